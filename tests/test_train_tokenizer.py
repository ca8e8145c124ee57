"""train_tokenizer.py and train_vgg.py through their command lines: both phases, resume, processes, bad input."""
import json
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import codebooks
import data
import losses
import runtime
import train_tokenizer
import vq
from miniature.shapes import Shapes, draw
from runtime import BadInput
from train_tokenizer import fingerprint, load_tokenizer

# Tiny, but all parts are at work: discriminator, R1, entropy term, deep and shallow layers.
TINY = ["--image_size", 16, "--channels", 16, 16, "--z_dim", 8, "--codebook_size", 16, "--disc_channels", 8, 8,
        "--disc_ramp", 2, "--r1_every", 2, "--iters", 6, "--batch_size", 8, "--lr", 1e-3, "--workers", 0, "--val_n", 10,
        "--log_every", 1, "--device", "cpu"]


@pytest.fixture
def train(script, vgg, tmp_path):
    def call(*words, out="run"):
        script("train_tokenizer", *TINY, "--vgg", vgg, "--out", tmp_path / out, *words)
        return torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    return call


def lines(folder, split):
    return [v for v in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if v["split"] == split]


def same(a, b):
    """Equal to the last bit, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


WEIGHTS = ("model", "disc", "opt_g", "opt_d", "ema", "step")


def test_both_phases(train, tmp_path, vgg, script):
    one = train()
    assert one["step"] == 6 and one["config"]["attention"] == 0
    words = ["--phase", 2, "--init", tmp_path / "run" / "ckpt.pt", "--vgg", vgg, "--out", tmp_path / "two",
             "--iters", 3, "--batch_size", 8, "--workers", 0, "--val_n", 10, "--log_every", 1, "--device", "cpu"]
    script("train_tokenizer", *words)
    two = torch.load(tmp_path / "two" / "ckpt.pt", weights_only=True)
    assert two["args"]["lr"] == two["args"]["lr_end"] == 5e-5 and two["args"]["betas"] == [0.5, 0.9]
    assert two["args"]["alpha"] == 0 and two["config"]["attention"] == 1
    for name, value in one["model"].items():
        moved = not torch.equal(value, two["model"][name])
        assert moved == name.startswith("decoder."), name  # encoder and codebook bitwise as they were
    a, b = (load_tokenizer(tmp_path / run / "ckpt.pt") for run in ("run", "two"))
    assert fingerprint(a) == fingerprint(b) and a.image_size == b.image_size == 16
    assert set(lines(tmp_path / "two", "train")[0]) & {"codebook", "logit"} == {"codebook"}  # alpha 0: no logits
    for picture in (tmp_path / "run" / "samples").iterdir():
        assert Image.open(picture).size[0] == 6 * (8 * 18 + 2)
    # the discriminator's weights are carried over, its Adam starts afresh
    assert two["opt_d"]["state"][0]["step"] == 3


def test_recomputed_activations_change_nothing_but_memory(train):
    """The same run with --recompute, to the last bit; what the backward pass keeps is far less."""
    one, two = train("--iters", 3), train("--iters", 3, "--recompute", out="two")
    assert all(same(one[name], two[name]) for name in WEIGHTS)
    train("--iters", 3, "--recompute", "--resume")  # may be chosen anew at each start
    kept, model = [], vq.VQModel((16, 16, 16), 8, 16)
    for recompute in (False, True):
        model.encoder.recompute = model.decoder.recompute = recompute
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.rand(2, 3, 32, 32))
        kept.append(size)
    assert kept[1] < kept[0] / 3


def test_phase_2_begins_at_phase_1s_reconstructions(train, tmp_path, monkeypatch):
    one = train()
    phase1 = load_tokenizer(tmp_path / "run" / "ckpt.pt")

    class Begun(Exception):
        pass

    def begin(model, disc, perceptual, xs, *rest):
        assert any(isinstance(part, vq.BlockAttention) for part in model.decoder.modules())
        assert torch.equal(model(xs[0])[0], phase1(xs[0])[0]) and same(dict(disc.state_dict()), dict(one["disc"]))
        raise Begun
    monkeypatch.setattr(train_tokenizer, "tokenizer_step", begin)
    shape = TINY.index("--iters")  # phase 2 has it from the checkpoint
    monkeypatch.setattr(sys.modules[__name__], "TINY", ["--image_size", 16, *TINY[shape:]])
    with pytest.raises(Begun):
        train("--phase", 2, "--init", tmp_path / "run" / "ckpt.pt", out="two")


def test_the_generators_step_leaves_the_discriminator_alone(train, tmp_path, monkeypatch):
    seen, discs = [], []
    step, make = runtime.Guard.step, losses.Discriminator

    def remember(*args):
        discs.append(make(*args))
        return discs[-1]

    def watch(self, optimizer, lr):
        if len(seen) % 2 == 0:  # the generator's turn: its loss went through the discriminator and left no gradient
            assert all(p.grad is None for p in discs[-1].parameters())
        params = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append((len(params), all(p.grad is not None for p in params)))
        return step(self, optimizer, lr)
    monkeypatch.setattr(runtime.Guard, "step", watch)
    monkeypatch.setattr(losses, "Discriminator", remember)
    state = train()
    generators = len([k for k in state["model"] if k.startswith(("encoder", "decoder", "quantizer"))])
    discriminators = len(state["disc"])
    # in turn, and each with a gradient on every weight of its own
    assert seen == [(generators, True), (discriminators, True)] * 6
    train("--disc_start", 1000, out="off")  # an adversarial weight of 0: the discriminator trains all the same
    off = torch.load(tmp_path / "off" / "ckpt.pt", weights_only=True)
    assert not same(off["disc"], state["disc"]) and "adversarial" not in lines(tmp_path / "off", "train")[0]
    none = train("--adv_weight", 0, out="none")
    assert none["disc"] is None


@pytest.mark.parametrize("codebook", ["none", "kmeans", "factorized"])
def test_table_5s_codebooks_train(train, codebook):
    state = train("--codebook", codebook)
    assert state["config"]["quantizer"] == codebook
    for value in state["model"].values():
        assert value.float().isfinite().all()


def test_table_1s_and_6s_variants_train(train, tmp_path):
    state = train("--decoder_attention", 2, "--decoder_extra_blocks", 2, "--perceptual_layers", "relu4_3", "logit",
                  "--ema", 0.9)
    assert state["config"]["attention"] == 2 and state["config"]["extra_blocks"] == 2
    assert {"relu4_3", "logit"} <= set(lines(tmp_path / "run", "train")[0])
    assert "relu1_2" not in lines(tmp_path / "run", "val")[0]
    assert same(load_tokenizer(tmp_path / "run" / "ckpt.pt").state_dict(), state["ema"])
    # the average is there once, and is not what it averages
    assert set(state) == {"kind", "args", "step", "torch", "config", *WEIGHTS}
    assert not same(state["ema"], state["model"]) and state["ema"].keys() == state["model"].keys()


def test_tensorboard_gets_the_same_figures(train, tmp_path):
    pytest.importorskip("tensorboard")
    train("--tensorboard", "--iters", 2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    logged = [v["l1"] for v in lines(tmp_path / "run", "train")]
    assert [e.value for e in events.Scalars("train/l1")] == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("words, stops", [
    ([], [3]), (["--vq_start", 4], [3, 4]),  # stopped while nothing is quantized, and where the codes begin
    (["--codebook", "kmeans"], [3]), (["--phase", 2], [3])])
def test_a_resumed_run_is_the_undisturbed_run(train, tmp_path, signal_in, words, stops):
    if "--phase" in words:
        train("--ema", 0.9, out="one")
        words = [*words, "--init", tmp_path / "one" / "ckpt.pt"]
    if "kmeans" not in words:
        words = [*words, "--ema", 0.9]
    whole = train(*words, out="whole")
    for step in stops:
        signal_in(step)
        assert train(*words, "--resume", out="parts")["step"] == step
    signal_in(None)
    parts = train(*words, "--resume", out="parts")
    assert all(same(whole[k], parts[k]) for k in WEIGHTS)


def test_codes_begin_at_kmeans_after_steps_without_quantization(train, tmp_path, monkeypatch):
    start_codes, begun = train_tokenizer.start_codes, []

    def watch(model, x, args):
        assert 0 < model.quantizer.codebook.abs().max() <= 1 / 16  # as they were drawn
        start_codes(model, x, args)
        z = model.encoder(x).detach().permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.equal(model.quantizer.codebook, codebooks.kmeans(z, 16, seed=0))
        begun.append(x)
    monkeypatch.setattr(train_tokenizer, "start_codes", watch)
    train("--vq_start", 4)
    assert len(begun) == 1 and ["H" in line for line in lines(tmp_path / "run", "train")] == [False] * 4 + [True] * 2

    model, x = vq.VQModel((16, 16), 8, 16), begun[0]
    args = Namespace(phase=1, dtype="fp32", l1_weight=1, perceptual_weight=1, vq_weight=1)
    for quantize in (False, True):
        x_hat, = train_tokenizer.tokenizer_step(model, None, lambda x_hat, x: (x_hat.sum() * 0, {}), [x], args, 0,
                                                quantize, runtime.Averages())
        assert torch.equal(x_hat, model.decode(model.encoder(x))) != quantize
        assert (model.quantizer.codebook.grad is not None) == quantize


# a second Ctrl-C, from someone who waits, changes nothing
@pytest.mark.parametrize("number, times", [(signal.SIGTERM, 1), (signal.SIGINT, 3)])
def test_a_signal_saves_and_resumes_exactly(train, vgg, tmp_path, number, times):
    whole = train("--iters", 60, "--log_every", 10, out="whole")
    words = [sys.executable, ROOT / "train_tokenizer.py", *TINY, "--vgg", vgg, "--out", tmp_path / "cut",
             "--iters", 60, "--log_every", 10, "--workers", 2, "--resume"]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 10/"):
            for _ in range(times):
                process.send_signal(number)
            break
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by a signal" in rest and error == ""
    cut = torch.load(tmp_path / "cut" / "ckpt.pt", weights_only=True)
    assert 10 <= cut["step"] < 60
    train("--iters", 60, "--log_every", 10, "--resume", out="cut")
    cut = torch.load(tmp_path / "cut" / "ckpt.pt", weights_only=True)
    assert all(same(whole[k], cut[k]) for k in WEIGHTS)
    a, b = lines(tmp_path / "whole", "train"), lines(tmp_path / "cut", "train")
    assert [v["step"] for v in a] == [v["step"] for v in b] and a[-1] == b[-1]


def test_two_processes_equal_one(launch, vgg, tmp_path):
    # fp32 sums in another order, amplified by Adam's first steps (g / |g|): a small rate keeps the losses comparable
    words = ["train_tokenizer.py", *TINY, "--vgg", vgg, "--iters", 4, "--lr", 1e-5, "--lr_end", 1e-5]
    launch([*words, "--out", tmp_path / "one"])
    told = launch([*words, "--out", tmp_path / "two"], processes=2).stdout
    assert told.count("NO --data") == 1  # by one of them
    a, b = lines(tmp_path / "one", "train"), lines(tmp_path / "two", "train")
    assert len(a) == len(b) == 4
    for x, y in zip(a, b):
        for name in x:
            if isinstance(x[name], float):
                assert x[name] == pytest.approx(y[name], rel=1e-5, abs=1e-6), (x["step"], name)
    x, y = lines(tmp_path / "one", "val")[0], lines(tmp_path / "two", "val")[0]
    assert all(x[name] == pytest.approx(y[name], rel=1e-4) for name in x if name != "split")


def gradients(monkeypatch, call):
    """The first step's averaged gradients, of tokenizer and discriminator."""
    kept = []
    average = runtime.average_gradients

    def keep(params):
        average(params)
        kept.append([p.grad.clone() for p in params if p.grad is not None])
    monkeypatch.setattr(runtime, "average_gradients", keep)
    call()
    monkeypatch.setattr(runtime, "average_gradients", average)
    return kept[:2]


def test_accumulation_equals_the_large_batch(train, monkeypatch):
    # all but the entropy term, whose soft usage is a mean over one micro-batch
    words = ["--gamma", 0, "--iters", 1]
    large = gradients(monkeypatch, lambda: train(*words, out="large"))
    small = gradients(monkeypatch, lambda: train(*words, "--accum", 2, out="small"))
    for net, (x, y) in enumerate(zip(large, small)):
        for g, h in zip(x, y):
            assert torch.allclose(g, h, rtol=1e-4, atol=1e-6), net


def test_gradients_of_two_processes_equal_one(tmp_path, launch, vgg):
    # the entropy term is of the global batch: with gamma 1 its gradient leads
    probe = tmp_path / "probe.py"
    probe.write_text(f"""
import argparse, sys; sys.path.insert(0, {str(ROOT)!r})
import torch, runtime, vq
runtime.setup(argparse.Namespace(device="cpu"))
torch.manual_seed(0)
model = vq.VQModel((16, 16), 8, 16, gamma=1.0)
model.quantizer.codebook.data.normal_()
model.quantizer.mean = runtime.mean_over_processes
x = torch.randn(8, 3, 16, 16)
share = x.chunk(runtime.world())[runtime.rank()]
x_hat, _, q = model(share)
((x_hat - share).abs().mean() + q["vq"]).backward()
runtime.average_gradients(list(model.parameters()))
if runtime.is_main():
    torch.save([q["H"].detach()] + [p.grad for p in model.parameters()], sys.argv[1])
runtime.run(lambda: None)  # leaves the process group
""")
    launch([probe, tmp_path / "one.pt"])
    launch([probe, tmp_path / "two.pt"], processes=2)
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for a, b in zip(one, two):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item())


def test_codebooks_survive_processes(tmp_path, launch):
    """Every process has the same codes, which are one process's: re-clustered, learned, started at K-means."""
    probe = tmp_path / "probe.py"
    probe.write_text(f"""
import argparse, sys; sys.path.insert(0, {str(ROOT)!r})
import torch, runtime, train_tokenizer, vq
runtime.setup(argparse.Namespace(device="cpu"))
kept = []
for codebook in ("kmeans", "factorized", "entropy"):
    torch.manual_seed(0)
    model = vq.VQModel((16, 16), 8, 16, quantizer=train_tokenizer.CODEBOOKS[codebook])
    q, optimizer = model.quantizer, torch.optim.SGD(model.quantizer.parameters(), 1.0)
    q.mean, q.gather, q.EVERY = runtime.mean_over_processes, runtime.gather_rows, 2
    for step in range(6):
        torch.manual_seed(step)
        share = torch.randn(8, 3, 8, 8).chunk(runtime.world())[runtime.rank()]
        if codebook == "entropy" and not step:
            train_tokenizer.start_codes(model, share, argparse.Namespace(dtype="fp32"))
        model.encode(share)[2]["vq"].backward()
        runtime.average_gradients(list(q.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    mine = q.codebook.detach().flatten()
    every = runtime.gather_rows(mine[None])
    assert (every == every[0]).all(), codebook
    kept.append(mine)
if runtime.is_main():
    torch.save(kept, sys.argv[1])
runtime.run(lambda: None)  # leaves the process group
""")
    launch([probe, tmp_path / "one.pt"])
    launch([probe, tmp_path / "two.pt"], processes=2)
    for one, two in zip(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt"), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_photographs_of_all_kinds(train, photos, many_photos, tmp_path, capsys):
    train("--data", photos, "--val", photos, "--crop", "resized")
    assert lines(tmp_path / "run", "val")[0]["l1"] > 0 and "NO --data" not in capsys.readouterr().out
    train("--data", many_photos, out="noval")
    assert "64 of the images are held out" in capsys.readouterr().out


def test_defaults_chain(script, vgg, tmp_path, monkeypatch, many_photos, capsys):
    """Each script finds what the last one made, and its data; what is missing is named with its maker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("miniature.shapes.Shapes.SIZES", {"train": 300, "val": 40})
    prior = ["train_prior", "--size", "tiny", "--iters", 2, "--batch_size", 8, "--workers", 0, "--views", 1]
    for words, maker in ((prior, "train_tokenizer.py"), (["sample"], "train_prior.py")):
        with pytest.raises(BadInput, match=f"no such file; python {maker}"):
            script(*words)
    script("train_tokenizer", *TINY, "--vgg", vgg, "--data", many_photos, "--iters", 2)
    script("train_tokenizer", "--phase", 2, "--vgg", vgg, "--iters", 2, "--batch_size", 8, "--workers", 0)
    script(*prior)
    assert capsys.readouterr().out.count(f"no --data: {many_photos}, as the tokenizer was trained on") == 2
    script("sample", "--n", 4)
    saved = np.load("samples/samples.npz")
    assert saved["arr_0"].shape == (4, 16, 16, 3) and saved["arr_1"].tolist() == [0, 1, 0, 1]
    assert json.loads(Path("samples/sampler.json").read_text())["tokenizer"] == "runs/phase2/ckpt.pt"
    result = script("fid", "--features", vgg, "--workers", 0)
    assert result["real"].startswith(f"96 images of {many_photos} train (16 x 16") and result["n_fake"] == 4
    result = script("fid", "--features", vgg, "--workers", 0, "--tokenizer", "runs/phase2/ckpt.pt")
    assert result["real"].startswith(f"64 images of {many_photos} val") and result["PSNR"] > 0
    Path("runs/phase2/ckpt.pt").unlink()
    script("sample", "--n", 4, "--out", "again")
    assert json.loads(Path("again/sampler.json").read_text())["tokenizer"] == "runs/tokenizer/ckpt.pt"


def test_a_run_goes_on_with_a_lower_rate(train, signal_in):
    """As the messages about non-finite gradients advise."""
    signal_in(2)
    train()
    signal_in(None)
    args = train("--resume", "--lr", 1e-5)["args"]
    assert args["lr"] == args["disc_lr"] == 1e-5


@pytest.mark.parametrize("words, told", [([], 1), (["--data", "shapes"], 0)])
def test_drawn_pictures_are_announced_unless_asked_for(train, capsys, words, told):
    state = train("--iters", 1, *words)
    out = capsys.readouterr().out
    assert out.count("NO --data: TRAINING ON DRAWN PICTURES") == told and "no --val" not in out
    assert state["args"]["data"] == "shapes"  # so that both resume each other


def test_unreadable_validation_images_are_named_and_left_out(train, tmp_path, capsys):
    folder = tmp_path / "val"
    folder.mkdir()
    for i in range(120):
        draw(i, i % 10, 16).save(folder / f"{i:03}.png")
    (folder / "000.png").write_bytes(b"")
    train("--val", folder, "--val_n", 0, "--batch_size", 8)  # batches of 8, one of them with seven
    assert "000.png" in capsys.readouterr().out
    values = lines(tmp_path / "run", "val")[0]
    assert all(v is not None for v in values.values())


@pytest.mark.parametrize("words, end", [([], 5e-4), (["--lr", 2e-4], 1e-4), (["--lr_end", 3e-4], 3e-4)])
def test_the_rate_decays_to_half(train, tmp_path, words, end):
    assert train("--iters", 2, *words)["args"]["lr_end"] == pytest.approx(end)


def test_nan_in_a_step_is_skipped_and_twenty_stop_the_run(train, tmp_path, monkeypatch):
    real = data.to_float
    calls = []

    def poison(images, device):
        calls.append(1)
        return real(images, device) * (float("nan") if len(calls) in poisoned else 1)
    monkeypatch.setattr(data, "to_float", poison)
    poisoned = {3}
    state = train()
    assert lines(tmp_path / "run", "train")[-1]["skipped"] == 1
    assert all(v.float().isfinite().all() for v in state["model"].values())
    poisoned, calls = range(5, 99), []
    with pytest.raises(BadInput, match="20 steps in a row.*last good state"):
        train("--iters", 60, "--log_every", 10, out="bad")
    state = torch.load(tmp_path / "bad" / "ckpt.pt", weights_only=True)
    assert state["step"] == 30 and all(v.float().isfinite().all() for v in state["model"].values())


def test_a_full_disk_leaves_the_previous_checkpoint(train, tmp_path, monkeypatch):
    saves = []

    def full(state, file):
        saves.append(1)
        if len(saves) > 1:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(state, file)
    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match="previous file is intact"):
        train("--save_every", 2)
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "run" / "ckpt.pt.tmp").exists()


def test_bad_input_is_refused_in_one_sentence(train, tmp_path, vgg, photos):
    train(out="used")
    good = tmp_path / "used" / "ckpt.pt"
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    for words, message in [
            (["--alpha", 1.5], "at most 1"), (["--image_size", 17], "multiple of 2"),
            (["--batch_size", 7, "--accum", 2], "not divisible"), (["--data", tmp_path / "none"], "no such folder"),
            (["--data", tmp_path / "empty"], "holds no images"), (["--phase", 2], "no such file; python train_tok"),
            (["--vq_start", 2, "--codebook", "kmeans"], "--vq_start goes with"),
            (["--vq_start", 2, "--codebook", "factorized"], "--vq_start goes with"),
            (["--vq_start", 2, "--init", good], "--vq_start goes with"),
            (["--ema", 0.9, "--codebook", "kmeans"], "--ema does not go with"),
            (["--data", photos, "--image_size", 256], "smaller than the crop"),
            (["--phase", 2, "--init", good, "--z_dim", 16], "not the shape of --init"),
            (["--phase", 2, "--init", good, "--disc_channels", 4, 8], "is not the shape of --init"),
            (["--init", tmp_path / "cut.pt"], "damaged"), (["--init", vgg], "holds a vgg checkpoint"),
            (["--init", tmp_path / "none.pt"], "no such file"), (["--vgg", tmp_path / "none.pt"], "no such file"),
            (["--vgg", good], "holds a tokenizer checkpoint"), (["--channels", 20, 30], "multiple of 16"),
            (["--codebook_size", 70000], "65536"), (["--ema", 1], "at most 0.99")]:
        with pytest.raises(BadInput, match=message) as error:
            train(*words, out="fresh")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "fresh").exists()  # refused before any work
    with pytest.raises(BadInput, match="already holds a run"):
        train(out="used")


def test_a_refusal_is_one_line_and_exit_code_2(launch, tmp_path):
    done = launch(["train_tokenizer.py", "--phase", 2, "--out", tmp_path / "x"], check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("train_tokenizer.py: runs/tokenizer/ckpt.pt:")


def test_train_vgg(script, launch, photos, tmp_path, monkeypatch, capsys):
    words = ["--image_size", 16, "--widths", 8, 8, 8, 8, 8, "--batch_size", 16, "--workers", 0, "--log_every", 5,
             "--device", "cpu"]
    monkeypatch.setattr(Shapes, "SIZES", {"train": 100, "val": 20})
    script("train_vgg", *words, "--labels", "fine", "--iters", 10, "--data", "shapes",
           "--out", tmp_path / "fine")
    assert "NO --data" not in capsys.readouterr().out
    net = train_tokenizer.load_vgg(str(tmp_path / "fine" / "ckpt.pt"))
    assert net.config["classes"] == 60 and not net.training
    assert (net.mean_square != 1).all() and net.mean_square.isfinite().all()
    x = data.to_float(torch.stack([data.EvalImages(Shapes(), 16)[i][0] for i in range(100)]), torch.device("cpu"))
    features = net(x, losses.LAYERS)
    for i, layer in enumerate(losses.LAYERS):  # after the division a layer's mean square is 1
        assert features[layer].square().mean().item() == pytest.approx(net.mean_square[i].item(), rel=0.2)
    script("train_vgg", *words, "--data", photos, "--val", photos, "--batch_size", 8, "--iters", 5,
           "--out", tmp_path / "photos")
    assert lines(tmp_path / "photos", "val")[0]["accuracy"] >= 0
    # as a command, from any directory: its imports are found
    launch(["miniature/train_vgg.py", *words, "--iters", 1, "--out", "here"], cwd=tmp_path)
    assert lines(tmp_path / "here", "val")[0]["accuracy"] >= 0
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(flat / name)
    for wrong, message in [(["--data", flat, "--val", flat, "--batch_size", 2], "no classes"),
                           (["--image_size", 20], "multiple of 8"),
                           (["--data", photos, "--val", photos, "--batch_size", 8, "--labels", "fine"], "for --data")]:
        with pytest.raises(BadInput, match=message):
            script("train_vgg", *words, *wrong, "--out", tmp_path / "x")
