"""train_prior.py and sample.py: code cache, training, resume, processes, samples, views."""
import json
import math
import re
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PRIOR, ROOT, launch, lines, load, same, save_prior, save_tokenizer
from PIL import Image

import data
import runtime
import sample
import train_prior
import vq
from miniature.shapes import Shapes
from train_prior import encode_dataset, learning_rate
from transformer import Transformer, load_prior

CPU, C = torch.device("cpu"), len(Shapes.classes)
EMPTY = 65535  # in the cache: no code yet


@pytest.fixture
def train(script, tokenizer, tmp_path):
    def call(*words, out="prior"):
        script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / out, *words)
        return load(tmp_path / out / "ckpt.pt")
    return call


@pytest.fixture
def phase_2(tokenizer, tmp_path):
    """A tokenizer with the same codes and another decoder."""
    one = load(tokenizer)
    one["config"]["attention"] = 1
    kept = {k: v for k, v in one["model"].items() if not k.startswith("decoder")}
    one["model"] = vq.VQModel(**one["config"]).state_dict() | kept
    torch.save(one, tmp_path / "phase2.pt")
    return tmp_path / "phase2.pt"


def encode(folder, tokenizer, source, crop="random", views=2, size=16):
    args = SimpleNamespace(image_size=size, workers=0)
    return encode_dataset(folder, source, vq.load_tokenizer(tokenizer)[0], crop, views, args, CPU)


def driver(path, change):
    """A script that is train_prior.py with something changed."""
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport os, time\nimport data, "
                    f"runtime, train_prior\n{change}\nruntime.launch(train_prior.main)\n")
    return path


def pictures(images):
    return data.to_uint8(images).permute(0, 2, 3, 1).numpy().astype(int)


def cells(path, columns):
    """The 16 x 16 images of a grid, row by row; it enlarges them six times."""
    grid = np.asarray(Image.open(path))[::6, ::6][2:, 2:].astype(int)
    grid = grid.reshape(-1, 18, columns, 18, 3).swapaxes(1, 2)
    return grid[:, :, :16, :16].reshape(-1, 16, 16, 3)


def test_the_cache_holds_the_codes_of_each_view(tokenizer, tmp_path):
    model, _ = vq.load_tokenizer(tokenizer)
    codes, labels = encode(tmp_path / "a", tokenizer, Shapes())
    assert codes.shape == (120, 64) and codes.dtype == np.uint16 and labels.dtype == np.int32
    for row in range(0, 120, 7):
        image, label = Shapes().load(row // 2, 16)
        view = data.augment(image, 16, "random", np.random.default_rng([0, row]))
        x = torch.tensor(view.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        assert (codes[row] == model.encode(x)[1].flatten().numpy()).all() and labels[row] == label
    assert (codes[::2] != codes[1::2]).any()  # flips
    codes, _ = encode(tmp_path / "b", tokenizer, Shapes("val"), "center", 1)
    x = data.to_float(data.EvalImages(Shapes("val"), 16)[5][0][None], CPU)
    assert len(codes) == 12 and codes[5].tolist() == model.encode(x)[1].flatten().tolist()


def test_a_killed_cache_goes_on(tokenizer, tmp_path, many_photos, monkeypatch):
    """Killed before the fourth batch of ten: seven are left to do."""
    script = driver(tmp_path / "driver.py", """
def to_float(*args, batches=[], real=data.to_float):
    batches.append(args)
    return real(*args) if len(batches) < 4 else os.kill(os.getpid(), 9)
data.to_float = to_float""")
    words = [*PRIOR, "--tokenizer", tokenizer, "--data", many_photos, "--val", many_photos]
    assert launch([script, *words, "--out", tmp_path / "p"], check=False).returncode == -9
    path, = tmp_path.glob("p/codes/train-*/codes.npy")
    assert ((np.load(path) != EMPTY).all(1) == (np.arange(320) < 96)).all()
    source, made, real = data.open_source(str(many_photos)), [], vq.VQModel.encode
    monkeypatch.setattr(vq.VQModel, "encode", lambda self, x: made.append(len(x)) or real(self, x))
    for _ in range(2):  # the second time nothing is left to do
        went_on = encode(tmp_path / "p/codes/train", tokenizer, source)
        assert made == [32] * 7
    whole = encode(tmp_path / "whole", tokenizer, source)
    assert all(map(np.array_equal, whole, went_on)) and not (went_on[0] == EMPTY).any()


def test_a_codebook_of_more_than_65535_codes(tokenizer, tmp_path):
    model, _ = vq.load_tokenizer(tokenizer)
    codebook = model.quantizer.codebook.data
    model.quantizer.codebook.data = torch.cat([codebook + 100] * 4374 + [codebook])  # 70,000
    model.quantizer.codebook_size = 70_000
    args = SimpleNamespace(image_size=16, workers=0)
    codes, _ = encode_dataset(tmp_path, Shapes("val"), model, "center", 1, args, CPU)
    images = data.EvalImages(Shapes("val"), 16)
    rows = torch.stack([images[i][0] for i in range(len(images))])  # one batch, as above: others
    found = model.encode(data.to_float(rows, CPU))[1].flatten(1)    # may round otherwise
    assert codes.min() >= 69_984 and np.array_equal(codes, found)


def test_codes_that_are_not_there_at_the_end_are_missed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(vq.VQModel, "encode", lambda self, x: (0, torch.full((len(x), 64), EMPTY)))
    with pytest.raises(SystemExit, match="lacks codes"):
        encode(tmp_path / "a", tokenizer, Shapes("val"))


def test_what_decides_the_codes_names_their_folder(tokenizer, phase_2, tmp_path, photos):
    other, folders = save_tokenizer(tmp_path / "other.pt", seed=1), tmp_path / "codes"

    def new(tokenizer=tokenizer, source=None, **options):
        before = {*folders.glob("*")}
        encode(folders / "train", tokenizer, source or Shapes("val"), **options)
        return len({*folders.glob("*")} - before)
    assert new() == 1 and new() == new(tokenizer=phase_2) == 0
    changes = [dict(tokenizer=other), dict(source=Shapes()), dict(crop="resized"), dict(views=3),
               dict(size=32), dict(source=data.open_source(str(photos)))]
    for change in changes:
        assert new(**change) == 1, change
    Image.new("RGB", (64, 64)).save(photos / "cats/grey.png")  # another picture of that name
    assert new(source=data.open_source(str(photos))) == 1


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_a_step_is_the_mean_over_all_predicted_codes(kind):
    torch.manual_seed(0)
    model = Transformer(kind, "tiny", 16, 9, 5, dropout=0.0).train()
    s, labels, u = torch.randint(16, (8, 9)), torch.randint(5, (8,)), torch.rand(8, 11)
    parts = [(s[i], *model.corrupt(s[i], labels[i], u[i])) for i in (slice(0, 4), slice(4, 8))]
    loss = train_prior.prior_step(model, parts, SimpleNamespace(dtype="fp32"))
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tokens, labels, mask = model.corrupt(s, labels, u)
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
def test_validation_equals_a_loop_and_best_is_the_best(train, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 70})  # more than a batch of 64
    state = train("--kind", kind, "--lr", 0.02)
    run = tmp_path / "prior"
    codes, val = (np.load(path).astype(int) for path in sorted(run.glob("codes/*/codes.npy")))
    values = lines(run, "val")
    best = min(values, key=lambda value: value["loss"])
    model, saved = load_prior(run / "best.pt")
    assert saved["step"] == best["step"] and state["step"] == 6 and len(values) == 2
    u, total, count = torch.rand(70, 66, generator=torch.Generator().manual_seed(0)), 0, 0
    for i, s in enumerate(torch.from_numpy(val)):
        tokens, _, mask = model.corrupt(s[None], None, u[i:i + 1])
        log_p = model(tokens, torch.tensor([Shapes("val").label(i)])).log_softmax(-1)[0]
        total -= log_p[torch.arange(64), s][mask[0]].sum().item()
        count += mask.sum().item()
    p = np.unique(codes, return_counts=True)[1] / codes.size
    H, loss = -(p * np.log(p)).sum(), total / count
    want = {"loss": loss, "H": H, "lnK": math.log(16), "H_minus_loss": H - loss}
    assert {name: best[name] for name in want} == pytest.approx(want, abs=2e-5)
    rates = [learning_rate(step, SimpleNamespace(**state["args"])) for step in range(6)]
    assert [line["lr"] for line in lines(run, "train")] == pytest.approx(rates, rel=1e-5)


def test_the_best_is_known_after_a_resume(train, tmp_path, monkeypatch, signal_at):
    losses = iter([3.0, 1.0, math.nan, 1.5, 2.0])
    monkeypatch.setattr(train_prior, "validate", lambda *args: next(losses))
    signal_at(4)
    with pytest.raises(SystemExit, match="143"):
        train("--eval_every", 1, "--iters", 5)
    assert load(tmp_path / "prior/best.pt")["step"] == 2
    signal_at(None)
    train("--eval_every", 1, "--iters", 5, "--resume")  # makes up for the validation of step 4
    assert load(tmp_path / "prior/best.pt")["step"] == 2
    assert [v["loss"] for v in lines(tmp_path / "prior", "val")] == [3.0, 1.0, None, 1.5, 2.0]


def test_a_signal_in_the_last_step_costs_no_best_checkpoint(train, tmp_path, signal_at, capsys):
    signal_at(6)
    with pytest.raises(SystemExit, match="143"):
        train("--eval_every", 6)
    assert load(tmp_path / "prior/ckpt.pt")["step"] == 6
    assert not (tmp_path / "prior/best.pt").exists()
    signal_at(None)
    for _ in range(2):
        capsys.readouterr()
        train("--eval_every", 6, "--resume")
        assert load(tmp_path / "prior/best.pt")["step"] == 6
        assert "is finished" in capsys.readouterr().out
        assert len(lines(tmp_path / "prior", "val")) == 1


def test_resume_is_exact(train, script, tmp_path, signal_at, tokenizer, refused):
    words = ["--kind", "nar", "--accum", 2, "--label_dropout", 0.2]
    whole = train(*words, out="whole")
    signal_at(2)
    with pytest.raises(SystemExit, match="143"):
        train(*words, out="parts")
    assert load(tmp_path / "parts/ckpt.pt")["step"] == 2
    signal_at(None)
    script("train_prior", "--out", tmp_path / "parts", "--resume")  # the flags are the run's
    parts = load(tmp_path / "parts/ckpt.pt")
    assert all(same(whole[k], parts[k]) for k in ("model", "opt", "step"))
    for split in ("train", "val"):
        assert lines(tmp_path / "whole", split) == lines(tmp_path / "parts", split)
    save_tokenizer(tokenizer, seed=1)  # trained on in the meantime: other codes
    assert str(tokenizer) in refused("train_prior", "--out", tmp_path / "parts", "--resume")


def test_help_needs_no_tokenizer(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nor minds a run
    runtime.save_file("runs/prior/ckpt.pt", lambda file: None)
    with pytest.raises(SystemExit, match="^0$"):
        script("train_prior", "--help")


def test_classes_the_null_class_and_a_shared_cache(train, many_photos, tmp_path, monkeypatch):
    state = train("--data", many_photos, "--iters", 1, out="photos")  # a part is held out
    assert state["classes"] == ["cats", "dogs"] and state["config"]["classes"] == 2
    torch.manual_seed(0)
    before = Transformer("ar", "tiny", 16, 64, C, null_class=True).prefix.weight
    changed = (train("--label_dropout", 1)["model"]["prefix.weight"] != before).any(1)
    assert changed.tolist() == [False] * C + [True]  # no class is seen
    monkeypatch.setattr(vq.VQModel, "encode", None)  # seeds and kinds share the codes
    for classes, kind in ((0, "ar"), (C, "nar")):
        state = train("--codes", tmp_path / "prior/codes", "--classes", classes, "--kind", kind,
                      "--seed", 1, "--iters", 1, out=kind)
        assert state["config"]["classes"] == classes and state["config"]["kind"] == kind


def test_two_processes_equal_one(train, script, tokenizer, tmp_path, many_photos):
    """Also where one begins late. One process takes two micro-batches instead."""
    late = driver(tmp_path / "driver.py", """
def open_array(*args, real=train_prior.open_array):
    array = real(*args)
    time.sleep(runtime.rank() * (len(array.shape) == 1))
    return array
train_prior.open_array = open_array""")
    words = ["--data", many_photos, "--val", many_photos, "--kind", "nar", "--dropout", 0,
             "--lr", 1e-4, "--label_dropout", 0.3]
    launch([late, *PRIOR, "--tokenizer", tokenizer, *words, "--out", tmp_path / "two"], 2)
    train(*words, "--accum", 2, out="one")
    files = [np.load(path) for path in sorted(tmp_path.glob("*/codes/*/*.npy"))]  # of each run 4
    assert len(files) == 8 and all(map(np.array_equal, files[:4], files[4:]))
    for split in ("train", "val"):
        one, two = ([v["loss"] for v in lines(tmp_path / run, split)] for run in ("one", "two"))
        assert len(one) == len(two) > 1 and one == pytest.approx(two, rel=1e-5)
    words = ["--prior", tmp_path / "one/ckpt.pt", "--tokenizer", tokenizer, "--count", 10,
             "--steps", 3, "--batch_size", 4, "--device", "cpu", "--out"]
    launch(["sample.py", *words, tmp_path / "s2"], 2)
    script("sample", *words, tmp_path / "s1")
    a, b = (np.load(tmp_path / s / "samples.npz") for s in ("s1", "s2"))
    assert all(np.array_equal(a[name], b[name]) for name in ("arr_0", "arr_1"))


@pytest.mark.parametrize("kind, options", [
    ("ar", dict(top_k=9, top_p=0.9)), ("nar", dict(steps=3, choice_temperature=1.0))])
def test_samples_are_whole_batches_decoded(script, tokenizer, phase_2, tmp_path, kind, options):
    """Samples 8 and 9 are the first two of a batch of four. Phase 2 decodes the same codes."""
    path = save_prior(tmp_path / "prior.pt", tokenizer, kind=kind, null_class=True)
    options |= dict(temperature=0.8, cfg=1.0)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    prior, codes = load_prior(path)[0], []
    for first in (0, 4, 8):
        torch.manual_seed(runtime.seed_of(7, first))
        codes.append(prior.generate(4, torch.tensor([3, 5, 3, 5]), **options))
    codes = torch.cat(codes)[:10].view(10, 8, 8)
    for out, file in (("one", tokenizer), ("two", phase_2)):
        script("sample", "--prior", path, "--tokenizer", file, "--labels", 3, 5, "--count", 10,
               "--batch_size", 4, "--seed", 7, "--device", "cpu", "--out", tmp_path / out, *words)
        images = np.load(tmp_path / out / "samples.npz")["arr_0"]
        want = pictures(vq.load_tokenizer(file)[0].decode_indices(codes))
        assert images.shape == (10, 16, 16, 3) and abs(images - want).max() <= 1


def test_the_files_of_the_samples(script, prior, tokenizer, tmp_path, refused):
    words = ["--prior", prior, "--tokenizer", tokenizer, "--device", "cpu", "--count", 12]
    script("sample", *words, "--out", tmp_path / "a")
    saved = np.load(tmp_path / "a/samples.npz")
    assert saved["arr_1"].tolist() == [i % C for i in range(12)]
    np.savez(tmp_path / "b.npz", saved["arr_0"], saved["arr_1"])  # ADM's layout
    one, two = (zipfile.ZipFile(path) for path in (tmp_path / "a/samples.npz", tmp_path / "b.npz"))
    assert {*one.namelist()} == {*two.namelist()}
    assert all(one.read(name) == two.read(name) for name in two.namelist())
    assert np.array_equal(cells(tmp_path / "a/grid.png", 8)[:12], saved["arr_0"])
    script("sample", *words, "--labels", "cone", 0, "--count", 20, "--out", tmp_path / "c")
    grid = np.asarray(Image.open(tmp_path / "c/grid.png"))  # a row for each class, named
    saved_c = np.load(tmp_path / "c/samples.npz")
    assert saved_c["arr_1"].tolist() == [3, 0] * 10 and grid.shape[1] > 8 * 108 + 12
    for row, first in ((0, 0), (1, 1)):
        right = grid[::6, -(8 * 108 + 12)::6][2 + 18 * row:18 + 18 * row, 2:18]
        assert np.array_equal(right, saved_c["arr_0"][first])
    made = json.loads((tmp_path / "a/sampler.json").read_text())
    assert made["count"] == 12 and made["top_p"] == 0.92 and made["kind"] == "ar"
    assert len([*(tmp_path / "a").iterdir()]) == 3  # nothing unfinished is left
    assert str(tmp_path / "a") in refused("sample", *words, "--out", tmp_path / "a")
    save_prior(prior, tokenizer, classes=0)
    script("sample", *words, "--out", tmp_path / "d")
    assert np.load(tmp_path / "d/samples.npz").files == ["arr_0"]  # no labels


def test_what_does_not_belong_together_is_refused(prior, tokenizer, tmp_path, refused, monkeypatch):
    other, out = save_tokenizer(tmp_path / "other.pt", seed=1), tmp_path / "out"
    words = ["sample", "--device", "cpu", "--out", out]
    assert "other.pt" in refused(*words, "--prior", prior, "--tokenizer", other)
    view = [*words, "--teacher_forced", "shapes", "--runs"]
    assert "other.pt" in refused(*view, f"{prior}:{other}")
    nar = save_prior(tmp_path / "nar.pt", tokenizer, kind="nar")
    assert "nar.pt" in refused(*view, f"{nar}:{tokenizer}")
    assert "prior.pt" in refused(*words, "--prior", prior, "--tokenizer", prior)
    assert "--label_dropout" in refused(*words, "--prior", prior, "--tokenizer", tokenizer,
                                        "--cfg", 1)
    pair = ["--prior", prior, "--tokenizer", tokenizer]
    for flag in ("count", "steps", "batch_size", "temperature", "top_p"):
        assert f"--{flag}" in refused(*words, *pair, f"--{flag}", 0)
    assert f"0 to {C - 1}" in refused(*words, *pair, "--labels", 99)
    assert "nearest names: cone" in refused(*words, *pair, "--labels", "cones")
    bare = save_prior(tmp_path / "bare.pt", tokenizer, classes=0)
    assert "without classes" in refused(*words, *pair, "--prior", bare, "--labels", 1)
    monkeypatch.setattr(runtime, "world", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "one machine" in refused(*words, *pair)
    assert "one process" in refused(*words, "--noise", "shapes", "--tokenizer", tokenizer)
    assert not out.exists()


def test_the_teacher_forced_view_equals_a_loop(prior, tokenizer, phase_2, tmp_path, script, capsys):
    """s'_i is the argmax given s_<i, and s_1 given the class alone."""
    script("sample", "--teacher_forced", "shapes", "--count", 3, "--out", tmp_path, "--device",
           "cpu", "--runs", f"{prior}:{tokenizer}", f"{prior}:{phase_2}")
    shown, right = cells(tmp_path / "teacher_forced.png", 5), 0
    one, two = (vq.load_tokenizer(path)[0] for path in (tokenizer, phase_2))
    net, _ = load_prior(prior)
    for row, i in enumerate((0, 5, 11)):  # evenly spread over the validation set
        image, label, _ = data.EvalImages(Shapes("val"), 16)[i]
        s, top1 = one.encode(data.to_float(image[None], CPU))[1], []
        for j in range(64):  # codes from j on are blotted out: they must not matter
            before = torch.where(torch.arange(64) < j, s.flatten(1), 0)
            top1.append(net(before, torch.tensor([label]))[0, j].argmax())
        top1 = torch.stack(top1).view_as(s)
        right += (top1 == s).sum().item()
        want = [m.decode_indices(codes) for m in (one, two) for codes in (s, top1)]
        want = pictures(torch.cat([data.to_float(image[None], CPU), *want]))
        assert abs(shown[5 * row:5 * row + 5] - want).max() <= 1
    said = re.findall(r"accuracy ([\d.]+) %", capsys.readouterr().out)
    assert said == [f"{100 * right / 192:.1f}"] * 2


def test_changed_codes_under_noise_equal_a_loop(tokenizer, script, capsys):
    model, changed = vq.load_tokenizer(tokenizer)[0], 0
    y = (sample.read_images("shapes", 16, 12, CPU)[0] + 1) / 2  # in [0, 1]
    noisy = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    for i in range(12):
        before, after = (model.encode(2 * z[i:i + 1] - 1)[1].flatten() for z in (y, noisy))
        changed += sum(a != b for a, b in zip(before.tolist(), after.tolist()))
    script("sample", "--noise", "shapes", "--tokenizer", tokenizer, "--count", 12, "--sigma", 0.1,
           "--seed", 3, "--device", "cpu")
    assert f"\n{100 * changed / (12 * 64):.2f} %" in capsys.readouterr().out and changed > 20
