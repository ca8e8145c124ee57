"""Perceptual loss against torchvision's named nodes, discriminator against slow references."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg16
from torchvision.models.feature_extraction import create_feature_extractor

import losses
import runtime
import train_tokenizer
from losses import LAYERS, LOW, SEM, VGG16, Discriminator, PerceptualLoss, load_vgg


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return VGG16().requires_grad_(False).eval()


# ---------------------------------------------------------------------------- perceptual loss

def test_layers_are_torchvisions(net):
    with torch.device("meta"):
        reference = vgg16(weights=None)
    reference.load_state_dict(net.state_dict(), assign=True)
    nodes = {"features.3": "relu1_2", "features.8": "relu2_2", "features.15": "relu3_3",
             "features.22": "relu4_3", "features.29": "relu5_3", "classifier.6": "logit"}
    x = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normed = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    expected = create_feature_extractor(reference.eval(), nodes)(normed)
    got = net(2 * x - 1, LAYERS)
    for layer in LAYERS:
        assert torch.allclose(got[layer], expected[layer], rtol=1e-4, atol=1e-6), layer
        # torchvision's ReLUs work in place: no later one may finish the job
        alone = net(2 * x - 1, (layer,))[layer]
        assert torch.allclose(alone, expected[layer], rtol=1e-4, atol=1e-6), layer


def test_equation_4_and_table_6(vgg):
    net = load_vgg(vgg)
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    scale, f, g = dict(zip(LAYERS, net.scale)), net(x_hat, LAYERS), net(x, LAYERS)
    term = {l: ((f[l] - g[l]).square().mean() / scale[l]).item() for l in LAYERS}
    low, sem = (sum(term[l] for l in layers) for layers in (LOW, SEM))
    for alpha in (0, 0.3, 1):
        loss, parts = PerceptualLoss(net, alpha)(x_hat, x)
        assert loss.item() == pytest.approx(alpha * sem + (1 - alpha) * low, rel=1e-5)
        assert {l: v.item() for l, v in parts.items()} == pytest.approx({l: term[l] for l in parts})
    for layers in (LOW, LAYERS, LAYERS[1:], LAYERS[2:], LAYERS[3:], SEM, ("logit",)):
        loss, parts = PerceptualLoss(net, layers=layers)(x_hat, x)
        assert loss.item() == pytest.approx(sum(term[l] for l in layers), rel=1e-5)
        assert set(parts) == set(layers)


def test_only_what_alpha_needs_is_computed(net, vgg):
    small, ran = load_vgg(vgg), set()
    parts = {"classifier": net.classifier, "after relu3_3": net.features[17],
             "small classifier": small.classifier, "small stage 3": small.stages[2]}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: ran.add(name))

    def runs(network, layers):
        ran.clear()
        assert set(network(torch.rand(1, 3, 32, 32), layers)) == set(layers)
        return set(ran)

    for alpha, layers in ((0, LOW), (0.5, LAYERS), (1, SEM)):
        assert set(PerceptualLoss(net, alpha).weights) == set(layers)
    assert runs(net, ("relu2_2",)) == runs(small, ("relu2_2",)) == set()
    assert runs(net, LOW) == {"after relu3_3"} and runs(small, LOW) == {"small stage 3"}
    assert runs(net, SEM) == {"after relu3_3", "classifier"}
    assert runs(small, SEM) == {"small stage 3", "small classifier"}


def test_an_offset_that_softmax_does_not_see_changes_nothing():
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 2, 3, 16, 16)
    net = losses.SmallVGG([8] * 5, [3, 4]).eval()
    with torch.no_grad():
        logits, loss = net(x, ("logit",))["logit"], PerceptualLoss(net, 1.0)(x_hat, x)[0]
        net.classifier.bias += torch.tensor([9.0] * 3 + [-5.0] * 4)
        net.classifier.weight[:3] += torch.randn(8)
        assert torch.allclose(net(x, ("logit",))["logit"], logits, atol=1e-5)
        assert torch.allclose(PerceptualLoss(net, 1.0)(x_hat, x)[0], loss)


class Colours(torch.nn.Module):
    """Somebody's own network, with the interface that losses.py describes and no more."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(3.0))
        self.register_buffer("scale", torch.tensor([1.0, 1, 1, 1, 2, 4]))

    def forward(self, x, layers):
        return {layer: (1 + LAYERS.index(layer)) * self.factor * x for layer in layers}


def test_another_network_can_stand_in():
    x, x_hat = torch.rand(2, 2, 3, 8, 8)
    term = [9 * i ** 2 * F.mse_loss(x_hat, x).item() / scale
            for i, scale in zip(range(1, 7), (1, 1, 1, 1, 2, 4))]
    for alpha in (0, 0.25, 1):
        by_hand = (1 - alpha) * sum(term[:5]) + alpha * sum(term[4:])
        assert PerceptualLoss(Colours(), alpha)(x_hat, x)[0].item() == pytest.approx(by_hand)


def test_frozen_in_eval_and_deterministic(net):
    loss = PerceptualLoss(net, 1.0)
    assert not any(m.training for m in loss.train().modules())  # VGG's dropout stays off
    x, x_hat = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    first, again = loss(x_hat, x)[0], loss(x_hat, x)[0]
    assert first == again
    first.backward()
    assert x_hat.grad.any() and x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())


def test_vgg16_is_torchvisions_or_says_that_it_is_not(net, tmp_path, capsys, monkeypatch):
    # a file of the same layout: all of a tensor is one number, which makes it small
    state = {name: torch.tensor(0.1).expand(p.shape) for name, p in net.state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    other = load_vgg(tmp_path / "other.pth").state_dict()
    assert other.keys() == state.keys() and all((p == 0.1).all() for p in other.values())
    assert "other.pth" in capsys.readouterr().out
    weights = losses.torchvision.models.VGG16_Weights.IMAGENET1K_V1

    def offline(self, **_):
        raise OSError("network is unreachable")
    monkeypatch.setattr(type(weights), "get_state_dict", offline)
    with pytest.raises(SystemExit, match=rf"--vgg imagenet.*{weights.url}"):
        load_vgg("imagenet")


# ------------------------------------------------------------------------------ discriminator

def test_discriminator_size():
    with torch.device("meta"):
        size = sum(p.numel() for p in Discriminator().parameters())
    assert size == pytest.approx(28.86e6, rel=1e-3)


def test_blur_against_loops():
    torch.manual_seed(0)
    x, row = torch.randn(1, 2, 5, 5), [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    padded, out = F.pad(x, (2, 2, 2, 2)), losses.Blur(2, padding=2)(x)
    for c in range(2):
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                slow = sum(row[a] * row[b] * padded[0, c, i + a, j + b]
                           for a in range(4) for b in range(4))
                assert out[0, c, i, j].item() == pytest.approx(slow.item(), abs=1e-6)


def test_strided_skip_equals_blur_then_stride():
    torch.manual_seed(0)
    block = losses.DiscriminatorBlock(4, 6)
    x = torch.randn(2, 4, 8, 8)
    slow = block.skip[1](losses.Blur(4, padding=1)(x)[:, :, ::2, ::2])
    assert torch.allclose(block.skip(x), slow, atol=1e-6)


def test_equalised_rate():
    torch.manual_seed(0)
    conv, linear = losses.EqualConv(8, 4, 3, padding=1), losses.EqualLinear(50, 3)
    assert conv.weight.std().item() == pytest.approx(1, abs=0.1)
    x, y = torch.randn(1, 8, 5, 5), torch.randn(2, 50)
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight / math.sqrt(72), padding=1), atol=1e-6)
    assert torch.allclose(linear(y), y @ linear.weight.T / math.sqrt(50), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_minibatch_stddev_against_loops(batch):
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 2, 2)
    out = losses.minibatch_stddev(x)
    assert out.shape == (batch, 4, 2, 2) and torch.equal(out[:, :3], x)
    for n in range(batch):
        group = x[n // 4 * 4:n // 4 * 4 + 4]
        std = [((group[:, c, i, j] - group[:, c, i, j].mean()) ** 2).mean().add(1e-8).sqrt()
               for c in range(3) for i in range(2) for j in range(2)]
        assert torch.allclose(out[n, 3], torch.full((2, 2), sum(std) / 12), atol=1e-5)


@pytest.mark.parametrize("size", [28, 36])
def test_discriminator_takes_any_size(size):
    assert Discriminator(size, (4, 8))(torch.randn(3, 3, size, size)).shape == (3,)


def test_adversarial_losses():
    real, fake = [2.0, -1.0], [0.5, -3.0]

    def minus_log_sigmoid(values):
        return -sum(math.log(1 / (1 + math.exp(-v))) for v in values) / 2

    generator = losses.generator_loss(torch.tensor(fake)).item()
    assert generator == pytest.approx(minus_log_sigmoid(fake))
    disc = losses.discriminator_loss(torch.tensor(real), torch.tensor(fake)).item()
    assert disc == pytest.approx(minus_log_sigmoid(real) + minus_log_sigmoid(-v for v in fake))


def test_r1_of_a_linear_function_and_by_differences():
    torch.manual_seed(0)
    w, x = torch.randn(3, 4, 4, requires_grad=True), torch.randn(5, 3, 4, 4)
    value = losses.r1_penalty(lambda x: (x * w).sum((1, 2, 3)), x)
    assert value.item() == pytest.approx(w.square().sum().item(), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(value, w)[0], 2 * w)
    disc, total = Discriminator(8, (4, 8)).double(), 0.0
    x = torch.randn(1, 3, 8, 8, dtype=torch.double)
    for k in range(x.numel()):  # central differences; logits are fp32, so the step is wide
        step = torch.zeros(x.numel(), dtype=torch.double)
        step[k] = 1e-2
        total += ((disc(x + step.view_as(x)) - disc(x - step.view_as(x))).item() / 2e-2) ** 2
    assert losses.r1_penalty(disc, x).item() == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_r1_of_a_step_is_pytorchs_second_derivative_in_value_and_gradient(dtype, monkeypatch):
    """Two micro-batches of twelve, taken in groups of eight and four, against all 24 at once."""
    torch.manual_seed(0)
    disc, x = Discriminator(32, (8, 32)), torch.randn(24, 3, 32, 32)
    monkeypatch.setattr(losses, "discriminator_loss", lambda real, fake: 0 * (real + fake).sum())
    args, averages = SimpleNamespace(dtype=dtype, r1=2 / 16), runtime.Averages()
    train_tokenizer.discriminator_step(disc, x.split(12), x.split(12), args, True, averages)
    x.requires_grad_()
    grad, = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    value = grad.square().sum((1, 2, 3)).mean()
    assert losses.r1_penalty(disc, x).item() == pytest.approx(value.item(), rel=1e-4)
    assert averages.means()["r1"] == pytest.approx(value.item(), rel=0.05)
    theirs = torch.autograd.grad(value, disc.parameters(), materialize_grads=True)
    for (name, p), g in zip(disc.named_parameters(), theirs):
        # fp32 sums over 24 x 1,024 positions in another order; a wrong term is off by percents
        assert (p.grad - g).abs().max() <= 1e-4 * g.abs().max(), name
