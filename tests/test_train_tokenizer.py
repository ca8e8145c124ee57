"""train_tokenizer.py and miniature/train_vgg.py: the loss by hand, both phases, their flags."""
import math
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON, TINY, lines, load
from PIL import Image

import data
import losses
import runtime
import train_tokenizer
import vq
from miniature.shapes import Shapes


@pytest.fixture
def train(script, vgg, tmp_path):
    """train("--iters", 3): the checkpoint of a tiny run."""
    def call(*words, out="run"):
        script("train_tokenizer", *TINY, "--vgg", vgg, "--out", tmp_path / out, *words)
        return load(tmp_path / out / "ckpt.pt")
    return call


# ------------------------------------------------------------------------------- the loss, by hand

@pytest.fixture
def step(vgg):
    """All that takes part in a step on twelve images."""
    torch.manual_seed(0)
    args = Namespace(phase=1, dtype="fp32", l1_weight=0.5, perceptual_weight=2.0, r1=10.0)
    found = Namespace(args=args, model=vq.VQModel([16, 16], 8, "vq", 16, beta=0.3, gamma=0.2),
                      disc=losses.Discriminator(16, [8, 8]), averages=runtime.Averages(),
                      perceptual=losses.PerceptualLoss(losses.load_vgg(vgg), alpha=0.25),
                      x=torch.rand(12, 3, 16, 16) * 2 - 1)
    torch.nn.init.normal_(found.model.quantizer.codebook)
    return found


def tokenizer_step(step, xs, adv_weight=0.3, quantize=True):
    """Its reconstructions and its gradients (0 where there are none)."""
    step.model.zero_grad()
    x_hats = train_tokenizer.tokenizer_step(step.model, step.disc, step.perceptual, xs, step.args,
                                            adv_weight, quantize, step.averages)
    return x_hats, [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for p in step.model.parameters()]


def discriminator_step(step, xs, x_hats, penalise):
    step.disc.zero_grad()
    train_tokenizer.discriminator_step(step.disc, xs, x_hats, step.args, penalise, step.averages)
    return [p.grad.clone() for p in step.disc.parameters()]


def close(ours, theirs):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
               for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("phase", [1, 2])
def test_the_tokenizers_loss_is_eq_2(step, phase):
    step.args.phase, model, x = phase, step.model, step.x
    if phase == 2:
        model.encoder.requires_grad_(False)
        model.quantizer.requires_grad_(False)
    (x_hat,), gradients = tokenizer_step(step, [x])
    z = model.encoder(x).permute(0, 2, 3, 1)
    distance = (z[..., None, :] - model.quantizer.codebook).square().sum(-1)  # (B, h, w, K)
    z_q = model.quantizer.codebook[distance.argmin(-1)]
    usage = (-distance).softmax(-1).mean((0, 1, 2))
    entropy = -(usage * usage.log()).sum()
    y = model.decoder((z + (z_q - z).detach()).permute(0, 3, 1, 2))
    net = step.perceptual.net
    per = [(a - b).square().mean() / scale for a, b, scale in zip(
        net(y, losses.LAYERS).values(), net(x, losses.LAYERS).values(), net.scale)]
    per = 0.25 * (per[4] + per[5]) + 0.75 * sum(per[:5])  # the last two are relu5_3 and the logits
    loss = 0.5 * (x - y).abs().mean() + 2 * per - 0.3 * step.disc(y).sigmoid().log().mean()
    if phase == 1:
        loss = loss + (z_q - z.detach()).square().mean() + 0.2 * (math.log(16) - entropy)
        loss = loss + 0.3 * (z - z_q.detach()).square().mean()
    loss.backward(inputs=[p for p in model.parameters() if p.requires_grad])
    assert torch.allclose(x_hat, y, atol=1e-5)
    assert step.averages.means()["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert close([2 * g for g in gradients],  # ours, and once more on top of it by hand
                 [g if p.grad is None else p.grad for p, g in zip(model.parameters(), gradients)])
    fixed = [p for part in (model.encoder, model.quantizer) for p in part.parameters()]
    assert all((p.grad is None) == (phase == 2) for p in fixed)
    assert all(p.grad is None for p in step.disc.parameters())


@pytest.mark.parametrize("penalise", [True, False])
def test_the_discriminators_loss_has_r1_at_times(step, penalise):
    fake = torch.rand_like(step.x)
    gradients = discriminator_step(step, [step.x], [fake], penalise)
    x = step.x.clone().requires_grad_()
    real = step.disc(x)
    slope, = torch.autograd.grad(real.sum(), x, create_graph=True)
    r1 = slope.square().sum((1, 2, 3)).mean()
    loss = -real.sigmoid().log().mean() - (-step.disc(fake)).sigmoid().log().mean()
    theirs = torch.autograd.grad(loss + penalise * 16 * 10 / 2 * r1, step.disc.parameters())
    assert close(gradients, theirs)
    means = step.averages.means()
    assert means["disc"] == pytest.approx(loss.item(), rel=1e-5)
    assert means.get("r1") == (pytest.approx(r1.item(), rel=0.05) if penalise else None)


def test_accumulation_equals_the_large_batch_but_for_the_entropy_term(step):
    parts = step.x.split(4)
    (x_hat,), large = tokenizer_step(step, [step.x])
    x_hats, small = tokenizer_step(step, parts)
    assert not close(small, large) and torch.allclose(torch.cat(x_hats), x_hat, atol=1e-5)
    step.model.quantizer.gamma = 0
    assert close(tokenizer_step(step, parts)[1], tokenizer_step(step, [step.x])[1])
    assert close(discriminator_step(step, parts, x_hats, True),
                 discriminator_step(step, [step.x], [x_hat], True))


def test_codes_begin_at_kmeans_after_steps_without_quantization(step, train, monkeypatch, tmp_path):
    start_codes, begun = train_tokenizer.start_codes, []

    def watch(model, x, args):
        assert 0 < model.quantizer.codebook.abs().max() <= 1 / 16  # as they were drawn
        start_codes(model, x, args)
        z = model.encoder(x).detach().permute(0, 2, 3, 1).flatten(0, 2)
        begun.append(torch.equal(model.quantizer.codebook, vq.kmeans(z, 16, seed=0)))
    monkeypatch.setattr(train_tokenizer, "start_codes", watch)
    train("--vq_start", 4)
    terms = ["H" in line for line in lines(tmp_path / "run", "train")]
    assert begun == [True] and terms == [False] * 4 + [True] * 2
    (x_hat,), gradients = tokenizer_step(step, [step.x], quantize=False)
    names = [name for name, _ in step.model.named_parameters()]
    assert torch.equal(x_hat, step.model.decode(step.model.encoder(step.x)))
    assert [n for n, g in zip(names, gradients) if not g.any()] == ["quantizer.codebook"]


def test_fused_adam_pairs_weights_and_gradients_in_channels_last():
    torch.manual_seed(0)
    a, b = (torch.nn.Conv2d(4, 6, 3) for _ in range(2))
    b.load_state_dict(a.state_dict())
    b.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8)
    for net, fused, y in ((a, False, x), (b, True, x.to(memory_format=torch.channels_last))):
        optimizer = torch.optim.Adam(net.parameters(), 0.01, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            net(y).square().sum().backward()
            optimizer.step()
    assert torch.allclose(a.weight, b.weight, atol=1e-5)


# -------------------------------------------------------------------------------------- whole runs

def test_what_a_run_logs_and_saves(train, tmp_path, capsys, monkeypatch):
    state = train()
    assert state.keys() == {"component", "args", "step", "torch", "config", "model", "opt", "disc",
                            "opt_disc"}
    assert vq.VQModel(**state["config"]).load_state_dict(state["model"])
    found = lines(tmp_path / "run", "train")
    assert [line["adv_weight"] for line in found] == pytest.approx([0, .05, .1, .1, .1, .1])
    assert ["r1" in line for line in found] == [True] + 5 * [False]
    rates = [runtime.cosine(n, 6, 1e-3, 5e-4) for n in range(6)]
    assert [line["lr"] for line in found] == pytest.approx(rates, rel=1e-5)
    assert [line["step"] for line in lines(tmp_path / "run", "val")] == [3, 6]
    assert {p.name for p in (tmp_path / "run/samples").iterdir()} == {"0000003.png", "0000006.png"}
    assert "warning: only" in capsys.readouterr().out  # of the codes
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 1})  # with one image not all can be
    train("--codebook_size", 640, "--vq_start", 2, "--iters", 3, out="many")
    assert lines(tmp_path / "many", "val")[-1]["usage"] <= 0.1
    assert lines(tmp_path / "many", "train")[-1]["code_deviation"] > 0
    assert "warning: only" not in capsys.readouterr().out
    state = train("--adv_weight", 0, out="none")
    assert "disc" not in state and "fake_logit" not in lines(tmp_path / "none", "train")[-1]


def test_drawn_pictures_are_announced_unless_asked_for(script, vgg, tmp_path, capsys):
    words = [word for word in TINY if word not in ("--data", "shapes")]
    script("train_tokenizer", *words, "--vgg", vgg, "--iters", 1, "--out", tmp_path / "run")
    assert "TRAINING ON DRAWN PICTURES" in capsys.readouterr().out
    assert load(tmp_path / "run/ckpt.pt")["args"]["data"] == "shapes"


def test_recomputed_activations_change_nothing_but_memory(train, monkeypatch):
    one, checkpoint, levels = train("--iters", 3), vq.checkpoint, set()
    monkeypatch.setattr(vq, "checkpoint", lambda level, *args, **options:
                        levels.add(id(level)) or checkpoint(level, *args, **options))
    two = train("--iters", 3, "--recompute", out="two")
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert len(levels) == 4  # of encoder and decoder
    kept, model = [], vq.VQModel((16, 16, 16), 8)
    for recompute in (False, True):
        model.encoder.recompute = model.decoder.recompute = recompute
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.rand(2, 3, 32, 32))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("words, part", [
    (["--quantizer", "factorized"], "quantizer.up.weight"),  # Table 5, whose K-means is below
    (["--extra_blocks", 2, "--attention", 2], "decoder.levels.0.9.qkv.weight"),  # Table 1
    (["--perceptual_layers", "relu4_3", "logit"], "quantizer.codebook")])  # Table 6
def test_the_variants_of_the_tables_train(train, tmp_path, words, part):
    state = train(*words)
    assert part in state["model"] and all(v.isfinite().all() for v in state["model"].values())
    terms = {*losses.LAYERS} & lines(tmp_path / "run", "val")[0].keys()
    assert terms == ({*words[1:]} if words[0] == "--perceptual_layers" else {"relu5_3", "logit"})


def test_validation_numbers_are_those_of_a_loop(train, vgg, tmp_path, capsys):
    """Over 118 images: two of 120 are unreadable, named and left out."""
    (tmp_path / "val").mkdir()
    for i in range(120):
        Shapes().load(i, 16)[0].save(tmp_path / f"val/{i:03}.png")
    for i in (7, 8):
        (tmp_path / f"val/00{i}.png").write_bytes(b"")
    train("--val", tmp_path / "val", "--iters", 3)
    assert "007.png" in capsys.readouterr().out
    model, _ = vq.load_tokenizer(tmp_path / "run/ckpt.pt")
    perceptual, rows, used = losses.PerceptualLoss(losses.load_vgg(vgg)), [], []
    for i in (*range(7), *range(9, 120)):
        image = np.asarray(Image.open(tmp_path / f"val/{i:03}.png"), np.float32)
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        x_hat, indices, _ = model(x)
        loss, layers = perceptual(x_hat, x)
        x_hat = x_hat.clamp(-1, 1)
        psnr = 10 * math.log10(4 / F.mse_loss(x_hat, x).item())
        rows.append([F.l1_loss(x_hat, x).item(), psnr, loss.item(), layers["logit"].item()])
        used += indices.flatten().tolist()
    p = np.bincount(used, minlength=16) / len(used)
    want = [*np.mean(rows, 0), (p > 0).mean(), np.prod(np.where(p > 0, p, 1) ** -p)]
    value = lines(tmp_path / "run", "val")[0]
    names = ("l1", "psnr", "perceptual", "logit", "usage", "perplexity")
    assert [value[name] for name in names] == pytest.approx(want, rel=1e-4)


def test_photographs_of_all_kinds(train, photos, tmp_path):
    train("--data", photos, "--val", photos, "--crop", "resized", "--iters", 1)
    assert lines(tmp_path / "run", "val")[0]["l1"] > 0


# ------------------------------------------------------------------------------------ both phases

@pytest.mark.parametrize("attention, quantizer", [(0, "vq"), (2, "kmeans")])
def test_phase_2_goes_on_from_phase_1(train, script, many_photos, tmp_path, monkeypatch, attention,
                                      quantizer):
    monkeypatch.setattr(vq.KMeans, "EVERY", 1)
    one = train("--data", many_photos, "--crop", "center", "--attention", attention, "--beta", 0.3,
                "--l1_weight", 0.7, "--quantizer", quantizer, "--iters", 3)
    assert ("quantizer.passes" in one["model"]) == (quantizer == "kmeans")
    phase_1, _ = vq.load_tokenizer(tmp_path / "run/ckpt.pt")
    step, begun = train_tokenizer.tokenizer_step, []

    def watch(model, disc, perceptual, xs, *rest):
        if not begun:  # at phase 1's reconstructions, with phase 1's discriminator
            begun.append(all(torch.equal(v, one["disc"][k]) for k, v in disc.state_dict().items()))
            assert torch.equal(model(xs[0])[0], phase_1(xs[0])[0])
        return step(model, disc, perceptual, xs, *rest)
    monkeypatch.setattr(train_tokenizer, "tokenizer_step", watch)
    words = ["train_tokenizer", "--init", tmp_path / "run/ckpt.pt", "--iters", 3, "--batch_size", 8,
             "--workers", 0, "--log_every", 1, "--device", "cpu", "--out"]
    script(*words, tmp_path / "two", "--phase", 2)
    script(*words, tmp_path / "finetuned")  # as LSUN's phase 1
    for run in ("two", "finetuned"):  # the adversarial weight does not rise from 0 again
        assert {line["adv_weight"] for line in lines(tmp_path / run, "train")} == {0.1}
    two = load(tmp_path / "two/ckpt.pt")
    assert begun == [True] and two["opt_disc"]["state"][0]["step"] == 3  # Adam starts afresh
    assert two["config"] == one["config"] | {"attention": attention or 1}
    for name in {*train_tokenizer.INHERITED} - {"attention"}:
        assert two["args"][name] == one["args"][name], name
    assert two["args"]["data"] == str(many_photos) and two["args"]["alpha"] == 0
    assert {line["lr"] for line in lines(tmp_path / "two", "train")} == {5e-5}
    assert two["opt"]["param_groups"][0]["betas"] == (0.5, 0.9)
    for name, value in one["model"].items():  # encoder and codebook to the last bit
        assert torch.equal(value, two["model"][name]) != name.startswith("decoder."), name
    assert vq.fingerprint(phase_1) == vq.fingerprint(vq.load_tokenizer(tmp_path / "two/ckpt.pt")[0])


def test_a_run_goes_on_longer_slower_and_after_a_fork(train, script, refused, tmp_path, capsys):
    one, path = train("--iters", 2, "--perceptual_weight", 0.5), tmp_path / "run/ckpt.pt"
    del one["args"]["recompute"]  # as if it were a fork's new flag
    torch.save(one, path)
    go_on = ["train_tokenizer", "--resume", "--out", tmp_path / "run"]
    assert "--z_dim 8" in refused(*go_on, "--z_dim", 16)
    capsys.readouterr()
    script(*go_on, "--iters", 5)
    two = load(path)
    assert "--iters was 2, now 5" in capsys.readouterr().out and two["step"] == 5
    flags = {"iters": 5, "resume": True, "recompute": False}
    assert two["args"] == one["args"] | flags and two["config"] == one["config"]
    rates = [line["lr"] for line in lines(tmp_path / "run", "train")][2:]
    assert rates == pytest.approx([runtime.cosine(n, 5, 1e-3, 5e-4) for n in (2, 3, 4)], rel=1e-5)
    script(*go_on, "--iters", 7, "--lr", 1e-5)  # as advised where gradients are not finite
    assert all(line["lr"] <= 1e-5 for line in lines(tmp_path / "run", "train")[5:])


def test_data_may_move_but_not_change_unnoticed(train, script, many_photos, tmp_path, capsys):
    train("--data", many_photos, "--iters", 1)
    moved = many_photos.rename(tmp_path / "moved")
    go_on = ["train_tokenizer", "--resume", "--out", tmp_path / "run", "--data", moved, "--iters"]
    script(*go_on, 2)
    assert "CHANGED" not in capsys.readouterr().out
    (moved / "cats/new.png").write_bytes((moved / "cats/0.png").read_bytes())
    script(*go_on, 3)
    text = capsys.readouterr().out
    assert "CHANGED" in text and len({*re.findall(r"\d+ images for training \([^)]+\)", text)}) == 2


@pytest.mark.parametrize("n", [1, 5, 21, 100])
def test_the_picture_of_a_validation_is_of_the_whole_set(train, tmp_path, monkeypatch, n):
    """Inputs, eight a row, their reconstructions below them; at most 32."""
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": n})
    train("--iters", 1)
    rows = np.asarray(Image.open(tmp_path / "run/samples/0000001.png"))  # enlarged
    scale = rows.shape[1] // (min(n, 8) * 18 + 2)
    rows = rows[::scale, ::scale][2:, 2:]
    model, _ = vq.load_tokenizer(tmp_path / "run/ckpt.pt")
    for i, index in enumerate(data.spread(n, 32)):
        y, x = i // 8 * 36, i % 8 * 18
        image, _, _ = data.EvalImages(Shapes("val"), 16)[index]
        assert np.array_equal(rows[y:y + 16, x:x + 16], image.permute(1, 2, 0))
        x_hat = data.to_uint8(model(data.to_float(image[None], torch.device("cpu")))[0])[0]
        below = rows[y + 18:y + 34, x:x + 16].astype(int)
        assert np.abs(below - x_hat.permute(1, 2, 0).numpy()).max() <= 1  # of a batch, of one


def test_each_script_finds_what_the_last_one_made(script, vgg, many_photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--iters", 2, "--batch_size", 8, "--workers", 0, "--device", "cpu"]
    script("train_tokenizer", *TINY, "--vgg", vgg, "--data", many_photos, *short)
    script("train_tokenizer", "--phase", 2, *short)
    script("train_prior", "--size", "tiny", *short)
    script("sample", "--count", 4, "--device", "cpu")
    saved = np.load("samples/samples.npz")
    assert saved["arr_0"].shape == (4, 16, 16, 3) and saved["arr_1"].tolist() == [0, 1, 0, 1]


# -------------------------------------------------------------------------- miniature/train_vgg.py

VGG = [*COMMON, "--image_size", 16, "--widths", 8, 8, 8, 8, 8]


def test_the_small_vgg_and_its_scale(script, tmp_path):
    script("train_vgg", *VGG, "--out", tmp_path / "run")
    net = losses.load_vgg(tmp_path / "run/ckpt.pt")
    images = data.EvalImages(Shapes("train"), 16)
    x = data.to_float(torch.stack([images[i][0] for i in range(60)]), torch.device("cpu"))
    for features, scale in zip(net(x, losses.LAYERS).values(), net.scale):
        assert features.var(0, correction=0).mean().item() == pytest.approx(scale.item(), rel=1e-4)
    source, kinds, right = Shapes("val"), net.config["kinds"], []
    source.fine = True
    for i in range(12):  # every softmax is right or wrong
        x = data.to_float(data.EvalImages(source, 16)[i][0][None], torch.device("cpu"))
        told = [part.argmax(1).item() for part in net(x, ["logit"])["logit"].split(kinds, 1)]
        right.append(np.equal(told, np.unravel_index(source.label(i), kinds)))
    assert lines(tmp_path / "run", "val")[-1]["accuracy"] == pytest.approx(np.mean(right), rel=1e-5)


@pytest.mark.parametrize("attack, passes", [(0, 1), (0.05, 2)])
def test_the_small_vgg_learns_classes_of_photographs(script, photos, tmp_path, monkeypatch, attack,
                                                     passes):
    forward, seen = losses.SmallVGG.forward, []
    monkeypatch.setattr(losses.SmallVGG, "forward", lambda net, x, layers:
                        seen.append(net.training) or forward(net, x, layers))
    script("train_vgg", *VGG, "--attack", attack, "--data", photos, "--val", photos,
           "--out", tmp_path / "run")
    state = load(tmp_path / "run/ckpt.pt")
    assert sum(seen) == passes * state["step"]
    assert state["config"]["kinds"] == [2] and state["classes"] == ["cats", "dogs"]
