"""train_prior.py and sample.py through their command lines: cache, training, resume, processes, samples, views."""
import json
import os
import re
import signal
import subprocess
import sys
import zipfile

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
from miniature.shapes import Shapes, draw
from runtime import BadInput
from train_tokenizer import build, fingerprint, load_tokenizer
from transformer import Transformer

PRIOR = ["--size", "tiny", "--iters", 4, "--batch_size", 8, "--lr", 1e-3, "--workers", 0, "--views", 2,
         "--log_every", 1, "--device", "cpu"]


def save_tokenizer(path, seed=0, **options):
    """A tokenizer checkpoint, untrained, with codes spread enough that images differ in them."""
    torch.manual_seed(seed)
    config = dict(channels=[16, 16], z_dim=8, codebook_size=16, quantizer="entropy") | options
    model = build(config)
    x = data.to_float(torch.stack([data.EvalImages(Shapes(), 16)[i][0] for i in range(16)]), torch.device("cpu"))
    z = model.encoder(x).detach().permute(0, 2, 3, 1).flatten(0, 2)
    model.quantizer.codebook.data = z[torch.randperm(len(z))[:16]].clone()
    args = {"image_size": 16, "data": "shapes", "val": None}
    torch.save({"kind": "tokenizer", "args": args, "step": 0, "config": config, "model": model.state_dict(),
                "ema": None}, path)
    return path


def save_prior(path, tokenizer, **options):
    """A prior's checkpoint, untrained, for the codes of that tokenizer."""
    torch.manual_seed(0)
    prior = Transformer("ar", "tiny", 16, 64, 10, **options)
    args = {"data": "shapes", "val": None, "image_size": 16}
    torch.save({"kind": "prior", "args": args, "step": 3, "config": prior.config, "model": prior.state_dict(),
                "ema": None, "tokenizer": fingerprint(load_tokenizer(tokenizer)), "grid": 8,
                "classes": list(Shapes.classes)}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "ckpt.pt")


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(Shapes, "SIZES", {"train": 300, "val": 40})


@pytest.fixture
def train(script, tokenizer, tmp_path):
    def call(*words, out="prior"):
        script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / out, *words)
        return torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    return call


def cache(run, split="train"):
    """Codes (rows, N) and labels (rows,) of a run's one cache of this split."""
    folder, = run.glob(f"codes/{split}-*")
    assert sorted(path.name for path in folder.iterdir()) == ["codes.npy", "labels.npy"]
    return np.load(folder / "codes.npy"), np.load(folder / "labels.npy")


def test_the_cache_holds_the_codes_of_the_views(train, tmp_path, tokenizer, capsys):
    train()
    assert "no --data: shapes, as the tokenizer was trained on" in capsys.readouterr().out
    rows, labels = cache(tmp_path / "prior")
    assert rows.shape == (600, 64) and rows.dtype == np.uint16 and labels.dtype == np.int32
    model, source = load_tokenizer(tokenizer), Shapes()
    views = train_prior.Views(source, 16, "random", 2)
    for row in (0, 1, 77, 599):
        image, label, _ = views[row]
        assert labels[row] == label == source.label(row // 2)
        codes = model.encode(data.to_float(image[None], torch.device("cpu")))[1].flatten()
        assert np.array_equal(rows[row], codes.numpy())
    assert not np.array_equal(views[0][0], views[1][0]) or not np.array_equal(views[2][0], views[3][0])  # flips
    val, _ = cache(tmp_path / "prior", "val")
    image = data.EvalImages(Shapes("val"), 16)[5][0]
    assert len(val) == 40
    assert np.array_equal(val[5], model.encode(data.to_float(image[None], torch.device("cpu")))[1].flatten().numpy())


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_training_logs_and_keeps_the_best(train, tmp_path, kind):
    state = train("--kind", kind, "--eval_every", 2, "--label_dropout", 0.2, "--ema", 0.9)
    values = lines(tmp_path / "prior", "val")
    assert values[0]["lnK"] == pytest.approx(np.log(16), rel=1e-5) and 0 < values[0]["H"] <= np.log(16)
    assert values[-1]["H_minus_loss"] == pytest.approx(values[-1]["H"] - values[-1]["loss"], abs=1e-4)
    best = torch.load(tmp_path / "prior" / "best.pt", weights_only=True)
    assert best["step"] == min(values, key=lambda v: v["loss"])["step"]
    assert state["config"]["kind"] == kind and state["config"]["null_class"]
    # the average is there once, and is not what it averages
    assert set(state) == {"kind", "args", "step", "torch", "config", "model", "optimizer", "ema", "tokenizer", "grid",
                          "classes"}
    assert state["ema"].keys() == state["model"].keys() and not same(state["ema"], state["model"])


def test_the_best_is_known_after_a_resume(train, tmp_path, monkeypatch, signal_in):
    """metrics.jsonl holds what the checkpoint does not: the lowest validation loss so far."""
    words = ["--eval_every", 1, "--save_every", 1, "--resume"]
    losses = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(train_prior, "validate", lambda *args: next(losses))
    best = []
    for step in (2, 3, None):  # a signal keeps a step from its validation: the next start makes up for it
        signal_in(step)
        train(*words)
        best.append(torch.load(tmp_path / "prior" / "best.pt", weights_only=True)["step"])
    assert best == [1, 2, 2]
    assert [v["loss"] for v in lines(tmp_path / "prior", "val")] == [3.0, 1.0, 2.0, 1.5]


def test_learning_rates_are_table_10s():
    args = type("A", (), dict(lr=1e-4, lr_end=5e-6, decay_start=80_000, iters=1_500_000, kind="ar"))
    rate = train_prior.learning_rate
    assert rate(0, args) == rate(80_000, args) == 1e-4 and rate(1_500_000, args) == pytest.approx(5e-6)
    assert rate(790_000, args) == pytest.approx(1e-4 * 0.05 ** 0.5)
    args = type("A", (), dict(lr=1e-4, lr_end=0.0, decay_start=50_000, iters=1_500_000, kind="nar"))
    assert rate(50_000, args) == 1e-4 and rate(775_000, args) == pytest.approx(5e-5) and rate(1_500_000, args) == 0


class Killed(BaseException):
    """Ends a script as SIGKILL would: nobody expects it."""


def test_an_interrupted_cache_goes_on(train, tmp_path, monkeypatch):
    """Killed between two chunks, after the last one, between the two files that they become, and before they go."""
    monkeypatch.setattr(train_prior, "CHUNK", 256)
    whole = train(out="whole")
    save_file, calls, moment = runtime.save_file, [], ""

    def to_float(images, device, real=data.to_float):
        calls.append(len(images))
        if moment == "to_float" and len(calls) == 10:  # in the second chunk of 256, by 32
            raise Killed
        return real(images, device)

    def save(path, write):
        if path.name == moment:
            raise Killed
        save_file(path, write)

    def rmtree(path, real=train_prior.shutil.rmtree):
        if moment == "rmtree":
            raise Killed
        real(path)
    monkeypatch.setattr(data, "to_float", to_float)
    monkeypatch.setattr(runtime, "save_file", save)
    monkeypatch.setattr(train_prior.shutil, "rmtree", rmtree)
    for moment, done in (("to_float", 1), ("labels.npy", 3), ("codes.npy", 3), ("rmtree", 3)):
        out = f"cut at {moment}"
        with pytest.raises(Killed):
            train(out=out)
        folder, = (tmp_path / out / "codes").iterdir()
        assert len(list((folder / "chunks").iterdir())) == done
        moment, calls = "", []
        cut = train(out=out)
        assert calls == ([32] * 10 + [24]) * (done < 3) + [32, 8]  # what was there is not made again; 40 of val
        for split in ("train", "val"):
            for file in ("codes.npy", "labels.npy"):
                a, b = (next((tmp_path / run / "codes").glob(f"{split}-*")) / file for run in ("whole", out))
                assert a.read_bytes() == b.read_bytes()
        assert same(whole["model"], cut["model"])


def test_codes_are_taken_where_they_fit_and_made_where_not(train, tmp_path, tokenizer, photos, monkeypatch):
    """A cache lies in a folder named after what it was made from; another seed and another kind of prior share it."""
    encoded, encode = [], vq.VQModel.encode
    monkeypatch.setattr(Shapes, "SIZES", {"train": 30, "val": 12})
    monkeypatch.setattr(vq.VQModel, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    train()
    codes, other = tmp_path / "prior/codes", save_tokenizer(tmp_path / "other.pt", seed=1)
    first = {path.name for path in codes.iterdir()}
    for words, new in [(["--seed", 1], set()), (["--kind", "nar", "--dropout", 0], set()),
                       (["--tokenizer", other], {"train", "val"}), (["--views", 3], {"train"}),
                       (["--crop", "resized"], {"train"}), (["--data", photos, "--val", photos], {"train", "val"})]:
        before = {path.name for path in codes.iterdir()}
        encoded.clear()
        train("--codes", codes, "--iters", 1, *words, out=f"x{words}")
        assert {path.name.split("-")[0] for path in codes.iterdir() if path.name not in before} == new, words
        assert bool(encoded) == bool(new)
    one, two = (np.load(path / "codes.npy") for path in codes.glob("val-*") if len(np.load(path / "codes.npy")) == 12)
    assert not np.array_equal(one, two)  # of the two tokenizers
    Image.new("RGB", (64, 64)).save(photos / "cats/grey.png")  # another picture of the same name
    before = len(list(codes.iterdir()))
    train("--codes", codes, "--iters", 1, "--data", photos, "--val", photos, out="y")
    assert len(list(codes.iterdir())) == before + 2 and first < {path.name for path in codes.iterdir()}


def test_a_cache_runs_no_code(train, tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/marker",)
    train()
    folder, = (tmp_path / "prior/codes").glob("train-*")
    np.save(folder / "labels.npy", np.array([Code()] * 600, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        train("--codes", tmp_path / "prior/codes", out="x")
    assert not (tmp_path / "marker").exists()


def test_a_run_does_not_go_on_with_another_tokenizer(train, tmp_path, tokenizer, signal_in):
    path = tmp_path / "tokenizer.pt"
    path.write_bytes(tokenizer.read_bytes())
    signal_in(2)
    train("--tokenizer", path)
    signal_in(None)
    save_tokenizer(path, seed=1)  # trained on in the meantime
    with pytest.raises(BadInput):
        train("--tokenizer", path, "--resume")


def test_a_resumed_prior_is_the_undisturbed_one(train, signal_in):
    words = ["--dropout", 0.1, "--kind", "nar", "--accum", 2, "--label_dropout", 0.2, "--ema", 0.9]
    whole = train(*words, out="whole")
    signal_in(2)
    assert train(*words, out="parts")["step"] == 2
    signal_in(None)
    parts = train(*words, "--resume", out="parts")
    assert all(same(whole[k], parts[k]) for k in ("model", "optimizer", "step", "ema"))


def test_a_folder_without_val(train, tmp_path, many_photos, capsys):
    train("--data", many_photos)
    out = capsys.readouterr().out
    assert "64 of the images are held out" in out and "no --data" not in out
    assert cache(tmp_path / "prior")[0].shape == (2 * 96, 64) and cache(tmp_path / "prior", "val")[0].shape == (64, 64)
    state = torch.load(tmp_path / "prior/ckpt.pt", weights_only=True)
    assert state["classes"] == ["cats", "dogs"] and state["config"]["classes"] == 2
    assert train("--data", many_photos, "--classes", 0, out="without")["config"]["classes"] == 0


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
        draw(i, i % 10, 20).save(photos / ("cats", "dogs")[i % 2] / f"{i}.png")
    words = ["train_prior.py", *PRIOR, "--tokenizer", tokenizer, "--data", photos, "--val", photos, "--kind", "nar",
             "--dropout", 0, "--lr", 1e-4, "--views", 4]
    launch([*words, "--out", tmp_path / "one"])
    launch([*words, "--out", tmp_path / "two"], processes=2)
    for part in ("train", "val"):
        assert all(map(np.array_equal, cache(tmp_path / "one", part), cache(tmp_path / "two", part)))
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
    assert Image.open(tmp_path / "a/grid.png").size == (6 * (8 * 18 + 2), 6 * (2 * 18 + 2))  # enlarged
    settings = json.loads((tmp_path / "a/sampler.json").read_text())
    assert settings["cfg"] == 1 and settings["n"] == 12 and (("top_p" in settings) and settings["kind"] == kind)
    assert not list((tmp_path / "a").glob("part*"))
    script(*words, "--n", 5, "--batch_size", 3, "--out", tmp_path / "b", "--labels", 3, 5, "--cfg", 1)
    assert np.array_equal(np.load(tmp_path / "b/samples.npz")["arr_0"], saved["arr_0"][:5])  # sample i is (seed, i)
    script(*words, "--n", 5, "--out", tmp_path / "c", "--labels", 3, 5, "--cfg", 1, "--seed", 1)
    assert not np.array_equal(np.load(tmp_path / "c/samples.npz")["arr_0"], saved["arr_0"][:5])


def test_streamed_samples_are_what_savez_writes(script, train, tmp_path, tokenizer):
    train()
    script("sample", "--prior", tmp_path / "prior/ckpt.pt", "--tokenizer", tokenizer, "--n", 7, "--batch_size", 3,
           "--device", "cpu", "--out", tmp_path / "a")
    with np.load(tmp_path / "a/samples.npz") as saved:
        arrays = {name: saved[name] for name in saved.files}
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
    np.savez(tmp_path / "b.npz", **arrays)
    one, two = (zipfile.ZipFile(path) for path in (tmp_path / "a/samples.npz", tmp_path / "b.npz"))
    assert sorted(one.namelist()) == sorted(two.namelist()) == ["arr_0.npy", "arr_1.npy"]
    for name in one.namelist():
        assert one.read(name) == two.read(name) and one.getinfo(name).compress_type == zipfile.ZIP_STORED


def test_only_classes_of_the_data_are_drawn_by_default(script, train, tmp_path, tokenizer, photos):
    train("--data", photos, "--val", photos)
    script("sample", "--prior", tmp_path / "prior/ckpt.pt", "--tokenizer", tokenizer, "--device", "cpu", "--n", 4,
           "--out", tmp_path / "a")
    assert np.load(tmp_path / "a/samples.npz")["arr_1"].tolist() == [0, 1, 0, 1]


def test_phase_2s_tokenizer_is_taken_and_another_refused(script, train, tmp_path, tokenizer, monkeypatch):
    train()
    one = torch.load(tokenizer, weights_only=True)
    config = one["config"] | {"attention": 1}
    model = build(config)
    state = model.state_dict() | {k: v for k, v in one["model"].items() if not k.startswith("decoder")}
    torch.save(one | {"config": config, "model": state}, tmp_path / "two.pt")
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
    write = sample.write_samples
    with monkeypatch.context() as patch:  # ended when the first of its files was there
        patch.setattr(sample, "write_samples", lambda out, *rest: write(out, *rest) if out.name == "4" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script(*both)
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "generate", None)  # all is drawn
        script(*both)
    for out, images in (("4", first), ("5", second)):
        assert np.array_equal(np.load(tmp_path / out / "samples.npz")["arr_0"], images)
    assert not list((tmp_path / "4").glob("part*"))
    save_tokenizer(tmp_path / "other.pt", seed=1)
    with pytest.raises(BadInput, match="is not the tokenizer"):
        script(*words, "--tokenizer", tmp_path / "other.pt", "--out", tmp_path / "b")


def test_teacher_forcing_reproduces_an_overfitted_set(script, tokenizer, tmp_path, capsys, monkeypatch):
    # eight images, of a class each: s_1 depends on the label alone
    monkeypatch.setattr(Shapes, "SIZES", {"train": 8, "val": 8})
    make = Shapes.__init__
    monkeypatch.setattr(Shapes, "__init__", lambda self, split="train": make(self, "train"))
    script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "p", "--iters", 200, "--batch_size", 8,
           "--dropout", 0, "--crop", "center", "--views", 1, "--log_every", 100, "--lr", 2e-3)
    script("sample", "--teacher_forced", "shapes", "--n", 8, "--out", tmp_path / "view", "--device", "cpu",
           "--runs", f"{tmp_path}/p/ckpt.pt:{tokenizer}", f"{tmp_path}/p/ckpt.pt:{tokenizer}")
    out = capsys.readouterr().out
    accuracy = re.findall(r"teacher-forced top-1 accuracy ([\d.]+) %", out)
    assert len(accuracy) == 2 and min(map(float, accuracy)) > 97
    assert Image.open(tmp_path / "view/teacher_forced.png").size == (6 * (5 * 18 + 2), 6 * (8 * 18 + 2))


def test_the_view_predicts_from_the_true_context(tokenizer, train, tmp_path, script):
    """s'_i is the argmax given s_<i, s_1 from the prefix alone, both decoded by the same decoder."""
    train()
    state = torch.load(tmp_path / "prior/ckpt.pt", weights_only=True)
    prior = Transformer(**state["config"])
    prior.load_state_dict(state["model"])
    prior.eval()
    model = load_tokenizer(tokenizer)
    image, label, _ = data.EvalImages(Shapes("val"), 16)[0]
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
    grid = np.asarray(Image.open(tmp_path / "v/teacher_forced.png"))[::6, ::6]  # enlarged for the eye
    exact = ((expected.clamp(-1, 1) + 1) * 127.5).round().byte()[0].permute(1, 2, 0).numpy()
    assert np.abs(grid[2:-2, 38:54].astype(int) - exact).max() <= 1


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
            draw(i, i % 10, 40).save(file, "WEBP")
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
    for words, message in [
            (["--betas", 1, 1], "at most 0.99"), (["--classes", 5], "has 10 classes, --classes says 5"),
            (["--tokenizer", prior], "holds a prior checkpoint"), (["--kind", "gan"], "invalid choice"),
            (["--label_dropout", 1], "at most 0.99"), (["--label_dropout", 0.1, "--classes", 0], "needs classes"),
            (["--val", photos], "has other classes"), (["--batch_size", 7, "--accum", 2], "divisible")]:
        with pytest.raises(BadInput, match=message) as error:
            train(*words, out="fresh")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "fresh").exists()  # refused before any work
    with pytest.raises(BadInput, match="already holds a run"):
        train()

    good = ["--prior", prior, "--tokenizer", tokenizer, "--device", "cpu", "--out", tmp_path / "s"]
    for words, message in [
            ([*good, "--n", 0], "at least 1"), ([*good, "--top_p", 0], "above 0"),
            ([*good, "--top_p", 1.1], "at most 1"), ([*good, "--top_k", 17], "top_k"),
            ([*good, "--steps", 3], "are for NAR"), ([*good, "--cfg", 1], "null class"),
            ([*good, "--labels", 10], "use 0 to 9"), ([*good, "--labels", 3, 10], "use 0 to 9"),
            (["--prior", prior], "runs/tokenizer/ckpt.pt: no such file; python train_tokenizer.py makes"),
            ([*good, tmp_path / "t"], "one folder for each"),
            ([*good, tmp_path / "s"], "one folder for each"),
            (["--noise", "shapes", "--tokenizer", "a", "b"], "one --tokenizer"),
            (["--prior", tokenizer, "--tokenizer", tokenizer], "holds a tokenizer checkpoint"),
            (["--prior", prior, "--tokenizer", prior], "holds a prior checkpoint"),
            ([], "runs/prior/best.pt: no such file; python train_prior.py makes"),
            (["--prior", prior, "--noise", "shapes"], "give one of"),
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
