"""Draw samples, and look inside a prior and a tokenizer.

    python sample.py --prior runs/prior/ckpt.pt --tokenizer runs/phase2/ckpt.pt --n 64 --out samples
    torchrun --nproc_per_node=8 sample.py --prior ... --tokenizer ... --count 50000 --out samples   # for fid.py
    python sample.py --prior ... --tokenizer runs/phase1/ckpt.pt runs/phase2/ckpt.pt --out one two  # Fig. 9
    python sample.py --teacher_forced /data/imagenet/val --runs runs/a0/prior/ckpt.pt:runs/a0/ckpt.pt \\
                     runs/a1/prior/ckpt.pt:runs/a1/ckpt.pt --n 8 --out view                     # Figs. 4, 5a, 11
    python sample.py --noise /data/imagenet/val --tokenizer runs/a0/ckpt.pt --n 1000            # Fig. 8

Sampling writes samples.npz (ADM's layout: arr_0 uint8 (N, H, W, 3), arr_1 labels), grid.png and sampler.json. Sample i
depends on (--seed, i) alone, not on the number of processes (in bf16: for one --batch_size). What is drawn is kept in
part/ until then: the same command goes on after a kill.
"""
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import runtime
import vq
from runtime import BadInput
from transformer import Transformer

# What each way of using the script reads, beside --device.
USED = {"prior": "tokenizer n out labels png batch_size seed dtype "
                 "top_p top_k temperature steps choice_temperature cfg",
        "teacher_forced": "runs n out labels batch_size", "noise": "tokenizer n seed sigma"}


def parse():
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--prior", default="", help="checkpoint of train_prior.py")
    add("--tokenizer", nargs="+", default=[],
        help="the tokenizer of the prior's codes, phase 1 or 2; several: each decodes the same samples")
    # torchrun reads the script's flags too, and takes --n for an abbreviation of its own: under it say --count
    add("--n", "--count", type=runtime.positive, default=64, help="number of samples, or of images to look at")
    add("--out", nargs="+", default=["samples"], help="folder for the results, one for each --tokenizer")
    add("--labels", type=runtime.count, nargs="+", help="classes to draw, in turn; default: all, in turn")
    add("--png", action="store_true", help="write every sample as a PNG as well")
    add("--batch_size", type=runtime.positive, default=64, help="samples drawn at once by a process")
    add("--seed", type=runtime.count, default=0, help="another seed, other samples")
    add("--top_p", type=runtime.bounded(float, 0, 1, above=True), help="AR; default 0.92 (Table 10, ImageNet)")
    add("--top_k", type=runtime.count, default=0, help="AR: keep the k most probable codes; 0: all")
    add("--temperature", type=runtime.rate, default=1.0, help="divides the logits")
    add("--steps", type=runtime.positive, help="NAR: decoding steps T; default 12")
    add("--choice_temperature", type=runtime.weight, help="NAR: noise on the confidence; default 0.45 (Table 10)")
    add("--cfg", type=runtime.weight, default=0.0, help="classifier-free guidance; 0: off, as in the paper")
    add("--teacher_forced", default="", help="images (file, folder, shapes) to predict with ground-truth context")
    add("--runs", nargs="+", default=[], help="PRIOR:TOKENIZER pairs for --teacher_forced")
    add("--noise", default="", help="images whose codes are compared with those of a noisy copy")
    add("--sigma", type=runtime.weight, default=0.01, help="standard deviation of that noise, images in [0, 1]")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="autocast; auto: bf16 on a GPU")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: cuda, then mps, then cpu")
    args = parser.parse_args()
    modes = [name for name in USED if getattr(args, name)]
    if len(modes) != 1:
        raise BadInput("give one of --prior (draw samples), --teacher_forced (predict images), --noise (disturb codes)")
    if modes != ["teacher_forced"] and not args.tokenizer:
        raise BadInput(f"--{modes[0]} needs --tokenizer")
    if args.noise and len(args.tokenizer) > 1:
        raise BadInput("--noise disturbs the codes of one --tokenizer")
    if len(set(args.out)) != len(args.out) or len(args.out) != (len(args.tokenizer) if args.prior else 1):
        raise BadInput("--out: one folder, or as many as --tokenizer has files, each another")
    if bool(args.runs) != (modes == ["teacher_forced"]):
        raise BadInput("--teacher_forced and --runs PRIOR:TOKENIZER ... belong together")
    if idle := parser.given - {modes[0], "device", *USED[modes[0]].split()}:
        raise BadInput(f"--{min(idle)} has no part in --{modes[0]}: leave it out")
    return args


def load_pair(prior_path, tokenizer_path, device):
    """Prior and tokenizer in eval mode, and the prior's checkpoint; refused if they don't belong together."""
    state = runtime.load_checkpoint(prior_path, "prior")
    tokenizer = vq.load_tokenizer(tokenizer_path, device)
    if vq.fingerprint(tokenizer) != state["tokenizer"]:
        raise BadInput(f"{tokenizer_path} is not the tokenizer that {prior_path} was trained on (other encoder or "
                       f"codebook): give that one, or its phase 2")
    with runtime.refusing(prior_path):
        prior = runtime.restore(prior_path, lambda: Transformer(**state["config"]), state["ema"] or state["model"])
        if not prior.tokens == state["grid"] ** 2 == (tokenizer.image_size // tokenizer.f) ** 2:
            raise ValueError(f"{prior.tokens} tokens on a grid of {state['grid']}")
    return prior.eval().to(device), tokenizer, state  # not frozen: autocast keeps its bf16 copies only of what is not


def to_uint8(images):
    """Float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()


def write(out, samples, labels, settings):
    """The files of a finished run: uint8 samples (n, H, W, 3), labels (n,) or None."""
    some = torch.from_numpy(np.array(samples[:64])).permute(0, 3, 1, 2).float() / 127.5 - 1
    data.save_grid(out / "grid.png", some, 8)
    text = json.dumps(settings, indent=1) + "\n"
    runtime.save_file(out / "sampler.json", lambda file: file.write(text.encode()))
    arrays = {"arr_0": samples} | ({"arr_1": labels.numpy()} if labels is not None else {})
    runtime.save_file(out / "samples.npz", lambda file: np.savez(file, **arrays))  # last: now all is there
    print(f"{len(samples)} samples in {out}/samples.npz, the first of them in {out}/grid.png")


@torch.no_grad()
def draw(args, device):
    """Sample with all processes and write samples.npz, grid.png, sampler.json, for each tokenizer into its folder."""
    tokenizers = []
    for path in args.tokenizer:
        prior, tokenizer, state = load_pair(args.prior, path, device)
        tokenizers.append(tokenizer)
    classes, ar = prior.config["classes"], prior.kind == "ar"
    if args.labels and not classes:
        raise BadInput("--labels: this prior is unconditional")
    # by default the classes that the data had: rows of classes never seen were never trained
    cycle = torch.tensor(args.labels or range(len(state["classes"]) if classes else 1))
    labels = cycle[torch.arange(args.n) % len(cycle)]
    options = {"temperature": args.temperature, "cfg": args.cfg, "top_k": args.top_k}
    if ar:
        if args.steps or args.choice_temperature is not None:
            raise BadInput(f"--steps and --choice_temperature are for NAR; {args.prior} is an AR prior")
        options["top_p"] = 0.92 if args.top_p is None else args.top_p
    else:
        choice = 0.45 if args.choice_temperature is None else args.choice_temperature
        options |= {"top_p": args.top_p or 1.0, "steps": args.steps or 12, "choice_temperature": choice}
    outs, size = [Path(out) for out in args.out], tokenizers[0].image_size  # of one encoder, so of one size
    with runtime.refusing():
        prior.check(args.n, labels if classes else None, **options)
    # One batch size throughout, the last batch filled up: another size may round another way. (So on a GPU in bf16 a
    # sample repeats exactly for one --batch_size only; in fp32 about one code in a million depends on it.)
    b = args.batch_size if device.type == "cuda" else min(args.batch_size, args.n)
    torch.backends.cudnn.benchmark = False  # two runs must choose the same kernels
    settings = {"n": args.n, "seed": args.seed, "batch_size": b, "kind": prior.kind, **options, "labels": args.labels,
                "prior": args.prior, "prior_step": state["step"], "prior_sha256": runtime.sha256(args.prior),
                "tokenizer": args.tokenizer, "tokenizer_sha256": [runtime.sha256(path) for path in args.tokenizer],
                "fingerprint": state["tokenizer"], "dtype": args.dtype, "device": device.type,
                "torch": str(torch.__version__)}

    # All processes write their rows of one file; it becomes the npz (one for each tokenizer) in the end.
    held = [runtime.lock(out) for out in outs if runtime.is_main()]
    for out in outs:  # part/ is there if this very run was killed between its last two files
        if (out / "samples.npz").exists() and not (outs[0] / "part/meta.json").exists():
            raise BadInput(f"{out} already holds samples: choose another --out")
        if args.png:
            (out / "png").mkdir(parents=True, exist_ok=True)
    part = runtime.Rows(outs[0] / "part", settings | {"beside": args.out[1:]}, b,
                        samples=((args.n, len(outs), size, size, 3), np.uint8))
    samples, todo = part.arrays["samples"], part.todo()
    progress = runtime.Progress(len(todo) * b * runtime.world(), "samples", 20)

    def drawn():
        for rows in todo:
            ids = torch.arange(rows.start, rows.start + b)
            with runtime.autocast(device, args.dtype):
                y = labels[ids % args.n] if classes else None
                indices = prior.generate(ids.tolist(), args.seed, y, **options)
            grid = indices.view(-1, state["grid"], state["grid"])
            images = torch.stack([to_uint8(tokenizer.decode_indices(grid)) for tokenizer in tokenizers], 1)
            yield rows, runtime.download(images)  # (b, tokenizers, H, W, 3)

    for rows, images in runtime.one_behind(drawn()):
        samples[rows.start:rows.stop] = images()[:len(rows)]
        for out, its in zip(outs, samples.swapaxes(0, 1)):
            for i in rows if args.png else ():
                Image.fromarray(its[i]).save(out / "png" / f"{i:06}.png")
        part.mark(rows)
        progress(len(rows) * runtime.world())
    part.close()
    if runtime.is_main():
        for j, (out, its) in enumerate(zip(outs, samples.swapaxes(0, 1))):
            write(out, its, labels if classes else None,
                  settings | {key: settings[key][j] for key in ("tokenizer", "tokenizer_sha256")})
        shutil.rmtree(outs[0] / "part")
        for file in held:
            file.close()


def read_images(spec, size, n, device):
    """The first n images of a file or a data set (of shapes: held-out ones): floats (n, 3, S, S), labels, classes."""
    if Path(spec).is_file() and not spec.endswith(".tar"):
        try:
            images, labels = [data.center(data.decode(spec, spec), size)], torch.zeros(1, dtype=torch.long)
        except data.Unreadable as error:
            raise BadInput(f"{error} can't be read") from None
        return data.to_float(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), device), labels, []
    source = data.open_source(spec, "val")
    n = min(n, len(source))
    # spread over the set, so that a folder sorted by class shows several; shapes come in turn
    chosen = range(n) if spec == "shapes" else np.linspace(0, len(source) - 1, n).astype(int).tolist()
    items = [data.EvalImages(source, size)[i] for i in chosen]
    for item in items:
        if item[2] < 0:
            raise BadInput(f"{source.name(-1 - item[2])} can't be read")
    return (data.to_float(torch.stack([item[0] for item in items]), device), torch.tensor([item[1] for item in items]),
            list(source.classes))


@torch.no_grad()
def teacher_forced(args, device):
    """Sec. 3.2: feed [c, s_1 .. s_(N-1)], take the top-1 code at every position (s_1 included), decode s and s' with
    the same decoder. One row per image: the input, then for each pair its reconstruction and its prediction."""
    columns, names = [], []
    for pair in args.runs:
        prior_path, colon, tokenizer_path = pair.partition(":")
        if not colon:
            raise BadInput(f"--runs {pair}: a pair is PRIOR:TOKENIZER, two checkpoints with a colon between them")
        prior, tokenizer, state = load_pair(prior_path, tokenizer_path, device)
        if prior.kind != "ar":
            raise BadInput(f"{prior_path} is a NAR prior: the view needs the causal mask of an AR prior (Sec. 3.2)")
        x, labels, classes = read_images(args.teacher_forced, tokenizer.image_size, args.n, device)
        if columns and columns[0].shape != x.shape:
            raise BadInput(f"{tokenizer_path} has another image size than the first pair: compare runs of one size")
        if args.labels:
            labels = torch.tensor(args.labels)[torch.arange(len(x)) % len(args.labels)]
        elif prior.config["classes"] and classes != list(state["classes"]):
            raise BadInput(f"{prior_path} knows classes that {args.teacher_forced} does not have: give --labels")
        conditional = bool(prior.config["classes"])
        if conditional and labels.max() >= prior.config["classes"]:
            raise BadInput(f"--labels {int(labels.max())}: {prior_path} has classes 0 to {prior.config['classes'] - 1}")
        parts = []
        for part, y in zip(x.split(args.batch_size), labels.to(device).split(args.batch_size)):
            s = tokenizer.encode(part)[1]  # (b, h, w)
            top1 = prior(s.flatten(1), y if conditional else None).argmax(-1).view_as(s)  # s'
            parts.append((tokenizer.decode_indices(s), tokenizer.decode_indices(top1), (s == top1).float()))
        reconstruction, prediction, hits = map(torch.cat, zip(*parts))
        columns += [] if columns else [x]
        columns += [reconstruction, prediction]
        names.append(f"{100 * hits.mean():.1f} % {pair}")
    out = Path(args.out[0])
    picture = torch.stack([c.float().clamp(-1, 1) for c in columns], 1).flatten(0, 1)  # image by image
    data.save_grid(out / "teacher_forced.png", picture, len(columns))
    print(f"columns of {out}/teacher_forced.png: input, then reconstruction and top-1 prediction of each pair")
    for name in names:
        print(f"top-1 accuracy {name}")


@torch.no_grad()
def changed_codes(tokenizer, x, sigma, seed):
    """Share of the codes of x (n, 3, S, S) that are others after Gaussian noise of sigma (images in [0, 1])."""
    generator, changed = torch.Generator().manual_seed(seed), []
    for part in x.split(64):
        # images are in [-1, 1] here: sigma is in the [0, 1] of the paper's figure, hence the factor 2
        noisy = part + 2 * sigma * torch.randn(part.shape, generator=generator).to(x.device)
        changed.append((tokenizer.encode(part)[1] != tokenizer.encode(noisy)[1]).float())
    return torch.cat(changed).mean().item()


def noise(args, device):
    """Fig. 8: the share of codes that change under Gaussian noise too weak to see."""
    tokenizer = vq.load_tokenizer(args.tokenizer[0], device)
    x, _, _ = read_images(args.noise, tokenizer.image_size, args.n, device)
    changed, codes = changed_codes(tokenizer, x, args.sigma, args.seed), (tokenizer.image_size // tokenizer.f) ** 2
    print(f"{100 * changed:.2f} % of {len(x) * codes} codes change under noise of sigma {args.sigma}")


def main():
    args = parse()
    device = runtime.setup(args.device)
    if args.prior:
        draw(args, device)
    elif runtime.world() > 1:
        raise BadInput("--teacher_forced and --noise run in one process: start them with python, not torchrun")
    else:
        teacher_forced(args, device) if args.teacher_forced else noise(args, device)


if __name__ == "__main__":
    runtime.run(main)
