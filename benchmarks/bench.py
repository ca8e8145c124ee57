"""How fast is each stage, how near to what the machine can do, what is each optimization worth?

    python benchmarks/bench.py                       # the paper's sizes; on a CPU small ones
    python benchmarks/bench.py --parts phase1 r1     # some parts only, in this order
    python benchmarks/bench.py --parts naive         # a phase-1 step without each optimization

The steps are those of train_tokenizer.py and train_prior.py; weights, images and codes are random.
TFLOP are counted by torch's FLOP counter (a multiply-add is 2). `share` is TFLOP/s over the rate of
one large matrix product. With --json each figure is on disk as soon as it is known.
"""
import argparse
import gc
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402
import train_prior  # noqa: E402
import train_tokenizer  # noqa: E402
import transformer  # noqa: E402

SIZES = {  # flags of train_tokenizer.py, and the priors
    "paper": ("--image_size 256", ("base", "large")),
    "small": ("--image_size 64 --channels 32 48 64 96 --z_dim 64 --disc_channels 32 128",
              ("tiny",))}
PARTS = ("phase1", "r1", "phase2", "priors", "sampling")
# What the part `naive` switches off, one after the other.
OFF = {"compile": "no torch.compile", "bf16": "fp32", "channels_last": "channels first",
       "fused": "Adam tensor by tensor", "frozen": "gradients of VGG's and D's weights, too",
       "layers": "all six VGG layers, of whatever weight", "lazy": "R1 at every step"}


# ----------------------------------------------------------------------------------- measuring

def measure(call, device, seconds):
    """Median seconds of a warm call(), and the peak of GPU memory meanwhile in GiB."""
    def run(n):
        begin = time.perf_counter()
        for _ in range(n):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / n

    gc.collect()
    run(1)
    times, n = [], math.ceil(0.05 / run(1))  # short calls several at once: the queue stays full
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while len(times) < 3 or n * sum(times) < seconds:
        times.append(run(n))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else math.nan
    return statistics.median(times), peak


def count_tflop(call):
    """TFLOP of call(), run once, eagerly: the counter does not see into compiled graphs."""
    counter = FlopCounterMode(display=False)
    # Its tracker of modules, not needed here, fails where R1's autograd.grad ends at the images.
    counter.mod_tracker._fw_pre_hook = counter.mod_tracker._fw_post_hook = lambda *_: None
    with torch.compiler.set_stance("force_eager"), counter:
        call()
    return counter.get_total_flops() / 1e12


class Table:
    """Prints a row for each figure, and keeps all in --json."""

    def __init__(self, args, device):
        self.args, self.device, self.rows = args, device, []
        dtype, n = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 2048)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        self.rate = 2 * n**3 / 1e12 / measure(lambda: a @ b, device, args.seconds)[0]
        card = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        self.machine = f"{card}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        print(f"{self.machine}; one large matrix product, {dtype}: {self.rate:.3f} TFLOP/s\n\n"
              f"{'':46} {'ms':>9} {'images/s':>9} {'TFLOP/image':>12} {'share':>7} {'peak GiB':>9}")

    def row(self, name, seconds, peak, images, tflop=math.nan):
        """tflop: of one image."""
        share = tflop * images / seconds / self.rate
        self.rows.append(dict(name=name, ms=1000 * seconds, images_per_s=images / seconds,
                              tflop_per_image=tflop, share=share, peak_gib=peak))
        print(f"{name:46} {1000 * seconds:9.1f} {images / seconds:9.1f} {tflop:12.5f} "
              f"{100 * share:5.1f} % {peak:9.2f}", flush=True)
        if self.args.json:
            found = {"machine": self.machine, "matrix_tflops": self.rate, "rows": self.rows}
            text = json.dumps(found, indent=1)
            runtime.save_file(self.args.json, lambda file: file.write(text.encode()))


# ---------------------------------------------------------------------------- what is measured

def flags_of(args, *words):
    """The flags of train_tokenizer.py at args.size, as its `parse` finds them."""
    words = ["bench", "--out", "runs/none", *SIZES[args.size][0].split(), *map(str, words)]
    with mock.patch.object(sys, "argv", words):
        return train_tokenizer.parse()


def compile_parts(*parts):
    torch._dynamo.reset()  # after eight variants of the same code Dynamo would leave it eager
    for part in parts:
        part.compile(dynamic=False)


def step_of(opts):
    """Run.step of a run that has no folder."""
    run = runtime.Run.__new__(runtime.Run)
    run.skipped = run.skipped_in_a_row = 0
    run.step(opts, 1e-4)


class Tokenizer:
    """What train_tokenizer.py sets up before its loop, and its step. `off`: names of OFF."""

    def __init__(self, args, device, phase=1, off=()):
        words = ["--phase", phase, "--init", "", "--dtype", "fp32" if "bf16" in off else "auto"]
        self.flags = flags_of(args, *words)
        self.off = off
        self.model, self.disc = train_tokenizer.build_models(self.flags, device)
        self.perceptual = losses.PerceptualLoss(losses.VGG16(), self.flags.alpha).to(device)
        self.networks = train_tokenizer.Networks(self.model, self.disc, self.perceptual)
        self.memory = torch.contiguous_format if "channels_last" in off else torch.channels_last
        self.model.to(memory_format=self.memory)
        self.disc.to(memory_format=self.memory)
        if "layers" in off:
            self.perceptual.weights = dict.fromkeys(losses.LAYERS, 0.0) | self.perceptual.weights
        if "frozen" in off:
            self.perceptual.requires_grad_(True)
            self.disc.requires_grad_(True).requires_grad_ = lambda _: self.disc
        adam = partial(torch.optim.Adam, foreach=False) if "fused" in off else partial(
            torch.optim.Adam, fused=True)
        trained = self.model if phase == 1 else self.model.decoder
        self.opts = [adam(net.parameters(), betas=(0.9, 0.99)) for net in (trained, self.disc)]
        if args.compile and "compile" not in off:
            compile_parts(self.model.encoder, self.model.decoder, self.perceptual.net, self.disc)
        shape = args.batch_size, 3, self.flags.image_size, self.flags.image_size
        images = torch.randint(256, shape, dtype=torch.uint8)
        self.images, self.device = images.pin_memory() if device.type == "cuda" else images, device

    def step(self, with_r1=False, images=None):
        """A step as in train_tokenizer.py, with R1 or without."""
        x = data.to_float(self.images if images is None else images, self.device)
        x, flags = x.contiguous(memory_format=self.memory), self.flags
        loss, x_hat, _ = train_tokenizer.tokenizer_loss(self.networks, x, flags.disc_warmup, flags)
        loss.backward()
        self.disc.requires_grad_(True)
        train_tokenizer.discriminator_loss(self.disc, x, x_hat.detach(), flags)[0].backward()
        if with_r1 or "lazy" in self.off:
            weight = flags.r1_weight / 2 * train_tokenizer.R1_EVERY
            train_tokenizer.backward_r1(self.disc, x, weight)
        self.disc.requires_grad_(False)
        step_of(self.opts)
        if "frozen" in self.off:
            self.perceptual.zero_grad()

    def report(self, table, name, seconds, count=True):
        """A row: the mean over R1's period of sixteen steps. Returns its seconds."""
        (plain, _), (full, peak) = (
            measure(partial(self.step, p), self.device, seconds) for p in (False, True))
        mean, tflop = plain + (full - plain) / train_tokenizer.R1_EVERY, math.nan
        if count:  # of four images, which fit eagerly as well
            a, b = (count_tflop(partial(self.step, p, self.images[:4])) for p in (False, True))
            tflop = (a + (b - a) / train_tokenizer.R1_EVERY) / min(4, len(self.images))
        table.row(name, mean, peak, len(self.images), tflop)
        return mean


def stock_r1(disc, x):
    """R1 by PyTorch's own second derivative, to compare with."""
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def r1(args, device, table):
    """R1 of a batch: the directional derivative in groups of eight, and PyTorch's own."""
    flags = flags_of(args)
    disc = losses.Discriminator(flags.image_size, flags.disc_channels)
    disc.to(device, memory_format=torch.channels_last)
    x = torch.randn(args.batch_size, 3, flags.image_size, flags.image_size, device=device)
    for name, penalty, parts in (("R1, directional derivative", losses.r1_penalty, 8),
                                 ("R1, the same, all images at once", losses.r1_penalty, len(x)),
                                 ("R1, PyTorch's second derivative", stock_r1, len(x))):
        def call(penalty=penalty, parts=parts):
            with runtime.tf32():
                for part in x.split(parts):
                    penalty(disc, part).backward()
        table.row(name, *measure(call, device, args.seconds), len(x), count_tflop(call) / len(x))


def priors(args, device, table, sample):
    """A training step of each prior, or (sample) drawing a batch of codes."""
    flags, b, rng = flags_of(args), args.batch_size, np.random.default_rng(0)
    K, N = flags.codebook_size, (flags.image_size >> (len(flags.channels) - 1)) ** 2
    flags.num_classes = 1000
    for name in SIZES[args.size][1]:
        for kind in ("ar", "nar"):
            model = transformer.Transformer(kind, name, K, N, flags.num_classes).to(device)
            opt = torch.optim.AdamW(model.param_groups(), fused=True)
            labels = torch.arange(b, device=device)
            cache = np.empty(b, [("codes", np.uint16, N), ("label", np.int32)])
            cache["codes"] = rng.integers(K, size=(b, N))
            cache["label"] = rng.integers(flags.num_classes, size=b)
            if args.compile and not sample:
                compile_parts(model)

            def train(model=model, cache=cache, opt=opt):
                indices, labels = train_prior.load_codes(cache, np.arange(b), flags, device)
                u = torch.rand(b, N + 2, device=device)
                corrupted = model.make_inputs(indices, labels, u)
                train_prior.prior_step(model, [(indices, *corrupted)], flags)
                step_of([opt])

            def draw(model=model, labels=labels):
                with runtime.autocast(device, "auto"):
                    model.generate(b, labels)

            call = draw if sample else train
            model.train(not sample)
            text = f"{kind.upper()} {name}: {'sampling' if sample else 'a training step'}"
            table.row(text, *measure(call, device, args.seconds), b, count_tflop(call) / b)


def naive(args, device, table):
    """A phase-1 step without each optimization in turn, without all of them, and with
    --grad_checkpointing."""
    names = [name for name in OFF if device.type == "cuda" or name not in ("compile", "bf16")]
    first = Tokenizer(args, device).report(table, "a phase-1 step", args.seconds, False)
    for off in (*([name] for name in names), names):
        text = OFF[off[0]] if len(off) == 1 else "without all of them"
        tokenizer = Tokenizer(args, device, off=off)
        seconds = tokenizer.report(table, f"  {text}", args.seconds, False)
        print(f"{'':46} {seconds / first:8.2f} times")
    tokenizer = Tokenizer(args, device)
    for part in (tokenizer.model.encoder, tokenizer.model.decoder):
        part.grad_checkpointing = True
    tokenizer.report(table, "  with --grad_checkpointing", args.seconds, False)


def main():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=(*PARTS, "naive"), default=PARTS, help="what to measure")
    add("--size", choices=SIZES, help="default: paper on a GPU, else small")
    add("--batch_size", type=int, help="images at once; default: 32, small 8")
    add("--seconds", type=float, default=2.0, help="repeat a measurement so long")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--json", help="write the figures there as they come")
    runtime.add_device_flags(add)
    parser.set_defaults(dtype="auto")  # the scripts' own; so the first line says it
    args = parser.parse_args()
    device, args.compile = runtime.setup(args)
    args.size = args.size or ("paper" if device.type == "cuda" else "small")
    args.batch_size = args.batch_size or (32 if args.size == "paper" else 8)
    table = Table(args, device)
    for part in args.parts:
        if part in ("phase1", "phase2"):
            tokenizer = Tokenizer(args, device, int(part[-1]))
            tokenizer.report(table, f"tokenizer, phase {part[-1]}: a step", args.seconds)
        elif part in ("priors", "sampling"):
            priors(args, device, table, part == "sampling")
        else:
            {"r1": r1, "naive": naive}[part](args, device, table)


if __name__ == "__main__":
    runtime.launch(main)
