"""Perceptual loss against torchvision's named nodes, discriminator against slow references."""
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg16
from torchvision.models.feature_extraction import create_feature_extractor

import losses
from losses import LAYERS, LOW, SEM, Discriminator, PerceptualLoss
from runtime import BadInput
from train_tokenizer import load_vgg


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """A file of the published layout, with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save(vgg16(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def net(vgg_file):
    return load_vgg(str(vgg_file))


def test_layers_are_torchvisions(net, vgg_file):
    reference = vgg16(weights=None)
    reference.load_state_dict(torch.load(vgg_file, weights_only=True))
    nodes = {"features.3": "relu1_2", "features.8": "relu2_2", "features.15": "relu3_3", "features.22": "relu4_3",
             "features.29": "relu5_3", "classifier.6": "logit"}
    x = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normed = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    expected = create_feature_extractor(reference.eval(), nodes)(normed)
    got = net(2 * x - 1, LAYERS)
    for layer in LAYERS:
        assert torch.allclose(got[layer], expected[layer], rtol=1e-4, atol=1e-6), layer
        alone = net(2 * x - 1, (layer,))[layer]  # torchvision's ReLUs work in place: no later one may finish the job
        assert torch.allclose(alone, expected[layer], rtol=1e-4, atol=1e-6), layer


def test_equation_4(vgg):
    net = load_vgg(str(vgg))
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    at = {a: PerceptualLoss(net, a)(x_hat, x)[0] for a in (0.0, 0.3, 1.0)}
    assert float(at[0.3]) == pytest.approx(0.3 * at[1.0].item() + 0.7 * at[0.0].item(), rel=1e-5)
    scale = dict(zip(LAYERS, net.mean_square))
    f, g = net(x_hat, LAYERS), net(x, LAYERS)
    term = {l: (f[l] - g[l]).square().mean() / scale[l] for l in LAYERS}
    assert float(at[0.0]) == pytest.approx(sum(term[l].item() for l in LOW), rel=1e-5)
    assert float(at[1.0]) == pytest.approx(sum(term[l].item() for l in SEM), rel=1e-5)
    table6 = {"low": LOW, "A": LAYERS, "B": LAYERS[1:], "C": LAYERS[2:], "D": LAYERS[3:], "sem": SEM, "E": ("logit",)}
    for name, layers in table6.items():
        value, shares = PerceptualLoss(net, layers=layers)(x_hat, x)
        assert float(value) == pytest.approx(sum(term[l].item() for l in layers), rel=1e-5), name
        assert set(shares) == set(layers)
        assert all(float(shares[l]) == pytest.approx(term[l].item(), rel=1e-5) for l in layers)


@pytest.mark.parametrize("alpha, runs, kept", [(0.0, False, set(LOW)), (1.0, True, set(SEM)), (0.5, True, set(LAYERS))])
def test_only_what_alpha_needs_is_computed(net, alpha, runs, kept):
    calls = []
    hook = net.classifier.register_forward_hook(lambda *_: calls.append(1))
    loss = PerceptualLoss(net, alpha)
    x = torch.rand(1, 3, 32, 32)
    loss(x, x)
    hook.remove()
    assert bool(calls) == runs and set(loss.weights) == kept and set(net(x, loss.weights)) == kept
    depth = []
    hook = net.features[17].register_forward_hook(lambda *_: depth.append(1))  # after relu3_3
    net(x, ("relu2_2",))
    hook.remove()
    assert not depth
    small = losses.SmallVGG([8] * 5, 10)
    small.stages[2].register_forward_hook(lambda *_: depth.append(1))
    small.classifier.register_forward_hook(lambda *_: calls.append(1))
    del calls[:]
    assert set(small(x, ("relu2_2",))) == {"relu2_2"} and not depth
    assert set(small(x, LOW)) == set(LOW) and depth and not calls


def test_a_network_halves_as_often_as_it_says(net):
    small = losses.SmallVGG([8] * 5, 10)
    assert small(torch.rand(2, 3, 16, 16), ("penultimate", "logit"))["penultimate"].shape == (2, 8)
    for network in (net, small):
        side = 2 ** network.halvings
        assert len(network(torch.rand(2, 3, side, side), ("logit",))["logit"]) == 2
        with pytest.raises(RuntimeError, match="too small"):  # a size of 0
            network(torch.rand(2, 3, side // 2, side // 2), ("logit",))


class Colours(torch.nn.Module):
    """Somebody's own network, with the interface that losses.py describes and no more."""

    halvings = 0

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(3.0))
        self.register_buffer("mean_square", torch.tensor([1.0, 1, 1, 1, 2, 4]))

    def forward(self, x, layers):
        return {layer: (1 + LAYERS.index(layer)) * self.factor * x for layer in layers}


def test_another_network_can_stand_in():
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 2, 3, 8, 8)
    mse = F.mse_loss(x_hat, x).item()
    for alpha, low, sem in ((0, 1, 0), (1, 0, 1), (0.25, 0.75, 0.25)):
        loss, shares = PerceptualLoss(Colours(), alpha)(x_hat, x)
        term = {l: 9 * (i + 1) ** 2 * mse / d for i, (l, d) in enumerate(zip(LAYERS, (1, 1, 1, 1, 2, 4)))}
        by_hand = low * sum(term[l] for l in LOW) + sem * sum(term[l] for l in SEM)
        assert loss.item() == pytest.approx(by_hand, rel=1e-5)
        assert {l: v.item() for l, v in shares.items()} == pytest.approx({l: term[l] for l in shares}, rel=1e-5)


def test_frozen_in_eval_and_deterministic(net):
    loss = PerceptualLoss(net, 1.0)
    loss.train()
    torch.nn.Module.train(loss, False)
    assert not any(m.training for m in loss.train().modules())  # VGG's dropout stays off
    x_hat = torch.rand(1, 3, 32, 32, requires_grad=True)
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    first, again = loss(x_hat, x)[0], loss(x_hat, x)[0]
    assert first == again
    first.backward()
    assert x_hat.grad.abs().sum() > 0 and x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())


def test_missing_or_wrong_weights_are_refused(tmp_path, monkeypatch, vgg, vgg_file, capsys):
    with pytest.raises(BadInput, match="no such file"):
        load_vgg(str(tmp_path / "none.pth"))
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(BadInput, match="damaged"):
        load_vgg(str(tmp_path / "bad.pth"))
    state = torch.load(vgg, weights_only=True)
    cut = {name: value for name, value in state["model"].items() if name != "mean_square"}
    for foreign in ({"a": torch.zeros(1)}, torch.zeros(1), state | {"model": cut}, state | {"config": {}}):
        torch.save(foreign, tmp_path / "other.pth")
        with pytest.raises(BadInput, match="other.pth is neither a copy of vgg16-397923af.pth nor a checkpoint of"):
            load_vgg(str(tmp_path / "other.pth"))
    torch.save(state | {"kind": "prior"}, tmp_path / "prior.pt")
    with pytest.raises(BadInput, match="holds a prior checkpoint"):
        load_vgg(str(tmp_path / "prior.pt"))

    def offline(self, **_):
        raise OSError("network is unreachable")
    monkeypatch.setattr(type(losses.torchvision.models.VGG16_Weights.IMAGENET1K_V1), "get_state_dict", offline)
    with pytest.raises(BadInput, match=r"download.pytorch.org.*vgg16-397923af.pth.*--vgg FILE"):
        load_vgg("imagenet")
    capsys.readouterr()
    load_vgg(str(vgg_file))
    assert "is not torchvision's" in capsys.readouterr().out  # random weights in the right layout do not pass unsaid
    for name, value in load_vgg(str(vgg)).state_dict().items():
        assert torch.equal(value, state["model"][name])
    assert capsys.readouterr().out == ""


def test_discriminator_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Discriminator().parameters()) == pytest.approx(28.86e6, rel=1e-3)


def test_blur_against_loops():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 5)
    row = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    padded, out = F.pad(x, (2, 2, 2, 2)), losses.Blur(2, padding=2)(x)
    for c in range(2):
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                slow = sum(row[a] * row[b] * padded[0, c, i + a, j + b] for a in range(4) for b in range(4))
                assert out[0, c, i, j].item() == pytest.approx(slow.item(), abs=1e-6)


@pytest.mark.parametrize("options", [dict(padding=2), dict(padding=1, stride=2)])
def test_blurs_derivatives(options):
    torch.manual_seed(0)
    blur = losses.Blur(3, **options).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.double, requires_grad=True)
    plain = F.conv2d(x, blur.kernel, None, blur.stride, blur.padding, groups=3)
    assert torch.allclose(blur(x), plain)
    weight = torch.randn_like(plain)
    assert torch.allclose(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (blur(x), plain)))
    assert torch.autograd.gradcheck(blur, x) and torch.autograd.gradgradcheck(blur, x)


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
    x = torch.randn(1, 8, 5, 5)
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight / math.sqrt(72), padding=1), atol=1e-6)
    y = torch.randn(2, 50)
    assert torch.allclose(linear(y), y @ linear.weight.T / math.sqrt(50), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8])
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


@pytest.mark.parametrize("size", [16, 48, 36, 80])
def test_discriminator_takes_any_size(size):
    assert Discriminator(size, (4, 8))(torch.randn(3, 3, size, size)).shape == (3,)


def test_r1_of_a_linear_function_and_by_differences():
    torch.manual_seed(0)
    w, x = torch.randn(3, 4, 4), torch.randn(5, 3, 4, 4, requires_grad=True)
    assert float(losses.r1_penalty((x * w).sum((1, 2, 3)), x)) == pytest.approx(w.square().sum().item(), rel=1e-5)
    disc = Discriminator(8, (4, 8)).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.double, requires_grad=True)
    value = losses.r1_penalty(disc(x).double(), x).item()
    total = 0.0
    for k in range(x.numel()):  # central differences; logits are fp32, so the step is wide
        step = torch.zeros(x.numel(), dtype=torch.double)
        step[k] = 1e-2
        total += ((disc(x + step.view_as(x)) - disc(x - step.view_as(x))).item() / 2e-2) ** 2
    assert value == pytest.approx(total, rel=0.02)


def test_adversarial_losses():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    sigmoid = lambda v: 1 / (1 + math.exp(-v))  # noqa: E731
    assert float(losses.generator_loss(fake)) == pytest.approx(-sum(math.log(sigmoid(v)) for v in (0.5, -3.0)) / 2)
    slow = -sum(math.log(sigmoid(v)) for v in (2.0, -1.0)) / 2 - sum(math.log(1 - sigmoid(v)) for v in (0.5, -3.0)) / 2
    assert float(losses.discriminator_loss(real, fake)) == pytest.approx(slow, rel=1e-6)


def test_ramp():
    assert [losses.ramp(s, 10, 4) for s in (0, 10, 12, 14, 99)] == [0, 0, 0.5, 1, 1]
    assert [losses.ramp(s, 10, 0) for s in (9, 10)] == [0, 1]
