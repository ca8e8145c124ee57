"""How fast is each stage, how near to what the machine can do, and what is each optimisation worth?

    python benchmarks/bench.py --naive                  # the paper's sizes on a GPU, small ones on a CPU
    python benchmarks/bench.py --image_size 128 --batch_size 8 --prior large

The steps are those of train_tokenizer.py and train_prior.py under their default flags; weights, images and codes are
random. TFLOP are counted by torch's FLOP counter on fake tensors (a multiply-add is 2; only convolutions and matrix
products count). `share` is TFLOP/s over the rate of one large matrix product. costs.py prints how all of it grows.
"""
import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import data  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402
import train_prior  # noqa: E402
import train_tokenizer  # noqa: E402
import transformer  # noqa: E402
import vq  # noqa: E402
from miniature.shapes import draw  # noqa: E402

SIZES = {
    "paper": dict(train_tokenizer.SHAPE, batch_size=32, prior="base"),
    "small": dict(image_size=64, channels=[32, 48, 64, 96], z_dim=64, codebook_size=1024, disc_channels=[32, 128],
                  batch_size=8, prior="tiny"),
}
# What --naive switches off in `Tokenizer`, one after the other, and what then stands in its place.
OFF = {"compile": "no torch.compile", "bf16": "fp32", "channels_last": "channels first in memory",
       "fused": "Adam tensor by tensor", "layers": "all six VGG layers, of whatever weight",
       "frozen": "gradients of VGG's and D's weights, too", "conv": "PyTorch's own derivatives of D",
       "lazy": "R1 at every step", "wait": "every loss read at once"}
FAKE = ("compile", "channels_last")  # off with fake tensors, which can't have them; no count depends on them
CPU = torch.device("cpu")


def add_size_flags(parser):
    add = parser.add_argument
    add("--size", choices=list(SIZES), help="of all below; default: paper on a GPU, small otherwise")
    add("--image_size", type=runtime.positive, help="side of the images")
    add("--batch_size", type=runtime.positive, help="images per process")
    add("--codebook_size", type=runtime.positive, help="K")
    add("--prior", choices=list(transformer.SIZES), help="size of the transformer")
    add("--seconds", type=runtime.weight, default=2.0, help="repeat a measurement so long, three times at least")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    add("--device", choices=runtime.DEVICES, default="auto", help="auto: cuda, then mps, then cpu")


def setup(args):
    """runtime.setup, and the sizes that no flag gave."""
    device = runtime.setup(args)
    for name, value in SIZES[args.size or ("paper" if device.type == "cuda" else "small")].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    f = 2 ** (len(args.channels) - 1)
    data.check_image_size(args.image_size, f)
    args.tokens = (args.image_size // f) ** 2
    if runtime.is_main():
        machine = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
              + ", ".join(f"{name} {getattr(args, name)}" for name in SIZES["small"]), flush=True)
    return device


# ------------------------------------------------------------------------------------------- measuring

def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def measure(call, device, seconds):
    """Median seconds of a warm call(), and the peak of GPU memory meanwhile in MB (nan without a GPU)."""
    def run(n):
        begin = time.perf_counter()
        for _ in range(n):
            call()
        synchronize(device)
        return (time.perf_counter() - begin) / n

    gc.collect()  # what was measured before
    run(1)
    times, n = [], math.ceil(0.05 / run(1))  # short calls several at once: a GPU's queue stays full
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while len(times) < 3 or n * sum(times) < seconds:
        times.append(run(n))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else math.nan


def count_tflop(make):
    """TFLOP of make(device)(), without running it. What reads a value back to the host would fail here."""
    counter = FlopCounterMode(display=False)
    # Its tracker of modules, which is not needed, fails where R1's autograd.grad ends at the images.
    counter.mod_tracker._fw_pre_hook = counter.mod_tracker._fw_post_hook = lambda *_: None
    eager = torch.compiler.set_stance("force_eager")  # a part that is compiled can't take fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), eager:
        call = make(CPU)
        with counter:
            call()
    return counter.get_total_flops() / 1e12


# ----------------------------------------------------------------------------------------- what is measured

def default_flags(script, *words):
    """The flags of a training script, as its `parse` finds them."""
    with mock.patch.object(sys, "argv", [script.__name__, *words]):
        return script.parse()


def compile_parts(*parts):
    torch._dynamo.reset()  # each variant compiles the same code: after eight of them Dynamo would leave it eager
    for part in parts:
        part.compile(dynamic=False)


class LoopAdam(torch.optim.Adam):
    found_inf = property(lambda self: None, lambda self, value: None)  # runtime.Guard's; only fused kernels take it


class Tokenizer:
    """What train_tokenizer.py sets up before its loop, and a step on self.images. `off`: names of OFF."""

    def __init__(self, args, device, phase=1, off=()):
        self.device, self.off, self.averages = device, off, runtime.Averages()
        self.flags = flags = default_flags(train_tokenizer, "--phase", str(phase), "--init", "-")
        torch.manual_seed(0)
        with device:
            self.model = vq.VQModel(args.channels, args.z_dim, args.codebook_size, flags.decoder_attention)
            self.disc, net = losses.Discriminator(args.image_size, args.disc_channels), losses.VGG16()
            self.perceptual = losses.PerceptualLoss(net, flags.alpha)
        self.model.quantizer.mean = runtime.mean_over_processes
        if phase == 2:
            self.model.encoder.requires_grad_(False)
            self.model.quantizer.requires_grad_(False)
        if "channels_last" not in off:
            self.model.to(memory_format=torch.channels_last)
            self.disc.to(memory_format=torch.channels_last)
        if "bf16" in off:
            flags.dtype = "fp32"
        if "layers" in off:
            self.perceptual.weights = dict.fromkeys(losses.LAYERS, 0.0) | self.perceptual.weights
        if "frozen" in off:
            self.perceptual.requires_grad_(True)
            self.disc.requires_grad_ = lambda _: self.disc
        for part in [m for m in self.disc.modules() if isinstance(m, (losses.EqualConv, losses.Blur))]:
            if "conv" in off:
                part.conv2d = lambda x, w, stride, padding, groups=1: F.conv2d(x, w.to(x.dtype), None, stride, padding,
                                                                               1, groups)
        if "lazy" in off:
            flags.r1_every = 1
        if "wait" in off:
            add = self.averages.add
            self.averages.add = lambda **terms: (add(**terms), [term.item() for term in terms.values()])
        adam = partial(LoopAdam, foreach=False) if "fused" in off else partial(torch.optim.Adam, fused=True)
        trained = self.model if phase == 1 else self.model.decoder
        self.opt_g, self.opt_d = (adam(net.parameters(), flags.lr, flags.betas) for net in (trained, self.disc))
        self.guard_g, self.guard_d = runtime.Guard(device), runtime.Guard(device)
        if args.compile and "compile" not in off:
            compile_parts(self.model.encoder, self.model.decoder, self.perceptual.net, self.disc)
        images = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
        self.images = images.pin_memory() if device.type == "cuda" else images

    def step(self, penalise=False):
        """A step, with R1 if `penalise`. Its terms go to self.averages."""
        flags, x = self.flags, data.to_float(self.images, self.device)
        xs = [x.contiguous() if "channels_last" in self.off else x]
        x_hats = train_tokenizer.tokenizer_step(self.model, self.disc, self.perceptual, xs, flags, flags.adv_weight,
                                                True, self.averages)
        self.guard_g.step(self.opt_g, flags.lr)
        if "frozen" in self.off:
            self.perceptual.zero_grad()
            self.disc.zero_grad()
        train_tokenizer.discriminator_step(self.disc, xs, x_hats, flags, penalise or "lazy" in self.off, self.averages)
        self.guard_d.step(self.opt_d, flags.lr)

    def parts(self):
        """{part of a phase-1 step: a call}, each with its share of the backward pass."""
        x = data.to_float(self.images, self.device)
        with torch.no_grad():
            z = self.model.encoder(x)
            z_q = self.model.quantizer(z)[0]

        def run(part, t, leaf=True):
            with runtime.autocast(self.device, self.flags.dtype):
                out = part(t.detach().requires_grad_(leaf))
            out.float().square().mean().backward()

        return {"encoder": lambda: run(self.model.encoder, x, leaf=False),
                "quantizer": lambda: run(lambda z: self.model.quantizer(z)[2]["vq"], z),
                "decoder": lambda: run(self.model.decoder, z_q),
                "perceptual loss (VGG)": lambda: run(lambda x_hat: self.perceptual(x_hat, x)[0], x),
                "discriminator, for the tokenizer": lambda: run(self.disc.requires_grad_(False), x),
                "discriminator, its own step": lambda: train_tokenizer.discriminator_step(
                    self.disc, [x], [x], self.flags, False, self.averages)}

    def time(self, seconds):
        """Mean over R1's period: seconds of a step, those for R1 in it; and the peak MB."""
        (plain, _), (full, peak) = (measure(partial(self.step, p), self.device, seconds) for p in (False, True))
        r1 = (full - plain) / self.flags.r1_every
        return plain + r1, r1, peak

    @classmethod
    def tflop(cls, args, phase=1):
        """Likewise TFLOP of a step, and those for R1 in it."""
        plain, full = (count_tflop(lambda _, p=p: partial(cls(args, CPU, phase, FAKE).step, p)) for p in (False, True))
        r1 = (full - plain) / default_flags(train_tokenizer).r1_every
        return plain + r1, r1


def prior(args, kind, device):
    """A step of train_prior.py, as a call."""
    flags, guard = default_flags(train_prior, "--kind", kind, "--classes", "1000"), runtime.Guard(device)
    b, K, N = args.batch_size, args.codebook_size, args.tokens
    random = np.random.default_rng(0).integers
    cache = random(K, size=(b, N)), random(flags.classes, size=b)
    with device:
        model = transformer.Transformer(kind, args.prior, K, N, flags.classes, flags.dropout)
    optimizer = torch.optim.AdamW(model.param_groups(flags.weight_decay), flags.lr, flags.betas, fused=True)
    if args.compile:
        compile_parts(model)

    def step():
        indices, labels = train_prior.fetch(cache, train_prior.epoch_rows(0, 0, b, 1), flags, device)
        train_prior.prior_step(model, [(indices, *model.corrupt(indices, labels, range(b)))], flags)
        guard.step(optimizer, flags.lr)
    return step


def sampling(args, kind, device):
    """A call that samples a batch of codes."""
    with device:
        model = transformer.Transformer(kind, args.prior, args.codebook_size, args.tokens, classes=0).eval()

    def generate():
        with runtime.autocast(device, "auto"):
            model.generate(range(args.batch_size))
    return generate


# ------------------------------------------------------------------------------------------------ the tables

def stages(args, device):
    """Print a row for each stage: images/s, TFLOP an image, TFLOP/s, their share of a matrix product's, peak MB."""
    dtype, n = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * n**3 / 1e12 / measure(lambda: a @ b, device, 1)[0]  # what the machine can do
    print(f"one large matrix product, {dtype}: {rate:.3f} TFLOP/s\n\n"
          f"{'':40} {'images/s':>9} {'TFLOP/image':>12} {'TFLOP/s':>8} {'share':>8} {'peak MB':>8}")

    def row(name, seconds, peak, tflop):
        print(f"{name:40} {args.batch_size / seconds:9.2f} {tflop / args.batch_size:12.5f} {tflop / seconds:8.3f} "
              f"{100 * tflop / seconds / rate:6.1f} % {peak:8.0f}", flush=True)

    for phase in (2, 1):
        tokenizer = Tokenizer(args, device, phase)
        (step, r1, peak), (tflop, tflop_r1) = tokenizer.time(args.seconds), Tokenizer.tflop(args, phase)
        row(f"tokenizer, phase {phase}: a training step", step, peak, tflop)
    total = r1
    for name, call in tokenizer.parts().items():  # of phase 1
        seconds, peak = measure(call, device, args.seconds)
        row(f"   {name}", seconds, peak, count_tflop(lambda _, name=name: Tokenizer(args, CPU, off=FAKE).parts()[name]))
        total += seconds
    row(f"   R1, a {tokenizer.flags.r1_every}th of it", r1, math.nan, tflop_r1)
    print(f"   these parts take {1000 * total:.0f} ms, a step {1000 * step:.0f} ms (with optimizers and copies)")
    model, x = tokenizer.model.eval(), data.to_float(tokenizer.images, device)
    with torch.no_grad():
        for name, call in (("encoding for the code cache, fp32", partial(model.encode, x)),
                           ("decoding of samples, fp32", partial(model.decode_indices, model.encode(x)[1]))):
            row(name, *measure(call, device, args.seconds), count_tflop(lambda _, call=call: call))
    for make, what in ((prior, "a training step"), (sampling, "sampling")):
        for kind in ("ar", "nar"):
            seconds, peak = measure(make(args, kind, device), device, args.seconds)
            row(f"{kind.upper()} prior: {what}", seconds, peak, count_tflop(partial(make, args, kind)))


def loading(args):
    """JPEGs of 500 pixels -> batches of floats of 256 in [-1, 1], on one core, with the same transforms."""
    T, threads = torchvision.transforms, torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "class").mkdir()
        for i in range(64):
            box = (0, 60, 500, 435) if i % 3 else (60, 0, 435, 500)
            draw(i, i % 10, 500).crop(box).save(f"{folder}/class/{i}.jpg", quality=95)
        images = data.TrainImages(data.open_source(folder), 256, "random", 0)
        ours = data.loader(images, [range(32), range(32, 64)], 0, CPU)
        same = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.RandomCrop(256), T.RandomHorizontalFlip(),
                          T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)])
        theirs = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(folder, same), 32)
        print(f"\n{'loading, one core':40} {'images/s':>9}")
        for name, call in (("data.py, a folder", lambda: [data.to_float(x, CPU) for x, *_ in ours]),
                           ("torchvision's ImageFolder", lambda: list(theirs))):
            print(f"{name:40} {64 / measure(call, CPU, args.seconds)[0]:9.1f}", flush=True)
    torch.set_num_threads(threads)


def naive(args, device):
    """Print the time of a phase-1 step without each optimisation in turn; on a GPU that of AR sampling, too."""
    def row(name, *off, recompute=False):
        tokenizer = Tokenizer(args, device, off=off)
        tokenizer.model.encoder.recompute = tokenizer.model.decoder.recompute = recompute
        seconds, _, peak = tokenizer.time(args.seconds)
        first.append(seconds)
        print(f"{name:65} {1000 * seconds:8.1f} {seconds / first[0]:6.2f} {peak:8.0f}", flush=True)

    first, names = [], [name for name in OFF if name != "bf16" or device.type == "cuda"]
    print(f"\n{'':65} {'ms':>8} {'times':>6} {'peak MB':>8}")
    row("a phase-1 step")
    for name in names[not args.compile:]:
        row(f"   {name} off: {OFF[name]}", name)
    row("   all of them off", *names)
    row("   with --recompute", recompute=True)
    row("   as the first, once more: run-to-run variance")
    if device.type == "cuda":
        recorded, _ = measure(sampling(args, "ar", device), device, args.seconds)
        with mock.patch.object(transformer, "repeat", lambda step, n, _: [step() for _ in range(n)]):
            plain, _ = measure(sampling(args, "ar", device), device, args.seconds)
        print(f"AR sampling {1000 * recorded:.1f} ms, without the CUDA graph {1000 * plain:.1f} ms")


def main():
    parser = runtime.Parser(__doc__)
    add_size_flags(parser)
    parser.add_argument("--naive", action="store_true", help="without each optimisation in turn, and without all")
    args = parser.parse_args()
    device = setup(args)
    if runtime.world() > 1:
        raise runtime.BadInput("bench.py runs in one process; costs.py --scaling measures several")
    stages(args, device)
    loading(args)
    if args.naive:
        naive(args, device)


if __name__ == "__main__":
    runtime.run(main)
