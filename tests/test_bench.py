"""bench.py and costs.py: the step that is measured is the script's, fast and naive agree, the counts are exact."""
import time
from argparse import Namespace
from functools import partial

import pytest
import torch
from test_train_tokenizer import TINY, lines

import bench
import costs
import data
import losses
import runtime
import train_tokenizer
import transformer
from bench import CPU, Tokenizer
from runtime import BadInput

ARGS = Namespace(image_size=16, batch_size=8, channels=[16, 16], z_dim=8, codebook_size=16, disc_channels=[8, 8],
                 prior="tiny", tokens=64, seconds=0)
KEEPING = [name for name in bench.OFF if name not in ("compile", "bf16", "lazy")]  # those that change no number


class Eyes(torch.nn.Module):
    """In VGG16's place, which takes a second to make and 32 pixels to see."""

    def __init__(self):
        super().__init__()
        self.net = losses.SmallVGG([8, 8, 16, 16, 16], 10)

    def forward(self, x, layers):
        return self.net(x, layers)


@pytest.fixture
def small_vgg(monkeypatch):
    def make():
        torch.manual_seed(1)
        return Eyes()
    monkeypatch.setattr(losses, "VGG16", make)


@pytest.fixture
def once(monkeypatch):
    """Measurements of one call each: what is printed is looked at, not how steady it is."""
    def measure(call, device, seconds):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin, 100.0
    monkeypatch.setattr(bench, "measure", measure)


def batches():
    """The script's, with TINY's flags."""
    args = Namespace(batch_size=8, accum=1, iters=3, workers=0)
    return [images for images, *_ in data.train_loader(data.TrainImages(data.Shapes(), 16, "random", 0), args, 0, CPU)]


def run(tokenizer, steps=3):
    found = []
    for i, images in enumerate(batches()[:steps]):
        tokenizer.images = images
        found.append({name: float(value) for name, value in tokenizer.step(penalise=i == 0).items()})
    return found


def test_the_measured_step_is_the_scripts(script, vgg, tmp_path, monkeypatch):
    for phase, more in ((1, ()), (2, ("--phase", 2, "--init", tmp_path / "1" / "ckpt.pt"))):
        flags = list(map(str, TINY))
        for name in ("--channels", "--z_dim", "--codebook_size", "--image_size") if phase == 2 else ():
            at = flags.index(name)
            del flags[at:at + (3 if name == "--channels" else 2)]
        lr = train_tokenizer.PHASE[phase]["lr"]
        script("train_tokenizer", *flags, "--iters", 3, "--lr", lr, "--lr_end", lr, "--disc_ramp", 0, "--r1_every", 16,
               "--vgg", vgg, "--out", tmp_path / str(phase), *more)
        with monkeypatch.context() as patch:
            patch.setattr(losses, "VGG16", partial(losses.load_vgg, vgg))
            tokenizer = Tokenizer(ARGS, CPU, phase)
        if phase == 2:
            init = runtime.load_checkpoint(tmp_path / "1" / "ckpt.pt", "tokenizer")
            train_tokenizer.load_init(tokenizer.model, tokenizer.disc, init, Namespace(init="1"))
        for ours, theirs in zip(run(tokenizer), lines(tmp_path / str(phase), "train")):
            for name in ("loss", "l1", "perceptual", "adversarial", "disc", "commitment", "H", "r1"):
                if name in theirs:
                    assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (phase, name)
        assert ours["r1"] == 0 and "r1" not in theirs


@pytest.mark.parametrize("off", [*[[name] for name in KEEPING], KEEPING], ids=lambda off: "+".join(off))
def test_fast_and_naive_agree_step_by_step(small_vgg, off):
    for fast, naive in zip(run(Tokenizer(ARGS, CPU)), run(Tokenizer(ARGS, CPU, off=off))):
        assert fast.keys() == naive.keys()
        for name, value in fast.items():
            assert naive[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_bf16_agrees_to_its_precision(small_vgg, monkeypatch):
    full = run(Tokenizer(ARGS, CPU), 2)
    monkeypatch.setattr(Tokenizer, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    half = run(Tokenizer(ARGS, CPU), 2)
    for a, b in zip(full, half):
        assert a != b
        for name in ("loss", "l1", "perceptual", "adversarial", "disc", "r1"):
            assert b[name] == pytest.approx(a[name], rel=0.03, abs=1e-3), name


def test_compiled_parts_agree_and_compile_once(small_vgg):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    tokenizer = Tokenizer(ARGS, CPU)
    eager = run(tokenizer)
    tokenizer = Tokenizer(ARGS, CPU)
    for part in (tokenizer.model.encoder, tokenizer.model.decoder, tokenizer.perceptual.net, tokenizer.disc):
        part.compile(backend=backend, fullgraph=True)  # fullgraph: no breaks
    compiled = run(tokenizer, 2)
    so_far = len(graphs)
    compiled += run(tokenizer)[:0]
    for a, b in zip(eager, compiled):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    assert 0 < so_far == len(graphs)  # three more steps, the first with R1, compiled nothing


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_the_priors_count_is_the_formula(kind):
    N, K, (L, _, d) = ARGS.tokens, ARGS.codebook_size, transformer.SIZES["tiny"].values()
    rows = N if kind == "ar" else N + 1  # NAR's prefix is a row of its own, and predicts nothing
    forward = L * (2 * rows * 12 * d * d + 4 * rows * rows * d) + 2 * N * d * K
    assert bench.count(partial(bench.prior, ARGS, kind)) * 1e12 == pytest.approx(3 * 8 * forward, rel=1e-9)


def test_nothing_waits_for_the_device(small_vgg):
    """Tensors without contents can't be read by the host: `count` gets to the end where no step does it."""
    for phase in (1, 2):
        assert Tokenizer.tflop(ARGS, phase)[0] > 0
    for make in (bench.prior, bench.sampling):
        for kind in ("ar", "nar"):
            assert bench.count(partial(make, ARGS, kind)) > 0
    with pytest.raises(Exception, match="local_scalar_dense"):
        bench.count(lambda cpu: Tokenizer(ARGS, cpu, off=("channels_last", "wait")).step)


def test_a_measurement_is_the_median_of_warm_calls(monkeypatch):
    clock, naps = [0.0], iter([0.3, 0.1, 0.06, 0.2, 0.07])  # the first two warm up
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    seconds, _ = bench.measure(lambda: clock.append(clock.pop() + next(naps)), CPU, 0)
    assert seconds == pytest.approx(0.07)


def test_every_stage_is_printed(script, small_vgg, once, monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "small", {**vars(ARGS), "image_size": 16, "batch_size": 4})
    script("bench", "--seconds", 0, "--naive", "--device", "cpu")
    out = capsys.readouterr().out
    for words in ("one large matrix product", "phase 1: a training step", "phase 2: a training step", "encoder",
                  "quantizer", "perceptual loss", "optimizers", "R1, a 16th", "encoding for the code cache",
                  "AR prior: sampling", "NAR prior: a training step", "Inception, fid.py", "ImageFolder",
                  "with --recompute", "all of them off"):
        assert words in out
    row = next(line for line in out.splitlines() if "phase 1: a training step" in line)
    images, per_image, speed = map(float, row.split("step")[1].split()[:3])
    assert speed == pytest.approx(images * per_image, abs=2e-3)


def test_growth_and_its_law(script, small_vgg, monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "time", lambda *_: (1.0, 0.0, 100.0))  # steps at 512 pixels would take a minute
    monkeypatch.setitem(bench.SIZES, "small", {**vars(ARGS), "batch_size": 4, "image_size": 16})
    script("costs", "--growth", "--seconds", 0, "--device", "cpu")
    rows = {line.split(" (law")[0]: line.split(")")[1].split() for line in capsys.readouterr().out.splitlines()
            if "(law" in line}
    assert float(rows["image_size 512"][2]) == pytest.approx(64, rel=0.1)
    assert [float(rows[f"batch_size {b}"][2]) for b in (1, 2, 4, 8)] == [1, 2, 4, 8]
    work = [float(rows[f"codebook_size {K}"][2]) for K in (256, 1024, 4096, 16384)]
    assert work[0] == 1 and work == sorted(work) and work[3] - 1 == pytest.approx(16384 / 4096 * (work[2] - 1), rel=0.1)


def test_many_processes_are_measured(launch):
    words = ["costs.py", "--scaling", "--processes", 2, "--image_size", 32, "--batch_size", 4, "--device", "cpu"]
    out = launch(words).stdout.splitlines()
    for name in ("tokenizer, phase 1", "AR prior"):
        row = next(line for line in out if line.startswith(name))
        alone, together, efficiency, _, share, _ = row[len(name):].split()
        assert float(efficiency) == pytest.approx(100 * float(alone) / float(together), abs=2)
        assert 0 < float(share) < 100


def test_hours_are_images_times_work_over_rate(script, monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "tflop", lambda args, phase: (4.0 * 3.6 * phase, 0))  # of four images
    monkeypatch.setattr(bench, "count", lambda make: 4 * 0.36)
    script("costs", "--hours", 100, 200, 10)
    hours = {line[:26].strip(): float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert hours["ImageNet, phase 1"] == 500_000 * 256 * 3.6 / 100 / 3600
    assert hours["FFHQ, phase 2"] == 200_000 * 32 * 7.2 / 200 / 3600
    assert hours["ImageNet, NAR large"] == 1_500_000 * 256 * 0.36 / 10 / 3600 and len(hours) == 21
    for phase in (1, 2):  # the scripts' own defaults
        paper = train_tokenizer.PHASE[phase]
        assert ("ImageNet", f"phase {phase}", paper["iters"], paper["batch_size"]) in costs.RUNS


def test_bad_input_is_one_sentence(script):
    for words, message in (([], "nothing to do"), (["--hours", 1, 2], "one rate or three"),
                           (["--hours", 0], "outside its range")):
        with pytest.raises(BadInput, match=message):
            script("costs", *words)
    with pytest.raises(BadInput, match="not a multiple of 8"):
        script("bench", "--image_size", 20, "--size", "small", "--device", "cpu")


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
