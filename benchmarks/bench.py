"""Measure the time, throughput, utilization and memory of each stage on this machine.

    python benchmarks/bench.py                       # the paper's sizes (on a CPU: small ones)
    python benchmarks/bench.py --parts phase1 r1     # only these parts, in this order
    python benchmarks/bench.py --parts naive         # a phase-1 step without each optimization

The training steps are those of train_tokenizer.py and train_prior.py. Weights, images and codes
are random. TFLOP are counted by torch's FLOP counter (a multiply-add is 2 FLOP). Utilization is
TFLOP/s relative to those of one large matrix product. --json FILE is rewritten after each row.
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

SIZES = {  # flags of train_tokenizer.py, and sizes of the priors
    "paper": ("--image_size 256", ("base", "large")),
    "small": ("--image_size 64 --channels 32 48 64 96 --z_dim 64 --disc_channels 32 128",
              ("tiny",))}
PARTS = ("phase1", "r1", "phase2", "priors", "sampling")
# The optimizations that the part `naive` switches off, one at a time.
OFF = {"compile": "no torch.compile", "bf16": "fp32", "channels_last": "channels first",
       "fused": "Adam without fused kernels", "frozen": "gradients of VGG's and D's weights",
       "layers": "all six VGG layers, even of weight 0", "lazy": "R1 at every step"}


# ----------------------------------------------------------------------------------- measuring

def measure(call, device, seconds):
    """The median time of call() after warm-up in seconds, and the peak GPU memory in GiB (nan on
    other devices). Repeats for at least `seconds`."""
    def run(n):
        begin = time.perf_counter()
        for _ in range(n):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / n

    gc.collect()
    run(1)
    times, n = [], math.ceil(0.05 / run(1))  # time several short calls at once: no idle GPU between
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while len(times) < 3 or n * sum(times) < seconds:
        times.append(run(n))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else math.nan
    return statistics.median(times), peak


def count_tflop(call):
    """TFLOP of one eager call(). The counter does not see into compiled graphs."""
    counter = FlopCounterMode(display=False)
    # The counter's module hooks are not needed, and fail in R1, whose gradient ends at the images.
    counter.mod_tracker._fw_pre_hook = counter.mod_tracker._fw_post_hook = lambda *_: None
    with torch.compiler.set_stance("force_eager"), counter:
        call()
    return counter.get_total_flops() / 1e12


class Table:
    """Prints a row per measurement, and writes all rows to --json."""

    def __init__(self, args, device):
        self.args, self.device, self.rows = args, device, []
        dtype, n = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 2048)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        self.rate = 2 * n**3 / 1e12 / measure(lambda: a @ b, device, args.seconds)[0]
        card = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        self.machine = f"{card}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        print(f"{self.machine}; one large matrix product, {dtype}: {self.rate:.3f} TFLOP/s\n\n"
              f"{'':46} {'ms':>9} {'images/s':>9} {'TFLOP/image':>12} {'util.':>7} {'peak GiB':>9}")

    def row(self, name, seconds, peak, images, tflop=math.nan):
        """seconds: for all images. tflop: for one image."""
        utilization = tflop * images / seconds / self.rate
        self.rows.append(dict(name=name, ms=1000 * seconds, images_per_s=images / seconds,
                              tflop_per_image=tflop, utilization=utilization, peak_gib=peak))
        print(f"{name:46} {1000 * seconds:9.1f} {images / seconds:9.1f} {tflop:12.5f} "
              f"{100 * utilization:5.1f} % {peak:9.2f}", flush=True)
        if self.args.json:
            text = json.dumps({"machine": self.machine, "matrix_tflops": self.rate,
                               "rows": self.rows}, indent=1)
            runtime.save_file(self.args.json, lambda file: file.write(text.encode()))


# ---------------------------------------------------------------------------- what is measured

def flags_of(args, *words):
    """What train_tokenizer.parse returns for the flags of args.size and `words`."""
    words = ["bench", "--out", "runs/none", *SIZES[args.size][0].split(), *map(str, words)]
    with mock.patch.object(sys, "argv", words):
        return train_tokenizer.parse()


def compile_parts(*parts):
    torch._dynamo.reset()  # Dynamo runs code eagerly after eight recompilations
    for part in parts:
        part.compile(dynamic=False)


def step_of(opts):
    """Run.step without a run folder."""
    run = runtime.Run.__new__(runtime.Run)
    run.skipped = run.skipped_in_a_row = 0
    run.step(opts, 1e-4)


class Tokenizer:
    """The set-up and the training step of train_tokenizer.py. off: keys of OFF."""

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
        """One training step, with or without R1."""
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
        """Add a row with the mean over the period of R1, 16 steps. Returns the mean in seconds."""
        (plain, _), (full, peak) = (
            measure(partial(self.step, p), self.device, seconds) for p in (False, True))
        mean, tflop = plain + (full - plain) / train_tokenizer.R1_EVERY, math.nan
        if count:  # for four images, as the eager step needs more memory
            a, b = (count_tflop(partial(self.step, p, self.images[:4])) for p in (False, True))
            tflop = (a + (b - a) / train_tokenizer.R1_EVERY) / min(4, len(self.images))
        table.row(name, mean, peak, len(self.images), tflop)
        return mean


def stock_r1(disc, x):
    """R1 by PyTorch's double backward, for comparison."""
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def r1(args, device, table):
    """R1 of a batch by directional derivatives, in groups of eight images as in training and all at
    once, and by double backward."""
    flags = flags_of(args)
    disc = losses.Discriminator(flags.image_size, flags.disc_channels)
    disc.to(device, memory_format=torch.channels_last)
    x = torch.randn(args.batch_size, 3, flags.image_size, flags.image_size, device=device)
    for name, penalty, group in (("R1, directional derivative", losses.r1_penalty, 8),
                                 ("R1, the same, all images at once", losses.r1_penalty, len(x)),
                                 ("R1, double backward", stock_r1, len(x))):
        def call(penalty=penalty, group=group):
            with runtime.tf32():
                for images in x.split(group):
                    penalty(disc, images).backward()
        table.row(name, *measure(call, device, args.seconds), len(x), count_tflop(call) / len(x))


def priors(args, device, table, sample):
    """A training step of each prior, or sampling of a batch of codes if sample=True."""
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
                inputs = model.make_inputs(indices, labels, u)
                train_prior.prior_step(model, [(indices, *inputs)], flags)
                step_of([opt])

            def draw(model=model, labels=labels):
                with runtime.autocast(device, "auto"):
                    model.generate(b, labels)

            call = draw if sample else train
            model.train(not sample)
            text = f"{kind.upper()} {name}: {'sampling' if sample else 'a training step'}"
            table.row(text, *measure(call, device, args.seconds), b, count_tflop(call) / b)


def naive(args, device, table):
    """A phase-1 step without one optimization at a time, without all of them, and with
    --grad_checkpointing. The line below a row is its time relative to the optimized step."""
    names = [name for name in OFF if device.type == "cuda" or name not in ("compile", "bf16")]
    optimized = Tokenizer(args, device).report(table, "a phase-1 step", args.seconds, False)
    for off in (*([name] for name in names), names):
        text = OFF[off[0]] if len(off) == 1 else "without all of them"
        tokenizer = Tokenizer(args, device, off=off)
        seconds = tokenizer.report(table, f"  {text}", args.seconds, False)
        print(f"{'':46} {seconds / optimized:8.2f} times")
    tokenizer = Tokenizer(args, device)
    for part in (tokenizer.model.encoder, tokenizer.model.decoder):
        part.grad_checkpointing = True
    tokenizer.report(table, "  with --grad_checkpointing", args.seconds, False)


def main():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=(*PARTS, "naive"), default=PARTS, help="what to measure")
    add("--size", choices=SIZES, help="sizes of images and networks; default: paper on a GPU")
    add("--batch_size", type=int, help="images per step; default: 32, with --size small 8")
    add("--seconds", type=float, default=2.0, help="minimum duration of a measurement in seconds")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="use torch.compile for training steps; default: only on a GPU")
    add("--json", help="file for the results, rewritten after each row; default: none")
    runtime.add_device_flags(add)
    parser.set_defaults(dtype="auto")  # the training scripts' default, shown in the first line
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
