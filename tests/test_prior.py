"""train_prior.py and sample.py through their command lines: cache, training, resume, processes, samples, views."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train_tokenizer import lines, same

import data
import runtime
import sample
import train_prior
import vq
from runtime import BadInput
from transformer import Transformer

PRIOR = ["--size", "tiny", "--classes", 10, "--iters", 4, "--batch_size", 8, "--lr", 1e-3, "--workers", 0, "--views", 2,
         "--log_every", 1, "--device", "cpu"]


def save_tokenizer(path, seed=0, **options):
    """A tokenizer checkpoint, untrained, with codes spread enough that images differ in them."""
    torch.manual_seed(seed)
    model = vq.VQModel(channels=(16, 16), z_dim=8, codebook_size=16, **options)
    x = data.to_float(torch.stack([data.EvalImages(data.Shapes(), 16)[i][0] for i in range(16)]), torch.device("cpu"))
    z = model.encoder(x).detach().permute(0, 2, 3, 1).flatten(0, 2)
    model.quantizer.codebook.data = z[torch.randperm(len(z))[:16]].clone()
    torch.save({"kind": "tokenizer", "args": {"image_size": 16}, "step": 0, "config": model.config,
                "model": model.state_dict(), "ema": None}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "ckpt.pt")


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(data.Shapes, "SIZES", {"train": 300, "val": 40})


@pytest.fixture
def train(script, tokenizer, tmp_path):
    def call(*words, out="prior"):
        script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / out, *words)
        return torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    return call


def test_the_cache_holds_the_codes_of_the_views(train, tmp_path, tokenizer):
    train()
    rows = np.memmap(tmp_path / "prior/codes/train/codes.bin", np.uint16, "r", shape=(600, 64))
    labels = np.memmap(tmp_path / "prior/codes/train/labels.bin", np.int32, "r")
    model, source = vq.load_tokenizer(tokenizer), data.Shapes()
    views = train_prior.Views(source, 16, "random", 2, seed=0)
    for row in (0, 1, 77, 599):
        image, label, _ = views[row]
        assert labels[row] == label == source.label(row // 2)
        codes = model.encode(data.to_float(image[None], torch.device("cpu")))[1].flatten()
        assert np.array_equal(rows[row], codes.numpy())
    assert not np.array_equal(views[0][0], views[1][0]) or not np.array_equal(views[2][0], views[3][0])  # flips
    val = np.memmap(tmp_path / "prior/codes/val/codes.bin", np.uint16, "r", shape=(40, 64))
    image = data.EvalImages(data.Shapes("val"), 16)[5][0]
    assert np.array_equal(val[5], model.encode(data.to_float(image[None], torch.device("cpu")))[1].flatten().numpy())


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_training_logs_and_keeps_the_best(train, tmp_path, kind):
    state = train("--kind", kind, "--eval_every", 2, "--label_dropout", 0.2, "--ema", 0.9)
    values = lines(tmp_path / "prior", "val")
    assert values[0]["lnK"] == pytest.approx(np.log(16), rel=1e-5) and 0 < values[0]["H"] <= np.log(16)
    assert values[-1]["H_minus_loss"] == pytest.approx(values[-1]["H"] - values[-1]["loss"], abs=1e-4)
    best = torch.load(tmp_path / "prior" / "best.pt", weights_only=True)
    assert best["best"] == pytest.approx(min(v["loss"] for v in values), rel=1e-5)
    assert state["config"]["kind"] == kind and state["config"]["null_class"] and state["ema"]


def test_learning_rates_are_table_10s():
    args = type("A", (), dict(lr=1e-4, lr_end=5e-6, decay_start=80_000, iters=1_500_000, kind="ar"))
    rate = train_prior.learning_rate
    assert rate(0, args) == rate(80_000, args) == 1e-4 and rate(1_500_000, args) == pytest.approx(5e-6)
    assert rate(790_000, args) == pytest.approx(1e-4 * 0.05 ** 0.5)
    args = type("A", (), dict(lr=1e-4, lr_end=0.0, decay_start=50_000, iters=1_500_000, kind="nar"))
    assert rate(50_000, args) == 1e-4 and rate(775_000, args) == pytest.approx(5e-5) and rate(1_500_000, args) == 0


def test_an_interrupted_cache_goes_on(train, tmp_path, monkeypatch):
    whole = train(out="whole")
    real, calls = data.to_float, []

    def fail(images, device):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(images, device)
    monkeypatch.setattr(data, "to_float", fail)
    with pytest.raises(KeyboardInterrupt):
        train(out="cut")
    done = np.fromfile(tmp_path / "cut/codes/train/done.bin", np.uint32)
    assert (done > 0).tolist() == [True, False, False]  # the second was encoded, but not yet written
    monkeypatch.setattr(data, "to_float", real)
    cut = train(out="cut")
    for name in ("train", "val"):
        for file in ("codes.bin", "labels.bin"):
            a, b = ((tmp_path / run / "codes" / name / file).read_bytes() for run in ("whole", "cut"))
            assert a == b
    assert same(whole["model"], cut["model"])


def test_a_resumed_prior_is_the_undisturbed_one(train, monkeypatch):
    words = ["--dropout", 0.1, "--kind", "nar", "--accum", 2, "--label_dropout", 0.2, "--ema", 0.9]
    whole = train(*words, out="whole")
    stopping, calls = runtime.Run.stopping, iter([False, True])
    monkeypatch.setattr(runtime.Run, "stopping", lambda self: next(calls))
    assert train(*words, out="parts")["step"] == 2
    monkeypatch.setattr(runtime.Run, "stopping", stopping)
    parts = train(*words, "--resume", out="parts")
    assert all(same(whole[k], parts[k]) for k in ("model", "optimizer", "step", "ema", "ema_state", "best"))


def test_a_folder_without_val(train, tmp_path, photos, capsys):
    train("--data", photos)
    assert "no --val" in capsys.readouterr().out
    assert (tmp_path / "prior/codes/val/codes.bin").stat().st_size == 8 * 64 * 2
    state = torch.load(tmp_path / "prior/ckpt.pt", weights_only=True)
    assert state["classes"] == ["cats", "dogs"] and state["config"]["classes"] == 10


def test_sigterm_saves(tokenizer, tmp_path, photos):
    words = [sys.executable, ROOT / "train_prior.py", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "p",
             "--iters", 100000, "--data", photos, "--val", photos]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    assert "stopped by a signal" in process.stdout.read() and process.wait(60) == 0
    assert torch.load(tmp_path / "p" / "ckpt.pt", weights_only=True)["step"] >= 3


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_accumulation_equals_the_large_batch(train, monkeypatch, kind):
    from test_train_tokenizer import gradients
    words = ["--kind", kind, "--iters", 1, "--dropout", 0]
    large, = gradients(monkeypatch, lambda: train(*words, out="large"))
    small, = gradients(monkeypatch, lambda: train(*words, "--accum", 4, out="small"))
    for g, h in zip(large, small):
        assert torch.allclose(g, h, rtol=1e-4, atol=1e-6)


def test_two_processes_equal_one(launch, tokenizer, tmp_path, photos):
    for i in range(70):  # more than one block of the validation, more than one chunk of the cache
        data.draw(i, i % 10, 20).save(photos / ("cats", "dogs")[i % 2] / f"{i}.png")
    words = ["train_prior.py", *PRIOR, "--tokenizer", tokenizer, "--data", photos, "--val", photos, "--kind", "nar",
             "--dropout", 0, "--lr", 1e-4, "--views", 7]
    launch([*words, "--out", tmp_path / "one"])
    launch([*words, "--out", tmp_path / "two"], processes=2)
    for file in ("train/codes.bin", "train/labels.bin", "val/codes.bin"):
        assert (tmp_path / "one/codes" / file).read_bytes() == (tmp_path / "two/codes" / file).read_bytes()
    for split in ("train", "val"):
        for a, b in zip(lines(tmp_path / "one", split), lines(tmp_path / "two", split), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    words = ["sample.py", "--prior", tmp_path / "one/ckpt.pt", "--tokenizer", tokenizer, "--count", 10, "--steps", 3,
             "--batch_size", 4, "--device", "cpu"]
    launch([*words, "--out", tmp_path / "s1"])
    launch([*words, "--out", tmp_path / "s2"], processes=2)
    a, b = (np.load(tmp_path / s / "samples.npz") for s in ("s1", "s2"))
    assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"])
    assert a["arr_0"].shape == (10, 16, 16, 3) and a["arr_0"].dtype == np.uint8


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_samples_on_disk(script, train, tmp_path, tokenizer, kind):
    train("--kind", kind, "--label_dropout", 0.2)
    words = ["sample", "--prior", tmp_path / "prior/ckpt.pt", "--tokenizer", tokenizer, "--device", "cpu"]
    script(*words, "--n", 12, "--out", tmp_path / "a", "--png", "--labels", 3, 5, "--cfg", 1)
    saved = np.load(tmp_path / "a/samples.npz")
    assert saved["arr_1"].tolist() == [3, 5] * 6 and saved["arr_0"].shape == (12, 16, 16, 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a/png/000007.png")), saved["arr_0"][7])
    assert Image.open(tmp_path / "a/grid.png").size == (8 * 18 - 2, 2 * 18 - 2)
    settings = json.loads((tmp_path / "a/sampler.json").read_text())
    assert settings["cfg"] == 1 and settings["n"] == 12 and (("top_p" in settings) and settings["kind"] == kind)
    assert not (tmp_path / "a/part").exists()
    script(*words, "--n", 5, "--batch_size", 3, "--out", tmp_path / "b", "--labels", 3, 5, "--cfg", 1)
    assert np.array_equal(np.load(tmp_path / "b/samples.npz")["arr_0"], saved["arr_0"][:5])  # sample i is (seed, i)
    script(*words, "--n", 5, "--out", tmp_path / "c", "--labels", 3, 5, "--cfg", 1, "--seed", 1)
    assert not np.array_equal(np.load(tmp_path / "c/samples.npz")["arr_0"], saved["arr_0"][:5])


def test_only_classes_of_the_data_are_drawn_by_default(script, train, tmp_path, tokenizer, photos):
    train("--data", photos)
    script("sample", "--prior", tmp_path / "prior/ckpt.pt", "--tokenizer", tokenizer, "--device", "cpu", "--n", 4,
           "--out", tmp_path / "a")
    assert np.load(tmp_path / "a/samples.npz")["arr_1"].tolist() == [0, 1, 0, 1]


def test_phase_2s_tokenizer_is_taken_and_another_refused(script, train, tmp_path, tokenizer, monkeypatch):
    train()
    one = torch.load(tokenizer, weights_only=True)
    model = vq.VQModel(**{**one["config"], "attention": 1})
    state = model.state_dict() | {k: v for k, v in one["model"].items() if not k.startswith("decoder")}
    torch.save(one | {"config": model.config, "model": state}, tmp_path / "two.pt")
    words = ["sample", "--prior", tmp_path / "prior/ckpt.pt", "--n", 2, "--device", "cpu"]
    script(*words, "--tokenizer", tmp_path / "two.pt", "--out", tmp_path / "a")
    script(*words, "--tokenizer", tokenizer, tmp_path / "two.pt", "--out", tmp_path / "1", tmp_path / "2", "--png")
    a, first, second = (np.load(tmp_path / out / "samples.npz")["arr_0"] for out in ("a", "1", "2"))
    assert np.array_equal(a, second) and not np.array_equal(first, second)  # the same codes, another decoder
    assert np.array_equal(np.asarray(Image.open(tmp_path / "2/png/000001.png")), second[1])
    assert json.loads((tmp_path / "2/sampler.json").read_text())["tokenizer"] == str(tmp_path / "two.pt")
    with pytest.raises(BadInput, match="already holds samples"):
        script(*words, "--tokenizer", tokenizer, tmp_path / "two.pt", "--out", tmp_path / "3", tmp_path / "2")
    both = [*words, "--tokenizer", tokenizer, tmp_path / "two.pt", "--out", tmp_path / "4", tmp_path / "5"]
    write = sample.write
    with monkeypatch.context() as patch:  # ended when the first of its files was there
        patch.setattr(sample, "write", lambda out, *rest: write(out, *rest) if out.name == "4" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script(*both)
    script(*both)
    for out, images in (("4", first), ("5", second)):
        assert np.array_equal(np.load(tmp_path / out / "samples.npz")["arr_0"], images)
    assert not (tmp_path / "4/part").exists()
    save_tokenizer(tmp_path / "other.pt", seed=1)
    with pytest.raises(BadInput, match="is not the tokenizer"):
        script(*words, "--tokenizer", tmp_path / "other.pt", "--out", tmp_path / "b")


def test_teacher_forcing_reproduces_an_overfitted_set(script, tokenizer, tmp_path, capsys, monkeypatch):
    # sixteen images; s_1 depends on the label alone, so two images of a class may share one prediction there
    monkeypatch.setattr(data.Shapes, "SIZES", {"train": 16, "val": 16})
    monkeypatch.setattr(data.Shapes, "__init__", lambda self, split="train": setattr(self, "n", 16) or setattr(
        self, "first", 0))
    monkeypatch.setattr(data.Shapes, "label", lambda self, i: i % 10)
    script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "p", "--iters", 200, "--batch_size", 16,
           "--dropout", 0, "--crop", "center", "--views", 1, "--log_every", 100, "--lr", 2e-3)
    script("sample", "--teacher_forced", "shapes", "--n", 16, "--out", tmp_path / "view", "--device", "cpu",
           "--runs", f"{tmp_path}/p/ckpt.pt:{tokenizer}", f"{tmp_path}/p/ckpt.pt:{tokenizer}")
    out = capsys.readouterr().out
    accuracy = [float(line.split()[2]) for line in out.splitlines() if line.startswith("top-1 accuracy")]
    assert len(accuracy) == 2 and min(accuracy) > 97
    assert Image.open(tmp_path / "view/teacher_forced.png").size == (5 * 18 - 2, 16 * 18 - 2)


def test_the_view_predicts_from_the_true_context(tokenizer, train, tmp_path, script):
    """s'_i is the argmax given s_<i, s_1 from the prefix alone, both decoded by the same decoder."""
    train()
    state = torch.load(tmp_path / "prior/ckpt.pt", weights_only=True)
    prior = Transformer(**state["config"])
    prior.load_state_dict(state["model"])
    prior.eval()
    model = vq.load_tokenizer(tokenizer)
    image, label, _ = data.EvalImages(data.Shapes("val"), 16)[0]
    s = model.encode(data.to_float(image[None], torch.device("cpu")))[1]
    changed = s.flatten(1).clone()
    slow = []
    for i in range(64):  # codes from i on are blotted out: they must not matter
        changed = s.flatten(1).clone()
        changed[:, i:] = 0
        slow.append(prior(changed, torch.tensor([label]))[0, i].argmax())
    script("sample", "--teacher_forced", "shapes", "--n", 1, "--out", tmp_path / "v", "--device", "cpu", "--runs",
           f"{tmp_path}/prior/ckpt.pt:{tokenizer}")
    expected = model.decode_indices(torch.stack(slow).view(1, 8, 8))
    grid = np.asarray(Image.open(tmp_path / "v/teacher_forced.png"))
    exact = ((expected.clamp(-1, 1) + 1) * 127.5).round().byte()[0].permute(1, 2, 0).numpy()
    assert np.abs(grid[:, 36:52].astype(int) - exact).max() <= 1


def test_the_noise_view(script, tokenizer, capsys):
    script("sample", "--noise", "shapes", "--tokenizer", tokenizer, "--n", 8, "--sigma", 0, "--device", "cpu")
    assert capsys.readouterr().out.startswith("0.00 % of 512 codes")
    script("sample", "--noise", "shapes", "--tokenizer", tokenizer, "--n", 8, "--sigma", 0.3, "--device", "cpu")
    assert float(capsys.readouterr().out.split()[0]) > 5


def test_an_lsun_like_run_without_classes(launch, tokenizer, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    import io
    env = lmdb.open(str(tmp_path / "church"), map_size=1 << 24)
    with env.begin(write=True) as transaction:
        for i in range(12):
            file = io.BytesIO()
            data.draw(i, i % 10, 40).save(file, "WEBP")
            transaction.put(f"{i}".encode(), file.getvalue())
    env.close()
    church = f"lsun:{tmp_path}/church"
    launch(["train_prior.py", *PRIOR, "--tokenizer", tokenizer, "--data", church, "--val", church, "--classes", 0,
            "--crop", "center", "--views", 1, "--workers", 2, "--out", tmp_path / "p"])
    launch(["sample.py", "--prior", tmp_path / "p/ckpt.pt", "--tokenizer", tokenizer, "--n", 3, "--top_p", 0.98,
            "--out", tmp_path / "s", "--device", "cpu"])
    saved = np.load(tmp_path / "s/samples.npz")
    assert saved.files == ["arr_0"] and saved["arr_0"].shape == (3, 16, 16, 3)


def test_bad_input_is_refused_in_one_sentence(script, train, tokenizer, tmp_path, photos):
    train()
    prior = tmp_path / "prior/ckpt.pt"
    other = save_tokenizer(tmp_path / "other.pt", seed=1)
    codes = tmp_path / "prior/codes"
    for words, message in [
            (["--betas", 1, 1], "outside"),
            (["--classes", 5], "has 10 classes, more than"), (["--tokenizer", prior], "holds a prior checkpoint"),
            (["--codes", codes, "--tokenizer", other], "another `tokenizer`"),
            (["--codes", codes, "--data", photos, "--val", photos], "another `data`"),
            (["--codes", codes, "--views", 3], "another `rows`|another `views`"),
            (["--kind", "gan"], "invalid choice"), (["--label_dropout", 1], "outside"),
            (["--label_dropout", 0.1, "--classes", 0], "needs classes"),
            (["--batch_size", 7, "--accum", 2], "divisible")]:
        with pytest.raises(BadInput, match=message) as error:
            train(*words, out=f"x{hash(str(words))}")
        assert "\n" not in str(error.value)
    whole = (codes / "train/codes.bin").read_bytes()
    (codes / "train/codes.bin").write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="it was cut or overwritten"):
        train("--codes", codes, out="y")
    (codes / "train/codes.bin").write_bytes(b"\xff" * len(whole))  # a damaged chunk is encoded again
    train("--codes", codes, out="z")
    assert (codes / "train/codes.bin").read_bytes() == whole

    good = ["--prior", prior, "--tokenizer", tokenizer, "--device", "cpu", "--out", tmp_path / "s"]
    for words, message in [
            ([*good, "--n", 0], "at least 1"), ([*good, "--top_p", 0], "outside"), ([*good, "--top_p", 1.1], "outside"),
            ([*good, "--top_k", 17], "top_k is 17"),
            ([*good, "--steps", 3], "are for NAR"), ([*good, "--cfg", 1], "without a null class"),
            ([*good, "--labels", 10], "use 0 to 9"), ([*good, "--labels", 3, 10], "use 0 to 9"),
            (["--prior", prior], "needs --tokenizer"), ([*good, tmp_path / "t"], "as many as --tokenizer"),
            (["--noise", "shapes", "--tokenizer", "a", "b"], "one --tokenizer"),
            (["--prior", tokenizer, "--tokenizer", tokenizer], "holds a tokenizer checkpoint"),
            (["--prior", prior, "--tokenizer", prior], "holds a prior checkpoint"), ([], "give one of"),
            (["--teacher_forced", "shapes"], "belong together"),
            (["--teacher_forced", "shapes", "--runs", str(prior)], "PRIOR:TOKENIZER"),
            (["--teacher_forced", tmp_path / "none", "--runs", f"{prior}:{tokenizer}"], "no such folder"),
            (["--teacher_forced", photos, "--runs", f"{prior}:{tokenizer}"], "give --labels")]:
        with pytest.raises(BadInput, match=message) as error:
            script("sample", *words)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "s").exists()
    script("sample", *good, "--n", 2)
    with pytest.raises(BadInput, match="already holds samples"):
        script("sample", *good, "--n", 2)
