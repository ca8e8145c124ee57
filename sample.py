"""Draw samples from a prior, or inspect a prior and a tokenizer.

    python sample.py                                                # 64 samples of runs/prior
    torchrun --nproc_per_node=8 sample.py --count 50000 --out samples50k            # for fid.py
    python sample.py --teacher_forced photos --runs runs/a0/prior/ckpt.pt:runs/a0/ckpt.pt \\
           runs/a1/prior/ckpt.pt:runs/a1/ckpt.pt --count 8          # the paper's Figs. 4, 5a, 11
    python sample.py --noise photos --tokenizer runs/a0/ckpt.pt --count 1000            # Fig. 8

Sampling writes samples.npz (ADM's layout: arr_0 uint8 (N, H, W, 3), arr_1 labels), grid.png and
sampler.json. A sample depends on --seed, its number and --batch_size, not on the number of
processes. With another phase's --tokenizer the same flags decode the same codes (Fig. 9).
"""
import argparse
import difflib
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

import data
import runtime
from losses import sha256
from transformer import load_prior
from vq import all_gather_rows, fingerprint, load_tokenizer

# Table 10. The first value is ImageNet's, for priors with classes, the second FFHQ's and LSUN's.
DEFAULTS = {"ar": {"top_p": (0.92, 0.98), "top_k": (0, 0)},
            "nar": {"choice_temperature": (0.45, 0.65), "decode_steps": (12, 12)}}


def parse():
    parser = runtime.parser(__doc__)
    add, count, positive = parser.add_argument, runtime.positive_int, runtime.positive_float
    add("--prior", default="runs/prior/best.pt", help="checkpoint of train_prior.py")
    add("--tokenizer", default="runs/phase2/ckpt.pt",
        help="the tokenizer that the prior was trained on, of phase 1 or 2")
    add("--count", type=count, default=64, help="number of samples or images")
    add("--labels", nargs="+", help="names or numbers of classes, used in turn; default: all")
    add("--out", default="samples", help="folder for the results")
    add("--seed", type=runtime.at_least(0), default=0, help="random seed")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="precision of the prior; auto: bf16 on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile of the decoder; default: on a GPU")
    runtime.add_device_flags(add)
    add = parser.add_argument_group("sampling").add_argument
    add("--batch_size", type=count, default=64, help="samples per batch and process")
    add("--temperature", type=positive, default=1.0, help="divides the logits")
    add("--cfg_scale", type=runtime.at_least(1, float), default=1.0,
        help="scale of classifier-free guidance; 1 is off, as in the paper")
    add("--top_p", type=positive, help="AR: keep the smallest set of codes with this probability; "
        "default: 0.92, without classes 0.98")
    add("--top_k", type=runtime.at_least(0), help="AR: keep the k most probable codes; 0: all")
    add("--decode_steps", type=count, help="NAR: decoding steps; default: 12")
    add("--choice_temperature", type=runtime.at_least(0, float),
        help="NAR: noise on the confidence; default: 0.45, without classes 0.65")
    add = parser.add_argument_group("teacher-forced view").add_argument
    add("--teacher_forced", metavar="DATA", help="show the prior's predictions for these images, "
        "each given the true codes before it")
    add("--runs", nargs="+", metavar="PRIOR:TOKENIZER", help="the pairs to compare")
    add = parser.add_argument_group("noise test").add_argument
    add("--noise", metavar="DATA", help="count the codes of these images that noise changes")
    add("--sigma", type=positive, default=0.01, help="standard deviation, for images in [0, 1]")
    args = parser.parse_args()
    if args.teacher_forced and not all(pair.count(":") == 1 for pair in args.runs or ["none"]):
        parser.error("--teacher_forced needs --runs PRIOR:TOKENIZER ...")
    return args


def load_pair(prior_path, tokenizer_path, device):
    """Prior, its checkpoint, tokenizer, its checkpoint. An error if they do not belong together."""
    prior, state = load_prior(prior_path, device)
    tokenizer, saved = load_tokenizer(tokenizer_path, device)
    if fingerprint(tokenizer) != state["tokenizer"]:
        raise SystemExit(f"{tokenizer_path} is not the tokenizer that {prior_path} was trained on: "
                         f"pass that one, or its phase 2")
    return prior, state, tokenizer, saved


def class_indices(labels, prior, state):
    """Class numbers of the names or numbers in `labels`; None: of all classes."""
    names, count, numbers = state["classes"], max(1, prior.num_classes), []
    if labels and not prior.num_classes:
        raise SystemExit("--labels: this prior was trained without classes")
    for label in labels or range(count):
        number = names.index(label) if label in names else -1
        if number < 0 and str(label).isdigit():
            number = int(label)
        if not 0 <= number < count:
            near = difflib.get_close_matches(str(label), names) or names[:3]
            raise SystemExit(f"--labels {label}: not a class of this prior, which has 0 to "
                             f"{count - 1}; nearest names: {', '.join(near)}")
        numbers.append(number)
    return torch.tensor(numbers)


# ------------------------------------------------------------------------------------ sampling

def decoding_options(args, prior):
    """Arguments of prior.generate: the flags of its kind, Table 10's values where not given."""
    options = {"temperature": args.temperature, "cfg_scale": args.cfg_scale}
    for kind, flags in DEFAULTS.items():
        for name, values in flags.items():
            given = getattr(args, name)
            if kind == prior.kind:
                options[name] = values[not prior.num_classes] if given is None else given
            elif given is not None:
                raise SystemExit(f"--{name} does not apply to the {prior.kind.upper()} prior "
                                 f"{args.prior}")
    if args.cfg_scale > 1 and not prior.config["null_class"]:
        raise SystemExit("--cfg_scale needs a prior that was trained with --label_dropout")
    return options


def sample_batches(prior, tokenizer, labels, args, options):
    """Yields uint8 arrays (n, S, S, 3) of all samples, in order, the same in every process. Batch i
    is drawn by process i % world_size."""
    device, b = prior.tok_emb.weight.device, min(args.batch_size, args.count)
    grid = math.isqrt(prior.length)
    size, group = grid * tokenizer.f, b * runtime.world_size()
    progress = runtime.Progress(args.count, every=20)
    for done in range(0, args.count, group):
        first = done + b * runtime.rank()
        images = torch.zeros(b, size, size, 3, dtype=torch.uint8, device=device)
        if first < args.count:
            # The last batch is filled up: another batch size might round otherwise.
            rows = torch.arange(first, first + b) % args.count
            torch.manual_seed(runtime.mix_seeds(args.seed, first))
            with runtime.autocast(device, args.dtype):
                y = None if labels is None else labels[rows].to(device)
                codes = prior.generate(b, y, **options).unflatten(1, (grid, grid))
            images = data.to_uint8(tokenizer.decode_indices(codes)).permute(0, 2, 3, 1)
        yield all_gather_rows(images).cpu().numpy()[:args.count - done]
        progress.show("sampling", done + group)


def write_npz(path, shape, batches, labels):
    """Stream samples to an npz in ADM's layout. It is written once: 50,000 samples of 256 x 256
    take 10 GB."""
    with runtime.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for images in batches:
                file.write(images.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.numpy())


@torch.no_grad()
def sample_images(args, device, compiled):
    """Sample with all processes, and write samples.npz, grid.png, sampler.json."""
    path = Path(args.out) / "samples.npz"
    if path.exists():
        raise SystemExit(f"{args.out} already holds samples: choose another --out")
    prior, state, tokenizer, _ = load_pair(args.prior, args.tokenizer, device)
    options = decoding_options(args, prior)
    if compiled:
        tokenizer.decoder.compile(dynamic=False)
    torch.backends.cudnn.benchmark = False  # two runs must choose the same kernels
    cycle, labels = class_indices(args.labels, prior, state), None
    if prior.num_classes:
        cycle = cycle[data.evenly_spaced(len(cycle), args.count)]
        labels = cycle[torch.arange(args.count) % len(cycle)]
    batches = sample_batches(prior, tokenizer, labels, args, options)
    if not runtime.is_main():
        for _ in batches:
            pass
        return
    size = math.isqrt(prior.length) * tokenizer.f
    write_npz(path, (args.count, size, size, 3), batches, labels)

    shown, names = range(min(64, args.count)), ()
    if labels is not None and args.count >= 8 * len(cycle):  # a row for each of the first classes
        rows = cycle[:8].tolist()
        shown = [n + j * len(cycle) for n in range(len(rows)) for j in range(8)]
        names = [state["classes"][n] for n in rows]
    samples = data.NpzSamples(str(path))
    grid = torch.stack([data.to_tensor(np.asarray(samples.load(n)[0])) for n in shown])
    data.save_grid(path.with_name("grid.png"), grid, 8, names)
    made = vars(args) | options | {
        "kind": prior.kind, "prior_step": state["step"], "classes": state["classes"],
        "prior_sha256": sha256(args.prior), "tokenizer_sha256": sha256(args.tokenizer),
        "data": state["args"]["data"], "torch": torch.__version__}
    text = json.dumps(made, indent=1) + "\n"
    runtime.save_file(path.with_name("sampler.json"), lambda file: file.write(text.encode()))
    print(f"{args.count} samples in {path}, some of them in {args.out}/grid.png")


# ----------------------------------------------------------------------------- looking inside

def read_images(spec, saved, count, device):
    """`count` evenly spaced images; if `spec` is the tokenizer's training data, held-out ones only.
    Floats (n, 3, S, S) in [-1, 1], labels (n,), class names. saved: the tokenizer's checkpoint."""
    hold_out = data.is_training_data(spec, saved["args"])
    source = data.open_source(spec, "val", hold_out)
    images = data.EvalImages(source, saved["args"]["image_size"], strict=True)
    images, labels = zip(*(images[i] for i in data.evenly_spaced(len(source), count)))
    return data.to_float(torch.stack(images), device), torch.tensor(labels), list(source.classes)


@torch.no_grad()
def teacher_forced(args, device):
    """Sec. 3.2: feed [c, s_1 .. s_(N-1)], take the top-1 code at every position (s_1 included), and
    decode s and s' with the same decoder. A row per image: the input, then for each pair its
    reconstruction and its prediction."""
    columns = []
    for pair in args.runs:
        prior, state, tokenizer, saved = load_pair(*pair.split(":"), device)
        if prior.kind != "ar":
            raise SystemExit(f"{pair}: the view needs the causal mask of an AR prior (Sec. 3.2)")
        x, labels, classes = read_images(args.teacher_forced, saved, args.count, device)
        if args.labels:
            cycle = class_indices(args.labels, prior, state)
            labels = cycle[torch.arange(len(x)) % len(cycle)]
        elif prior.num_classes and classes != list(state["classes"]):
            raise SystemExit(f"{args.teacher_forced} lacks the classes of {pair}: pass --labels")
        parts = []
        for part, y in zip(x.split(64), labels.to(device).split(64)):
            s = tokenizer.encode(part)[1]  # (b, h, w)
            top1 = prior(s.flatten(1), y if prior.num_classes else None).argmax(-1).view_as(s)  # s'
            reconstruction, prediction = map(tokenizer.decode_indices, (s, top1))
            parts.append((reconstruction, prediction, (s == top1).float()))
        reconstruction, prediction, correct = map(torch.cat, zip(*parts))
        columns += [x] * (not columns) + [reconstruction, prediction]
        print(f"teacher-forced top-1 accuracy {100 * correct.mean():.1f} % {pair}")
    path = Path(args.out) / "teacher_forced.png"
    data.save_grid(path, data.to_uint8(torch.stack(columns, 1).flatten(0, 1)), len(columns))
    print(f"columns of {path}: input, then reconstruction and top-1 prediction of each pair")


@torch.no_grad()
def code_change_rate(tokenizer, x, sigma, seed):
    """Fig. 8: the fraction of the codes of x (n, 3, S, S) that change under weak noise."""
    generator, changed = torch.Generator().manual_seed(seed), []
    for part in x.split(64):
        # Images are in [-1, 1] here and in [0, 1] in the paper's figure, hence the factor 2.
        noise = 2 * sigma * torch.randn(part.shape, generator=generator).to(x.device)
        changed.append(tokenizer.encode(part)[1] != tokenizer.encode(part + noise)[1])
    return torch.cat(changed).float().mean().item()


def noise_test(args, device):
    tokenizer, saved = load_tokenizer(args.tokenizer, device)
    x, *_ = read_images(args.noise, saved, args.count, device)
    rate = code_change_rate(tokenizer, x, args.sigma, args.seed)
    print(f"{100 * rate:.2f} % of the codes change under noise of sigma {args.sigma}")


def main():
    args = parse()
    analysis = teacher_forced if args.teacher_forced else noise_test if args.noise else None
    if analysis:  # runs in fp32 and eager
        args.dtype, args.compile = "fp32", False
    device, compiled = runtime.setup(args)
    if not analysis:
        return sample_images(args, device, compiled)
    if runtime.world_size() > 1:
        raise SystemExit("--teacher_forced and --noise run in one process: python, not torchrun")
    analysis(args, device)


if __name__ == "__main__":
    runtime.launch(main)
