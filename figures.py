"""Tables and pictures of a set of runs: the paper's claims beside what was measured.

    python figures.py demo                                  # what demo.sh left: one seed, which decides nothing
    python figures.py demo demo1 demo2 --out docs           # several seeds: mean, spread and a verdict
    python figures.py --ablations ablations --out docs      # Tables 1, 5 and 6 in miniature (ablations.sh)

A run is a folder as demo.sh leaves it: judge/ (a network of train_vgg.py that measures), and for each alpha a folder
alpha0, alpha1, ... with phase1/, phase2/, ar/, nar/, and the JSON files of fid.py. Pictures are drawn with PIL; the
curves (Fig. 10, Fig. 5b) need matplotlib, which nothing else does, and are left out without it.
"""
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import losses
import runtime
import sample
import vq
from runtime import BadInput

HELD_OUT = 500  # pictures that reconstructions are measured on
# A row of the first table: name, what it is, digits, and what the paper expects of it as alpha rises.
ROWS = [
    ("l1", "L1 of reconstructions (images in [-1, 1])", 3, "higher"),
    ("psnr", "PSNR, dB", 2, "lower"),
    ("colour", "L1 of 4 x 4 block means: colour", 3, "higher"),
    ("relu5_3", "deep features of reconstructions, relative square error", 3, "lower"),
    ("logit", "logits of reconstructions, relative square error", 3, "lower"),
    ("rfd", "FD of reconstructions", 2, "lower"),
    ("usage", "codes used, %", 1, ""),
    ("H", "unigram entropy of the codes H, nats", 2, ""),
    ("ar_loss", "AR: validation loss, nats a code", 3, "lower"),
    ("nar_loss", "NAR: validation loss, nats a masked code", 3, "lower"),
    ("ar_gain", "AR: H less that loss", 3, ""),
    ("top1", "AR: top-1 accuracy with true context, %", 1, ""),
    ("ar1", "FD of AR samples", 2, "lower"),
    ("nar1", "FD of NAR samples", 2, "lower"),
    ("ar1_seen", "AR samples recognised as the object asked for, %", 1, "higher"),
    ("nar1_seen", "NAR samples recognised, %", 1, "higher"),
    ("noise", "codes that change under noise of sigma 0.01, %", 1, ""),
]
# Of the second table: phase 1 against phase 2 of one alpha.
PHASES = [("l1", "L1 of reconstructions", 3), ("psnr", "PSNR, dB", 2), ("colour", "colour", 3),
          ("rfd", "FD of reconstructions", 2), ("ar", "FD of AR samples", 2), ("nar", "FD of NAR samples", 2)]


# ------------------------------------------------------------------------------------------------ measuring

def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} can't be read ({error}): let demo.sh finish, then run this again") from None


def validation(run):
    """The "val" lines of a run's metrics.jsonl."""
    try:
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{run}/metrics.jsonl can't be read ({error}): let demo.sh finish first") from None
    return [line for line in lines if line["split"] == "val"]


def lowest(run):
    """The validation line of a prior's run with the lowest loss: that of best.pt."""
    return min(validation(run), key=lambda line: line["loss"])


def alphas(run):
    """{alpha: folder} of a run, in rising order."""
    found = {float(p.name.removeprefix("alpha")): p for p in Path(run).glob("alpha[0-9]*") if p.is_dir()}
    if not found:
        raise BadInput(f"{run} holds no folders alpha0, alpha1, ...: give a folder that demo.sh made")
    return dict(sorted(found.items()))


@torch.no_grad()
def fidelity(tokenizer, judge, x):
    """How well a tokenizer keeps x (n, 3, S, S): pixels and colours, and the layers of a network that it was not
    trained with, each relative to its mean square."""
    x_hat = torch.cat([tokenizer(part)[0].clamp(-1, 1) for part in x.split(100)])
    mse = ((x_hat - x) / 2).square().mean((1, 2, 3))
    ours, true = judge(x_hat, losses.LAYERS), judge(x, losses.LAYERS)
    relative = {l: (F.mse_loss(ours[l], true[l]) / true[l].square().mean()).item() for l in losses.LAYERS}
    return {"l1": (x_hat - x).abs().mean().item(), "psnr": (-10 * mse.log10()).mean().item(),
            "colour": (F.avg_pool2d(x_hat, 4) - F.avg_pool2d(x, 4)).abs().mean().item(), **relative}


@torch.no_grad()
def measure(run, device):
    """{alpha: {name of a figure: value}} of one run."""
    judge = losses.load_vgg(f"{run}/judge/ckpt.pt").to(device)
    figures = {}
    for alpha, folder in alphas(run).items():
        print(f"measuring {folder}", flush=True)
        prior, one, _ = sample.load_pair(folder / "ar" / "best.pt", folder / "phase1" / "ckpt.pt", device)
        two = vq.load_tokenizer(folder / "phase2" / "ckpt.pt", device)
        x, labels, _ = sample.read_images("shapes", one.image_size, HELD_OUT, device)
        values = fidelity(one, judge, x)
        values |= {f"{name}_2": value for name, value in fidelity(two, judge, x).items()}
        values["noise"] = 100 * sample.changed_codes(one, x, 0.01, seed=0)
        values["same_codes"] = vq.fingerprint(one) == vq.fingerprint(two)
        s = torch.cat([one.encode(part)[1] for part in x.split(100)]).flatten(1)
        top1 = torch.cat([prior(*part).argmax(-1) for part in zip(s.split(100), labels.to(device).split(100))])
        values["top1"] = 100 * (top1 == s).float().mean().item()
        for kind in ("ar", "nar"):
            best = lowest(folder / kind)
            values[f"{kind}_loss"], values["H"] = best["loss"], best["H"]
        values["ar_gain"] = values["H"] - values["ar_loss"]
        for phase, end in (("phase1", ""), ("phase2", "_2")):
            found = read_json(folder / f"{phase}.json")
            values["rfd" + end], values["usage" + end] = found["FD"], 100 * found["usage"]
        for name in ("ar1", "ar2", "nar1", "nar2"):
            found = read_json(folder / f"{name}.json")
            values[name], values[f"{name}_seen"] = found["FD"], 100 * found["recognised"]
        figures[alpha] = values
    return figures


# --------------------------------------------------------------------------------------------------- tables

def spread(values, digits):
    """'0.101 +- 0.004': mean and standard deviation over the seeds; one seed has no spread."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def verdict(before, after, expected):
    """What the seeds say of "`after` is higher (lower) than `before`": one figure of each seed in both lists.

    seen: so in every seed; not seen: the other way round in every seed; undecided: mixed, or fewer than three
    seeds."""
    if not expected:
        return ""
    as_expected = [(b > a) == (expected == "higher") for a, b in zip(before, after)]
    if len(as_expected) < 3:
        return f"{sum(as_expected)} of {len(as_expected)}: undecided"
    return "seen" if all(as_expected) else "undecided" if any(as_expected) else "not seen"


def tables(runs):
    """The two tables as Markdown: `runs` is a list of what `measure` returns, a seed each."""
    names = sorted(set.intersection(*(set(figures) for figures in runs)))
    get = lambda alpha, name: [figures[alpha][name] for figures in runs]  # noqa: E731
    low, high = names[0], names[-1]
    lines = [f"| {len(runs)} seed(s) | " + " | ".join(f"alpha {a:g}" for a in names) + " | paper expects | seen? |",
             "|---|" + "---|" * (len(names) + 2)]
    for name, text, digits, expected in ROWS:
        columns = " | ".join(spread(get(a, name), digits) for a in names)
        lines.append(f"| {text} | {columns} | {expected} | {verdict(get(low, name), get(high, name), expected)} |")
    lines += ["", "| phase 2: the decoder alone, with attention | alpha | phase 1 | phase 2 | paper expects | seen? |",
              "|---|---|---|---|---|---|"]
    for name, text, digits in PHASES:
        pair = (name + "1", name + "2") if name in ("ar", "nar") else (name, name + "_2")
        for alpha in (high, low):
            before, after = get(alpha, pair[0]), get(alpha, pair[1])
            expected = "higher" if name == "psnr" else "lower"
            control = "" if alpha == high else " (control)"
            lines.append(f"| {text} | {alpha:g}{control} | {spread(before, digits)} | {spread(after, digits)} | "
                         f"{expected if alpha == high else ''} | {verdict(before, after, expected)} |")
    same = all(figures[a]["same_codes"] for figures in runs for a in names)
    lines.append(f"| encoder and codebook | all | | {'bitwise unchanged' if same else 'CHANGED'} | unchanged | "
                 f"{'seen' if same else 'not seen'} |")
    return "\n".join(lines) + "\n"


# Tables 1, 5 and 6: folder of ablations.sh -> row of the table, and the paper's rFID and FID of AR samples.
ABLATIONS = {
    "Table 1": {"base": ("baseline", 3.45, 16.97), "conv": ("+Conv x2", 3.22, 17.19),
                "attention": ("+Attention x2", 2.90, 17.42), "long": ("2x training", 3.28, 16.19)},
    "Table 5": {"none": ("no regularisation", 4.07, 17.19), "factorized": ("factorized, L2-normed", 2.93, 24.91),
                "kmeans": ("K-means", 3.54, 16.84), "entropy": ("entropy", 3.45, 16.97)},
    "Table 6": {"base": ("low: five ReLU layers", 3.45, 16.97), "A": ("A: low + logit", 3.01, 15.19),
                "B": ("B: A less relu1_2", 2.93, 14.47), "C": ("C: B less relu2_2", 2.81, 14.08),
                "D": ("D: C less relu3_3", 2.62, 13.34), "sem": ("sem: relu5_3 + logit", 2.77, 12.07),
                "E": ("E: logit alone", 4.65, 17.88)},
}


def ablation_tables(folder):
    """Tables 1, 5 and 6 as Markdown, beside the paper's figures; rows that were not run are left out."""
    lines = []
    for title, rows in ABLATIONS.items():
        lines += [f"| {title} | L1 | FD of reconstructions | codes used, % | AR: validation loss (H) | "
                  "FD of AR samples | paper: rFID | paper: FID, AR |", "|---|" + "---|" * 7]
        for name, (text, rfid, fid) in rows.items():
            run = Path(folder) / name
            if not (run / "ar1.json").exists():
                continue
            last, found = validation(run / "phase1")[-1], read_json(run / "phase1.json")
            samples = read_json(run / "ar1.json")
            best = lowest(run / "ar")
            lines.append(f"| {text} | {last['l1']:.3f} | {found['FD']:.2f} | {100 * found['usage']:.1f} | "
                         f"{best['loss']:.2f} ({best['H']:.2f}) | {samples['FD']:.2f} | {rfid:.2f} | {fid:.2f} |")
        lines.append("")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- pictures

def sheet(path, rows, scale=3):
    """One PNG of captioned rows: `rows` is a list of (caption, uint8 images (n, H, W, 3)) with equal n, H, W."""
    n, h, w = rows[0][1].shape[:3]
    side, gap, left = scale * h, 4, 200
    picture = Image.new("RGB", (left + n * (scale * w + gap), len(rows) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for i, (caption, images) in enumerate(rows):
        pen.text((left - 8, i * (side + gap) + side // 2), caption, "black", font, anchor="rm", align="right")
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize((scale * w, side), Image.Resampling.NEAREST)
            picture.paste(tile, (left + j * (scale * w + gap), i * (side + gap)))
    runtime.save_file(path, lambda file: picture.save(file, "PNG", optimize=True))
    print(f"wrote {path}")


@torch.no_grad()
def view(run, device, path, n=10):
    """Figs. 5a and 11: inputs; for each alpha the reconstruction, the AR prior's top-1 prediction with true context,
    and the reconstruction of phase 2."""
    rows, pixels = [], lambda images: sample.to_uint8(images).cpu().numpy()
    for alpha, folder in alphas(run).items():
        prior, one, _ = sample.load_pair(folder / "ar" / "best.pt", folder / "phase1" / "ckpt.pt", device)
        two = vq.load_tokenizer(folder / "phase2" / "ckpt.pt", device)
        x, labels, _ = sample.read_images("shapes", one.image_size, n, device)
        s = one.encode(x)[1]
        top1 = prior(s.flatten(1), labels.to(device)).argmax(-1).view_as(s)
        rows = rows or [("input", pixels(x))]
        rows += [(f"alpha {alpha:g}\n{text}", pixels(tokenizer.decode_indices(codes)))
                 for text, tokenizer, codes in (("reconstruction", one, s), ("AR prediction", one, top1),
                                                ("reconstruction, phase 2", two, s))]
    sheet(path, rows)


def drawn(run, names, path, n=10):
    """Rows of the first n samples of each alpha: `names` maps the folders of sample.py to captions."""
    rows = []
    for alpha, folder in alphas(run).items():
        for name, caption in names.items():
            with np.load(folder / name / "samples.npz") as arrays:
                rows.append((f"alpha {alpha:g}\n{caption}", arrays["arr_0"][:n]))
    sheet(path, rows)


def curves(folders, runs, path):
    """Fig. 10: validation loss against step; Fig. 5b: FD against alpha, over all seeds."""
    try:
        import matplotlib
    except ImportError:
        print("the curves of Figs. 10 and 5b need the package: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    names = sorted(runs[0])
    for axis, kind in zip(axes, ("ar", "nar")):
        for folder in folders:
            for alpha, place in alphas(folder).items():
                lines = validation(place / kind)
                axis.plot([v["step"] for v in lines], [v["loss"] for v in lines], f"C{names.index(alpha)}",
                          label=f"alpha {alpha:g}" if folder == folders[0] else None)
        axis.set(title=f"{kind.upper()} prior", xlabel="step", ylabel="validation loss, nats a code")
        axis.legend()
    for name, text in (("rfd", "reconstructions"), ("ar1", "AR samples"), ("nar1", "NAR samples"),
                       ("ar2", "AR samples, phase 2"), ("nar2", "NAR samples, phase 2")):
        values = [[figures[a][name] for figures in runs] for a in names]
        axes[2].errorbar(names, [statistics.mean(v) for v in values], marker="o", capsize=3, label=text,
                         yerr=[statistics.stdev(v) if len(v) > 1 else math.nan for v in values])
    axes[2].set(title="distance against alpha", xlabel="alpha", ylabel="FD, judge's features")
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    parser = runtime.Parser(__doc__)
    parser.add_argument("runs", nargs="*", help="folders of demo.sh, one a seed")
    parser.add_argument("--ablations", default="", help="folder of ablations.sh")
    parser.add_argument("--out", default="", help="where tables and pictures go (default: the first folder)")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto",
                        help="auto: cuda, then mps, then cpu")
    args = parser.parse_args()
    if not (args.runs or args.ablations):
        raise BadInput("nothing to do: name one or more folders of demo.sh, or --ablations FOLDER")
    out = Path(args.out or args.ablations or args.runs[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out} can't be written ({error.strerror})") from None

    def write(name, text):
        print(text)
        runtime.save_file(out / name, lambda file: file.write(text.encode()))

    if args.ablations:
        write("ablations.md", ablation_tables(args.ablations))
    if args.runs:
        device = runtime.setup(args.device)
        runs = [measure(run, device) for run in args.runs]
        write("table.md", tables(runs))
        runtime.save_file(out / "table.json", lambda file: file.write(json.dumps(runs, indent=1).encode()))
        first = args.runs[0]
        view(first, device, out / "view.png")
        drawn(first, {"ar2": "AR samples", "nar2": "NAR samples"}, out / "samples.png")
        drawn(first, {"ar1": "AR, phase 1", "ar2": "the same, phase 2", "nar1": "NAR, phase 1",
                      "nar2": "the same, phase 2"}, out / "phases.png")
        curves(args.runs, runs, out / "curves.png")


if __name__ == "__main__":
    runtime.run(main)
