"""Perceptual loss against torchvision's named nodes, discriminator against slow references."""
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Code
from torchvision.models import VGG16_Weights, vgg16
from torchvision.models.feature_extraction import create_feature_extractor

import fid
import losses
from losses import LAYERS, LOW_LAYERS, SEM_LAYERS, VGG16, Discriminator, PerceptualLoss, load_vgg


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
        # torchvision's ReLUs work in place: without the next layers it must be the same
        single = net(2 * x - 1, (layer,))[layer]
        assert torch.allclose(single, expected[layer], rtol=1e-4, atol=1e-6), layer


def test_equation_4_and_table_6(vgg):
    net = load_vgg(vgg)
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    scale, f, g = dict(zip(LAYERS, net.layer_scale)), net(x_hat, LAYERS), net(x, LAYERS)
    term = {l: ((f[l] - g[l]).square().mean() / scale[l]).item() for l in LAYERS}
    low, sem = (sum(term[l] for l in layers) for layers in (LOW_LAYERS, SEM_LAYERS))
    for alpha in (0, 0.3, 1):
        loss, parts = PerceptualLoss(net, alpha)(x_hat, x)
        assert loss.item() == pytest.approx(alpha * sem + (1 - alpha) * low, rel=1e-5)
        same, parts = PerceptualLoss(net, alpha)(x_hat, x, LAYERS)  # as in validation
        assert torch.equal(same, loss)
        assert {l: v.item() for l, v in parts.items()} == pytest.approx(term)
    for layers in (LOW_LAYERS, LAYERS, LAYERS[1:], LAYERS[2:], LAYERS[3:], SEM_LAYERS, ("logit",)):
        loss, parts = PerceptualLoss(net, layers=layers)(x_hat, x)
        assert loss.item() == pytest.approx(sum(term[l] for l in layers), rel=1e-5)
        assert set(parts) == set(layers)


def test_alpha_0_does_not_run_the_classifier(net, vgg, monkeypatch):
    for network in (net, load_vgg(vgg)):
        monkeypatch.setattr(network.classifier, "forward", None)
        _, terms = PerceptualLoss(network, alpha=0)(*torch.rand(2, 1, 3, 32, 32))
        assert set(terms) == set(LOW_LAYERS)


def test_an_offset_of_the_logits_changes_nothing():
    torch.manual_seed(0)
    x, net = torch.rand(2, 3, 16, 16), losses.SmallVGG([8] * 5, [3, 4]).eval()
    with torch.no_grad():
        logits = net(x, ("logit",))["logit"]
        net.classifier.bias += torch.tensor([9.0] * 3 + [-5.0] * 4)
        net.classifier.weight[:3] += torch.randn(8)
        assert torch.allclose(net(x, ("logit",))["logit"], logits, atol=1e-5)


def test_frozen_in_eval_and_deterministic(net):
    loss = PerceptualLoss(net, 1.0)
    assert not any(m.training for m in loss.train().modules())  # VGG's dropout stays off
    x, x_hat = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    first, again = loss(x_hat, x)[0], loss(x_hat, x)[0]
    assert first == again
    first.backward()
    assert x_hat.grad.any() and x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())


def test_vgg16_is_torchvisions_file_or_a_note_is_printed(net, tmp_path, capsys):
    # expanded from one number, so that the file is small
    state = {name: torch.tensor(0.1).expand(p.shape) for name, p in net.state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    other = load_vgg(tmp_path / "other.pth").state_dict()
    assert other.keys() == state.keys() and all((p == 0.1).all() for p in other.values())
    assert "other.pth" in capsys.readouterr().out


@pytest.mark.parametrize("url, flag, load", [
    (VGG16_Weights.IMAGENET1K_V1.url, "--vgg", lambda path: load_vgg(path or "imagenet")),
    (fid.URL, "--inception", lambda path: fid.Inception(path, "tf1"))])
def test_weights_are_downloaded_checked_and_run_no_code(url, flag, load, tmp_path, monkeypatch):
    """A copy that a flag names is not checked by its hash, but may hold weights only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path, asked = tmp_path / "checkpoints" / url.rpartition("/")[2], []

    def download(*words):
        asked.append(words)
        raise OSError("Network is unreachable")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(SystemExit, match=f"{url}.*{flag}"):
        load(None)
    assert asked == [(url, str(path))]
    torch.save(Code(), path)
    with pytest.raises(SystemExit, match=f"{path}.*sha256"):
        load(None)
    with pytest.raises((SystemExit, pickle.UnpicklingError), match="Weights only"):
        load(str(path))
    assert len(asked) == 1 and not Path("ran").exists()
    right = path.with_name(f"net-{losses.sha256(path)[:8]}.pth")
    losses.download(f"https://example.org/{right.name}", path, flag)  # the hash is right


# ------------------------------------------------------------------------------ discriminator

def test_discriminator_size():
    with torch.device("meta"):
        size = sum(p.numel() for p in Discriminator().parameters())
    assert size == pytest.approx(28.86e6, rel=1e-3)
    for side in (28, 36):  # any image size
        assert Discriminator(side, (4, 8))(torch.randn(3, 3, side, side)).shape == (3,)


def test_blur_against_loops_and_the_skips_stride():
    torch.manual_seed(0)
    x, row, block = torch.randn(2, 4, 8, 8), [1, 3, 3, 1], losses.DiscriminatorBlock(4, 6)
    padded, out = F.pad(x, (2, 2, 2, 2)), losses.Blur(4, padding=2)(x)
    slow = sum(row[a] * row[b] / 64 * padded[:, :, a:a + 9, b:b + 9]
               for a in range(4) for b in range(4))
    assert torch.allclose(out, slow, atol=1e-6)
    slow = block.skip[1](out[:, :, 1:-1, 1:-1][:, :, ::2, ::2])
    assert torch.allclose(block.skip(x), slow, atol=1e-6)


def test_equalised_learning_rate():
    torch.manual_seed(0)
    conv, linear = losses.EqualizedConv2d(8, 4, 3, padding=1), losses.EqualizedLinear(50, 3)
    assert conv.weight.std().item() == pytest.approx(1, abs=0.1)
    x, y = torch.randn(1, 8, 5, 5), torch.randn(2, 50)
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight / math.sqrt(72), padding=1), atol=1e-6)
    assert torch.allclose(linear(y), y @ linear.weight.T / math.sqrt(50), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_minibatch_stddev_is_of_groups_of_four(batch):
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 2, 2)
    out = losses.minibatch_stddev(x)
    assert out.shape == (batch, 4, 2, 2) and torch.equal(out[:, :3], x)
    for n in range(batch):
        group = x[n // 4 * 4:n // 4 * 4 + 4].numpy()
        std = np.sqrt(group.var(0) + 1e-8).mean()
        assert np.allclose(out[n, 3], std, atol=1e-5)
