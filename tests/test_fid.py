"""fid.py against pytorch-fid, torch-fidelity, closed forms and slow loops.

All tools get one file of random weights in the layout of the published one, scaled so that rounding
errors do not grow from layer to layer."""
import contextlib
import io
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models.inception as tv
from conftest import Code, NoFloat64, run_scripts, save_tokenizer
from PIL import Image
from torch import nn

import data
import fid
import losses
import vq

CPU = torch.device("cpu")


def drawings(n, seed, shift=0, size=64):
    """Random colors from coarse to fine, uint8 (n, 3, size, size)."""
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
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy(), **more)
    return str(path)


def run(real, *words):
    """What fid.py finds, in this process, and the lines that it prints."""
    words = ["--real", real, *words, "--workers", 0, "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return fid.main([*map(str, words)]), out.getvalue().splitlines()


def warnings(out):
    return "".join(line for line in out if line.startswith("warning: "))


def close(value, rel=1e-9):
    return pytest.approx(value, rel=rel)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the published file's layout."""
    torch.manual_seed(0)
    net = tv.Inception3(num_classes=1008, aux_logits=False, init_weights=False).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the one batch below
            nn.init.uniform_(module.weight, 0.2, 0.4)
            nn.init.normal_(module.bias, 0.3, 0.06)
    with torch.no_grad():
        net(fid.resize_tf1(drawings(4, seed=0)))
    nn.init.normal_(net.fc.weight)
    nn.init.normal_(net.fc.bias, std=2)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def tf1(weights, tmp_path_factory):
    """Two folders, and one pass over them in batches, with Inception and --resize tf1."""
    tmp = tmp_path_factory.mktemp("tf1")
    real = write_pngs(tmp / "real", drawings(5, seed=1)[..., :48])
    fake = write_pngs(tmp / "fake", drawings(15, seed=2, shift=12)[..., :48])
    found, out = run(real, "--fake", fake, "--inception", weights, "--batch_size", 4,
                     "--save", tmp / "a.npz", "--json", tmp / "a.json")
    return Namespace(tmp=tmp, real=real, fake=fake, found=found, out=out)


# -------------------------------------------------------------------------- the published tools

def test_fid_and_is_equal_torch_fidelity(weights, tf1):
    import torch_fidelity
    theirs = torch_fidelity.calculate_metrics(
        input1=tf1.fake, input2=tf1.real, isc=True, fid=True, cuda=False, batch_size=8,
        save_cpu_ram=True, cache=False, verbose=False, feature_extractor_weights_path=weights)
    for ours, name in (("FID", "frechet_inception_distance"), ("IS", "inception_score_mean"),
                       ("IS_std", "inception_score_std")):
        assert tf1.found[ours] == close(theirs[name], 1e-4)
    assert tf1.found["IS"] > 1.1


def test_what_is_printed_and_saved(tf1):
    """The numbers, what they depend on, and a warning not to compare these with a paper's."""
    found, out, saved = tf1.found, tf1.out, json.loads((tf1.tmp / "a.json").read_text())
    assert {key: saved[key] for key in found} == found and len(saved["weights"]) == 8
    assert saved["versions"]["torch"] == torch.__version__ and saved["args"]["resize"] == "tf1"
    assert saved["real"] == f"5 images of {tf1.real} (48 x 64)" and saved["n_fake"] == 15
    assert {f"FID {found['FID']:.2f}", f"IS {found['IS']:.1f} +- {found['IS_std']:.1f}"} <= {*out}
    for word in ("measured:", saved["real"], saved["fake"], "--resize tf1", saved["weights"]):
        assert word in out[-1]
    warned = warnings(out)  # not the published weights; for 2048 features; the numbers differ
    assert all(text in warned for text in ("inception.pth", "15 images of", "5 and 15"))


def test_features_equal_pytorch_fid(weights, monkeypatch):
    import pytorch_fid.inception
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url",
                        lambda *_, **__: torch.load(weights))
    theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    images, ours = drawings(3, seed=3, size=350), fid.Inception(weights, "pytorch")
    with torch.inference_mode():
        wanted = theirs(images / 255)[0][:, :, 0, 0]
        torch.testing.assert_close(ours(images)[0], wanted, rtol=0, atol=1e-5)
    assert wanted.std(0).mean() > 0.01


def test_pytorch_fid_reads_our_statistics_and_we_read_its(tmp_path, vgg):
    from pytorch_fid.fid_score import compute_statistics_of_path
    flags = ("--feature_net", vgg, "--image_size", 16)
    ours, val, theirs = (tmp_path / f"{name}.npz" for name in ("ours", "val", "theirs"))
    run("shapes", *flags, "--save", ours)
    run("shapes", "--split", "val", *flags, "--save", val)
    a, b = (compute_statistics_of_path(str(path), None, 0, 16, "cpu") for path in (ours, val))
    np.savez(theirs, mu=a[0], sigma=a[1])  # as its --save-stats does
    wanted = fid.frechet_distance(*map(torch.from_numpy, (*a, *b)))
    for real, n, unknown in ((ours, 60, False), (theirs, 0, True)):
        for fake in (("--fake", val), ("--fake", "shapes", "--split", "val")):
            found, out = run(real, *fake, *flags)
            assert found["FD"] == close(wanted) and found["n_real"] == n and found["n_fake"] == 12
            assert ("no provenance" in warnings(out)) == unknown
            assert ("numbers of images" in warnings(out)) == (n == 60)


def test_frechet_distance_of_rotated_diagonal_matrices():
    """It is known. Many variances are zero, as with fewer images than features. With the larger
    rank first, rounding errors of the other's null space are left."""
    d = 200
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0])
    mean, zero = torch.ones(d).double(), torch.zeros(d).double()
    for dead_a, dead_b in ((0, 0), (75, 0), (150, 75), (d, 0), (d, d)):
        a, b = torch.linspace(0.1, 4, d).double(), torch.linspace(3, 0.2, d).double()
        a[:dead_a], b[:dead_b] = 0, 0
        wanted = d + float((a.sqrt() - b.sqrt()).square().sum())
        small, large = ((turn * v) @ turn.T for v in (a, b))
        assert fid.frechet_distance(mean, small, zero, large) == close(wanted, 1e-11)
        assert fid.frechet_distance(mean, large, zero, small) == close(wanted, 1e-6)
        assert 0 <= fid.frechet_distance(mean, large, mean, large) < 1e-6


# ----------------------------------------------------------- processes, tokenizers, classifiers

class Pixels(nn.Module):
    """A network whose features and logits are simple functions of the image."""

    name, feature_dim, num_classes = "FID", 12, 7
    weights, provenance, description = "0", "weights 0", "pixels"

    def forward(self, images):
        x = F.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return x, torch.cat([x[:, :3] - x[:, 9:], x[:, 3:7]], 1) / 20


def test_two_processes_find_what_one_finds(vgg, tokenizer, tmp_path, monkeypatch):
    """All that is summed: features, codes, labels that are right, what IS is made of."""
    monkeypatch.setattr(fid, "Inception", lambda *_: Pixels())
    real, fake = (write_npz(tmp_path / f"{seed}.npz", drawings(25, seed, size=16),
                            arr_1=np.arange(25) % 6) for seed in (5, 6))
    kinds = (["--tokenizer", tokenizer], ["--fake", fake, "--feature_net", vgg], ["--fake", fake])
    runs = [["fid", "--real", real, *words, "--batch_size", 4, "--workers", 0, "--device", "cpu",
             "--json", tmp_path / f"{i}.json"] for i, words in enumerate(kinds)]
    simple = "import fid, test_fid\nfid.Inception = lambda *_: test_fid.Pixels()"
    done = run_scripts(tmp_path, runs, simple)
    assert done.stdout.count("perplexity") == 1
    found = set()
    for i, words in enumerate(kinds):
        one, two = run(real, *words)[0], json.loads((tmp_path / f"{i}.json").read_text())
        numbers = {key: value for key, value in one.items() if not isinstance(value, str)}
        assert {key: two[key] for key in numbers} == close(numbers, 1e-6)
        found |= {*numbers}
    assert found == {*"n_real n_fake rFID usage perplexity FD accuracy FID IS IS_std".split()}


def test_no_is_of_fewer_than_ten_images(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "Inception", lambda *_: Pixels())
    for n in (9, 10):
        fake = write_npz(tmp_path / f"{n}.npz", drawings(n, seed=6, size=16))
        found, _ = run(fake, "--fake", fake)
        assert ("IS" in found) == (n == 10) and found["n_fake"] == n


def test_rfid_usage_and_perplexity_equal_a_loops(tokenizer, tmp_path, monkeypatch):
    """Both encode one batch of 70 images: in another batch size a few values round otherwise."""
    state = torch.load(tokenizer)
    state["model"]["quantizer.codebook"][13:] += 100  # codes too far to be used
    torch.save(state, tokenizer)
    monkeypatch.setattr(fid, "Inception", lambda *_: Pixels())
    real = write_pngs(tmp_path / "val", drawings(70, seed=5, size=20))
    found, out = run(real, "--tokenizer", tokenizer, "--batch_size", 70)

    pixels = torch.stack([data.to_tensor(data.center_crop(Image.open(path), 16))
                          for path in sorted(Path(real).iterdir())])
    x_hats, codes, _ = vq.load_tokenizer(tokenizer)[0](data.to_float(pixels, CPU))
    x_hats, used = ((x_hats.clamp(-1, 1) + 1) * 127.5).round(), codes.flatten().tolist()
    a, b = (Pixels()(x)[0].double() for x in (pixels, x_hats))
    wanted = fid.frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert found["rFID"] == close(wanted, 1e-6) and found["rFID"] > 1
    p = np.array([used.count(k) for k in {*used}]) / len(used)
    assert 4 < len(p) <= 13 and found["usage"] == len(p) / 16
    assert found["perplexity"] == close(np.exp(-(p * np.log(p)).sum()))
    assert f"rFID {found['rFID']:.2f}" in out and f"({len(p)} of 16)" in out[-3]
    assert "70 reconstructions of" in found["fake"] and not {"FID", "IS"} & found.keys()


def test_a_small_vgg_gives_fd_and_accuracy_but_no_fid(vgg, tmp_path):
    """Its features are the input of its last layer; of two softmaxes the first has the classes."""
    images = drawings(40, seed=2, size=32)
    layers = losses.load_vgg(vgg)(data.to_float(images, CPU), ("relu5_3", "logit"))
    features, logits = fid.SmallVGGFeatures(vgg)(images)
    torch.testing.assert_close(features, layers["relu5_3"].mean((2, 3)))
    torch.testing.assert_close(logits, layers["logit"][:, :6])
    labels = logits.argmax(1)
    assert len(labels.unique()) > 1
    labels[:10] = (labels[:10] + 1) % 6  # 10 of 40 samples miss their class
    fake = write_npz(tmp_path / "fake.npz", images, arr_1=labels.numpy())
    with NoFloat64():  # on a Mac's GPU
        found, out = run("shapes", "--image_size", 32, "--fake", fake, "--feature_net", vgg)
    assert found["accuracy"] == 0.75
    assert any("accuracy 0.75" in line and "--feature_net" in line for line in out)
    assert found["FD"] > 0 and not any(line.startswith(("FID", "IS")) for line in out)


# ------------------------------------------------------------------------- sets, files, errors

def test_samples_are_mapped_where_they_can_be(vgg, tmp_path):
    """Wherever arr_0 lies in the file. Compressed ones, or those in Fortran order, are loaded."""
    images, labels, path = drawings(6, seed=9, size=32), np.arange(6), tmp_path / "samples.npz"
    array = images.permute(0, 2, 3, 1).contiguous().numpy()
    first, last = dict(arr_0=array, arr_1=labels), dict(arr_1=labels, other=labels, arr_0=array)
    fortran = first | {"arr_0": np.asfortranarray(array)}
    for save, arrays, mapped in ((np.savez, fortran, False), (np.savez_compressed, first, False),
                                 (np.savez, first, True), (np.savez, last, True)):
        save(path, **arrays)
        samples = data.NpzSamples(str(path))
        for i, (image, label) in enumerate(map(samples.load, range(6))):
            assert np.array_equal(image, array[i]) and label == i
        assert isinstance(samples.array(), np.memmap) == mapped
    folder = write_pngs(tmp_path / "folder", images)  # the other folder is as sample.py leaves it
    assert run(tmp_path, "--fake", folder, "--feature_net", vgg)[0]["FD"] < 1e-6


def test_count_takes_evenly_spaced_images_and_samples_have_no_splits(tmp_path, many_photos):
    images = fid.EvalSet("shapes", 8, "train", 20)
    assert len(images) == 20 and images.indices == data.evenly_spaced(60, 20)
    path = write_npz(tmp_path / "samples.npz", drawings(60, seed=5, size=16))
    assert len(fid.EvalSet(path, 16, "val", None)) == 60
    train, val, both = (len(fid.EvalSet(str(many_photos), 16, split, None))
                        for split in ("train", "val", None))
    assert train + val == both == 160 and val < 20


def test_the_network_of_the_loss_is_no_independent_judge(vgg, tokenizer, tmp_path, photos):
    """Whatever its name is, the same file is recognized."""
    copy, state = tmp_path / "copy.pt", torch.load(tokenizer)
    copy.write_bytes(vgg.read_bytes())
    for trained_with, same in ((copy, True), (tokenizer, False), (tmp_path / "moved.pt", False)):
        state["args"]["vgg"] = str(trained_with)
        torch.save(state, tokenizer)
        _, out = run(photos, "--tokenizer", tokenizer, "--feature_net", vgg)
        assert (str(vgg) in warnings(out)) == same


def test_reconstructions_of_the_training_data_are_of_its_held_out_part(vgg, tmp_path, many_photos):
    for val, words, n in ((None, [], 7), (None, ["--split", "train"], 153), ("shapes", [], 160),
                          (None, ["--real", "shapes"], 60)):
        path = save_tokenizer(tmp_path / "ckpt.pt", data=str(many_photos), val=val)
        found = run(many_photos, "--tokenizer", path, "--feature_net", vgg, *words)[0]
        assert found["n_fake"] == found["n_real"] == n


def test_statistics_of_other_features_are_rejected(rejected, tf1, tmp_path, vgg):
    made = "weights 01234567, --resize none"
    np.savez(tmp_path / "other.npz", mu=np.zeros(16), sigma=np.eye(16), made=made)
    for path in (tf1.tmp / "a.npz", tmp_path / "other.npz"):  # the first is Inception's
        words = "--real", path, "--fake", "shapes", "--feature_net", vgg
        assert str(path) in rejected("fid", *words)


def test_a_broken_npz_is_one_sentence_that_names_it(rejected, vgg, tmp_path, monkeypatch):
    """An array of objects, whose pickle could run code, is not read."""
    monkeypatch.chdir(tmp_path)
    mu, sigma = np.zeros(16), np.eye(16)
    for name, arrays in (("half", dict(mu=mu)), ("small", dict(mu=mu, sigma=np.eye(15))),
                         ("objects", dict(mu=np.array([Code()]), sigma=sigma))):
        np.savez(name, **arrays)
    Path("cut.npz").write_bytes(Path("half.npz").read_bytes()[:100])
    bad = [*Path().glob("*.npz")]
    good = write_npz("good.npz", drawings(4, seed=0, size=16))
    for path in bad:
        for real, fake in ((good, path), (path, good)):
            words = "--real", real, "--fake", fake, "--feature_net", vgg
            assert str(path) in rejected("fid", *words)
    assert not Path("ran").exists()


def test_an_unreadable_image_is_an_error_that_names_it(rejected, vgg, tmp_path):
    good, bad = (write_pngs(tmp_path / name, drawings(4, seed=0, size=16)) for name in "ab")
    for path in (tmp_path / "b/0003.png", tmp_path / "b/0000.png"):
        path.write_bytes(path.read_bytes()[:100])
        for real, fake, workers in ((good, bad, 2), (bad, good, 0)):
            words = "--real", real, "--fake", fake, "--feature_net", vgg, "--workers", workers
            assert path.name in rejected("fid", *words, "--device", "cpu")
