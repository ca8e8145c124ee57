"""Draw samples, and look inside a prior and a tokenizer.

    python sample.py                                                # 64 samples of runs/prior
    torchrun --nproc_per_node=8 sample.py --count 50000 --out samples50k            # for fid.py
    python sample.py --teacher_forced photos --runs runs/a0/prior/ckpt.pt:runs/a0/ckpt.pt \\
           runs/a1/prior/ckpt.pt:runs/a1/ckpt.pt --count 8          # the paper's Figs. 4, 5a, 11
    python sample.py --noise photos --tokenizer runs/a0/ckpt.pt --count 1000            # Fig. 8

Sampling writes samples.npz (ADM's layout: arr_0 uint8 (N, H, W, 3), arr_1 labels), grid.png and
sampler.json. A sample depends on --seed, its number and --batch_size (at most --count), not on the
number of processes. The same flags with another phase's --tokenizer decode the same codes (Fig. 9).
"""
import argparse
import difflib
import json
from pathlib import Path

import numpy as np
import torch

import data
import runtime
from losses import sha256
from transformer import load_prior
from vq import fingerprint, load_tokenizer


def parse():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--prior", default="runs/prior/best.pt", help="checkpoint of train_prior.py")
    add("--tokenizer", default="runs/phase2/ckpt.pt",
        help="the tokenizer of the prior's codes, of phase 1 or 2")
    add("--count", type=runtime.at_least_1, default=64,
        help="number of samples, or of images to look at")
    add("--out", default="samples", help="folder for the results")
    add("--labels", nargs="+", help="classes to sample, in turn, by name or number; default: all")
    add("--batch_size", type=runtime.at_least_1, default=64,
        help="samples drawn at once by a process")
    add("--seed", type=int, default=0, help="another seed, other samples")
    add("--top_p", type=runtime.above_0, default=0.92,
        help="AR (Table 10: 0.92, 0.98 without classes)")
    add("--top_k", type=int, default=0, help="AR: keep the k most probable codes; 0: all")
    add("--temperature", type=runtime.above_0, default=1.0, help="divides the logits")
    add("--steps", type=runtime.at_least_1, default=12, help="NAR: decoding steps T")
    add("--choice_temperature", type=float, default=0.45,
        help="NAR: noise on the confidence (Table 10: 0.45, 0.65 without classes)")
    add("--cfg", type=float, default=0.0, help="classifier-free guidance; the paper uses none")
    add("--teacher_forced", help="images (folder, shapes) to predict, given the codes before")
    add("--runs", nargs="+", help="PRIOR:TOKENIZER pairs for --teacher_forced")
    add("--noise", help="images whose codes are compared with those of a noisy copy")
    add("--sigma", type=float, default=0.01, help="deviation of that noise, images in [0, 1]")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="of the prior; auto: bf16 on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile of the decoder; default: on a GPU")
    runtime.add_device_flags(add)
    return parser.parse_args()


def load_pair(prior_path, tokenizer_path, device):
    """Prior, tokenizer, their image size, and the prior's checkpoint; refused if they don't belong
    together."""
    prior, state = load_prior(prior_path, device)
    tokenizer, saved = load_tokenizer(tokenizer_path, device)
    if fingerprint(tokenizer) != state["tokenizer"]:
        raise SystemExit(f"{tokenizer_path} is not the tokenizer that {prior_path} was trained on "
                         f"(other encoder or codebook): give that one, or its phase 2")
    return prior, tokenizer, saved["args"]["image_size"], state


def numbers_of(labels, prior, state):
    """Numbers of the classes that --labels names; without it of all."""
    names, numbers = state["classes"], []
    if labels and not prior.classes:
        raise SystemExit("--labels: this prior was trained without classes")
    for label in labels or range(max(1, prior.classes)):
        number = names.index(label) if label in names else -1
        if number < 0 and str(label).isdigit():
            number = int(label)
        if not 0 <= number < max(1, prior.classes):
            near = difflib.get_close_matches(str(label), names) or names[:3]
            raise SystemExit(f"--labels {label}: no class of this prior, which has 0 to "
                             f"{prior.classes - 1}; nearest names: {', '.join(near)}")
        numbers.append(number)
    return torch.tensor(numbers)


@torch.no_grad()
def draw(args, device, compiled):
    """Sample with all processes, and write samples.npz, grid.png, sampler.json."""
    out = Path(args.out)
    if (out / "samples.npz").exists():
        raise SystemExit(f"{out} already holds samples: choose another --out")
    prior, tokenizer, size, state = load_pair(args.prior, args.tokenizer, device)
    cycle = numbers_of(args.labels, prior, state)
    runtime.on_one_machine("draw samples")
    if args.cfg and not prior.config["null_class"]:
        raise SystemExit("--cfg needs a prior that was trained with --label_dropout")
    if compiled:
        tokenizer.decoder.compile(dynamic=False)
    torch.backends.cudnn.benchmark = False  # two runs must choose the same kernels
    labels = cycle[torch.arange(args.count) % len(cycle)] if prior.classes else None
    names = ("temperature", "cfg", "top_k", "top_p") if prior.kind == "ar" else (
        "temperature", "cfg", "steps", "choice_temperature")
    options = {name: getattr(args, name) for name in names}

    b, path = min(args.batch_size, args.count), out / "unfinished.npy"
    if runtime.is_main():
        runtime.create_array(path, (args.count, size, size, 3), np.uint8)
    runtime.barrier()
    samples = np.load(path, mmap_mode="r+")  # all processes fill it
    runtime.barrier()
    if runtime.is_main():
        path.unlink()  # it lives as long as they have it open, and no longer
    firsts = range(0, args.count, b)
    progress = runtime.Progress(len(firsts))
    for n, first in enumerate(firsts[runtime.rank()::runtime.world()], 1):
        # One batch size throughout, the last batch filled up: another one may round otherwise.
        rows = torch.arange(first, first + b) % args.count
        torch.manual_seed(runtime.seed_of(args.seed, first))
        with runtime.autocast(device, args.dtype):
            chosen = None if labels is None else labels[rows].to(device)
            codes = prior.generate(b, chosen, **options).unflatten(1, (state["grid"], -1))
        images = data.to_uint8(tokenizer.decode_indices(codes))[:args.count - first]
        samples[first:first + b] = images.permute(0, 2, 3, 1).cpu().numpy()  # (b, S, S, 3)
        progress.show("sampling", n * runtime.world(), images=b, every_s=20)
    runtime.barrier()
    if not runtime.is_main():
        return
    shown, names = np.arange(min(64, args.count)), ()
    if labels is not None and args.count >= 8 * len(cycle):  # a row for each of the first classes
        shown = np.concatenate([np.arange(args.count)[labels == n][:8] for n in cycle[:8]])
        names = [state["classes"][n] for n in cycle[:8].tolist()]
    grid = torch.from_numpy(samples[shown]).permute(0, 3, 1, 2)
    data.save_grid(out / "grid.png", grid, 8, names)
    made = vars(args) | {"kind": prior.kind, "prior_step": state["step"],
                         "classes": state["classes"],
                         "prior_sha256": sha256(args.prior), "data": state["args"]["data"],
                         "tokenizer_sha256": sha256(args.tokenizer), "torch": torch.__version__}
    (out / "sampler.json").write_text(json.dumps(made, indent=1) + "\n")
    arrays = {"arr_0": samples} | ({} if labels is None else {"arr_1": labels.numpy()})
    runtime.save_file(out / "samples.npz", lambda file: np.savez(file, **arrays))
    print(f"{args.count} samples in {out}/samples.npz, the first of them in {out}/grid.png")


def read_images(spec, size, count, device):
    """`count` images of a set, evenly spread: floats (n, 3, S, S) in [-1, 1], labels (n,), names of
    the classes."""
    source = data.open_source(spec, "val")
    images = data.EvalImages(source, size)
    images, labels, reasons = zip(*(images[i] for i in data.spread(len(source), count)))
    if any(reasons):
        raise SystemExit(f"an image can't be read: {''.join(reasons)}")
    return data.to_float(torch.stack(images), device), torch.tensor(labels), list(source.classes)


@torch.no_grad()
def teacher_forced(args, device):
    """Sec. 3.2: feed [c, s_1 .. s_(N-1)], take the top-1 code at every position (s_1 included), and
    decode s and s' with the same decoder. A row per image: the input, then for each pair its
    reconstruction and its prediction."""
    columns = []
    for pair in args.runs:
        prior, tokenizer, size, state = load_pair(*pair.split(":"), device)
        if prior.kind != "ar":
            raise SystemExit(f"{pair}: the view needs the causal mask of an AR prior (Sec. 3.2)")
        x, labels, classes = read_images(args.teacher_forced, size, args.count, device)
        if args.labels:
            cycle = numbers_of(args.labels, prior, state)
            labels = cycle[torch.arange(len(x)) % len(cycle)]
        elif prior.classes and classes != list(state["classes"]):
            raise SystemExit(f"{pair} has classes that {args.teacher_forced} has not: --labels")
        parts = []
        for part, y in zip(x.split(64), labels.to(device).split(64)):
            s = tokenizer.encode(part)[1]  # (b, h, w)
            top1 = prior(s.flatten(1), y if prior.classes else None).argmax(-1).view_as(s)  # s'
            reconstruction, prediction = map(tokenizer.decode_indices, (s, top1))
            parts.append((reconstruction, prediction, (s == top1).float()))
        reconstruction, prediction, right = map(torch.cat, zip(*parts))
        columns += [x] * (not columns) + [reconstruction, prediction]
        print(f"teacher-forced top-1 accuracy {100 * right.mean():.1f} % {pair}")
    path = Path(args.out) / "teacher_forced.png"
    data.save_grid(path, data.to_uint8(torch.stack(columns, 1).flatten(0, 1)), len(columns))
    print(f"columns of {path}: input, then reconstruction and top-1 prediction of each pair")


@torch.no_grad()
def changed_codes(tokenizer, x, sigma, seed):
    """Fig. 8: the share of the codes of x (n, 3, S, S) that change under noise too weak to see."""
    generator, changed = torch.Generator().manual_seed(seed), []
    for part in x.split(64):
        # images are in [-1, 1] here, in the paper's figure in [0, 1]: hence the factor 2
        noise = 2 * sigma * torch.randn(part.shape, generator=generator).to(x.device)
        changed.append(tokenizer.encode(part)[1] != tokenizer.encode(part + noise)[1])
    return torch.cat(changed).float().mean().item()


def main():
    args = parse()
    looking = args.teacher_forced or args.noise
    if looking:  # these run so; the first line shall say it
        args.dtype, args.compile = "fp32", False
    device, compiled = runtime.setup(args)
    if looking and runtime.world() > 1:
        raise SystemExit("--teacher_forced and --noise run in one process: python, not torchrun")
    if args.teacher_forced:
        teacher_forced(args, device)
    elif args.noise:
        tokenizer, saved = load_tokenizer(args.tokenizer, device)
        x, *_ = read_images(args.noise, saved["args"]["image_size"], args.count, device)
        share = changed_codes(tokenizer, x, args.sigma, args.seed)
        print(f"{100 * share:.2f} % of the codes change under noise of sigma {args.sigma}")
    else:
        draw(args, device, compiled)


if __name__ == "__main__":
    runtime.launch(main)
