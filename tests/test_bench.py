"""bench.py and costs.py: what is measured is the scripts' work, fast and naive agree, the counts are exact."""
import math
import sys
import time
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import ROOT
from test_train_tokenizer import TINY, lines

import data
import losses
import runtime
import train_tokenizer
import transformer
from miniature.shapes import Shapes
from runtime import BadInput

sys.path[:0] = [str(ROOT / "benchmarks")]

import bench  # noqa: E402
import costs  # noqa: E402
from bench import CPU, FAKE, Tokenizer  # noqa: E402

ARGS = Namespace(image_size=16, batch_size=8, channels=[16, 16], z_dim=8, codebook_size=16, disc_channels=[8, 8],
                 prior="tiny", tokens=64, seconds=0, compile=False)
KEEPING = [name for name in bench.OFF if name not in ("compile", "bf16", "lazy")]  # those that change no number


@pytest.fixture
def small_vgg(monkeypatch):
    """In VGG16's place, which takes a second to make and needs 32 pixels."""
    def make():
        torch.manual_seed(1)
        return losses.SmallVGG([8, 8, 16, 16, 16], 10)
    monkeypatch.setattr(losses, "VGG16", make)


@pytest.fixture
def once(monkeypatch):
    """Measurements of one call each: what is printed is tested, not how steady it is."""
    def measure(call, device, seconds):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin, 100.0
    monkeypatch.setattr(bench, "measure", measure)


def batches():
    """The script's, with TINY's flags."""
    args = Namespace(batch_size=8, accum=1, iters=3, workers=0)
    return [images for images, *_ in data.train_loader(data.TrainImages(Shapes(), 16, "random", 0), args, 0, CPU)]


def run(tokenizer, steps=3):
    """The terms of each step; R1 in the first."""
    found = []
    for i, images in enumerate(batches()[:steps]):
        tokenizer.images = images
        tokenizer.step(penalise=i == 0)
        found.append(tokenizer.averages.means())
    return found


def test_the_setup_is_the_scripts(script, vgg, tmp_path, monkeypatch):
    """The step is the script's own function; networks, optimizers, rates and weights must be the script's, too."""
    for phase, words in ((1, TINY), (2, ["--phase", 2, "--init", tmp_path / "1" / "ckpt.pt", "--image_size", 16,
                                         *TINY[TINY.index("--iters"):]])):
        flags = bench.default_flags(train_tokenizer, "--phase", str(phase), "--init", "-")
        script("train_tokenizer", *words, "--iters", 3, "--lr", flags.lr, "--lr_end", flags.lr, "--disc_ramp", 0,
               "--r1_every", 16, "--vgg", vgg, "--out", tmp_path / str(phase))
        net = train_tokenizer.load_vgg(vgg)
        scale = dict(zip(losses.LAYERS, net.mean_square.tolist()))
        with monkeypatch.context() as patch:
            patch.setattr(losses, "VGG16", lambda net=net: net)
            tokenizer = Tokenizer(ARGS, CPU, phase)
        tokenizer.perceptual.scale = scale  # VGG16's is all ones
        if phase == 2:
            state = runtime.load_file(tmp_path / "1" / "ckpt.pt", "tokenizer")
            assert not tokenizer.model.load_state_dict(state["model"], strict=False).unexpected_keys
            tokenizer.disc.load_state_dict(state["disc"])
        ours, theirs = run(tokenizer), lines(tmp_path / str(phase), "train")
        assert len(ours) == len(theirs) == 3 and "r1" in ours[0] and "r1" not in ours[1]
        for terms, line in zip(ours, theirs):
            assert terms == pytest.approx({name: line[name] for name in terms}, rel=2e-5), phase


@pytest.mark.parametrize("off", [*[[name] for name in KEEPING], KEEPING], ids="+".join)
def test_fast_and_naive_agree_step_by_step(small_vgg, off):
    for fast, naive in zip(run(Tokenizer(ARGS, CPU)), run(Tokenizer(ARGS, CPU, off=off))):
        assert {name: naive[name] for name in fast} == pytest.approx(fast, rel=1e-4, abs=1e-6)


def test_what_naive_switches_off_is_off(small_vgg, monkeypatch):
    """Numbers that do not change can't show it."""
    read, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (read.append(self), item(self))[1])
    for off in ([], list(bench.OFF)):
        tokenizer = Tokenizer(ARGS, CPU, off=off)
        blur = tokenizer.disc.blocks[0].blur(torch.ones(1, 8, 8, 8, requires_grad=True))
        read.clear()
        tokenizer.step()
        waits, terms = bool(read), tokenizer.averages.means()
        on = {"channels_last": tokenizer.model.encoder.stem.weight.is_contiguous(memory_format=torch.channels_last),
              "bf16": tokenizer.flags.dtype == "auto", "fused": bool(tokenizer.opt_g.param_groups[0]["fused"]),
              "layers": "relu1_2" not in terms, "conv": "Convolve" in type(blur.grad_fn).__name__, "wait": not waits,
              "frozen": not any(p.requires_grad for p in tokenizer.perceptual.parameters()),
              "lazy": "r1" not in terms, "lazy, its weight": tokenizer.flags.r1_every == 16}
        assert set(on.values()) == {not off}, on
        assert on.keys() - {"lazy, its weight"} | {"compile"} == bench.OFF.keys()


def test_bf16_agrees_to_its_precision(small_vgg):
    full, half = Tokenizer(ARGS, CPU), Tokenizer(ARGS, CPU)
    half.flags.dtype = "bf16"
    for a, b in zip(run(full, 2), run(half, 2)):
        assert a != b
        for name in {"loss", "l1", "perceptual", "adversarial", "disc", "r1"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=0.03, abs=1e-3), name


def test_compiled_parts_agree_and_compile_once(small_vgg):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    eager, tokenizer = run(Tokenizer(ARGS, CPU)), Tokenizer(ARGS, CPU)
    for part in (tokenizer.model.encoder, tokenizer.model.decoder, tokenizer.perceptual.net, tokenizer.disc):
        part.compile(backend=backend, fullgraph=True)  # fullgraph: no breaks
    compiled = run(tokenizer, 2)
    so_far = len(graphs)
    run(tokenizer)
    for a, b in zip(eager, compiled):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    assert 0 < so_far == len(graphs)  # three more steps, the first with R1, compiled nothing


def test_every_variant_compiles_afresh(small_vgg, monkeypatch):
    """After eight graphs of one function Dynamo would run it eagerly."""
    events, args = [], Namespace(**vars(ARGS) | {"compile": True})
    monkeypatch.setattr(torch._dynamo, "reset", lambda: events.append("reset"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: events.append(type(self).__name__))
    for off in ((), ("conv",), ("compile",)):
        Tokenizer(args, CPU, off=off)
    bench.prior(args, "ar", CPU)
    assert events == ["reset", "Encoder", "Decoder", "SmallVGG", "Discriminator"] * 2 + ["reset", "Transformer"]


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_the_priors_count_is_the_formula(kind):
    N, K, (L, _, d) = ARGS.tokens, ARGS.codebook_size, transformer.SIZES["tiny"].values()
    rows = N if kind == "ar" else N + 1  # NAR's prefix is a row of its own, and predicts nothing
    forward = L * (2 * rows * 12 * d * d + 4 * rows * rows * d) + 2 * N * d * K
    assert bench.count_tflop(partial(bench.prior, ARGS, kind)) * 1e12 == pytest.approx(3 * 8 * forward, rel=1e-9)


def test_nothing_waits_for_the_device(small_vgg):
    """Fake tensors can't be read by the host: the counter gets to the end where no step does it."""
    for phase in (1, 2):
        assert Tokenizer.tflop(ARGS, phase)[0] > 0
    for make in (bench.prior, bench.sampling):
        for kind in ("ar", "nar"):
            assert bench.count_tflop(partial(make, ARGS, kind)) > 0
    with pytest.raises(Exception, match="local_scalar_dense"):
        bench.count_tflop(lambda cpu: Tokenizer(ARGS, cpu, off=(*FAKE, "wait")).step)


def test_r1_is_counted(small_vgg):
    """The second derivative costs more than the first, of which a step has two (real and fake)."""
    step, r1 = Tokenizer.tflop(ARGS)
    disc = bench.count_tflop(lambda cpu: Tokenizer(ARGS, cpu, off=FAKE).parts()["discriminator, its own step"])
    assert 0.5 * disc < 16 * r1 < 2 * disc < 2 * step


def test_a_measurement_is_the_median_of_warm_calls(monkeypatch):
    clock, naps = [0.0], iter([0.3, 0.1, 0.06, 0.2, 0.07])  # the first two warm up
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    seconds, peak = bench.measure(lambda: clock.append(clock.pop() + next(naps)), CPU, 0)
    assert seconds == pytest.approx(0.07) and math.isnan(peak)


def test_every_stage_is_printed(script, small_vgg, once, monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "small", {**vars(ARGS), "batch_size": 4})
    script("bench", "--seconds", 0, "--naive", "--device", "cpu")
    out = capsys.readouterr().out
    for words in ("one large matrix product", "phase 1: a training step", "phase 2: a training step", "encoder",
                  "quantizer", "perceptual loss", "its own step", "R1, a 16th", "encoding for the code cache",
                  "AR prior: sampling", "NAR prior: a training step", "data.py", "ImageFolder",
                  "fused off", "with --recompute", "all of them off", "run-to-run variance"):
        assert words in out, words
    row = next(line for line in out.splitlines() if "phase 1: a training step" in line)
    images, per_image, speed = map(float, row.split("step")[1].split()[:3])
    assert speed == pytest.approx(images * per_image, abs=2e-3)


def test_growth_and_its_law(script, small_vgg, monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "time", lambda *_: (1.0, 0.0, 100.0))  # steps at 512 pixels would take a minute
    monkeypatch.setitem(bench.SIZES, "small", {**vars(ARGS), "batch_size": 4})
    script("costs", "--growth", "--seconds", 0, "--device", "cpu")
    rows = {line.split(" (law")[0]: line.split(")")[1].split() for line in capsys.readouterr().out.splitlines()
            if "(law" in line}
    assert float(rows["image_size 512"][2]) == pytest.approx(64, rel=0.1)
    assert [float(rows[f"batch_size {b}"][2]) for b in (1, 2, 4, 8)] == [1, 2, 4, 8]
    work = [float(rows[f"codebook_size {K}"][2]) for K in (256, 1024, 4096, 16384)]
    assert work[0] == 1 and work == sorted(work) and work[3] - 1 == pytest.approx(16384 / 4096 * (work[2] - 1), rel=0.1)


def test_many_processes_are_measured(launch, tmp_path):
    words = ["--scaling", "--processes", 2, "--image_size", 32, "--batch_size", 4, "--device", "cpu"]
    out = launch(["benchmarks/costs.py", *words], cwd=tmp_path).stdout.splitlines()
    for name in ("tokenizer, phase 1", "AR prior"):
        row = next(line for line in out if line.startswith(name))
        alone, together, efficiency, _, share, _ = row[len(name):].split()
        assert float(efficiency) == pytest.approx(100 * float(alone) / float(together), abs=2)
        assert 0 < float(share) < 100


def test_hours_are_images_times_work_over_rate(script, monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "tflop", lambda args, phase: (4.0 * 3.6 * phase, 0))  # of four images
    monkeypatch.setattr(bench, "count_tflop", lambda make: 4 * 0.36)
    script("costs", "--hours", 100, 200, 10)
    hours = {line[:26].strip(): float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert hours["ImageNet, phase 1"] == 500_000 * 256 * 3.6 / 100 / 3600
    assert hours["FFHQ, phase 2"] == 200_000 * 32 * 7.2 / 200 / 3600
    assert hours["ImageNet, NAR large"] == 1_500_000 * 256 * 0.36 / 10 / 3600 and len(hours) == 21
    for phase in (1, 2):  # the scripts' own defaults
        paper = train_tokenizer.PHASE[phase]
        assert ("ImageNet", f"phase {phase}", paper["iters"], paper["batch_size"]) in costs.RUNS


def test_bad_input_is_one_sentence(script, monkeypatch):
    for words, message in (([], "nothing to do"), (["--hours", 1, 2], "one rate or three"),
                           (["--hours", 0], "0 is not above 0")):
        with pytest.raises(BadInput, match=message):
            script("costs", *words)
    with pytest.raises(BadInput, match="not a multiple of 8"):
        script("bench", "--image_size", 20, "--size", "small", "--device", "cpu")
    monkeypatch.setattr(runtime, "world", lambda: 2)
    with pytest.raises(BadInput, match="one process"):
        script("bench", "--device", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_the_recorded_graph_draws_the_same(monkeypatch, cfg):
    model = transformer.Transformer("ar", "tiny", 64, 16, 5, null_class=True).eval().cuda()
    draw = partial(model.generate, range(4), 3, torch.arange(4), top_p=0.9, cfg=cfg)
    for dtype in ("fp32", "bf16"):
        with runtime.autocast(torch.device("cuda"), dtype):
            recorded = [draw(), draw()]
            with monkeypatch.context() as patch:
                patch.setattr(transformer, "repeat", lambda step, n, device: [step() for _ in range(n)])
                plain = draw()
        assert torch.equal(recorded[0], plain) and torch.equal(recorded[1], plain)
