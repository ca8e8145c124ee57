"""Compare outputs and gradients of all networks on this device with eager fp32 on a CPU.

    python benchmarks/check.py            # a few minutes on a GPU, mostly compilation

The networks have the paper's widths, small inputs and random weights. For each network, dtype and
mode (eager, compiled) a line shows the largest relative error and the tensor that has it. The AR
sampler's CUDA graph must give exactly the codes of a plain loop. Exits with an error if a limit is
exceeded.
"""
import argparse
import copy
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import losses  # noqa: E402
import runtime  # noqa: E402
import transformer  # noqa: E402
import vq  # noqa: E402

CPU = torch.device("cpu")
CHANNELS, DISC_CHANNELS, SIDE = (128, 256, 512), (128, 512), 32
# bf16 has 8 significant bits and rounds at every layer. On a CPU the error is 0.3 for one bias of
# the discriminator, and at most 0.1 otherwise.
LIMITS = {"fp32": 1e-3, "bf16": 0.5}


def networks():
    """{name: (network, input, call)}. call(network, input) returns a tensor."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, SIDE, SIDE) * 2 - 1
    model = vq.VQModel(CHANNELS, attention=1)
    for part in model.modules():
        if isinstance(part, vq.BlockAttention):  # with zero weights errors inside would not show
            torch.nn.init.normal_(part.out.weight, std=0.02)
    disc = losses.Discriminator(SIDE, DISC_CHANNELS)
    codes, labels = torch.randint(1024, (4, 256)), torch.arange(4)
    ar, nar = (transformer.Transformer(kind, "tiny", num_classes=4) for kind in ("ar", "nar"))

    def plain(net, x):
        return net(x)

    def features(net, x):
        return torch.cat([f.flatten(1) for f in net(x, losses.LAYERS).values()], 1)

    def with_labels(net, s):
        return net(s, labels.to(s.device))

    return {"encoder": (model.encoder, x, plain),
            "decoder with attention": (model.decoder, model.encoder(x).detach(), plain),
            "VGG16": (losses.VGG16().requires_grad_(False), x, features),
            "discriminator": (disc, x, plain),
            "AR prior": (ar, codes, with_labels), "NAR prior": (nar, codes, with_labels)}


def r1(disc, x):
    """R1 as in train_tokenizer.py: with TF32, never compiled."""
    with runtime.tf32():
        return losses.r1_penalty(disc.forward, x)


def outcome(net, x, call, device, dtype="fp32", compiled=False):
    """{name: float64 tensor on the CPU}: the output of call(net, x) on a device, and the gradients
    of a random weighted sum of it."""
    net = copy.deepcopy(net).to(device, memory_format=torch.channels_last).eval()  # no dropout
    torch._dynamo.reset()
    if compiled:
        net.compile(dynamic=False)
    x = x.to(device)
    if x.is_floating_point():
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with runtime.autocast(device, dtype):
        out = call(net, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out.float() * weights.to(device)).sum().backward()
    tensors = {name: p.grad for name, p in net.named_parameters()}
    tensors |= {"input": x.grad, "output": out}
    return {name: t.detach().cpu().double() for name, t in tensors.items() if t is not None}


def largest_error(result, reference):
    """The largest |a - b| / |b| over all tensors, and the tensor's name. Some gradients are zero
    except for rounding (the bias of attention keys), so |b| gets 1e-3 of the largest norm added."""
    unit = 1e-3 * max(b.norm() for name, b in reference.items() if name != "output")
    errors = {}
    for name, b in reference.items():
        error = (result[name] - b).norm() / (b.norm() + unit)
        errors[name] = error.nan_to_num(nan=torch.inf).item()
    worst = max(errors, key=errors.get)
    return errors[worst], worst


@torch.no_grad()
def graph_equals_loop(device):
    """The fraction of codes that are equal in the sampler's CUDA graph and in a plain loop, with
    top-k 1, so without randomness."""
    torch.manual_seed(0)
    prior = transformer.Transformer("ar", "tiny", num_classes=4).eval().to(device)
    labels = torch.arange(8, device=device) % 4
    with runtime.autocast(device, "auto"):
        sampled = prior.generate(8, labels, top_k=1)
    with runtime.autocast(device, "auto"), mock.patch.object(transformer, "CUDAGraph", lambda f: f):
        looped = prior.generate(8, labels, top_k=1)
    return (sampled == looped).float().mean().item()


def main():
    parser = runtime.parser(__doc__)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="check compiled networks, too; default: only on a GPU")
    runtime.add_device_flags(parser.add_argument)
    device, compile_too = runtime.setup(parser.parse_args())
    failed = []

    def report(name, how, value, right, note):
        if not right:
            failed.append(f"{name}, {how}")
        print(f"{name:24} {how:16} {value:9.1e} {'' if right else 'WRONG '}{note}", flush=True)

    equal = graph_equals_loop(device)
    report("AR sampler", "graph and loop", equal, equal == 1, "of the codes are equal")
    cases = networks()
    references = {name: outcome(*case, CPU) for name, case in cases.items()}
    disc, x, _ = cases["discriminator"]
    error, worst = largest_error(outcome(disc, x, r1, device), outcome(disc, x, r1, CPU))
    report("R1", "TF32, eager", error, error <= LIMITS["bf16"], worst)
    for compiled in (False, True) if compile_too else (False,):
        for name, case in cases.items():
            for dtype, limit in LIMITS.items():
                result = outcome(*case, device, dtype, compiled)
                error, worst = largest_error(result, references[name])
                how = f"{dtype}, {'compiled' if compiled else 'eager'}"
                report(name, how, error, error <= limit, worst)
    if failed:
        raise SystemExit(f"results differ from a CPU's: {'; '.join(failed)}")


if __name__ == "__main__":
    runtime.launch(main)
