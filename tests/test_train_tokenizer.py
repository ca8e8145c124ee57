"""train_tokenizer.py and miniature/train_vgg.py: the loss by hand, both phases, their flags."""
import math
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_vgg
from conftest import COMMON, TINY, cells, lines, load, to_pixels
from PIL import Image

import data
import losses
import runtime
import train_tokenizer
import vq
from miniature.shapes import Shapes

CPU = torch.device("cpu")


@pytest.fixture
def train(script, vgg, tmp_path):
    """train("--iters", 3): the checkpoint of a tiny run."""
    def call(*words, out="run"):
        script("train_tokenizer", *TINY, "--vgg", vgg, "--out", tmp_path / out, *words)
        return load(tmp_path / out / "ckpt.pt")
    return call


# ------------------------------------------------------------------------------- the loss, by hand

def close(ours, theirs):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
               for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("phase", [1, 2, "without quantization"])
def test_the_tokenizers_loss_is_eq_2(vgg, phase):
    torch.manual_seed(0)
    model, disc = vq.VQModel([16, 16], 8, "vq", 16, 0.3, 0.2), losses.Discriminator(16, [8, 8])
    torch.nn.init.normal_(model.quantizer.codebook)
    perceptual = losses.PerceptualLoss(losses.load_vgg(vgg), alpha=0.25)
    networks = train_tokenizer.Networks(model, disc, perceptual)
    x, quantized = torch.rand(12, 3, 16, 16) * 2 - 1, phase in (1, 2)
    args = Namespace(phase=2 if phase == 2 else 1, dtype="fp32", l1_weight=0.5, adv_weight=0.4,
                     perceptual_weight=2.0, disc_warmup=40, vq_warmup=30 if quantized else 31)
    ours, x_hat, terms = train_tokenizer.tokenizer_loss(networks, x, 30, args)
    z = model.encoder(x).permute(0, 2, 3, 1)
    z = z.detach() if phase == 2 else z
    distance = (z[..., None, :] - model.quantizer.codebook).square().sum(-1)  # (B, h, w, K)
    z_q = model.quantizer.codebook[distance.argmin(-1)]
    usage = (-distance).softmax(-1).mean((0, 1, 2))
    entropy = -(usage * usage.log()).sum()
    y = model.decoder((z + quantized * (z_q - z).detach()).permute(0, 3, 1, 2))
    net = perceptual.net
    per = [(a - b).square().mean() / scale for a, b, scale in zip(
        net(y, losses.LAYERS).values(), net(x, losses.LAYERS).values(), net.layer_scale)]
    per = 0.25 * (per[4] + per[5]) + 0.75 * sum(per[:5])  # the last two are relu5_3 and the logits
    theirs = 0.5 * (x - y).abs().mean() + 2 * per - 0.3 * disc(y).sigmoid().log().mean()
    if phase == 1:
        theirs = theirs + (z_q - z.detach()).square().mean() + 0.2 * (math.log(16) - entropy)
        theirs = theirs + 0.3 * (z - z_q.detach()).square().mean()
    assert torch.allclose(x_hat, y, atol=1e-5) and terms["loss"] is ours
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert close(*(torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True)
                   for loss in (ours, theirs)))


def test_a_step_of_a_run_is_adams_on_the_large_batch(train, vgg, tmp_path):
    """With --grad_accum as without, but for the entropy term. R1, in groups of eight images and of
    what is left, is PyTorch's second derivative."""
    words = ["--iters", 1, "--batch_size", 12, "--disc_warmup", 0]
    states = {accum: train(*words, "--entropy_weight", 0, "--grad_accum", accum, out=accum)
              for accum in ("1", "3")}
    args = Namespace(**states["1"]["args"])
    model, disc = train_tokenizer.build_models(args, CPU)
    networks = train_tokenizer.Networks(model, disc, losses.PerceptualLoss(losses.load_vgg(vgg)))
    stream = data.TrainImages(Shapes(), 16, "random", 0)
    x = data.to_float(torch.stack([stream[n][0] for n in range(12)]), CPU).requires_grad_()
    loss, x_hat, _ = train_tokenizer.tokenizer_loss(networks, x.detach(), 0, args)
    disc.requires_grad_(True)
    slope, = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    r1 = slope.square().sum((1, 2, 3)).mean()
    disc_loss = -disc(x).sigmoid().log().mean() - (-disc(x_hat.detach())).sigmoid().log().mean()
    for total, net, name in ((loss, model, "model"), (disc_loss + 16 * 10 / 2 * r1, disc, "disc")):
        gradients = torch.autograd.grad(total, [*net.parameters()])
        for state in states.values():
            opt = state["opt" if name == "model" else "opt_disc"]["state"].values()
            assert close([each["exp_avg"] * 10 for each in opt], gradients)
            for (key, before), each in zip(net.named_parameters(), opt):
                g = each["exp_avg"] * 10
                assert torch.allclose(state[name][key], before - 1e-3 * g / (g.abs() + 1e-8))
    for accum in states:
        assert lines(tmp_path / accum, "train")[0]["r1"] == pytest.approx(r1.item(), rel=1e-4)


@pytest.mark.parametrize("words, steps, quantized", [
    (["--vq_warmup", 4], [4], [4, 5]),
    (["--quantizer", "kmeans", "--grad_accum", 2], [0, 2, 4], [*range(6)])])
def test_kmeans_gives_the_codebook_before_a_step_is_quantized(train, monkeypatch, tmp_path, words,
                                                              steps, quantized):
    """With --vq_warmup for the first quantized step. Once per step, not per micro-batch."""
    kmeans_codebook, found = train_tokenizer.kmeans_codebook, []

    def watch(model, x, args):
        assert found or 0 < model.quantizer.codebook.abs().max() <= 1 / 16  # as they were drawn
        kmeans_codebook(model, x, args)
        z = model.encoder(x).detach().permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.equal(model.quantizer.codebook, vq.kmeans(z, 16))
        found.append(len(lines(tmp_path / "run", "train")))
    monkeypatch.setattr(train_tokenizer, "KMEANS_STEPS", range(0, 5, 2))
    monkeypatch.setattr(train_tokenizer, "kmeans_codebook", watch)
    train(*words)
    terms = ["soft_entropy" in line for line in lines(tmp_path / "run", "train")]
    assert found == steps and np.flatnonzero(terms).tolist() == quantized


# -------------------------------------------------------------------------------------- whole runs

def test_by_default_a_run_validates_at_least_ten_times(tmp_path, monkeypatch):
    for iters, due in ((7, [*range(8)]), (109, [*range(0, 101, 10), 109]), (99_999, [0, 5000])):
        words = ["--iters", str(iters), "--out", str(tmp_path / str(iters))]
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *words])
        run = runtime.Run(train_tokenizer.parse(), "", ())
        steps = [step for step in range(iters + 1) if run.validation_is_due(step)]
        assert steps[:len(due)] == due and len(steps) > 7


def test_what_a_run_logs_and_saves(train, tmp_path, capsys, monkeypatch):
    state = train()
    assert state.keys() == {"component", "args", "step", "torch", "best", "validated", "skipped",
                            "config", "content", "model", "opt", "disc", "opt_disc"}
    assert vq.VQModel(**state["config"]).load_state_dict(state["model"])
    found = lines(tmp_path / "run", "train")
    assert [line["adv_weight"] for line in found] == pytest.approx([0, .05, .1, .1, .1, .1])
    assert ["r1" in line for line in found] == [True] + 5 * [False]
    rates = [runtime.cosine(n, 6, 1e-3, 5e-4) for n in range(6)]
    assert [line["lr"] for line in found] == pytest.approx(rates, rel=1e-5)
    assert [line["step"] for line in lines(tmp_path / "run", "val")] == [0, 3, 6]
    images = {path.name for path in (tmp_path / "run/samples").iterdir()}
    assert images == {f"000000{step}.png" for step in (0, 3, 6)}
    assert "warning: only" in capsys.readouterr().out  # of the codes
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 1})  # with one image not all can be
    train("--codebook_size", 640, "--vq_warmup", 2, "--iters", 3, "--eval_every", 9, out="many")
    assert lines(tmp_path / "many", "val")[-1]["usage"] <= 0.1
    assert lines(tmp_path / "many", "train")[-1]["code_deviation"] > 0
    state = train("--adv_weight", 0, "--iters", 1, out="none")
    assert "disc" not in state and "fake_logit" not in lines(tmp_path / "none", "train")[-1]


def test_recomputed_activations_change_only_memory(train):
    states, kept = [], []

    def pack(tensor):
        kept[-1] += tensor.nbytes
        return tensor
    for more in ([], ["--grad_checkpointing"]):
        states.append(train("--iters", 3, *more, out=str(more)))
        model, _ = train_tokenizer.build_models(Namespace(**states[-1]["args"]), CPU)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.rand(2, 3, 32, 32))
    one, two = (state["model"] for state in states)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("words, part", [
    (["--quantizer", "factorized"], "quantizer.up.weight"),  # Table 5, whose K-means is below
    (["--extra_blocks", 2, "--attention", 2], "decoder.levels.0.9.qkv.weight"),  # Table 1
    (["--perceptual_layers", "relu4_3", "logit"], "quantizer.codebook")])  # Table 6
def test_the_variants_of_the_tables_train(train, photos, tmp_path, words, part):
    """On photographs of many modes, sizes and formats."""
    more = ["--data", photos, "--val", photos, "--crop", "resized", "--iters", 2]
    state = train(*more, *words)
    assert part in state["model"] and all(v.isfinite().all() for v in state["model"].values())
    value = lines(tmp_path / "run", "val")[0]
    layers = words[1:] if words[0] == "--perceptual_layers" else ["relu5_3", "logit"]
    assert value["perceptual"] == pytest.approx(sum(value[layer] for layer in layers), rel=1e-5)


def test_validation_equals_a_loop(train, vgg, tmp_path, capsys):
    """Two of 30 images are unreadable. They are reported, and the next one takes their place."""
    (tmp_path / "val").mkdir()
    for i in range(30):
        Shapes().load(i, 16)[0].save(tmp_path / f"val/{i:03}.png")
    for i in (7, 8):
        (tmp_path / f"val/00{i}.png").write_bytes(b"")
    train("--val", tmp_path / "val", "--iters", 3, "--alpha", 0, "--lr", 0.02)  # leaves [-1, 1]
    assert capsys.readouterr().out.count("skipped: '007.png'") == 1
    model, _ = vq.load_tokenizer(tmp_path / "run/ckpt.pt")
    net, rows, used = losses.load_vgg(vgg), [], []
    low, sem = (losses.PerceptualLoss(net, alpha) for alpha in (0, 1))
    for i in (*range(7), 9, 9, *range(9, 30)):
        image = np.asarray(Image.open(tmp_path / f"val/{i:03}.png"), np.float32)
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        x_hat, indices, _ = model(x)
        (l_low, _), (l_sem, layers) = low(x_hat, x), sem(x_hat, x)
        x_hat = x_hat.clamp(-1, 1)
        psnr = 10 * math.log10(4 / F.mse_loss(x_hat, x).item())
        rows.append([F.l1_loss(x_hat, x), psnr, l_low, l_low, l_sem, layers["logit"]])
        used += indices.flatten().tolist()
    p = np.bincount(used, minlength=16) / len(used)
    perplexity = np.prod(np.where(p > 0, p, 1) ** -p)
    want = [*np.mean(rows, 0), (p > 0).mean(), perplexity, math.log(perplexity)]
    value = lines(tmp_path / "run", "val")[-1]
    names = ("l1", "psnr", "perceptual", "L_low", "L_sem", "logit", "usage", "perplexity",
             "code_entropy")
    assert [value[name] for name in names] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("n", [21, 100])
def test_reconstructions_are_of_the_whole_set(tokenizer, tmp_path, monkeypatch, n):
    """Each input above its reconstruction, eight per row; at most 32."""
    monkeypatch.setattr(Shapes, "SIZES", {"val": n})
    args, (model, _) = Namespace(image_size=16, phase=1, dtype="fp32"), vq.load_tokenizer(tokenizer)
    train_tokenizer.save_reconstructions(tmp_path / "0.png", model, Shapes("val"), args, CPU)
    images = data.EvalImages(Shapes("val"), 16)
    x = torch.stack([images[i][0] for i in data.evenly_spaced(n, 32)])
    x = data.to_float(x, CPU)
    sheet = cells(tmp_path / "0.png", 8).reshape(-1, 2, 8, 16, 16, 3)
    for row, want in enumerate((x, model(x)[0])):
        shown = sheet[:, row].reshape(-1, 16, 16, 3)[:len(x)]
        assert abs(shown - to_pixels(want)).max() <= 1


# ------------------------------------------------------------------------------------ both phases

@pytest.mark.parametrize("attention, quantizer", [(0, "vq"), (2, "kmeans")])
def test_phase_2_and_finetuning_start_from_phase_1(train, script, many_photos, tmp_path,
                                                   monkeypatch, attention, quantizer):
    monkeypatch.setattr(train_tokenizer, "KMEANS_STEPS", range(9))
    one = train("--data", many_photos, "--crop", "center", "--attention", attention,
                "--commitment_weight", 0.3, "--l1_weight", 0.7, "--quantizer", quantizer,
                "--iters", 2)
    phase_1, _ = vq.load_tokenizer(tmp_path / "run/ckpt.pt")
    tokenizer_loss, begun = train_tokenizer.tokenizer_loss, []

    def watch(networks, x, step, args):
        assert not any(p.requires_grad for p in networks.disc.parameters())
        if not step:  # phase 1's reconstructions and discriminator
            disc = networks.disc.state_dict()
            begun.append(all(torch.equal(v, one["disc"][k]) for k, v in disc.items()))
            z_q, *_ = train_tokenizer.encode(networks.model.eval(), x, args)
            assert torch.equal(networks.model.decode(z_q), phase_1(x)[0])
            networks.model.train()
        return tokenizer_loss(networks, x, step, args)
    monkeypatch.setattr(train_tokenizer, "tokenizer_loss", watch)
    words = ["train_tokenizer", "--init", tmp_path / "run/ckpt.pt", "--batch_size", 8,
             "--workers", 0, "--log_every", 1, "--device", "cpu", "--out"]
    script(*words, tmp_path / "finetuned", "--iters", 1)  # as LSUN's phase 1
    script(*words, tmp_path / "two", "--phase", 2, "--iters", 2)
    two, found = load(tmp_path / "two/ckpt.pt"), lines(tmp_path / "two", "train")
    assert begun == [True, True] and two["opt_disc"]["state"][0]["step"] == 2  # Adam starts afresh
    assert two["config"] == one["config"] | {"attention": attention or 1}
    for name in {*train_tokenizer.INHERITED_FLAGS} - {"attention"}:
        assert two["args"][name] == one["args"][name], name
    assert two["args"]["data"] == str(many_photos) and two["args"]["alpha"] == 0
    assert {(line["lr"], line["adv_weight"]) for line in found} == {(5e-5, 0.1)}
    assert two["opt"]["param_groups"][0]["betas"] == (0.5, 0.9)
    for name, value in one["model"].items():  # encoder and codebook to the last bit
        assert torch.equal(value, two["model"][name]) != name.startswith("decoder."), name
    assert vq.fingerprint(phase_1) == vq.fingerprint(vq.load_tokenizer(tmp_path / "two/ckpt.pt")[0])


def test_a_run_resumes_longer_slower_on_moved_data_and_after_a_fork(train, script, many_photos,
                                                                    tmp_path, capsys):
    state = train("--iters", 2, "--data", many_photos)
    del state["args"]["grad_checkpointing"]  # as if it were a fork's new flag
    torch.save(state, tmp_path / "run/ckpt.pt")
    moved = many_photos.rename(tmp_path / "moved")
    resume = ["train_tokenizer", "--resume", "--out", tmp_path / "run", "--data", moved]
    script(*resume, "--iters", 5)
    assert "has changed" not in capsys.readouterr().out
    rates = [line["lr"] for line in lines(tmp_path / "run", "train")][2:]
    assert rates == pytest.approx([runtime.cosine(n, 5, 1e-3, 5e-4) for n in (2, 3, 4)], rel=1e-5)
    (moved / "cats/new.png").write_bytes((moved / "cats/0.png").read_bytes())
    script(*resume, "--iters", 7, "--lr", 1e-5)  # as advised where gradients are not finite
    assert all(line["lr"] <= 1e-5 for line in lines(tmp_path / "run", "train")[5:])
    assert "the data set has changed" in capsys.readouterr().out


def test_continuing_a_finished_phase_1_warns_of_its_priors_and_phase_2(train, tmp_path, capsys):
    """Not if it was stopped before its end, and not in phase 2, which keeps the codes."""
    for out, words in (("run", []), ("two", ["--phase", 2, "--init", tmp_path / "run/ckpt.pt"])):
        state, path = train(*words, "--iters", 1, out=out), tmp_path / out / "ckpt.pt"
        for iters, expected in ((1, out == "run"), (2, False)):
            torch.save(state | {"args": state["args"] | {"iters": iters}}, path)
            capsys.readouterr()
            train("--resume", "--iters", 2, out=out)
            assert (str(path) in capsys.readouterr().out) == expected


# -------------------------------------------------------------------------- miniature/train_vgg.py

VGG = [*COMMON, "--image_size", 16, "--widths", 8, 8, 8, 8, 8]


def test_the_small_vgg_and_its_scale(script, tmp_path):
    script("train_vgg", *VGG, "--out", tmp_path / "run")
    net = losses.load_vgg(tmp_path / "run/ckpt.pt")
    images = data.EvalImages(Shapes("train"), 16)
    x = data.to_float(torch.stack([images[i][0] for i in range(60)]), CPU)
    for features, scale in zip(net(x, losses.LAYERS).values(), net.layer_scale):
        assert features.var(0, correction=0).mean().item() == pytest.approx(scale.item(), rel=1e-4)
    source, kinds, right = Shapes("val"), net.config["num_classes_per_head"], []
    source.fine = True
    for i in range(12):  # every softmax is right or wrong
        x = data.to_float(data.EvalImages(source, 16)[i][0][None], CPU)
        found = [part.argmax(1).item() for part in net(x, ["logit"])["logit"].split(kinds, 1)]
        right.append(np.equal(found, np.unravel_index(source.label(i), kinds)))
    assert lines(tmp_path / "run", "val")[-1]["accuracy"] == pytest.approx(np.mean(right), rel=1e-5)


@pytest.mark.parametrize("attack, passes", [(0, 1), (0.05, 2)])
def test_the_small_vgg_learns_classes_of_photographs(script, photos, tmp_path, monkeypatch, attack,
                                                     passes):
    forward, seen = losses.SmallVGG.forward, []
    monkeypatch.setattr(losses.SmallVGG, "forward", lambda net, x, layers:
                        seen.append(net.training) or forward(net, x, layers))
    script("train_vgg", *VGG, "--fgsm_eps", attack, "--data", photos, "--val", photos,
           "--out", tmp_path / "run")
    state = load(tmp_path / "run/ckpt.pt")
    assert sum(seen) == passes * state["step"]
    assert state["config"]["num_classes_per_head"] == [2] and state["classes"] == ["cats", "dogs"]


def test_a_skipped_step_leaves_no_nan_in_the_small_vgg(script, tmp_path, monkeypatch):
    """The running statistics of batch norm would otherwise keep it for ever."""
    perturb, calls = train_vgg.perturb, []

    def spoil(x, generator):
        calls.append(math.nan if len(calls) == 1 else 1)
        return perturb(x, generator) * calls[-1]
    monkeypatch.setattr(train_vgg, "perturb", spoil)
    script("train_vgg", *VGG, "--out", tmp_path / "run")
    state = load(tmp_path / "run/ckpt.pt")
    assert (state["step"], state["skipped"]) == (6, 2)  # of 12, with those on perturbed images
    assert all(value.isfinite().all() for value in state["model"].values())


def test_images_without_variance_train_no_small_vgg(rejected, tmp_path):
    for name in ("cats/1", "cats/2", "dogs/1"):
        path = tmp_path / f"photos/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(path)
    assert "images" in rejected("train_vgg", *VGG, "--data", tmp_path / "photos",
                                "--val", tmp_path / "photos", "--out", tmp_path / "run")
    assert not (tmp_path / "run/ckpt.pt").exists()
