"""Draw samples from a prior, or inspect priors and tokenizers.

    python sample.py                                                # 64 samples of runs/prior
    torchrun --nproc_per_node=8 sample.py --count 50000 --out samples50k            # for fid.py
    python sample.py --reconstruct photos --tokenizers runs/a0/ckpt.pt runs/a1/ckpt.pt
    python sample.py --teacher_forced photos --runs runs/a0/prior/ckpt.pt:runs/a0/ckpt.pt \\
           runs/a1/prior/ckpt.pt:runs/a1/ckpt.pt --count 8          # the paper's Figs. 4, 5a, 11
    python sample.py --noise photos --tokenizer runs/a0/ckpt.pt --count 1000            # Fig. 8

Sampling writes samples.npz (ADM's layout: arr_0 uint8 (N, H, W, 3), arr_1 labels), grid.png and
sampler.json. A sample depends on --seed, its number and --batch_size, not on the number of
processes. Its codes do not depend on the phase of --tokenizer, which only decodes them (Fig. 9).
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
from losses import LAYERS, LOW_LAYERS, SEM_LAYERS, PerceptualLoss, load_vgg, sha256
from transformer import load_prior
from vq import all_gather_rows, fingerprint, l1_and_psnr, load_tokenizer, usage_and_perplexity

# Table 10. The first value is ImageNet's, for priors with classes, the second FFHQ's and LSUN's.
DEFAULTS = {"ar": {"top_p": (0.92, 0.98), "top_k": (0, 0)},
            "nar": {"choice_temperature": (0.45, 0.65), "decode_steps": (12, 12)}}


def parse():
    parser = runtime.parser(__doc__)
    add, count, positive = parser.add_argument, runtime.positive_int, runtime.positive_float
    add("--prior", default="runs/prior/best.pt", help="checkpoint of train_prior.py")
    add("--tokenizer", default="runs/phase2/ckpt.pt",
        help="checkpoint of train_tokenizer.py; to sample, the prior's tokenizer or its phase 2")
    add("--count", type=count, default=64, help="number of samples, or of images, evenly spaced")
    add("--labels", nargs="+", help="names or numbers of classes to cycle through; default: all")
    add("--out", default="samples", help="folder for the results")
    add("--seed", type=runtime.at_least(0), default=0, help="random seed")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="precision of the prior when sampling; auto: bf16 on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile of the decoder; default: on a GPU")
    runtime.add_device_flags(add)
    add = parser.add_argument_group("sampling").add_argument
    add("--batch_size", type=count, default=64, help="samples per batch and process")
    add("--temperature", type=positive, default=1.0, help="number that divides the logits")
    add("--cfg_scale", type=runtime.at_least(1, float), default=1.0,
        help="scale of classifier-free guidance; 1 is off, as in the paper")
    add("--top_p", type=positive, help="AR: sample from the smallest set of codes with this total "
        "probability; default: 0.92, without classes 0.98")
    add("--top_k", type=runtime.at_least(0),
        help="AR: sample from the k most probable codes; default: 0, from all")
    add("--decode_steps", type=count, help="NAR: number of decoding steps; default: 12")
    add("--choice_temperature", type=runtime.at_least(0, float),
        help="NAR: scale of the noise on the confidence; default: 0.45, without classes 0.65")
    add = parser.add_argument_group("reconstructions").add_argument
    add("--reconstruct", metavar="DATA", help="encode and decode these images: writes "
        "reconstructions.png and codes.npy, prints a table")
    add("--tokenizers", nargs="+", metavar="CKPT",
        help="compare these tokenizers; default: only --tokenizer")
    add("--vgg", help="network of L_low and L_sem; default: the first tokenizer's own --vgg")
    add = parser.add_argument_group("teacher forcing").add_argument
    add("--teacher_forced", metavar="DATA", help="write teacher_forced.png: each code of these "
        "images as an AR prior predicts it from the true codes before it")
    add("--runs", nargs="+", metavar="PRIOR:TOKENIZER", help="pairs of checkpoints to compare")
    add = parser.add_argument_group("noise test").add_argument
    add("--noise", metavar="DATA",
        help="print the percentage of the codes of these images that noise changes")
    add("--sigma", type=positive, default=0.01,
        help="standard deviation of the noise, for images in [0, 1]")
    args = parser.parse_args()
    if args.teacher_forced and not all(pair.count(":") == 1 for pair in args.runs or ["none"]):
        parser.error("--teacher_forced needs --runs PRIOR:TOKENIZER ..., one colon in each pair")
    if args.tokenizers and not args.reconstruct:
        parser.error("--tokenizers needs --reconstruct")
    return args


def load_pair(prior_path, tokenizer_path, device):
    """The prior, its checkpoint, the tokenizer, its checkpoint. Exits with an error if the prior
    was not trained on this tokenizer's codes."""
    prior, state = load_prior(prior_path, device)
    tokenizer, saved = load_tokenizer(tokenizer_path, device)
    if fingerprint(tokenizer) != state["tokenizer"]:
        trained_on = state["args"].get("tokenizer", "that tokenizer")
        raise SystemExit(f"{tokenizer_path} is not the tokenizer that {prior_path} was trained on: "
                         f"pass {trained_on} or its phase 2. If phase 1 was resumed since then, "
                         f"pass its earlier ckpt.pt or train the prior again")
    return prior, state, tokenizer, saved


def class_indices(labels, prior, state):
    """Class numbers (n,) of the names or numbers in `labels`; of all classes if it is None."""
    count, names = max(1, prior.num_classes), list(state["classes"])
    if not labels:
        return torch.arange(count)
    if not prior.num_classes:
        raise SystemExit("--labels: this prior was trained without classes")
    numbers = {str(n): n for n in range(count)} | {name: n for n, name in enumerate(names)}
    for label in labels:
        if label not in numbers:
            near = difflib.get_close_matches(label, names) or names[:3]
            raise SystemExit(f"--labels {label}: this prior has classes 0 to {count - 1}; nearest "
                             f"names: {', '.join(near)}")
    return torch.tensor([numbers[label] for label in labels])


# ------------------------------------------------------------------------------------ sampling

def decoding_options(args, prior):
    """Arguments of prior.generate: the flags of its kind, or Table 10's values by default."""
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


def sample_batches(pair, labels, args, options):
    """Yields uint8 arrays (n, S, S, 3) of all samples, in order, the same in every process. Batch i
    is drawn by process i % world_size. pair: as `load_pair` returns it."""
    prior, state, tokenizer, _ = pair
    device, b = prior.tok_emb.weight.device, min(args.batch_size, args.count)
    grid, group = state["grid"], b * runtime.world_size()
    size = grid * tokenizer.f
    progress = runtime.Progress(args.count, every=20)
    for done in range(0, args.count, group):
        first = done + b * runtime.rank()
        images = torch.zeros(b, size, size, 3, dtype=torch.uint8, device=device)
        if first < args.count:
            # The last batch is filled up, as batches of another size may round differently.
            rows = torch.arange(first, first + b) % args.count
            torch.manual_seed(runtime.mix_seeds(args.seed, first))
            with runtime.autocast(device, args.dtype):
                y = None if labels is None else labels[rows].to(device)
                codes = prior.generate(b, y, **options).unflatten(1, (grid, grid))
            images = data.to_uint8(tokenizer.decode_indices(codes)).permute(0, 2, 3, 1)
        yield all_gather_rows(images).cpu().numpy()[:args.count - done]
        progress.show("sampling", done + group)


def write_npz(path, shape, batches, labels):
    """Write samples to an npz in ADM's layout, batch by batch: 50,000 samples of 256 x 256 take
    10 GB, which are neither held in memory nor written twice."""
    with runtime.replacing(path) as output, zipfile.ZipFile(output, "w") as archive:
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
    pair = load_pair(args.prior, args.tokenizer, device)
    prior, state, tokenizer, _ = pair
    options = decoding_options(args, prior)
    if compiled:
        tokenizer.decoder.compile(dynamic=False)
    torch.backends.cudnn.benchmark = False  # repeated runs must choose the same kernels
    cycle, labels = class_indices(args.labels, prior, state), None
    if prior.num_classes:
        cycle = cycle[data.evenly_spaced(len(cycle), args.count)]  # at most `count`
        labels = cycle[torch.arange(args.count) % len(cycle)]
    batches = sample_batches(pair, labels, args, options)
    if not runtime.is_main():
        for _ in batches:
            pass
        return
    size = state["grid"] * tokenizer.f
    write_npz(path, (args.count, size, size, 3), batches, labels)

    samples = data.NpzSamples(str(path)).array()  # memory-mapped
    rows = [("", samples[:64])]
    # A row for each of eight classes, unless there are many with few samples each.
    if labels is not None and (len(cycle) <= 8 or args.count >= 4 * len(cycle)):
        rows = [(data.row_label(state["classes"][c], c), samples[n::len(cycle)][:8])
                for n, c in enumerate(cycle[:8].tolist())]
    rows = [(name, torch.tensor(images).movedim(3, 1)) for name, images in rows]
    data.save_grid(path.with_name("grid.png"), rows)
    made = vars(args) | options | {
        "kind": prior.kind, "prior_step": state["step"], "classes": state["classes"],
        "prior_sha256": sha256(args.prior), "tokenizer_sha256": sha256(args.tokenizer),
        "data": state["args"]["data"], "torch": torch.__version__}
    text = json.dumps(made, indent=1) + "\n"
    runtime.save_file(path.with_name("sampler.json"), lambda file: file.write(text.encode()))
    print(f"{args.count} samples in {path}, some of them in {args.out}/grid.png")


# ----------------------------------------------------------------------------- looking inside

def read_images(spec, tokenizers, count):
    """`count` evenly spaced images at the size of the tokenizers [(model, checkpoint), ...]; if one
    was trained on `spec`, held-out images only. uint8 (n, 3, S, S), labels (n,), class names."""
    flags = [saved["args"] for _, saved in tokenizers]
    size, *others = {f["image_size"] for f in flags}
    if others:
        raise SystemExit("the tokenizers were trained at different image sizes")
    hold_out = any(data.is_training_data(spec, f) for f in flags)
    source = data.open_source(spec, "val", hold_out)
    images = data.EvalImages(source, size, strict=True)
    try:
        images, labels = zip(*(images[i] for i in data.evenly_spaced(len(source), count)))
    except data.Unreadable as error:
        raise SystemExit(f"{spec}: {error}") from error
    return torch.stack(images), torch.tensor(labels), list(source.classes)


@torch.no_grad()
def reconstruct(args, device):
    """Encode and decode images with one tokenizer or several. Writes reconstructions.png (at most
    64 images) and codes.npy, int32 (n, h, w), or codes1.npy, codes2.npy, ... of several tokenizers.
    Prints a table of means over the images, defined as in validation."""
    paths, out = args.tokenizers or [args.tokenizer], Path(args.out)
    tokenizers = [load_tokenizer(path, device) for path in paths]
    images, *_ = read_images(args.reconstruct, tokenizers, args.count)
    vgg = args.vgg or tokenizers[0][1]["args"].get("vgg")  # miniature/weights name none
    perceptual = vgg and PerceptualLoss(load_vgg(vgg), layers=LAYERS).to(device)
    shown = torch.zeros(len(images), dtype=torch.bool)
    shown[data.evenly_spaced(len(images), 64)] = True
    rows = [("input", images[shown])]
    print("      L1   PSNR   L_low   L_sem   codes used")
    for number, (path, (tokenizer, _)) in enumerate(zip(paths, tokenizers), 1):
        parts, means = [], 0
        for part, mask in zip(images.split(64), shown.split(64)):
            x = data.to_float(part, device)
            x_hat, indices, _ = tokenizer(x)
            parts.append((data.to_uint8(x_hat).cpu()[mask], indices.cpu()))
            terms = perceptual(x_hat, x)[1] if perceptual else dict.fromkeys(LAYERS, math.nan)
            low, sem = (sum(terms[layer] for layer in side) for side in (LOW_LAYERS, SEM_LAYERS))
            values = *l1_and_psnr(x_hat, x), low, sem
            means += torch.tensor([*map(float, values)]) * len(x) / len(images)
        x_hat, codes = map(torch.cat, zip(*parts))
        K = tokenizer.quantizer.codebook_size
        usage = 100 * usage_and_perplexity(codes.flatten().bincount(minlength=K))[0]
        print("{:8.4f} {:6.2f} {:7.4f} {:7.4f}".format(*means), f"{usage:10.1f} %   {path}")
        number = number if len(paths) > 1 else ""
        rows.append((f"reconstruction {number}", x_hat))
        codes = codes.numpy().astype(np.int32)
        runtime.save_file(out / f"codes{number}.npy", lambda file, c=codes: np.save(file, c))
    data.save_grid(out / "reconstructions.png", rows)
    print(f"{shown.sum()} of {len(images)} images in {out}/reconstructions.png")


@torch.no_grad()
def teacher_forced(args, device):
    """Sec. 3.2: feed [c, s_1 .. s_(N-1)], take the top-1 code at every position (s_1 included), and
    decode s and s' with the same decoder. Writes teacher_forced.png: rows of inputs, and for each
    pair the rows of its reconstructions and predictions."""
    pairs = [load_pair(*pair.split(":"), device) for pair in args.runs]
    images, found, classes = read_images(args.teacher_forced, [pair[2:] for pair in pairs],
                                         args.count)
    rows = [("input", images)]
    for number, (name, (prior, state, tokenizer, _)) in enumerate(zip(args.runs, pairs), 1):
        if prior.kind != "ar":
            raise SystemExit(f"{name}: teacher forcing needs the causal mask of an AR prior")
        labels = found
        if args.labels:
            cycle = class_indices(args.labels, prior, state)
            labels = cycle[torch.arange(len(images)) % len(cycle)]
        elif prior.num_classes and classes != list(state["classes"]):
            raise SystemExit(f"{args.teacher_forced} lacks the classes of {name}: pass --labels")
        parts = []
        for part, y in zip(images.split(64), labels.to(device).split(64)):
            s = tokenizer.encode(data.to_float(part, device))[1]  # (b, h, w)
            top1 = prior(s.flatten(1), y if prior.num_classes else None).argmax(-1).view_as(s)  # s'
            decoded = (data.to_uint8(tokenizer.decode_indices(codes)) for codes in (s, top1))
            parts.append((*decoded, (s == top1).float()))
        reconstruction, prediction, correct = (torch.cat(part).cpu() for part in zip(*parts))
        rows += [(f"reconstruction {number}", reconstruction), (f"prediction {number}", prediction)]
        print(f"{number}: teacher-forced top-1 accuracy {100 * correct.mean():.1f} % {name}")
    path = Path(args.out) / "teacher_forced.png"
    data.save_grid(path, rows)
    print(f"inputs, reconstructions and top-1 predictions in {path}")


@torch.no_grad()
def noise_test(args, device):
    """Fig. 8: print the percentage of codes that change if weak noise is added to the images."""
    tokenizer, saved = load_tokenizer(args.tokenizer, device)
    images, *_ = read_images(args.noise, [(tokenizer, saved)], args.count)
    generator, changed = torch.Generator().manual_seed(args.seed), []
    for part in images.split(64):
        x = data.to_float(part, device)
        # Images are in [-1, 1] here and in [0, 1] in the paper's figure, hence the factor 2.
        noise = 2 * args.sigma * torch.randn(x.shape, generator=generator).to(device)
        changed.append(tokenizer.encode(x)[1] != tokenizer.encode(x + noise)[1])
    rate = torch.cat(changed).float().mean().item()
    print(f"{100 * rate:.2f} % of the codes change under noise of sigma {args.sigma}")


def main():
    args = parse()
    analysis = (reconstruct if args.reconstruct else teacher_forced if args.teacher_forced
                else noise_test if args.noise else None)
    if analysis:  # runs in fp32 and eager
        args.dtype, args.compile = "fp32", False
    device, compiled = runtime.setup(args)
    if not analysis:
        return sample_images(args, device, compiled)
    if runtime.world_size() > 1:
        raise SystemExit("--reconstruct, --teacher_forced and --noise run in one process: python, "
                         "not torchrun")
    analysis(args, device)


if __name__ == "__main__":
    runtime.launch(main)
