"""train_prior.py and sample.py: code cache, training, resume, processes, samples, views."""
import contextlib
import fcntl
import gc
import json
import re
import resource
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PRIOR,
    cells,
    lines,
    load,
    noise,
    run_scripts,
    save_prior,
    save_tokenizer,
    to_pixels,
)
from PIL import Image

import data
import losses
import runtime
import sample
import train_prior
import vq
from miniature.shapes import Shapes
from train_prior import learning_rate
from transformer import Transformer, load_prior

CPU, C = torch.device("cpu"), len(Shapes.classes)


@pytest.fixture
def train(script, tokenizer, tmp_path):
    def call(*words, out="prior"):
        script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / out, *words)
        return load(tmp_path / out / "ckpt.pt")
    return call


@pytest.fixture
def phase_2(tokenizer, tmp_path):
    """A tokenizer with the same codes and another decoder."""
    path = save_tokenizer(tmp_path / "phase2.pt", attention=1)
    state, codes = load(path), load(tokenizer)["model"]
    state["model"] |= {k: v for k, v in codes.items() if not k.startswith("decoder")}
    torch.save(state, path)
    return path


@pytest.fixture
def encoded(monkeypatch):
    """A list to which each batch that a tokenizer encodes adds its size."""
    sizes, encode = [], vq.VQModel.encode
    monkeypatch.setattr(vq.VQModel, "encode",
                        lambda self, x: sizes.append(len(x)) or encode(self, x))
    return sizes


def encode(folder, tokenizer, source, crop="random", views=2, size=16):
    model, args = vq.load_tokenizer(tokenizer)[0], Namespace(workers=0)
    views = train_prior.AugmentedViews(source, size, crop, views)
    return train_prior.build_code_cache(folder, views, model, vq.fingerprint(model), args)


def read_cache(run, split):
    path, = run.glob(f"codes/{split}-*.bin")
    return np.fromfile(path, [("codes", np.uint16, 64), ("label", np.int32)])


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    gc.collect()  # closes the script's files, as the end of its process would
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --------------------------------------------------------------------------------- the code cache

def test_the_cache_holds_the_codes_of_each_view(tokenizer, tmp_path):
    model, _ = vq.load_tokenizer(tokenizer)
    cache = encode(tmp_path / "a", tokenizer, Shapes())
    codes = cache["codes"]
    assert codes.shape == (120, 64) and codes.dtype == np.uint16
    for row in range(0, 120, 7):
        image, label = Shapes().load(row // 2, 16)
        view = data.augment(image, 16, "random", np.random.default_rng([0, row]))
        x = torch.tensor(view.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        assert (codes[row] == model.encode(x)[1].flatten().numpy()).all()
        assert cache["label"][row] == label
    assert (codes[::2] != codes[1::2]).any()  # flips
    codes = encode(tmp_path / "b", tokenizer, Shapes("val"), "center", 1)["codes"]
    x = data.to_float(data.EvalImages(Shapes("val"), 16)[5][0][None], CPU)
    assert len(codes) == 12 and codes[5].tolist() == model.encode(x)[1].flatten().tolist()


def test_encoding_resumes_from_whole_batches_of_a_cut_file(tokenizer, tmp_path, encoded,
                                                           monkeypatch):
    encode(tmp_path / "codes", tokenizer, Shapes())
    path, = tmp_path.glob("codes-*.bin")
    whole = path.read_bytes()
    for rows, batches in ((31.5, 4), (64, 2), (70.5, 2), (119.9, 1), (120, 0)):
        path.write_bytes(whole[:int(len(whole) * rows / 120)])
        encoded.clear()
        encode(tmp_path / "codes", tokenizer, Shapes())
        assert encoded == [32] * batches and path.read_bytes() == whole, rows
    # Another run finishes the file while this one waits for it.
    path.unlink()
    monkeypatch.setattr(fcntl, "lockf", lambda file, mode: path.write_bytes(whole))
    encode(tmp_path / "codes", tokenizer, Shapes())
    assert not encoded and path.read_bytes() == whole


def test_codes_above_65535_are_kept(tokenizer, tmp_path, monkeypatch):
    model, _ = vq.load_tokenizer(tokenizer)
    model.quantizer.codebook_size = 70_000
    monkeypatch.setattr(model, "encode", lambda x: (x, torch.full((len(x), 8, 8), 69_999)))
    views, args = train_prior.AugmentedViews(Shapes(), 16, "center", 1), Namespace(workers=0)
    cache = train_prior.build_code_cache(tmp_path / "codes", views, model, "", args)
    assert (cache["codes"] == 69_999).all()


def test_the_name_of_a_cache_depends_on_all_that_the_codes_depend_on(tokenizer, phase_2, tmp_path,
                                                                     photos):
    other, folder = save_tokenizer(tmp_path / "other.pt", seed=1), tmp_path / "codes"

    def new(tokenizer=tokenizer, source=None, **options):
        before = {*folder.glob("*")}
        encode(folder / "train", tokenizer, source or Shapes("val"), **options)
        return len({*folder.glob("*")} - before)
    assert new() == 1 and new() == new(tokenizer=phase_2) == 0
    changes = [dict(tokenizer=other), dict(source=Shapes()), dict(crop="resized"), dict(views=3),
               dict(size=32), dict(source=data.open_source(str(photos)))]
    for change in changes:
        assert new(**change) == 1, change
    Image.new("RGB", (64, 64)).save(photos / "cats/grey.png")  # another image of that name
    assert new(source=data.open_source(str(photos))) == 1


def test_a_full_disk_is_one_sentence_and_costs_nothing(rejected, tokenizer, prior, tmp_path):
    words = ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "run"]
    with full_disk(10_000):
        assert "cannot write" in (sentence := rejected(*words)) and ".bin: " in sentence
    found = encode(tmp_path / "run/codes/train", tokenizer, Shapes())  # when there is space again
    assert found.tobytes() == encode(tmp_path / "whole", tokenizer, Shapes()).tobytes()
    words = ["sample", "--prior", prior, "--tokenizer", tokenizer, "--device", "cpu", "--count",
             32, "--batch_size", 8, "--out", tmp_path / "samples"]
    with full_disk(10_000):
        assert "samples.npz: " in (sentence := rejected(*words)) and "cannot write" in sentence
    assert not [*tmp_path.glob("samples/*")]


# --------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_a_step_is_the_mean_over_all_predicted_codes(kind):
    torch.manual_seed(0)
    model = Transformer(kind, "tiny", 16, 9, 5, dropout=0.0).train()
    s, labels, u = torch.randint(16, (8, 9)), torch.randint(5, (8,)), torch.rand(8, 11)
    parts = [(s[i], *model.make_inputs(s[i], labels[i], u[i])) for i in (slice(0, 4), slice(4, 8))]
    loss = train_prior.prior_step(model, parts, Namespace(dtype="fp32"))
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tokens, labels, mask = model.make_inputs(s, labels, u)
    log_p = model(tokens, labels).double().log_softmax(-1)
    picked = log_p.gather(-1, s[..., None])[..., 0]
    smoothed = 0.9 * picked + 0.1 * log_p.mean(-1)
    want = -(smoothed if kind == "nar" else picked)[mask].mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=1e-4, atol=1e-6)


def test_learning_rates_are_table_10s(tokenizer, tmp_path, monkeypatch):
    words = ["train_prior.py", "--tokenizer", str(tokenizer), "--out", str(tmp_path / "x")]
    for more, rates in [
            ("", {0: 1e-4, 80_000: 1e-4, 790_000: 1e-4 * 0.05**0.5, 1_500_000: 5e-6}),
            ("--kind nar", {0: 1e-4, 50_000: 1e-4, 775_000: 5e-5, 1_500_000: 0}),
            ("--iters 1500 --lr 2e-3", {80: 2e-3, 790: 2e-3 * 0.05**0.5, 1500: 1e-4}),  # shrunk
            ("--lr_end 1e-6 --decay_start 500000", {500_000: 1e-4, 1_000_000: 1e-5})]:
        monkeypatch.setattr(sys, "argv", words + more.split())
        args = train_prior.parse()
        assert {n: learning_rate(n, args) for n in rates} == pytest.approx(rates), more


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_validation_equals_a_loop(train, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 70})  # more than a batch of 64
    state, run, losses = train("--kind", kind, "--lr", 0.02), tmp_path / "prior", {}
    values = lines(run, "val")
    best = min(values, key=lambda value: value["loss"])
    model, saved = load_prior(run / "best.pt")
    assert saved["step"] == best["step"] and [line["step"] for line in values] == [0, 3, 6]
    u = torch.rand(70, 66, generator=torch.Generator().manual_seed(0))
    for i, (s, label) in enumerate(read_cache(run, "val")):
        s = torch.from_numpy(s.astype(int))
        tokens, _, mask = model.make_inputs(s[None], None, u[i:i + 1])
        log_p = model(tokens, torch.tensor([label])).log_softmax(-1)[0]
        for j in range(64):
            known = sum(not mask[0, k] for k in range(64) if k != j) / 63
            little, much = (j == 0, j >= 32) if kind == "ar" else (known < 1 / 4, known > 3 / 4)
            names = ["loss"] + ["loss_little_context"] * little + ["loss_much_context"] * much
            for name in names if mask[0, j] else ():
                losses.setdefault(name, []).append(-log_p[j, s[j]].item())
    want = {name: np.mean(each) for name, each in losses.items()}
    codes = read_cache(run, "train")["codes"]
    p = np.unique(codes, return_counts=True)[1] / codes.size
    want["unigram_entropy"] = -(p * np.log(p)).sum()
    want["entropy_minus_loss"] = want["unigram_entropy"] - want["loss"]
    assert len(want) == 5
    assert {name: best[name] for name in want} == pytest.approx(want, abs=2e-5)
    rates = [learning_rate(step, Namespace(**state["args"])) for step in range(6)]
    assert [line["lr"] for line in lines(run, "train")] == pytest.approx(rates, rel=1e-5)


@pytest.mark.parametrize("uses", [True, False])
def test_a_prior_that_ignores_the_other_codes_is_reported(train, monkeypatch, capsys, uses):
    """All codes of an image are equal. The more of them are known, the surer this model is."""
    encode, forward = vq.VQModel.encode, Transformer.forward

    def logits(self, tokens, labels):
        known = F.one_hot(tokens, 17)[..., :16].float().mean(1, keepdim=True)  # (B, 1, K)
        return 0 * forward(self, tokens, labels) + 10 * uses * known
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 70})
    monkeypatch.setattr(vq.VQModel, "encode",
                        lambda *args: (0, encode(*args)[1][:, :1, :1].expand(-1, 8, 8)))
    monkeypatch.setattr(Transformer, "forward", logits)
    train("--kind", "nar", "--iters", 4, "--eval_every", 1)  # from the middle on: 2, 3, 4
    assert capsys.readouterr().out.count("ignores the other codes") == (0 if uses else 3)


def test_best_and_validated_survive_a_resume(train, script, rejected, tokenizer, tmp_path,
                                             monkeypatch, signal_at, capsys):
    losses = [3.0, 1.0, 2.0, 1.5, 1.7]
    names, found = ("loss", "loss_little_context", "loss_much_context"), iter(losses)
    monkeypatch.setattr(train_prior, "validate", lambda *args: dict.fromkeys(names, next(found)))

    def steps():
        return [load(tmp_path / f"prior/{name}.pt")["step"] for name in ("ckpt", "best")]
    signal_at(3)
    with pytest.raises(SystemExit, match="143"):
        train("--eval_every", 1, "--iters", 4)
    assert steps() == [3, 1]
    signal_at(None)
    for _ in range(2):  # the first makes up for the validation of step 3
        capsys.readouterr()
        script("train_prior", "--resume", "--out", tmp_path / "prior")  # the flags are the run's
        assert steps() == [4, 1]
    assert "is finished" in capsys.readouterr().out
    assert [value["loss"] for value in lines(tmp_path / "prior", "val")] == losses
    save_tokenizer(tokenizer, seed=1)  # trained on in the meantime: other codes
    assert str(tokenizer) in rejected("train_prior", "--resume", "--out", tmp_path / "prior")


def test_classes_the_null_class_and_a_shared_cache(train, many_photos, tmp_path, encoded):
    state = train("--data", many_photos, "--iters", 1, out="photos")  # a part is held out
    assert state["classes"] == ["cats", "dogs"] and state["config"]["num_classes"] == 2
    torch.manual_seed(0)
    before = Transformer("ar", "tiny", 16, 64, C, null_class=True).cls_emb.weight
    after = train("--label_dropout", 1, "--iters", 1)["model"]["cls_emb.weight"]
    assert (after != before).any(1).tolist() == [False] * C + [True]  # no class is seen
    encoded.clear()
    for classes, kind in ((0, "ar"), (C, "nar")):
        state = train("--code_cache", tmp_path / "prior/codes", "--num_classes", classes,
                      "--kind", kind, "--seed", 1, "--iters", 1, out=kind)
        assert state["config"]["num_classes"] == classes and state["config"]["kind"] == kind
    assert not encoded  # seeds and kinds share the codes


# The smaller data set, and a copy of the codes after a round: what a SIGKILL would leave.
KILLED = """
import shutil
Shapes.SIZES = {"train": 80, "val": 140}

def to_float(*args, batches=[], real=data.to_float):
    batches.append(args)
    if runtime.is_main() and len(batches) == 2:
        shutil.copytree("OUT/two/codes", "OUT/killed")
    return real(*args)
data.to_float = to_float
"""


def test_two_processes_equal_one(train, script, tokenizer, tmp_path, monkeypatch, encoded):
    """One process takes two micro-batches. Two encode five batches in three rounds."""
    monkeypatch.setattr(Shapes, "SIZES", {"train": 80, "val": 140})
    words = ["--kind", "nar", "--dropout", 0, "--lr", 1e-4, "--label_dropout", 0.3]
    draw = ["sample", "--prior", tmp_path / "two/ckpt.pt", "--tokenizer", tokenizer, "--count", 10,
            "--decode_steps", 3, "--batch_size", 4, "--device", "cpu", "--out"]
    two = ["train_prior", *PRIOR, "--tokenizer", tokenizer, *words, "--out", tmp_path / "two"]
    run_scripts(tmp_path, (two, [*draw, tmp_path / "s2"]), KILLED.replace("OUT", str(tmp_path)))
    train(*words, "--grad_accum", 2, out="one")
    for split, rows in (("train", 160), ("val", 140)):
        one, two = (read_cache(tmp_path / run, split) for run in ("one", "two"))
        assert len(one) == rows and one.tobytes() == two.tobytes()
        one, two = ([{k: line[k] for k in line if k.startswith("loss")}
                     for line in lines(tmp_path / run, split)] for run in ("one", "two"))
        assert len(one) == len(two) == {"train": 6, "val": 3}[split]
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in zip(one, two))
    encoded.clear()  # two processes were killed after a round; one resumes
    resumed = encode(tmp_path / "killed/train", tokenizer, Shapes())
    assert encoded == [32] * 3
    assert resumed.tobytes() == read_cache(tmp_path / "two", "train").tobytes()
    script(*draw, tmp_path / "s1")
    a, b = (np.load(tmp_path / s / "samples.npz") for s in ("s1", "s2"))
    assert all(np.array_equal(a[name], b[name]) for name in ("arr_0", "arr_1"))


# --------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("kind, options", [
    ("ar", dict(top_k=9, top_p=0.9)), ("nar", dict(decode_steps=3, choice_temperature=1.0))])
def test_samples_are_whole_batches_decoded(script, tokenizer, phase_2, tmp_path, kind, options):
    """Samples 8 and 9 are the first two of a batch of four. Phase 2 decodes the same codes."""
    path = save_prior(tmp_path / "prior.pt", tokenizer, kind=kind, null_class=True)
    options |= dict(temperature=0.8, cfg_scale=2.0)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    prior, codes = load_prior(path)[0], []
    for first in (0, 4, 8):
        torch.manual_seed(runtime.mix_seeds(7, first))
        codes.append(prior.generate(4, torch.tensor([3, 5, 3, 5]), **options))
    codes = torch.cat(codes)[:10].view(10, 8, 8)
    for out, file in (("one", tokenizer), ("two", phase_2)):
        script("sample", "--prior", path, "--tokenizer", file, "--labels", 3, 5, "--count", 10,
               "--batch_size", 4, "--seed", 7, "--device", "cpu", "--out", tmp_path / out, *words)
        images = np.load(tmp_path / out / "samples.npz")["arr_0"]
        want = to_pixels(vq.load_tokenizer(file)[0].decode_indices(codes))
        assert images.shape == (10, 16, 16, 3) and abs(images - want).max() <= 1


def test_the_files_of_the_samples(script, prior, tokenizer, tmp_path, rejected, monkeypatch):
    words = ["--prior", prior, "--tokenizer", tokenizer, "--device", "cpu", "--count", 12]
    with monkeypatch.context() as broken, pytest.raises(TypeError):
        broken.setattr(np.lib.format, "write_array", None)  # fails when all but the labels is there
        script("sample", *words, "--out", tmp_path / "a")
    assert not [*(tmp_path / "a").iterdir()]
    script("sample", *words, "--out", tmp_path / "a")
    saved = np.load(tmp_path / "a/samples.npz")
    np.savez(tmp_path / "b.npz", saved["arr_0"], np.arange(12) % C)  # ADM's layout
    one, two = (zipfile.ZipFile(path) for path in (tmp_path / "a/samples.npz", tmp_path / "b.npz"))
    assert one.namelist() == two.namelist()
    for a, b in zip(one.infolist(), two.infolist()):
        assert one.read(a) == two.read(b) and a.compress_type == b.compress_type
    made = json.loads((tmp_path / "a/sampler.json").read_text())
    assert made["count"] == 12 and made["top_p"] == 0.92 and made["kind"] == "ar"
    assert len([*(tmp_path / "a").iterdir()]) == 3  # nothing unfinished is left
    assert str(tmp_path / "a") in rejected("sample", *words, "--out", tmp_path / "a")
    script("sample", *words, "--count", 3, "--out", tmp_path / "d")
    assert np.load(tmp_path / "d/samples.npz")["arr_1"].tolist() == [0, 2, 5]  # evenly spaced
    save_prior(prior, tokenizer, num_classes=0)
    script("sample", *words, "--out", tmp_path / "e")
    assert np.load(tmp_path / "e/samples.npz").files == ["arr_0"]  # no labels
    samples = [*np.load(tmp_path / "e/samples.npz")["arr_0"], *np.full((4, 16, 16, 3), 255)]
    assert np.array_equal(cells(tmp_path / "e/grid.png", 8), samples)
    assert Image.open(tmp_path / "e/grid.png").width == 6 * (8 * 18 + 2)  # no names
    save_prior(prior, tokenizer)  # a row per class would show one sample of each
    script("sample", *words, "--labels", *range(6), *range(6), "--out", tmp_path / "f")
    assert Image.open(tmp_path / "f/grid.png").width == 6 * (8 * 18 + 2)


@pytest.mark.parametrize("labels, count, rows, columns", [
    ([], 8, 6, 2), (["cone", 0], 20, 2, 8), ([*range(6), *range(4)], 40, 8, 4), ([], 3, 3, 1)])
def test_a_row_of_the_grid_shows_one_class_beside_its_name(script, prior, tokenizer, tmp_path,
                                                           labels, count, rows, columns):
    words = ["--prior", prior, "--tokenizer", tokenizer, "--device", "cpu", "--out", tmp_path]
    script("sample", *words, "--count", count, *(["--labels", *labels] if labels else []))
    saved, blank = np.load(tmp_path / "samples.npz"), np.full((16, 16, 3), 255)
    period = len(labels) or min(count, C)
    found, numbers = iter(cells(tmp_path / "grid.png", columns)), range(count)
    for first in range(rows):
        shown = numbers[first::period][:8]
        assert len({saved["arr_1"][n] for n in shown}) == 1
        for image in [*saved["arr_0"][shown], *[blank] * (columns - len(shown))]:
            assert np.array_equal(next(found), image)
    assert next(found, None) is None
    names = np.asarray(Image.open(tmp_path / "grid.png"))[:, :-6 * (18 * columns + 2)]
    assert all((row < 128).any() for row in np.split(names[12:], rows))


@pytest.mark.parametrize("kind, name, values, others", [
    ("ar", "top_p", (0.92, 0.98), ("decode_steps", "choice_temperature")),
    ("nar", "choice_temperature", (0.45, 0.65), ("top_p", "top_k"))])
def test_sampling_defaults_are_table_10s(monkeypatch, kind, name, values, others):
    def options(classes, *words):
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        prior = Transformer(kind, "tiny", 16, 4, classes)
        return sample.decoding_options(sample.parse(), prior)
    more = {"ar": {"top_k": 0}, "nar": {"decode_steps": 12}}[kind]
    more |= {"temperature": 1, "cfg_scale": 1}
    assert options(10) == more | {name: values[0]} and options(0) == more | {name: values[1]}
    assert options(0, f"--{name}", "0.5")[name] == 0.5
    for other in others:
        with pytest.raises(SystemExit, match=f"--{other} .*{kind.upper()}"):
            options(10, f"--{other}", "1")


def test_what_does_not_belong_together_is_rejected(prior, tokenizer, tmp_path, rejected,
                                                   monkeypatch):
    other, out = save_tokenizer(tmp_path / "other.pt", seed=1), tmp_path / "out"
    words = ["sample", "--device", "cpu", "--out", out, "--tokenizer", tokenizer, "--prior", prior]
    view = [*words, "--teacher_forced", "shapes", "--runs"]
    assert "other.pt" in rejected(*view, f"{prior}:{other}")
    state = load(prior)
    state["args"]["tokenizer"] = "runs/mine/ckpt.pt"
    torch.save(state, prior)
    sentence = rejected(*words, "--tokenizer", other)
    assert "runs/mine/ckpt.pt or its phase 2" in sentence and "earlier" in sentence
    for pairs in ([], ["--runs", prior], ["--runs", f"C:{prior}:{tokenizer}"]):
        assert "--runs" in rejected(*words, "--teacher_forced", "shapes", *pairs)
    assert "--reconstruct" in rejected(*words, "--tokenizers", tokenizer)
    nar = save_prior(tmp_path / "nar.pt", tokenizer, kind="nar")
    assert "nar.pt" in rejected(*view, f"{nar}:{tokenizer}")
    assert "--label_dropout" in rejected(*words, "--cfg_scale", 2)
    assert "nearest names: cone" in rejected(*words, "--labels", "cones")
    bare = save_prior(tmp_path / "bare.pt", tokenizer, num_classes=0)
    assert "without classes" in rejected(*words, "--prior", bare, "--labels", 1)
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    for flag in ("--noise", "--reconstruct"):
        assert "one process" in rejected(*words, flag, "shapes")
    assert not out.exists()


# ------------------------------------------------------------------------------- looking inside

def test_the_teacher_forced_view_equals_a_loop(prior, tokenizer, phase_2, tmp_path, script, capsys):
    """s'_i is the argmax given s_<i, and s_1 given only the class."""
    script("sample", "--teacher_forced", "shapes", "--count", 3, "--out", tmp_path, "--device",
           "cpu", "--runs", f"{prior}:{tokenizer}", f"{prior}:{phase_2}")
    shown, right = cells(tmp_path / "teacher_forced.png", 3), 0
    one, two = (vq.load_tokenizer(path)[0] for path in (tokenizer, phase_2))
    net, _ = load_prior(prior)
    for column, i in enumerate((0, 5, 11)):  # evenly spaced in the validation set
        image, label = data.EvalImages(Shapes("val"), 16)[i]
        s, top1 = one.encode(data.to_float(image[None], CPU))[1], []
        for j in range(64):  # codes from j on are blotted out: they must not matter
            before = torch.where(torch.arange(64) < j, s.flatten(1), 0)
            top1.append(net(before, torch.tensor([label]))[0, j].argmax())
        top1 = torch.stack(top1).view_as(s)
        right += (top1 == s).sum().item()
        want = [m.decode_indices(codes) for m in (one, two) for codes in (s, top1)]
        want = to_pixels(torch.cat([data.to_float(image[None], CPU), *want]))
        assert len(shown) == 15 and abs(shown[column::3] - want).max() <= 1
    said = re.findall(r"accuracy ([\d.]+) %", capsys.readouterr().out)
    assert said == [f"{100 * right / 192:.1f}"] * 2


def test_changed_codes_under_noise_equal_a_loop_over_held_out_images(tmp_path, many_photos, script,
                                                                    capsys):
    images = data.EvalImages(data.open_source(str(many_photos), "val", True), 16)
    y = torch.stack([images[i][0] for i in range(len(images))]) / 255
    tokenizer = save_tokenizer(tmp_path / "photos.pt", data=str(many_photos))
    model, saved = vq.load_tokenizer(tokenizer)
    noisy = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    before, after = ([model.encode(2 * x[None] - 1)[1] for x in part] for part in (y, noisy))
    changed = (torch.cat(before) != torch.cat(after)).float().mean()
    script("sample", "--noise", many_photos, "--tokenizer", tokenizer, "--count", 160, "--sigma",
           0.1, "--seed", 3, "--device", "cpu")
    assert f"\n{100 * changed:.2f} %" in capsys.readouterr().out and changed > 0.02
    saved["args"]["val"] = "elsewhere"  # then no image of the folder is held out
    assert len(sample.read_images(str(many_photos), [(model, saved)], 160)[0]) == 160


def test_reconstructions_equal_a_loop(tokenizer, phase_2, photos, vgg, script, tmp_path, capsys):
    """Of two tokenizers with the same codes; the first one's --vgg is the default."""
    state = load(tokenizer)
    state["args"]["vgg"] = str(vgg)
    torch.save(state, tokenizer)
    script("sample", "--reconstruct", photos, "--tokenizers", tokenizer, phase_2, "--count", 7,
           "--out", tmp_path, "--device", "cpu")
    table = [line.split() for line in capsys.readouterr().out.splitlines() if ".pt" in line]
    images = data.EvalImages(data.open_source(str(photos)), 16)
    x = [data.to_float(images[i][0][None], CPU) for i in (0, 1, 2, 3, 4, 5, 7)]  # evenly spaced
    perceptual = losses.PerceptualLoss(losses.load_vgg(vgg), layers=losses.LAYERS)
    shown = cells(tmp_path / "reconstructions.png", 7)
    assert len(shown) == 21 and np.array_equal(shown[:7], to_pixels(torch.cat(x)))
    for row, path in enumerate((tokenizer, phase_2)):
        model, values, used = vq.load_tokenizer(path)[0], [], set()
        codes = np.load(tmp_path / f"codes{row + 1}.npy")
        assert codes.shape == (7, 8, 8)
        for i in range(7):
            x_hat, indices, _ = model(x[i])
            assert np.array_equal(codes[i], indices[0])
            used |= {*indices.flatten().tolist()}
            assert abs(shown[7 * (row + 1) + i] - to_pixels(x_hat)).max() <= 1
            *low, logit = perceptual(x_hat, x[i])[1].values()
            values.append([*vq.l1_and_psnr(x_hat, x[i]), sum(low), low[-1] + logit])
        want = [*np.mean(values, 0), 100 * len(used) / 16]
        for word, value, digits in zip(table[row], want, (4, 2, 4, 4, 1)):
            assert float(word) == pytest.approx(value, abs=0.6 * 10 ** -digits)
        assert table[row][-1] == str(path)


def test_one_tokenizer_reconstructs_many_images(tokenizer, many_photos, script, tmp_path, capsys):
    """More than the sheet's 64, in batches; without a network there is no L_low."""
    script("sample", "--reconstruct", many_photos, "--tokenizer", tokenizer, "--count", 150,
           "--out", tmp_path, "--device", "cpu")
    row = capsys.readouterr().out.splitlines()[2]
    assert row.split()[2:4] == ["nan", "nan"] and str(tokenizer) in row
    codes, model = np.load(tmp_path / "codes.npy"), vq.load_tokenizer(tokenizer)[0]
    images = data.EvalImages(data.open_source(str(many_photos)), 16)
    chosen = data.evenly_spaced(160, 150)
    assert codes.shape == (150, 8, 8)
    for j in (0, 70, 149):
        x = data.to_float(images[chosen[j]][0][None], CPU)
        assert np.array_equal(codes[j], model.encode(x)[1][0])
    shown = cells(tmp_path / "reconstructions.png", 8).reshape(8, 2, 8, 16, 16, 3)
    want = [images[chosen[j]][0].permute(1, 2, 0) for j in data.evenly_spaced(150, 64)]
    assert np.array_equal(shown[:, 0].reshape(64, 16, 16, 3), torch.stack(want))


def test_images_that_can_not_be_reconstructed_are_one_sentence(tokenizer, rejected, tmp_path):
    words = ["sample", "--tokenizer", tokenizer, "--device", "cpu", "--out", tmp_path / "out",
             "--reconstruct"]
    (tmp_path / "mine").mkdir()
    assert "no images" in rejected(*words, tmp_path / "mine")
    Image.fromarray(noise(0, 40, 30)).save(tmp_path / "mine/good.png")
    (tmp_path / "mine/bad.png").write_text("a page")
    assert "bad.png" in rejected(*words, tmp_path / "mine")
    large = save_tokenizer(tmp_path / "large.pt", image_size=32)
    assert "image sizes" in rejected(*words, "shapes", "--tokenizers", tokenizer, large)
    assert not (tmp_path / "out").exists()
