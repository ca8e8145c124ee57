"""fid.py against pytorch-fid, torch-fidelity, prdc, scikit-image and scipy, against closed forms, and bad input.

The published weights are not needed: all tools are given one file of random weights in the published layout,
scaled so that rounding does not grow from layer to layer (features of 0.3 that differ by 0.07)."""
import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.models.inception as tv
from PIL import Image
from torch import nn

import data
import fid
import losses
import metrics
import runtime
import train_tokenizer
import vq
from runtime import BadInput

N = 20  # images a set: two in each split of the Inception Score


def pictures(n, seed, shift=0, size=64):
    """Random colours from coarse to fine, uint8 (n, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((n, 3, size, size), 128.0 + shift)
    for s in (2, 4, 16, 64):
        waves = torch.randn(n, 3, s, s, generator=generator)
        image += 50 * F.interpolate(waves, (size, size), mode="bicubic") / s**0.5
    return image.clamp(0, 255).byte()


def write_pngs(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")
    return str(folder)


def write_npz(path, images, **more):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return str(path)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("fid")


@pytest.fixture(scope="module")
def weights(tmp):
    """Random weights in the published file's layout: a plain dict in PyTorch's old format, 1008 classes."""
    torch.manual_seed(0)
    net = tv.Inception3(num_classes=1008, aux_logits=False, init_weights=False).train()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the one batch below
            module.weight.data.uniform_(0.2, 0.4)
            module.bias.data.normal_(0.3, 0.06)
    with torch.no_grad():
        net(fid.resize_tf1(pictures(8, seed=0)))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(module.running_var.mean().item())
    net.fc.weight.data.normal_(0, 1)
    net.fc.bias.data.normal_(0, 2)
    state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp / "inception.pth", _use_new_zipfile_serialization=False)
    return str(tmp / "inception.pth")


@pytest.fixture(scope="module")
def folders(tmp):
    """Two folders of N pictures of different statistics."""
    return write_pngs(tmp / "a", pictures(N, seed=1)), write_pngs(tmp / "b", pictures(N, seed=2, shift=12))


@pytest.fixture(scope="module")
def classifier(tmp):
    """A checkpoint as train_vgg.py writes it: 3 classes of 2 colours each; 8 penultimate features."""
    torch.manual_seed(0)
    net = losses.SmallVGG([8, 8, 8, 8, 8], 6)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net(data.to_float(pictures(32, seed=0, size=16), "cpu"), ("logit",))  # in training mode: sets statistics
    net.classifier.bias.data.zero_()
    weight = net.classifier.weight.data
    weight -= weight.mean(1, keepdim=True)  # so that no class wins everywhere
    torch.save({"kind": "vgg", "config": net.config, "model": net.state_dict(), "args": {}, "step": 1,
                "labels": {"classes": ["x", "y", "z"], "fine": 2}}, tmp / "vgg.pt")
    return str(tmp / "vgg.pt")


@pytest.fixture(scope="module")
def tf1(weights, folders, tmp):
    """What fid.py finds with --resize tf1, the default; it saves the statistics of the first folder."""
    return run(*folders, weights, "--save", str(tmp / "a.npz"), "--json", str(tmp / "tf1.json"))


@pytest.fixture(scope="module")
def full(weights, folders, tmp):
    """The same with --full."""
    return run(*folders, weights, "--full", "--save", str(tmp / "full.npz"), "--json", str(tmp / "full.json"))


def run(real, fake, weights=None, *more):
    """fid.py in this process."""
    fake, weights = ["--fake", fake] if fake else [], ["--inception", weights] if weights else []
    return fid.main(["--real", real, *fake, *weights, "--workers", "0", "--device", "cpu", *more])


# ------------------------------------------------------------------------------------- the published tools

def test_features_and_fid_equal_pytorch_fid(weights, folders, monkeypatch):
    import pytorch_fid.fid_score
    import pytorch_fid.inception
    load = "load_state_dict_from_url"
    monkeypatch.setattr(pytorch_fid.inception, load, lambda *args, **more: torch.load(weights))
    theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    images, ours = pictures(4, seed=3, size=350), fid.Inception(weights, "pytorch")
    with torch.inference_mode():
        features, _ = ours(images)
        wanted = theirs(images / 255)[0][:, :, 0, 0]
    print(f"features: mean {wanted.mean():.3f}, deviation between images {wanted.std(0).mean():.3f}, largest "
          f"difference {(features - wanted).abs().max():.1e}")
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)

    value = run(*folders, weights, "--resize", "pytorch")["FID"]
    wanted = pytorch_fid.fid_score.calculate_fid_given_paths(list(folders), 8, "cpu", 2048, 0)
    print(f"FID {value:.6f}, pytorch-fid {wanted:.6f}, relative difference {value / wanted - 1:.1e}")
    assert value == pytest.approx(wanted, rel=1e-4)


def test_fid_and_is_equal_torch_fidelity(weights, folders, tf1):
    import torch_fidelity
    wanted = torch_fidelity.calculate_metrics(
        input1=folders[1], input2=folders[0], isc=True, fid=True, cuda=False, batch_size=8, save_cpu_ram=True,
        cache=False, verbose=False, feature_extractor_weights_path=weights)
    for ours, theirs in (("FID", "frechet_inception_distance"), ("IS", "inception_score_mean"),
                         ("IS_std", "inception_score_std")):
        print(f"{ours} {tf1[ours]:.6f}, torch-fidelity {wanted[theirs]:.6f}, relative difference "
              f"{tf1[ours] / wanted[theirs] - 1:.1e}")
        assert tf1[ours] == pytest.approx(wanted[theirs], rel=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (299, 598), (400, 131)])
def test_tf1_resize_is_bitwise_torch_fidelitys(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    wanted = (tf1(images.float(), (299, 299), align_corners=False) - 128) / 128
    assert torch.equal(fid.resize_tf1(images), wanted)


def test_pytorch_fid_reads_our_statistics(tf1, tmp):
    from pytorch_fid.fid_score import compute_statistics_of_path
    mu, sigma = compute_statistics_of_path(str(tmp / "a.npz"), None, 0, 2048, "cpu")
    assert mu.shape == (2048,) and sigma.shape == (2048, 2048) and mu.dtype == sigma.dtype == np.float64


def test_frechet_equals_scipy_at_2048_and_is_faster():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)

    def gaussian():
        spread = generator.standard_normal((2048, 2048)) / 45 * np.logspace(0, -1.5, 2048)[:, None]
        x = generator.standard_normal((3000, 2048)) @ spread
        return generator.standard_normal(2048), np.cov(x, rowvar=False)

    (m1, s1), (m2, s2) = gaussian(), gaussian()
    began = time.perf_counter()
    value = fid.frechet(*map(torch.from_numpy, (m1, s1, m2, s2)))
    ours, began = time.perf_counter() - began, time.perf_counter()
    wanted = (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2)).real
    theirs = time.perf_counter() - began
    print(f"2048 dimensions: {ours:.1f} s, scipy's sqrtm {theirs:.1f} s, ratio {theirs / ours:.1f}; "
          f"{value:.6f} and {wanted:.6f}, relative difference {value / wanted - 1:.1e}")
    assert value == pytest.approx(wanted, rel=1e-6)


def prdc(real, fake):
    """Precision and recall by the prdc package, of float32 features as Inception's are."""
    import prdc
    found = prdc.compute_prdc(np.asarray(real, np.float32), np.asarray(fake, np.float32), nearest_k=3)
    return found["precision"], found["recall"]


@pytest.mark.parametrize("n, m, mean", [(5, 9, 0), (700, 1000, 0), (1300, 2100, 0), (2100, 1300, 0), (600, 500, 1000)])
def test_precision_and_recall_equal_prdc(n, m, mean):
    """In blocks of 1,000 rows. With a large mean fp32 would not do: its squares leave no digits for the distances."""
    generator = torch.Generator().manual_seed(n)
    real, fake = (torch.randn(size, 32, generator=generator) * torch.linspace(1, 0.1, 32) for size in (n, m))
    real, fake = real + mean, 0.8 * fake + 0.1 + mean
    ours, theirs = metrics.precision_recall(real, fake), prdc(real, fake)
    print(f"precision, recall {ours}, prdc {theirs}")
    assert ours == pytest.approx(theirs, abs=1e-6) and (n < 10 or 0.1 < min(ours) and max(ours) < 0.99)


def test_full_equals_slow_references(weights, folders, tf1, full):
    """sFID, precision and recall from torch-fidelity's network, numpy's covariance and its singular values."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    theirs, spatial = FeatureExtractorInceptionV3("inception", ["2048"], weights).eval(), []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _, inputs, out: spatial.append(out[:, :7]))
    pool3 = []
    for folder in folders:
        images = torch.stack([data.to_tensor(np.asarray(Image.open(p))) for p in sorted(Path(folder).iterdir())])
        with torch.inference_mode():
            pool3.append(theirs(images)[0].numpy())
    real, fake = (x.permute(0, 2, 3, 1).flatten(1).double().numpy() for x in spatial)
    assert real.shape == (N, 2023) and real.min() == 0 < real.std(0).mean()  # after the ReLU
    (m1, a), (m2, b) = ((x.mean(0), (x - x.mean(0)) / (N - 1)**0.5) for x in (real, fake))  # the covariance is a.T @ a
    trace = np.linalg.norm(a @ b.T, "nuc")  # tr sqrt(S1 S2), the sum of these singular values
    wanted = (m1 - m2) @ (m1 - m2) + np.square(a).sum() + np.square(b).sum() - 2 * trace
    print(f"sFID {full['sFID']:.6f}, slow {wanted:.6f}, relative difference {full['sFID'] / wanted - 1:.1e}")
    assert full["sFID"] == pytest.approx(wanted, rel=1e-4)
    assert (full["precision"], full["recall"]) == pytest.approx(prdc(*pool3), abs=1e-6)
    for key in ("FID", "IS", "IS_std"):  # the other numbers do not depend on --full
        assert full[key] == pytest.approx(tf1[key], rel=1e-9)


def test_mixed_6_of_the_graph_is_mixed_6d():
    """By the graph's count, mixed, mixed_1, ..., and by the widths of its 7x7 branches, 160 where mixed_7 has 192."""
    net = tv.Inception3(aux_logits=False, init_weights=False)
    mixed = [name for name, _ in net.named_children() if name.startswith("Mixed")]
    assert mixed[6] == "Mixed_6d" and mixed[7] == "Mixed_6e"
    assert net.Mixed_6d.branch7x7_1.conv.out_channels == 160 and net.Mixed_6e.branch7x7_1.conv.out_channels == 192


@pytest.mark.parametrize("h, w", [(11, 11), (64, 48), (97, 130)])
def test_psnr_and_ssim_equal_scikit_image(h, w):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    x = pictures(1, seed=0, size=130)[0, :, :h, :w]
    for noise in (1, 20, 200):
        y = (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255).byte()
        a, b = (image.permute(1, 2, 0).numpy() for image in (x, y))
        wanted = (peak_signal_noise_ratio(a, b, data_range=255),
                  structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                        data_range=255, channel_axis=2))
        assert metrics.psnr_ssim(x, y).tolist() == pytest.approx(wanted, abs=1e-9)
    assert metrics.psnr_ssim(x, x).tolist() == pytest.approx([100, 1])


# ----------------------------------------------------------------------------------------- closed forms

def covariance(d, n, seed):
    x = np.random.default_rng(seed).standard_normal((n, d)) * np.logspace(0, -1, d)
    return torch.from_numpy(np.cov(x, rowvar=False))


def test_frechet_closed_forms():
    d, g = 16, np.random.default_rng(1)
    m1, m2, a, b = torch.from_numpy(np.stack([*g.standard_normal((2, d)), *g.uniform(0.1, 4, (2, d))]))
    s = covariance(d, 100, 0)
    equal, diagonal = fid.frechet(m1, s, m2, s), fid.frechet(m1, a.diag(), m2, b.diag())
    assert equal == pytest.approx(float((m1 - m2).square().sum()), rel=1e-9)  # equal covariances: |m1 - m2|^2
    wanted = float((m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert diagonal == pytest.approx(wanted, rel=1e-9)
    assert fid.frechet(m1, 4 * s, m1, s) == pytest.approx(float(s.trace()), rel=1e-9)  # (2 - 1)^2 tr S


@pytest.mark.parametrize("n", [1000, 60], ids=["regular", "singular"])
def test_frechet_of_identical_sets_is_zero(n):
    mean, s = torch.randn(512, dtype=torch.float64), covariance(512, n, 0)
    assert 0 <= fid.frechet(mean, 100 * s, mean, 100 * s) < 1e-6


def test_frechet_of_singular_covariances():
    """Diagonal with zeros, turned by a rotation: known in closed form. With the smaller rank first it is exact;
    with the larger first, rounding errors of the other's null space are left."""
    d, zero = 400, torch.zeros(400, dtype=torch.float64)
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0])
    a, b = torch.linspace(0.1, 4, d).double(), torch.linspace(3, 0.2, d).double()
    for dead_a, dead_b in ((150, 0), (300, 150), (d, 0), (d, d)):
        a_, b_ = a.clone(), b.clone()
        a_[:dead_a], b_[:dead_b] = 0, 0
        wanted = float((a_.sqrt() - b_.sqrt()).square().sum())
        small, large = ((turn * v) @ turn.T for v in (a_, b_))
        assert fid.frechet(zero, small, zero, large) == pytest.approx(wanted, rel=1e-11)
        assert fid.frechet(zero, large, zero, small) == pytest.approx(wanted, rel=1e-6)


# ------------------------------------------------------------------------- sums, batches, processes, shuffle

class Pixels(nn.Module):
    """A network whose features and logits are simple functions of the picture."""

    name, feature_dim, num_classes, labels_per_class, resize, weights = "FID", 12, 7, 1, "tf1", "0"

    def forward(self, images):
        features = F.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return features, torch.cat([features[:, :3] - features[:, 9:], features[:, 3:7]], 1) / 20


class Fixed(list):
    """Images in memory, as fid.measure reads them: (image, label, place in the set)."""

    path = description = "pictures"


def summary(images, batch_size, net=None, **more):
    dataset = Fixed((image, 0, i) for i, image in enumerate(images))
    args = SimpleNamespace(batch_size=batch_size, workers=0)
    return fid.measure(dataset, net or Pixels(), args, torch.device("cpu"), **more)


def test_streaming_equals_numpy_and_any_batch_size():
    images = pictures(50, seed=4, size=16)
    features, logits = (t.double() for t in Pixels()(images))
    one, many = summary(images, 50), summary(images, 7)  # in seven batches of 7, and one image
    for stats in (one, many):
        torch.testing.assert_close(stats["mu"], features.mean(0), rtol=1e-12, atol=0)
        wanted = torch.from_numpy(np.cov(features.numpy(), rowvar=False))
        torch.testing.assert_close(stats["sigma"], wanted, rtol=1e-9, atol=1e-9)
        assert stats["n"] == 50

    scores, order = [], np.random.RandomState(2020).permutation(50)  # the definition, written out
    for k in range(10):
        p = logits[order[5 * k:5 * k + 5]].softmax(1)
        scores.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    for stats in (one, many):
        assert (stats["IS"], stats["IS_std"]) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_splits_of_unequal_size_are_torch_fidelitys():
    images = pictures(37, seed=7, size=16)  # splits of 3 and 4 images
    logits, order = Pixels()(images)[1].double(), np.random.RandomState(2020).permutation(37)
    scores = []
    for k in range(10):
        p = logits[order[k * 37 // 10:(k + 1) * 37 // 10]].softmax(1)
        scores.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    stats = summary(images, 8)
    assert (stats["IS"], stats["IS_std"]) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_is_shuffles_images_that_lie_in_order_of_class():
    class Certain(Pixels):
        def forward(self, images):
            return torch.zeros(len(images), 12), 100 * F.one_hot(images[:, 0, 0, 0].long(), 7).float()

    images = torch.arange(700).div(100, rounding_mode="floor").byte().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    # Seven classes, surely told apart: 7. Unshuffled, a split has one class or two.
    assert 6.7 < summary(images, 64, Certain())["IS"] <= 7


def test_two_processes_equal_one(weights, full, folders, tmp, launch):
    """20 images in batches of 7: three batches, so the processes have 2 and 1, and the last is not full."""
    sides = ["--real", tmp / "full.npz", "--fake", folders[1], "--inception", weights, "--device", "cpu", "--full"]
    more = ["--batch_size", 7, "--workers", 1, "--json", tmp / "two.json"]
    done = launch(["fid.py", *sides, *more], processes=2)
    two = json.loads((tmp / "two.json").read_text())
    for name in ("FID ", "IS ", "sFID ", "precision ", "recall "):
        assert sum(line.startswith(name) for line in done.stdout.splitlines()) == 1, name
    for key in ("FID", "IS", "IS_std", "sFID", "precision", "recall"):
        assert two[key] == pytest.approx(full[key], rel=1e-5)


class Spatial(Pixels):
    """With features for sFID, as Inception has them."""

    def forward(self, images):
        self.spatial = images.float().flatten(1)[:, :1].repeat(1, 2023)
        return super().forward(images)


def test_features_are_kept_in_order_and_at_most_so_many():
    images, net = pictures(50, seed=4, size=16), Spatial()
    features = net(images)[0]
    for batch_size in (50, 7):
        some, every = (summary(images, batch_size, net, keep=keep) for keep in (20, 50))
        assert torch.equal(some["features"], features[data.choose(50, 20)]) and some["mu_s"].shape == (2023,)
        assert torch.equal(every["features"], features)
        torch.testing.assert_close(some["sigma"], summary(images, batch_size)["sigma"], rtol=1e-9, atol=1e-9)


def test_images_and_codes_are_counted_once_under_two_processes(classifier, tmp, launch):
    """A real tokenizer, --features because it is cheap: 25 pictures in 3 batches, against one process."""
    torch.manual_seed(0)
    images, model = pictures(25, seed=5, size=16), vq.VQModel(channels=(32, 32), z_dim=8, codebook_size=16)
    z = model.encoder(data.to_float(images, "cpu")).movedim(1, -1).flatten(0, -2)
    model.quantizer.codebook.data = z[::100].detach().clone()  # codes that are used
    config = {"channels": [32, 32], "z_dim": 8, "codebook_size": 16, "quantizer": "entropy"}
    torch.save({"kind": "tokenizer", "config": config, "model": model.state_dict(), "ema": None,
                "args": {"image_size": 16}}, tmp / "tokenizer.pt")
    flags = ["--real", write_npz(tmp / "count.npz", images), "--tokenizer", str(tmp / "tokenizer.pt"),
             "--features", classifier, "--device", "cpu", "--workers", "0", "--batch_size", "9"]
    one = fid.main(flags)
    launch(["fid.py", *flags, "--json", tmp / "count.json", "--save", tmp / "counted.npz"], processes=2)
    two = json.loads((tmp / "count.json").read_text())
    assert 1 < one["codes_used"] == two["codes_used"] and two["n_fake"] == 25
    for key in ("perplexity", "FD", "PSNR", "SSIM"):
        assert two[key] == pytest.approx(one[key], rel=1e-9)

    features = fid.Classifier(classifier)(images)[0].double().numpy()
    with np.load(tmp / "counted.npz") as saved:
        np.testing.assert_allclose(saved["mu"], features.mean(0), rtol=1e-6)
        np.testing.assert_allclose(saved["sigma"], np.cov(features, rowvar=False), rtol=1e-4, atol=1e-9)
        assert saved["n"] == 25


# ------------------------------------------------------------------------------------- the command line

def test_output_lines_and_json(tf1, tmp, folders, weights, capsys):
    saved = json.loads((tmp / "tf1.json").read_text())
    assert saved["real"] == f"{N} images of {folders[0]} (64 x 64)"
    assert saved["n_real"] == saved["n_fake"] == N
    assert saved["FID"] == tf1["FID"] and saved["resize"] == "tf1" and len(saved["weights"]) == 8
    assert saved["versions"]["torch"] == torch.__version__ and saved["args"]["batch_size"] == 64
    again = run(str(tmp / "a.npz"), folders[1], weights)  # the saved statistics stand for the folder
    assert again["n_real"] == N
    for key in ("FID", "IS"):
        assert again[key] == pytest.approx(tf1[key], rel=1e-9)
    out, err = capsys.readouterr()
    assert f"FID {tf1['FID']:.2f}" in out.splitlines()
    assert f"IS {tf1['IS']:.1f} +- {tf1['IS_std']:.1f}" in out.splitlines()
    assert f"measured: {N} images of {folders[1]} (64 x 64) against {tmp / 'a.npz'} ({N} images of" in out
    assert "--resize tf1, weights " in out
    assert "covariance is singular" in err and "not the published file" in err


def test_full_prints_its_lines_and_the_protocol(weights, folders, full, tmp, capsys, monkeypatch):
    saved = json.loads((tmp / "full.json").read_text())
    assert {key: saved[key] for key in full} == full and "20 real and 20 fake images" in saved["measured"]
    # The saved statistics stand for the folder. So does a file as ADM's: statistics of all, and some of the images.
    monkeypatch.setattr(fid, "FAKE", 12)
    with np.load(tmp / "full.npz") as arrays:
        kept = {key: arrays[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}
    adm = write_npz(tmp / "adm.npz", pictures(N, seed=1)[:10], **kept)
    capsys.readouterr()
    for reference, n in ((str(tmp / "full.npz"), N), (adm, 10)):
        again = run(reference, folders[1], weights, "--full")
        out = capsys.readouterr().out.splitlines()
        for key, digits in (("FID", 2), ("sFID", 2), ("precision", 4), ("recall", 4)):
            assert f"{key} {again[key]:.{digits}f}" in out
        for key in ("FID", "sFID", "IS"):
            assert again[key] == pytest.approx(full[key], rel=1e-6)
        assert f", precision and recall by 3 neighbours, {n} real and 12 fake images, weights" in out[-1]


def test_npz_folder_and_compressed_npz_are_the_same(classifier, folders, tmp):
    images = pictures(N, seed=2, shift=12)
    plain = write_npz(tmp / "plain.npz", images, arr_1=np.arange(N) % 3)
    np.savez_compressed(tmp / "packed.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    first, *others = (run(folders[0], fake, None, "--features", classifier)["FD"]
                      for fake in (folders[1], plain, str(tmp / "packed.npz")))
    assert first > 0 and others == pytest.approx([first, first], rel=1e-9)


def test_features_print_fd_and_accuracy_never_fid(classifier, folders, tmp, capsys):
    images = pictures(N, seed=2, shift=12)
    with torch.no_grad():
        labels = train_tokenizer.load_vgg(classifier)(data.to_float(images, "cpu"), ("logit",))["logit"].argmax(1) // 2
    assert len(labels.unique()) > 1
    labels[:5] = (labels[:5] + 1) % 3  # 5 of 20 asked for another class
    fake = write_npz(tmp / "labelled.npz", images, arr_1=labels.numpy())
    result = run(folders[0], fake, None, "--features", classifier)
    out, _ = capsys.readouterr()
    assert result["accuracy"] == 15 / 20 and "accuracy 0.75" in out.splitlines()
    assert f"FD (features of {classifier}) {result['FD']:.2f}" in out.splitlines()
    assert "FID" not in out and "IS " not in out and "FID" not in result


def test_tokenizer_gives_rfid_usage_and_perplexity(classifier, weights, tmp, monkeypatch, capsys):
    """A tokenizer that keeps the grey of 4 x 4 pixels in four of its eight codes."""
    class Coarse(nn.Module):
        quantizer, f, image_size = SimpleNamespace(K=8), 4, 32

        def encode(self, x):
            grey = F.avg_pool2d(x.mean(1, keepdim=True), 4)
            indices = ((grey + 1) * 2).clamp(0, 3).long()  # codes 0..3: half of them
            return (indices - 1.5) / 2 * 1.5, indices[:, 0], {}

        def decode(self, z_q):
            return F.interpolate(z_q, scale_factor=4).expand(-1, 3, -1, -1)

    tokenizer, images = Coarse(), pictures(12, seed=6, size=40)
    monkeypatch.setattr(train_tokenizer, "load_tokenizer", lambda path, device: tokenizer)
    real = write_pngs(tmp / "val", images)
    result = run(real, None, None, "--tokenizer", "ckpt.pt", "--features", classifier, "--batch_size", "5")
    lines = capsys.readouterr().out.splitlines()

    cropped = torch.stack([fid.Images(real, 32)[j][0] for j in range(12)])
    x = data.to_float(cropped, "cpu")
    z_q, indices, _ = tokenizer.encode(x)
    x_hat = ((tokenizer.decode(z_q).clamp(-1, 1) + 1) * 127.5).round().byte()  # they are uint8 too
    net = fid.Classifier(classifier)
    a, b = summary(cropped, 12, net), summary(x_hat, 12, net)
    wanted = fid.frechet(a["mu"], a["sigma"], b["mu"], b["sigma"])
    assert result["FD"] == pytest.approx(wanted, rel=1e-6)
    share = indices.flatten().bincount(minlength=8).double() / indices.numel()
    hit = int((share > 0).sum())
    assert result["codes_used"] == hit <= 4 and f"usage {12.5 * hit:.1f} % ({hit} of 8)" in lines
    wanted = torch.special.entr(share).sum().exp().item()
    assert result["perplexity"] == pytest.approx(wanted) and f"perplexity {wanted:.1f}" in lines
    wanted = [metrics.psnr_ssim(*pair).tolist() for pair in zip(cropped, x_hat)]  # equal scikit-image's
    assert (result["PSNR"], result["SSIM"]) == pytest.approx(np.mean(wanted, 0))
    assert f"PSNR {result['PSNR']:.2f}" in lines and f"SSIM {result['SSIM']:.4f}" in lines
    assert "12 images of" in result["real"] and "(32 x 32, shorter side" in result["real"]

    result = run("shapes", None, weights, "--tokenizer", "ckpt.pt", "--n", "4")  # by Inception it is an rFID
    lines = capsys.readouterr().out.splitlines()
    assert result["rFID"] > 0 and f"rFID {result['rFID']:.2f}" in lines and "FID" not in result
    assert not any(line.startswith("IS") for line in lines)
    assert result["fake"] == "4 reconstructions of shapes val"
    assert result["real"] == "4 images of shapes val (32 x 32)"


def test_reconstructions_are_decoded_in_parts_of_64(classifier, tmp, monkeypatch):
    class Same(nn.Module):
        quantizer, f, image_size, parts = SimpleNamespace(K=2), 1, 12, []

        def encode(self, x):
            return x, torch.zeros(len(x), 12, 12, dtype=torch.long), {}

        def decode(self, z_q):
            self.parts.append(len(z_q))
            return z_q

    monkeypatch.setattr(train_tokenizer, "load_tokenizer", lambda path, device: Same())
    real = write_npz(tmp / "parts.npz", pictures(150, seed=8, size=12))
    more = ("--tokenizer", "ckpt.pt", "--features", classifier)
    result = run(real, None, None, *more, "--batch_size", "130")
    assert Same.parts == [64, 64, 2, 20] and result["FD"] < 1e-9 and result["codes_used"] == 1
    assert (result["PSNR"], result["SSIM"]) == pytest.approx((100, 1))
    refuse("SSIM needs 11 pixels", write_npz(tmp / "small.npz", pictures(4, seed=8, size=8)), None, None, *more)


# ------------------------------------------------------------------------------------- torchvision's classifiers

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub("resnet18") puts random weights, as the published file is called, into torch's cache; its path."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def put(name):
        torch.manual_seed(0)
        net = torchvision.models.get_model(name, **{"init_weights": True} if name == "googlenet" else {})
        path = tmp_path / "checkpoints" / torchvision.models.get_model_weights(name).DEFAULT.url.split("/")[-1]
        torch.save(net.state_dict(), path)
        return path
    return put


def test_a_classifier_of_torchvision(hub, folders, tmp_path, capsys, monkeypatch):
    """By name, by the name of its weights, by a copy; against pictures that go through its transforms one by one."""
    name, features = "shufflenet_v2_x0_5", []
    cached, weights = hub(name), torchvision.models.get_model_weights(name).DEFAULT
    net, transforms = torchvision.models.get_model(name, weights=weights).eval(), weights.transforms()
    net.fc = nn.Identity()
    for folder in folders:
        images = [transforms(data.to_tensor(np.asarray(Image.open(p)))) for p in sorted(Path(folder).iterdir())]
        with torch.no_grad():
            features.append(net(torch.stack(images)).double())
    mean_and_cov = [part for x in features for part in (x.mean(0), x.T.cov())]
    wanted = fid.frechet(*mean_and_cov)
    copy = cached.rename(tmp_path / "copy.pth")
    refuse("is no copy of its weights", *folders, None, "--features", f"{name}:{copy}")
    monkeypatch.setattr(runtime, "sha256", lambda path: weights.url.split("-")[-1][:8])  # as if it were the published
    by_copy = run(*folders, None, "--features", f"{name}:{copy}")
    copy.rename(cached)
    by_name = run(*folders, None, "--features", name)
    by_weights = run(*folders, None, "--features", f"{name}:IMAGENET1K_V1")
    assert wanted > 0 and [r["FD"] for r in (by_copy, by_name, by_weights)] == pytest.approx([wanted] * 3, rel=1e-4)
    out = capsys.readouterr().out
    assert f"\nFD ({name}) {by_name['FD']:.2f}\n" in out and f"\nFD ({name}:IMAGENET1K_V1) " in out
    assert f"features of {name}, weights f707e712" in out and "accuracy" not in out and "FID" not in out


def test_a_copy_of_googlenet_has_its_transform_of_the_input(hub, monkeypatch):
    cached = hub("googlenet")
    monkeypatch.setattr(runtime, "sha256", lambda path: "1378be20")
    images = pictures(2, seed=0)
    with torch.inference_mode():
        by_name, by_copy = (fid.Classifier(spec)(images)[0] for spec in ("googlenet", f"googlenet:{cached}"))
    assert by_name.shape == (2, 1024) and torch.equal(by_name, by_copy)


def test_bad_features(hub, folders, tmp_path, monkeypatch):
    def refused(words, spec):
        refuse(words, *folders, None, "--features", spec)

    refused("did you mean convnext_tiny or", "convnet_tiny")
    refused("torchvision.models.list_models()", str(tmp_path / "absent.pt"))
    refused("['IMAGENET1K_V1', 'IMAGENET1K_V2']", "resnet50:IMAGENET")
    refused("is no copy of its weights", f"resnet18:{tmp_path / 'absent.pth'}")
    hub("squeezenet1_1")
    refused("no linear layer", "squeezenet1_1")
    hub("shufflenet_v2_x0_5").write_bytes(b"half of a file")
    refused("shufflenetv2_x0.5-f707e7126e.pth elsewhere and give shufflenet_v2_x0_5:FILE", "shufflenet_v2_x0_5")
    (tmp_path / "other.pth").write_bytes(hub("squeezenet1_1").read_bytes())
    monkeypatch.setattr(runtime, "sha256", lambda path: "f707e712")
    refused("does not fit", f"shufflenet_v2_x0_5:{tmp_path / 'other.pth'}")

    def offline(*args, **more):
        calls.append(args)
        raise OSError("Network is unreachable")

    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    refused("no download: fetch https://download.pytorch.org/models/resnet18-f37072fd.pth elsewhere and give "
            "resnet18:FILE: Network is unreachable", "resnet18")
    assert calls[0][2] == "f37072fd"  # the hash is checked


def test_samples_are_mapped_not_loaded(tmp):
    """An image comes from its place in the file, wherever arr_0 lies in it; what moves to a worker is small."""
    images = pictures(6, seed=9, size=32).permute(0, 2, 3, 1).numpy()
    np.savez(tmp / "first.npz", arr_0=images, arr_1=np.arange(6))
    np.savez(tmp / "last.npz", arr_1=np.arange(6), other=np.ones(1000), arr_0=images)
    np.savez(tmp / "fortran.npz", arr_0=np.asfortranarray(images))
    np.savez_compressed(tmp / "small.npz", arr_0=images)
    for name in ("first", "last", "fortran", "small"):
        samples = fid.Samples(str(tmp / f"{name}.npz"))
        assert all(np.array_equal(np.asarray(samples.load(i)), images[i]) for i in range(6))
        assert isinstance(samples.array(), np.memmap) == (name != "small")
        assert name == "small" or len(pickle.dumps(samples)) < 3000
    assert [fid.Samples(str(tmp / "last.npz")).label(i) for i in range(6)] == list(range(6))


def test_n_draws_from_all_classes_without_replacement():
    images = fid.Images("shapes", 8, "train", 100)  # label(i) = i % 10: every 200th would be of one class
    assert len(images) == len(set(images.index.tolist())) == 100
    assert {images.source.label(i) for i in images.index.tolist()} == set(range(10))
    assert images.index[-1] > 10_000  # not the first hundred
    assert np.array_equal(images.index, fid.Images("shapes", 8, "train", 100).index)
    assert np.array_equal(fid.Images("shapes", 8, "val").index, np.arange(2000))


def test_shapes_and_the_split(classifier, tmp, capsys):
    flags = ("--features", classifier, "--image_size", "16", "--n", "12")
    run("shapes", None, None, *flags, "--save", str(tmp / "train.npz"))
    run("shapes", None, None, *flags, "--save", str(tmp / "val.npz"), "--split", "val")
    assert run(str(tmp / "train.npz"), "shapes", None, *flags)["FD"] < 1e-6  # train is the default
    more = ("--split", "val", "--json", str(tmp / "new" / "folder" / "val.json"))
    assert run(str(tmp / "train.npz"), "shapes", None, *flags, *more)["FD"] > 1e-3
    assert (tmp / "new" / "folder" / "val.json").exists()
    assert "12 images of shapes val (16 x 16)" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- bad input

def refuse(words, *args):
    with pytest.raises(BadInput) as caught:
        run(*args)
    text = str(caught.value)
    assert words in text and "\n" not in text and text.count(". ") == 0, text  # one sentence


@pytest.mark.parametrize("workers", ["0", "2"])
def test_bad_images(classifier, tmp_path, workers):
    more = ("--features", classifier, "--workers", workers, "--batch_size", "2")
    good = write_pngs(tmp_path / "good", pictures(4, seed=0, size=16))
    mixed = write_pngs(tmp_path / "mixed", pictures(4, seed=0, size=16))
    Image.new("RGB", (20, 16)).save(tmp_path / "mixed" / "0002.png")
    refuse("0002.png is 20 x 16, the first image of", good, mixed, None, *more)
    refuse("--image_size", mixed, good, None, *more)
    run(mixed, good, None, *more, "--image_size", "16")
    broken = write_pngs(tmp_path / "broken", pictures(4, seed=0, size=16))
    data_ = (tmp_path / "broken" / "0003.png").read_bytes()
    (tmp_path / "broken" / "0003.png").write_bytes(data_[:len(data_) // 2])
    refuse("unreadable image", good, broken, None, *more)
    refuse("0003.png", broken, good, None, *more, "--image_size", "16")
    refuse("1 image(s)", write_pngs(tmp_path / "one", pictures(1, seed=0, size=16)), good, None, *more)
    refuse("only 4 image(s)", good, mixed, None, *more, "--n", "5")
    refuse("--image_size", "shapes", good, None, *more)
    refuse("smaller than the crop", good, mixed, None, *more, "--image_size", "64")


def test_an_image_that_fails_once_stops_the_run(folders, classifier, monkeypatch):
    images, calls = fid.Images(folders[0]), []
    load = images.source.load

    def flaky(i, at_least=0):
        calls.append(i)
        if calls.count(3) == 1 and i == 3:
            raise data.Unreadable("0003.png (OSError: the disk was busy)")
        return load(i, at_least)

    monkeypatch.setattr(images.source, "load", flaky)
    net, args = fid.Classifier(classifier), SimpleNamespace(batch_size=8, workers=0)
    with pytest.raises(BadInput, match="unreadable image.*0003.png"):
        fid.measure(images, net, args, torch.device("cpu"))


def test_bad_npz(classifier, folders, tmp_path):
    def file(**arrays):
        np.savez(tmp_path / "bad.npz", **arrays)
        return str(tmp_path / "bad.npz")

    def refused(words, **arrays):
        refuse(words, folders[0], file(**arrays), None, "--features", classifier)

    good = np.zeros((4, 8, 8, 3), np.uint8)
    refused("float32", arr_0=good.astype(np.float32))
    refused("arr_0 is object", arr_0=np.array([{}, None], dtype=object))
    refused("(4, 3, 8, 8)", arr_0=good.transpose(0, 3, 1, 2))
    refused("arr_1", arr_0=good, arr_1=np.zeros(3, int))
    refused("Object arrays", arr_0=good, arr_1=np.array([{}] * 4, dtype=object))
    refused("neither samples", images=good)
    refused("two at least for a covariance", arr_0=good[:1])
    path = file(arr_0=good)
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    refuse("neither samples", folders[0], path, None, "--features", classifier)
    refuse("No such file", folders[0], str(tmp_path / "absent.npz"), None, "--features", classifier)


def test_bad_input_of_full(weights, tf1, full, folders, tmp, tmp_path):
    few, small = write_pngs(tmp_path / "few", pictures(3, seed=0)), write_pngs(tmp_path / "s", pictures(4, 0, size=32))
    statistics = str(tmp / "a.npz")
    refuse("3 images are too few for the 3 nearest", folders[0], few, weights, "--full")
    refuse("3 images are too few for the 3 nearest", few, folders[0], weights, "--full")
    refuse("images of two sizes", folders[0], small, weights, "--full")
    refuse("holds statistics alone", statistics, folders[0], weights, "--full")
    refuse("holds statistics, not images", folders[0], str(tmp / "full.npz"), weights, "--full")
    with np.load(tmp / "full.npz") as arrays:
        kept = {key: arrays[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}
    adm = write_npz(tmp_path / "adm.npz", pictures(9, 0, size=32), **kept)
    refuse("images of two sizes", adm, folders[0], weights, "--full")


def test_bad_statistics(classifier, folders, tmp_path, capsys):
    def file(**arrays):
        np.savez(tmp_path / "s.npz", **{"mu": np.zeros(8), "sigma": np.eye(8), **arrays})
        return str(tmp_path / "s.npz")

    flags = (folders[0], None, "--features", classifier)
    refuse("of 5 features", file(mu=np.zeros(5), sigma=np.eye(5)), *flags)
    ours = {"n": 9, "description": "d", "resize": "none", "weights": "01234567"}
    refuse("resize tf1", file(**ours | {"resize": "tf1"}), *flags)
    refuse("weights 01234567", file(**ours), *flags)
    for key in ours:
        refuse("is missing", file(**{name: value for name, value in ours.items() if name != key}), *flags)
    refuse("not finite", file(mu=np.full(8, np.nan)), *flags)
    refuse("Object arrays", file(mu=np.array([{}] * 8, dtype=object)), *flags)
    refuse("holds statistics", file(), None, None, "--save", str(tmp_path / "new.npz"))
    assert run(file(), *flags)["FD"] > 0  # another tool's file: used, with a warning
    assert "does not say how it was made" in capsys.readouterr().err


def test_statistics_of_the_other_resize_are_refused(tf1, weights, folders, tmp):
    statistics, more = str(tmp / "a.npz"), ("--resize", "pytorch")
    refuse("was made with resize tf1, not with pytorch", statistics, folders[1], weights, *more)


def test_bad_weight_files(weights, folders, tmp_path, monkeypatch):
    def refused(words, change):
        change(tmp_path / "w.pth")
        refuse(words, *folders, str(tmp_path / "w.pth"))

    torchvisions = tv.Inception3(init_weights=False).state_dict()  # 1000 classes and an auxiliary head
    refused("torch.Size([1008])", lambda path: torch.save(torchvisions, path))
    refused("layout", lambda path: torch.save({"fc.weight": torch.zeros(1008, 2048)}, path))
    refused("layout", lambda path: torch.save([1, 2], path))
    refused("damaged", lambda path: path.write_bytes(Path(weights).read_bytes()[:100_000]))
    refused("damaged", lambda path: path.write_text("<html>not found</html>"))
    refuse("no such file", *folders, str(tmp_path / "absent.pth"))

    # The download: no network is no traceback; the hash is checked when the file comes, and when it is there.
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    calls = []

    def offline(*args, **more):
        calls.append((args, more))
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    refuse("no download: fetch https://github.com/mseitzer/", *folders)
    refuse("--inception: Network is unreachable", *folders)
    assert calls[0][0] == (fid.URL, str(tmp_path / "checkpoints" / fid.WEIGHTS), "6726825d")
    (tmp_path / "checkpoints" / fid.WEIGHTS).write_bytes(b"half of a file")
    refuse("is damaged", *folders)


def test_weights_that_give_nan_are_refused():
    class Broken(Pixels):
        def forward(self, images):
            return [t * float("nan") for t in super().forward(images)]

    with pytest.raises(BadInput, match="not finite"):
        summary(pictures(4, seed=0, size=8), 4, Broken())


@pytest.mark.parametrize("flags, words", [
    (["--real", "A", "--fake", "A/../A"], "their distance is 0"),
    (["--real", "A", "--fake", "B", "--tokenizer", "T"], "two questions"),
    (["--real", "A"], "samples/samples.npz: no such file; python sample.py makes it"),
    (["--fake", "B"], "sampler.json: no such file, so --real is needed"),
    (["--real", "A", "--fake", "B", "--inceptoin", "W"], "--inceptoin"),
    (["--real", "A", "--fake", "B", "--features", "F", "--resize", "tf1"], "do not go with --features"),
    (["--real", "A", "--fake", "B", "--features", "F", "--full"], "does not go with --features"),
    (["--real", "A", "--tokenizer", "T", "--full"], "--full does not go with"),
    (["--real", "shapes", "--fake", "B"], "need an --image_size"),
    (["--real", "A", "--save", "stats.pt"], ".npz"),
    (["--real", "A", "--fake", "B", "--image_size", "0"], "--image_size"),
])
def test_contradictions_are_refused_before_any_work(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "A").mkdir()
    with pytest.raises(BadInput, match=words.replace("(", r"\(")):
        fid.main(flags)


def test_existing_file_is_not_overwritten_by_save(folders, tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"precious")
    refuse("new file", folders[0], None, None, "--save", str(tmp_path / "samples.npz"))
    assert (tmp_path / "samples.npz").read_bytes() == b"precious"


def test_bad_input_is_one_line_on_stderr(folders, launch):
    done = launch(["fid.py", "--real", folders[0], "--fake", folders[0]], check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"fid.py: --real and --fake are both {folders[0]}: their distance is 0\n"
