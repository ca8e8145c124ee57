"""Draw samples, and look inside a prior and a tokenizer.

    python sample.py --prior runs/prior/ckpt.pt --tokenizer runs/phase2/ckpt.pt --n 64 --out samples
    torchrun --nproc_per_node=8 sample.py --prior ... --tokenizer ... --count 50000 --out samples   # for fid.py
    python sample.py --prior ... --tokenizer runs/phase1/ckpt.pt runs/phase2/ckpt.pt --out one two  # Fig. 9
    python sample.py --teacher_forced /data/imagenet/val --runs runs/a0/prior/ckpt.pt:runs/a0/ckpt.pt \\
                     runs/a1/prior/ckpt.pt:runs/a1/ckpt.pt --n 8 --out view                     # Figs. 4, 5a, 11
    python sample.py --noise /data/imagenet/val --tokenizer runs/a0/ckpt.pt --n 1000            # Fig. 8

Sampling writes samples.npz (ADM's layout: arr_0 uint8 (N, H, W, 3), arr_1 labels), grid.png and sampler.json. Sample i
depends on (--seed, i) alone, not on the number of processes (in bf16: for one --batch_size). Finished batches are kept
in part/ until then: the same command continues after a kill.
"""
import argparse
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import runtime
from runtime import BadInput
from train_tokenizer import fingerprint, load_tokenizer
from transformer import Transformer


def parse():
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--prior", help="checkpoint of train_prior.py; default: runs/prior/best.pt")
    add("--tokenizer", nargs="+", help="the tokenizer of the prior's codes, phase 1 or 2; several: each decodes the "
        "same samples; default: runs/phase2/ckpt.pt, without it runs/tokenizer/ckpt.pt")
    # torchrun reads the script's flags too, and takes --n for an abbreviation of its own: under it use --count
    add("--n", "--count", type=runtime.positive, default=64, help="number of samples, or of images to view")
    add("--out", nargs="+", default=["samples"], help="folder for the results, one for each --tokenizer")
    add("--labels", type=runtime.count, nargs="+", help="classes to sample, in turn; default: all, in turn")
    add("--png", action="store_true", help="write every sample as a PNG as well")
    add("--batch_size", type=runtime.positive, default=64, help="samples made at once by a process")
    add("--seed", type=runtime.count, default=0, help="another seed, other samples")
    add("--top_p", type=runtime.number(float, 0, 1, above=True), help="AR; default 0.92 (Table 10, ImageNet)")
    add("--top_k", type=runtime.count, default=0, help="AR: keep the k most probable codes; 0: all")
    add("--temperature", type=runtime.rate, default=1.0, help="divides the logits")
    add("--steps", type=runtime.positive, help="NAR: decoding steps T; default 12")
    add("--choice_temperature", type=runtime.weight, help="NAR: noise on the confidence; default 0.45 (Table 10)")
    add("--cfg", type=runtime.weight, default=0.0, help="classifier-free guidance; 0: off, as in the paper")
    add("--teacher_forced", default="", help="images (folder, shapes) to predict with ground-truth context")
    add("--runs", nargs="+", default=[], help="PRIOR:TOKENIZER pairs for --teacher_forced")
    add("--noise", default="", help="images whose codes are compared with those of a noisy copy")
    add("--sigma", type=runtime.weight, default=0.01, help="standard deviation of that noise, images in [0, 1]")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="autocast; auto: bf16 on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of the decoder (default: on a GPU)")
    add("--device", choices=runtime.DEVICES, default="auto", help="auto: cuda, then mps, then cpu")
    args = parser.parse_args()
    if bool(args.prior) + bool(args.teacher_forced) + bool(args.noise) > 1:
        raise BadInput("give one of --prior (samples), --teacher_forced (predictions), --noise (codes under noise)")
    if not args.teacher_forced and not args.noise:
        args.prior = args.prior or "runs/prior/best.pt"
    phase = "phase2" if Path("runs/phase2/ckpt.pt").exists() else "tokenizer"
    args.tokenizer = args.tokenizer or [f"runs/{phase}/ckpt.pt"]
    if bool(args.runs) != bool(args.teacher_forced):
        raise BadInput("--teacher_forced and --runs PRIOR:TOKENIZER ... belong together")
    if args.noise and len(args.tokenizer) > 1:
        raise BadInput("--noise looks at the codes of one --tokenizer")
    if args.prior and not len({*args.out}) == len(args.out) == len(args.tokenizer):
        raise BadInput("--out: give one folder for each file of --tokenizer, each another")
    return args


def load_pair(prior_path, tokenizer_path, device):
    """Prior and tokenizer in eval mode, and the prior's checkpoint; refused if they don't belong together."""
    state = runtime.load_file(prior_path, "prior")
    tokenizer = load_tokenizer(tokenizer_path, device)
    if fingerprint(tokenizer) != state["tokenizer"]:
        raise BadInput(f"{tokenizer_path} is not the tokenizer that {prior_path} was trained on (other encoder or "
                       f"codebook): give that one, or its phase 2")
    with runtime.explain(f"{prior_path} does not fit this code: ", Exception):
        prior = Transformer(**state["config"])
        prior.load_state_dict(state["ema"] or state["model"])
    # Not frozen: autocast caches its bf16 copies only of weights that take gradients.
    return prior.eval().to(device), tokenizer, state


def write_samples(out, chunks, j, shape, labels, settings):
    """The files of a finished run, from chunks of (b, tokenizers, H, W, 3): those of tokenizer j."""
    parts = [(lambda file=file: np.load(file)["samples"][:, j]) for file, _ in chunks]
    first = np.concatenate([part() for part in parts[:-(-64 // len(chunks[0][1]))]])[:64]
    data.save_grid(out / "grid.png", torch.from_numpy(first).permute(0, 3, 1, 2) / 127.5 - 1, 8)
    runtime.save_json(out / "sampler.json", settings)

    def write(file):  # np.savez would hold all samples in memory
        with zipfile.ZipFile(file, "w") as archive:
            if labels is not None:
                with archive.open("arr_1.npy", "w") as member:
                    np.save(member, labels.numpy())
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                runtime.write_npy(member, shape, np.uint8, (part() for part in parts))
    runtime.save_file(out / "samples.npz", write)  # last: it says that all is there
    print(f"{shape[0]} samples in {out}/samples.npz, the first of them in {out}/grid.png")


@torch.no_grad()
def draw(args, device):
    """Sample with all processes and write samples.npz, grid.png, sampler.json, for each tokenizer into its folder."""
    tokenizers, outs = [], [Path(out) for out in args.out]
    for path in args.tokenizer:
        prior, tokenizer, state = load_pair(args.prior, path, device)
        tokenizers.append(tokenizer)
        if args.compile:
            tokenizer.decoder.compile(dynamic=False)
    classes, ar, size = prior.config["classes"], prior.kind == "ar", tokenizer.image_size
    if args.labels and not classes:
        raise BadInput("--labels: this prior is unconditional")
    # by default the classes that the data had: rows of classes never seen were never trained
    cycle = torch.tensor(args.labels or range(len(state["classes"]) if classes else 1))
    labels = cycle[torch.arange(args.n) % len(cycle)] if classes else None
    if ar and (args.steps or args.choice_temperature is not None):
        raise BadInput(f"--steps and --choice_temperature are for NAR; {args.prior} is an AR prior")
    options = {"temperature": args.temperature, "cfg": args.cfg, "top_k": args.top_k,
               "top_p": args.top_p or (0.92 if ar else 1.0)}
    if not ar:
        choice = 0.45 if args.choice_temperature is None else args.choice_temperature
        options |= {"steps": args.steps or 12, "choice_temperature": choice}
    # One batch size throughout, the last batch filled up: another size may round another way. (So on a GPU in bf16 a
    # sample repeats exactly for one --batch_size only; in fp32 about one code in a million depends on it.)
    b = args.batch_size if device.type == "cuda" else min(args.batch_size, args.n)
    torch.backends.cudnn.benchmark = False  # two runs must choose the same kernels
    settings = {"n": args.n, "seed": args.seed, "batch_size": b, "kind": prior.kind, **options, "labels": args.labels,
                "png": args.png, **{key: state["args"][key] for key in ("data", "val", "image_size")},
                "prior": args.prior, "prior_step": state["step"],
                "prior_sha256": runtime.sha256(args.prior),
                "tokenizer": args.tokenizer, "tokenizer_sha256": [runtime.sha256(path) for path in args.tokenizer],
                "fingerprint": state["tokenizer"], "dtype": args.dtype, "device": device.type,
                "torch": str(torch.__version__)}
    part = outs[0] / f"part-{hashlib.sha256(json.dumps([settings, args.out]).encode()).hexdigest()[:12]}"
    for other in set(outs[0].glob("part-*")) - {part}:
        raise BadInput(f"{other} holds unfinished samples of other flags: give those, remove it, or use another --out")
    for out in outs:  # part is there if this very run was killed between its last two files
        if (out / "samples.npz").exists() and not part.exists():
            raise BadInput(f"{out} already holds samples: choose another --out")

    chunks = runtime.chunks(part, args.n, b)
    todo = runtime.pending(chunks)
    progress = runtime.Progress(len(todo) * b * runtime.world(), "samples", 20)
    for file, rows in todo:
        ids = torch.arange(rows.start, rows.start + b)
        with runtime.autocast(device, args.dtype), runtime.explain():
            codes = prior.generate(ids, args.seed, None if labels is None else labels[ids % args.n], **options)
        # In parts of 64: more images are too many for the attention decoder's kernels on a GPU.
        parts = codes.unflatten(1, (state["grid"], -1)).split(64)
        images = [torch.cat([data.to_uint8(t.decode_indices(part)) for part in parts]) for t in tokenizers]
        images = torch.stack(images, 1).movedim(2, -1)[:len(rows)].cpu().numpy()  # (b, tokenizers, H, W, 3)
        for out, its in zip(outs, images.swapaxes(0, 1)) if args.png else ():
            (out / "png").mkdir(parents=True, exist_ok=True)
            for i, image in zip(rows, its):
                Image.fromarray(image).save(out / "png" / f"{i:06}.png")
        runtime.save_file(file, lambda f, images=images: np.savez(f, samples=images))
        progress(len(rows) * runtime.world())
    runtime.barrier()
    if runtime.is_main():
        for j, out in enumerate(outs):
            write_samples(out, chunks, j, (args.n, size, size, 3), labels,
                          settings | {key: settings[key][j] for key in ("tokenizer", "tokenizer_sha256")})
        shutil.rmtree(part)


def read_images(spec, size, n, device):
    """n images of a data set (of shapes: held-out ones): floats (n, 3, S, S) in [-1, 1], labels (n,), classes."""
    source = data.open_source(spec, "val")
    n = min(n, len(source))
    # spread over the set, so that a folder sorted by class shows several; shapes come in turn
    chosen = range(n) if source.drawn else data.spread(len(source), n)
    images, labels, index = zip(*(data.EvalImages(source, size)[i] for i in chosen))
    if max(index) >= 0:
        raise BadInput(f"{source.name(max(index))} can't be read")
    return data.to_float(torch.stack(images), device), torch.tensor(labels), list(source.classes)


@torch.no_grad()
def teacher_forced(args, device):
    """Sec. 3.2: feed [c, s_1 .. s_(N-1)], take the top-1 code at every position (s_1 included), decode s and s' with
    the same decoder. One row per image: the input, then for each pair its reconstruction and its prediction."""
    columns, told = [], []
    for pair in args.runs:
        prior_path, colon, tokenizer_path = pair.partition(":")
        if not colon:
            raise BadInput(f"--runs {pair}: a pair is PRIOR:TOKENIZER, two checkpoints with a colon between them")
        prior, tokenizer, state = load_pair(prior_path, tokenizer_path, device)
        if prior.kind != "ar":
            raise BadInput(f"{prior_path} is a NAR prior: the view needs the causal mask of an AR prior (Sec. 3.2)")
        x, labels, classes = read_images(args.teacher_forced, tokenizer.image_size, args.n, device)
        if args.labels:
            labels = torch.tensor(args.labels)[torch.arange(len(x)) % len(args.labels)]
        elif prior.config["classes"] and classes != list(state["classes"]):
            raise BadInput(f"{prior_path} has classes that {args.teacher_forced} does not have: give --labels")
        parts = []
        for part, y in zip(x.split(64), labels.to(device).split(64)):
            s = tokenizer.encode(part)[1]  # (b, h, w)
            top1 = prior(s.flatten(1), y if prior.config["classes"] else None).argmax(-1).view_as(s)  # s'
            parts.append((tokenizer.decode_indices(s), tokenizer.decode_indices(top1), (s == top1).float()))
        reconstruction, prediction, correct = map(torch.cat, zip(*parts))
        columns += [x] * (not columns) + [reconstruction, prediction]
        told.append(f"teacher-forced top-1 accuracy {100 * correct.mean():.1f} % {pair}")
    if len({column.shape for column in columns}) > 1:
        raise BadInput("the tokenizers of --runs have several image sizes: compare runs of one size")
    out = Path(args.out[0])
    data.save_grid(out / "teacher_forced.png", torch.stack(columns, 1).flatten(0, 1), len(columns))
    print(f"columns of {out}/teacher_forced.png: input, then reconstruction and top-1 prediction of each pair")
    print("\n".join(told))


@torch.no_grad()
def changed_codes(tokenizer, x, sigma, seed):
    """Fig. 8: the share of the codes of x (n, 3, S, S) that change under Gaussian noise too weak to see."""
    generator, changed = torch.Generator().manual_seed(seed), []
    for part in x.split(64):
        # images are in [-1, 1] here: sigma is in the [0, 1] of the paper's figure, hence the factor 2
        noisy = part + 2 * sigma * torch.randn(part.shape, generator=generator).to(x.device)
        changed.append((tokenizer.encode(part)[1] != tokenizer.encode(noisy)[1]).float())
    return torch.cat(changed).mean().item()


def main():
    args = parse()
    device = runtime.setup(args)
    if args.prior:
        draw(args, device)
    elif runtime.world() > 1:
        raise BadInput("--teacher_forced and --noise run in one process: start them with python, not torchrun")
    elif args.teacher_forced:
        teacher_forced(args, device)
    else:
        tokenizer = load_tokenizer(args.tokenizer[0], device)
        x, _, _ = read_images(args.noise, tokenizer.image_size, args.n, device)
        changed, codes = changed_codes(tokenizer, x, args.sigma, args.seed), (tokenizer.image_size // tokenizer.f) ** 2
        print(f"{100 * changed:.2f} % of {len(x) * codes} codes change under noise of sigma {args.sigma}")


if __name__ == "__main__":
    runtime.run(main)
