"""How fast is each stage, how near to what the machine can do, and what is each optimisation worth?

    python bench.py --naive                  # the paper's sizes on a GPU, small ones on a CPU
    python bench.py --image_size 128 --batch_size 8 --prior large

TFLOP are counted by torch's FLOP counter (a multiply-add is 2; only convolutions and matrix products count), on
tensors without contents. `share` is TFLOP/s over the rate of one large matrix product, measured here. Weights are
random: only the time is looked at. costs.py prints how all of it grows.
"""
import contextlib
import ctypes
import gc
import io
import math
import statistics
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import fid
import losses
import runtime
import train_tokenizer
import transformer
import vq

SIZES = {
    "paper": dict(image_size=256, batch_size=32, channels=[128, 128, 256, 256, 512], z_dim=256, codebook_size=1024,
                  disc_channels=[128, 512], prior="base"),
    "small": dict(image_size=64, batch_size=8, channels=[32, 48, 64, 96], z_dim=64, codebook_size=1024,
                  disc_channels=[32, 128], prior="tiny"),
}
# What --naive switches off, one after the other, and what then stands in its place.
OFF = {"compile": "no torch.compile", "bf16": "fp32", "channels_last": "channels first in memory",
       "fused": "Adam tensor by tensor, checked on the host", "layers": "all six VGG layers, of whatever weight",
       "frozen": "gradients of VGG's and D's weights, too", "reuse": "reconstructed again for D",
       "blur": "autograd's own derivatives of the blur", "lazy": "R1 at every step", "wait": "every loss read at once"}
LAYOUT = ("channels_last",)  # off where FLOPs are counted: tensors without contents can't always be laid out anew
R1_EVERY = 16
CPU = torch.device("cpu")


def add_size_flags(parser):
    add = parser.add_argument
    add("--size", choices=list(SIZES), help="of all below; default: paper on a GPU, small otherwise")
    add("--image_size", type=runtime.positive, help="side of the images")
    add("--batch_size", type=runtime.positive, help="images per process")
    add("--codebook_size", type=runtime.positive, help="K")
    add("--prior", choices=list(transformer.SIZES), help="size of the transformer")
    add("--seconds", type=runtime.weight, default=2.0, help="repeat a measurement so long, three times at least")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: cuda, then mps, then cpu")


def settle(args, device):
    """Fill the sizes that no flag gave."""
    for name, value in SIZES[args.size or ("paper" if device.type == "cuda" else "small")].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    data.check_image_size(args.image_size, 2 ** (len(args.channels) - 1))
    args.tokens = (args.image_size // 2 ** (len(args.channels) - 1)) ** 2
    machine = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    if runtime.is_main():
        print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}; VGG16; weights random; "
              + ", ".join(f"{name} {getattr(args, name)}" for name in SIZES["small"]), flush=True)


# ------------------------------------------------------------------------------------------- measuring

def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def resident(key):
    """VmRSS (memory in use) or VmHWM (its peak) of this process in MB, as Linux counts them."""
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024


START = resident("VmRSS") if sys.platform == "linux" else 0


def measure(call, device, seconds):
    """Median seconds of a warm call(), and the peak of memory meanwhile in MB: of the GPU, or by how much this process
    has grown since its start (nan where that can't be known)."""
    gc.collect()  # what was measured before
    for _ in range(2):
        begin = time.perf_counter()
        call()
        synchronize(device)
        once = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    times, inner = [], math.ceil(0.05 / once)  # short calls several at once: a GPU's queue stays full
    while len(times) < 3 or inner * sum(times) < seconds:
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        synchronize(device)
        times.append((time.perf_counter() - begin) / inner)
    peak = float("nan")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    elif sys.platform == "linux":
        peak = resident("VmHWM") - START
    return statistics.median(times), peak


def count(make):
    """TFLOP of make(device)(), without running it. What reads a value back to the host would fail here."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        call = make(CPU)
        with FlopCounterMode(display=False) as counter:
            call()
    return counter.get_total_flops() / 1e12


def matmul_rate(device, dtype):
    """TFLOP/s of one large matrix product: what the machine can do."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / 1e12 / measure(lambda: a @ b, device, 1)[0]


# ----------------------------------------------------------------------------------------- what is measured

class Tokenizer:
    """One step of train_tokenizer.py, written again: the loop there reads straight down, so that no step can be called
    from here. tests/test_bench.py holds that both give the same losses. `off`: optimisations to do without (OFF)."""

    def __init__(self, args, device, phase=1, off=()):
        self.device, self.phase, self.on = device, phase, {name: name not in off for name in OFF}
        paper = train_tokenizer.PHASE[phase]
        torch.manual_seed(0)
        with device:
            self.model = vq.VQModel(args.channels, args.z_dim, args.codebook_size, attention=paper["decoder_attention"])
            self.disc = losses.Discriminator(args.image_size, args.disc_channels)
            self.perceptual = losses.PerceptualLoss(losses.VGG16(), paper["alpha"])
        if self.on["channels_last"]:
            self.model.to(memory_format=torch.channels_last)
            self.disc.to(memory_format=torch.channels_last)
        self.model.quantizer.sync = runtime.mean_over_processes
        if not self.on["layers"]:
            self.perceptual.weights = dict.fromkeys(losses.LAYERS, 0.0) | self.perceptual.weights
        self.perceptual.requires_grad_(not self.on["frozen"])
        if phase == 2:
            self.model.encoder.requires_grad_(False)
            self.model.quantizer.requires_grad_(False)
        adam = partial(torch.optim.Adam, lr=paper["lr"], betas=paper["betas"], fused=self.on["fused"],
                       foreach=None if self.on["fused"] else False)
        self.opt_g = adam(self.model.parameters() if phase == 1 else self.model.decoder.parameters())
        self.opt_d = adam(self.disc.parameters())
        self.guard_g, self.guard_d = runtime.Guard(device), runtime.Guard(device)
        if not self.on["blur"]:
            for blur in [m for m in self.disc.modules() if isinstance(m, losses.Blur)]:
                blur.forward = partial(plain_blur, blur)
        if device.type == "cuda" and self.on["compile"]:
            for part in (self.model.encoder, self.model.decoder, self.perceptual.net, self.disc):
                part.compile()
        images = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
        self.images = images.pin_memory() if device.type == "cuda" else images

    def autocast(self):
        return runtime.autocast(self.device, "auto" if self.on["bf16"] else "fp32")

    def reconstruct(self, x):
        if self.phase == 1:
            return self.model(x)[::2]
        with torch.no_grad():
            z_q, _, q = self.model.encode(x)
        return self.model.decode(z_q), q

    def update(self, guard, optimizer):
        if self.on["fused"]:
            return guard.step(optimizer)
        params = optimizer.param_groups[0]["params"]
        runtime.average_gradients(params)
        if torch.nn.utils.get_total_norm([p.grad for p in params]).isfinite():
            optimizer.step()
        optimizer.zero_grad()

    def step(self, penalise=False):
        """A step on self.images; with R1 if `penalise`. Returns its losses."""
        x = data.to_float(self.images, self.device)
        if not self.on["channels_last"]:
            x = x.contiguous()
        self.disc.requires_grad_(not self.on["frozen"])
        with self.autocast():
            x_hat, q = self.reconstruct(x)
            per, _ = self.perceptual(x_hat, x)
            fake_logits = self.disc(x_hat)
        l1, adv = F.l1_loss(x_hat.float(), x), losses.generator_loss(fake_logits)
        loss = l1 + per + 0.1 * adv + (q["vq"] if self.phase == 1 else 0)
        loss.backward()
        x_hat = x_hat.detach()
        if not self.on["reuse"]:
            with torch.no_grad(), self.autocast():
                x_hat, _ = self.reconstruct(x)
        self.update(self.guard_g, self.opt_g)
        if not self.on["frozen"]:
            self.perceptual.zero_grad()
            self.disc.zero_grad()

        self.disc.requires_grad_(True)
        penalise, every = (penalise, R1_EVERY) if self.on["lazy"] else (True, 1)
        if penalise:
            x = x.requires_grad_().clone()  # the FLOP counter can't follow a gradient that ends at a leaf
            real_logits = self.disc.forward(x)
        with self.autocast():
            real_logits = real_logits if penalise else self.disc(x)
            fake_logits = self.disc(x_hat)
        loss_d = losses.discriminator_loss(real_logits, fake_logits)
        r1 = losses.r1_penalty(real_logits, x) if penalise else torch.zeros(())
        (loss_d + 10 / 2 * every * r1).backward()
        self.update(self.guard_d, self.opt_d)
        values = dict(loss=loss, l1=l1, perceptual=per, adversarial=adv, disc=loss_d, r1=r1, **q)
        return {name: value.detach() if self.on["wait"] else value.item() for name, value in values.items()}

    def parts(self):
        """{part of a phase-1 step: a call}, each with its share of the backward pass."""
        x = data.to_float(self.images, self.device)
        with torch.no_grad():
            z = self.model.encoder(x)
            z_q = self.model.quantizer(z)[0]
        grads = [(p, torch.zeros_like(p)) for o in (self.opt_g, self.opt_d) for p in o.param_groups[0]["params"]]

        def run(part, *inputs, frozen=False):
            self.disc.requires_grad_(not frozen)
            with self.autocast():
                out = part(*inputs)
            out.float().square().mean().backward()

        def optimize():
            for p, grad in grads:
                p.grad = grad
            self.update(self.guard_g, self.opt_g)
            self.update(self.guard_d, self.opt_d)
        leaf = lambda t: t.detach().requires_grad_()  # noqa: E731
        return {"encoder": lambda: run(self.model.encoder, x),
                "quantizer": lambda: run(lambda z: self.model.quantizer(z)[2]["vq"], leaf(z)),
                "decoder": lambda: run(self.model.decoder, leaf(z_q)),
                "perceptual loss (VGG)": lambda: run(lambda x_hat: self.perceptual(x_hat, x)[0], leaf(x)),
                "discriminator, for the tokenizer": lambda: run(self.disc, leaf(x), frozen=True),
                "discriminator, its own step": lambda: (run(self.disc, x), run(self.disc, x)),
                "optimizers": optimize,
                "images to the device": lambda: data.to_float(self.images, self.device)}

    def time(self, seconds):
        """Mean over R1's period: seconds of a step, those for R1 in it, peak MB."""
        (plain, _), (full, peak) = (measure(partial(self.step, p), self.device, seconds) for p in (False, True))
        return plain + (full - plain) / R1_EVERY, (full - plain) / R1_EVERY, peak

    @classmethod
    def tflop(cls, args, phase=1):
        """Likewise TFLOP of a step, and those for R1 in it."""
        plain, full = (count(lambda cpu, p=p: partial(cls(args, cpu, phase, LAYOUT).step, p)) for p in (False, True))
        return plain + (full - plain) / R1_EVERY, (full - plain) / R1_EVERY


def plain_blur(blur, x):
    return F.conv2d(x, blur.kernel.to(x.dtype), None, blur.stride, blur.padding, groups=x.shape[1])


def prior(args, kind, device):
    """A step of train_prior.py on random codes, as a call."""
    b, K, guard = args.batch_size, args.codebook_size, runtime.Guard(device)
    with device:
        model = transformer.Transformer(kind, args.prior, K, args.tokens)
    optimizer = torch.optim.AdamW(model.param_groups(), 1e-4, (0.9, 0.96), fused=True)
    codes, classes = torch.randint(K, (b, args.tokens)), torch.randint(1000, (b,))
    if device.type == "cuda":
        model.compile()

    def step():
        indices, labels = runtime.upload(codes, device), runtime.upload(classes, device)
        tokens, labels, mask = model.corrupt(indices, labels, range(b))
        total = runtime.sum_over_processes(mask.sum().float()) / runtime.world()
        with runtime.autocast(device, "auto"):
            loss, _ = model.loss(model(tokens, labels), indices, mask)
        (loss / total).backward()
        guard.step(optimizer)
    return step


def sampling(args, kind, device, cache=True):
    """A call that draws a batch of codes; without the cache (AR): with a whole pass for every code."""
    with device:
        model = transformer.Transformer(kind, args.prior, args.codebook_size, args.tokens, classes=0).eval()
    s = torch.zeros(args.batch_size, args.tokens, dtype=torch.long, device=device)

    @torch.no_grad()
    def draw():
        with runtime.autocast(device, "auto"):
            if cache:
                model.generate(range(args.batch_size))
            for _ in range(0 if cache else args.tokens):
                model(s)
    return draw


def inception(folder, device):
    """fid.py's network, and pytorch-fid's with the same random weights (None if it is not installed)."""
    path = Path(folder) / "inception.pth"
    torch.save(torchvision.models.Inception3(1008, aux_logits=False, init_weights=False).state_dict(), path)
    with contextlib.redirect_stderr(io.StringIO()):  # it warns that these are not the published weights
        ours = fid.Inception(path, "pytorch").to(device)
    try:
        import pytorch_fid.inception as published
    except ImportError:
        return ours, None
    published.load_state_dict_from_url = lambda *_, **__: torch.load(path)
    theirs = published.InceptionV3().eval().to(device)
    return ours, lambda images: theirs(images.float() / 255)[0]


# ------------------------------------------------------------------------------------------------ the tables

def stages(args, device):
    """Print a row for each stage: images/s, TFLOP an image, TFLOP/s, their share of a matrix product's, peak MB."""
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate, b = matmul_rate(device, low), args.batch_size
    print(f"one large matrix product, {low}: {rate:.3f} TFLOP/s\n\n"
          f"{'':40} {'images/s':>9} {'TFLOP/image':>12} {'TFLOP/s':>8} {'share':>8} {'peak MB':>8}")

    def row(name, seconds, peak, tflop):
        print(f"{name:40} {b / seconds:9.2f} {tflop / b:12.5f} {tflop / seconds:8.3f} "
              f"{100 * tflop / seconds / rate:6.1f} % {peak:8.0f}", flush=True)

    for phase in (2, 1):
        tokenizer = Tokenizer(args, device, phase)
        (step, r1, peak), (tflop, tflop_r1) = tokenizer.time(args.seconds), Tokenizer.tflop(args, phase)
        row(f"tokenizer, phase {phase}: a training step", step, peak, tflop)
    total = r1
    for name, call in tokenizer.parts().items():  # of phase 1
        seconds, peak = measure(call, device, args.seconds)
        row(f"   {name}", seconds, peak, count(lambda cpu, name=name: Tokenizer(args, cpu, off=LAYOUT).parts()[name]))
        total += seconds
    row(f"   R1, a {R1_EVERY}th of it", r1, float("nan"), tflop_r1)
    print(f"   one by one the parts take {1000 * total:.0f} ms, the step {1000 * step:.0f} ms")
    model, x = tokenizer.model.eval(), data.to_float(tokenizer.images, device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        ours, theirs = inception(folder, device)
        for name, call in (("encoding for the code cache, fp32", partial(model.encode, x)),
                           ("decoding of samples, fp32", partial(model.decode_indices, model.encode(x)[1])),
                           ("Inception, fid.py, fp32", partial(ours, tokenizer.images.to(device))),
                           ("Inception, pytorch-fid, fp32", theirs and partial(theirs, tokenizer.images.to(device)))):
            if call:
                row(name, *measure(call, device, args.seconds), count(lambda _, call=call: call))
    for make, what in ((prior, "a training step"), (sampling, "sampling")):
        for kind in ("ar", "nar"):
            seconds, peak = measure(make(args, kind, device), device, args.seconds)
            row(f"{kind.upper()} prior: {what}", seconds, peak, count(partial(make, args, kind)))


def loading(args):
    """JPEGs of 500 pixels -> batches of floats of 256 in [-1, 1], on one core, with the same transforms."""
    T, threads = torchvision.transforms, torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photos, tar = Path(folder) / "photos", Path(folder) / "photos.tar"
        for i in range(64):
            (photos / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            box = (0, 60, 500, 435) if i % 3 else (60, 0, 435, 500)
            data.draw(i, i % 10, 500).crop(box).save(photos / f"{i % 2}" / f"{i}.jpg", quality=95)
        with tarfile.open(tar, "w") as file:
            file.add(photos, "photos")
        same = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.RandomCrop(256), T.RandomHorizontalFlip(),
                          T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)])
        theirs = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(photos, same), 32)

        def ours(path):
            images = data.TrainImages(data.open_source(str(path)), 256, "random", 0)
            return lambda: [data.to_float(x, CPU) for x, *_ in data.loader(images, [range(32), range(32, 64)], 0, CPU)]
        print(f"\n{'loading, one core':40} {'images/s':>9}")
        for name, call in (("data.py, a folder", ours(photos)), ("data.py, a tar", ours(tar)),
                           ("torchvision's ImageFolder", lambda: list(theirs))):
            print(f"{name:40} {64 / measure(call, CPU, args.seconds)[0]:9.1f}", flush=True)
    torch.set_num_threads(threads)


def naive(args, device):
    """Print the time of a tokenizer step and of AR sampling, whole and with each optimisation switched off in turn."""
    print(f"\n{'':70} {'ms':>8} {'times':>6} {'peak MB':>8}")

    def table(rows):
        first = None
        for name, find in rows:
            seconds, *_, peak = find()
            first = first or seconds
            print(f"{name:70} {1000 * seconds:8.1f} {seconds / first:6.2f} {peak:8.0f}", flush=True)

    def step(*off, recompute=False):
        tokenizer = Tokenizer(args, device, off=off)
        tokenizer.model.encoder.recompute = tokenizer.model.decoder.recompute = recompute
        return tokenizer.time(args.seconds)

    def draw(cache=True, graph=True):
        repeat = transformer.repeat
        if not graph:
            transformer.repeat = lambda call, n, _: [call() for _ in range(n)]
        found = measure(sampling(args, "ar", device, cache), device, args.seconds)
        transformer.repeat = repeat
        return found
    gpu = device.type == "cuda"
    off = [name for name in OFF if gpu or name not in ("compile", "bf16")]
    table([("a phase-1 step", step), *[(f"   {name} off: {OFF[name]}", partial(step, name)) for name in off],
           ("   all of them off", partial(step, *off)), ("   with --recompute", partial(step, recompute=True)),
           ("   as the first, once more: the machine's drift", step)])
    table([("AR sampling", draw), *[("   without the CUDA graph", partial(draw, graph=False))][:gpu],
           ("   without the cache: a whole pass for every code", partial(draw, cache=False))])


def main():
    parser = runtime.Parser(__doc__)
    add_size_flags(parser)
    parser.add_argument("--naive", action="store_true", help="without each optimisation in turn, and without all")
    args = parser.parse_args()
    device = runtime.setup(args.device)
    settle(args, device)
    stages(args, device)
    loading(args)
    if args.naive:
        naive(args, device)


if __name__ == "__main__":
    runtime.run(main)
