"""Tables and pictures of a set of runs: the paper's claims beside what was measured.

    python miniature/figures.py demo                                  # what demo.sh left: one seed decides nothing
    python miniature/figures.py demo demo1 demo2 --out docs           # several seeds: mean, spread and a verdict
    python miniature/figures.py --ablations ablations --out docs      # Tables 1, 5 and 6 in miniature (ablations.sh)

A run is a folder as demo.sh leaves it: classifier/ (the evaluation classifier, a network of train_vgg.py), and for each
alpha a folder alpha0, alpha1, ... with phase1/, phase2/, ar/, nar/ and the JSON files of fid.py. Pictures are made with
PIL. The curves (Figs. 10 and 5b) need matplotlib and are left out without it; nothing else needs it.
"""
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402
import sample  # noqa: E402
from runtime import BadInput  # noqa: E402
from train_tokenizer import fingerprint, load_tokenizer, load_vgg  # noqa: E402

HELD_OUT = 500  # pictures that reconstructions are measured on
# A row of the first table: name, what it is, digits, and what the paper expects of it as alpha rises.
ROWS = [
    ("l1", "L1 of reconstructions (images in [-1, 1])", 3, "higher"),
    ("psnr", "PSNR, dB", 2, "lower"),
    ("colour", "L1 of 4 x 4 block means: colour", 3, "higher"),
    ("sem", "L_sem of reconstructions (Eq. 4), in the network of the loss", 3, "lower"),
    ("relu5_3", "deep features of reconstructions, relative square error", 3, "lower"),
    ("logit", "logits of reconstructions, relative square error", 3, "lower"),
    ("fd", "FD of reconstructions", 2, "lower"),
    ("usage", "codes used, %", 1, ""),
    ("H", "unigram entropy of the codes H, nats", 2, ""),
    ("ar_loss", "AR: validation loss, nats a code", 3, "lower"),
    ("nar_loss", "NAR: validation loss, nats a masked code", 3, "lower"),
    ("ar_gain", "AR: gain over the unigram entropy, nats", 3, ""),
    ("top1", "AR: teacher-forced top-1 accuracy, %", 1, ""),
    ("ar_fd", "FD of AR samples", 2, "lower"),
    ("nar_fd", "FD of NAR samples", 2, "lower"),
    ("ar_accuracy", "AR samples: classification accuracy, %", 1, "higher"),
    ("nar_accuracy", "NAR samples: classification accuracy, %", 1, "higher"),
    ("noise", "codes that change under noise of sigma 0.01, %", 1, ""),
]
# Of the second table: phase 1 (name) against phase 2 (name_2) of one alpha, and what the paper expects of phase 2.
PHASES = [("l1", "L1 of reconstructions", 3, "lower"), ("psnr", "PSNR, dB", 2, "higher"),
          ("colour", "colour", 3, "lower"), ("fd", "FD of reconstructions", 2, "lower"),
          ("ar_fd", "FD of AR samples", 2, "lower"), ("nar_fd", "FD of NAR samples", 2, "lower")]


# ------------------------------------------------------------------------------------------------ measuring

def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} can't be read ({error}): let demo.sh finish, then run this again") from None


def validation(run):
    """The "val" lines of a run's metrics.jsonl."""
    lines = [line for line in runtime.read_metrics(Path(run) / "metrics.jsonl") if line["split"] == "val"]
    if not lines:
        raise BadInput(f"{run}/metrics.jsonl holds no validation: let demo.sh finish, then run this again")
    return lines


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
def load(folder, n, device):
    """Of one alpha: the tokenizers of both phases, n held-out pictures x (n, 3, S, S), their codes s (n, h, w), and the
    AR prior's teacher-forced top-1 predictions of them (n, h, w)."""
    prior, one, _ = sample.load_pair(folder / "ar" / "best.pt", folder / "phase1" / "ckpt.pt", device)
    two = load_tokenizer(folder / "phase2" / "ckpt.pt", device)
    x, labels, _ = sample.read_images("shapes", one.image_size, n, device)
    s = one.encode(x)[1]
    return one, two, x, s, prior(s.flatten(1), labels.to(device)).argmax(-1).view_as(s)


@torch.no_grad()
def fidelity(tokenizer, classifier, x):
    """How well a tokenizer keeps x (n, 3, S, S): pixels, colours, and the layers of a network that it was not trained
    with, each relative to its mean square."""
    x_hat = tokenizer(x)[0].clamp(-1, 1)
    mse = ((x_hat - x) / 2).square().mean((1, 2, 3))  # of values in [0, 1]
    ours, true = classifier(x_hat, losses.LAYERS), classifier(x, losses.LAYERS)
    relative = {l: (F.mse_loss(ours[l], true[l]) / true[l].square().mean()).item() for l in losses.LAYERS}
    return {"l1": (x_hat - x).abs().mean().item(), "psnr": (-10 * mse.log10()).mean().item(),
            "colour": (F.avg_pool2d(x_hat, 4) - F.avg_pool2d(x, 4)).abs().mean().item(), **relative}


@torch.no_grad()
def measure(run, device):
    """{alpha: {name of a figure: value}} of one run. Names that end in _2 are of phase 2."""
    classifier, figures = load_vgg(f"{run}/classifier/ckpt.pt").to(device), {}
    semantics = losses.PerceptualLoss(load_vgg(f"{run}/vgg/ckpt.pt").to(device), alpha=1)
    for alpha, folder in alphas(run).items():
        print(f"measuring {folder}", flush=True)
        one, two, x, s, top1 = load(folder, HELD_OUT, device)
        values = {"noise": 100 * sample.changed_codes(one, x, 0.01, seed=0), "H": lowest(folder / "ar")["H"],
                  "top1": 100 * (top1 == s).float().mean().item(), "same_codes": fingerprint(one) == fingerprint(two)}
        values["sem"] = semantics(one(x)[0], x)[0].item()
        for phase, end, tokenizer in ((1, "", one), (2, "_2", two)):
            values |= {name + end: value for name, value in fidelity(tokenizer, classifier, x).items()}
            found = read_json(folder / f"phase{phase}.json")
            values["fd" + end], values["usage" + end] = found["FD"], 100 * found["usage"]
            for kind in ("ar", "nar"):
                found = read_json(folder / f"{kind}{phase}.json")
                values[f"{kind}_fd{end}"], values[f"{kind}_accuracy{end}"] = found["FD"], 100 * found["accuracy"]
        values["ar_loss"], values["nar_loss"] = (lowest(folder / kind)["loss"] for kind in ("ar", "nar"))
        values["ar_gain"] = values["H"] - values["ar_loss"]
        figures[alpha] = values
    return figures


# --------------------------------------------------------------------------------------------------- tables

def common(runs):
    """The alphas that all runs have, in rising order: `runs` is a list of what `measure` returns, a seed each."""
    names = sorted(set.intersection(*map(set, runs)))
    if not names:
        raise BadInput("the runs have no alpha in common: give those of one DEMO_ALPHAS")
    return names


def spread(values, digits):
    """'0.101 ± 0.004': mean and standard deviation over the seeds; one seed has no spread."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def verdict(before, after, expected):
    """What the seeds say of "`after` is higher (lower) than `before`": one figure of each seed in both lists.

    reproduced: so in every seed; opposite: the other way round in every seed; inconclusive: all else, and whatever
    fewer than three seeds say."""
    if not expected:
        return ""
    rises = [b - a if expected == "higher" else a - b for a, b in zip(before, after)]
    if len(rises) < 3:
        return f"{sum(rise > 0 for rise in rises)} of {len(rises)}: inconclusive"
    return "reproduced" if min(rises) > 0 else "opposite" if max(rises) < 0 else "inconclusive"


def tables(runs):
    """The two tables as Markdown."""
    names = common(runs)
    low, high = names[0], names[-1]
    get = lambda alpha, name: [figures[alpha][name] for figures in runs]  # noqa: E731
    lines = [f"| {len(runs)} seed(s) | " + " | ".join(f"alpha {a:g}" for a in names) + " | paper expects | verdict |",
             "|---|" + "---|" * (len(names) + 2)]
    for name, text, digits, expected in ROWS:
        columns = " | ".join(spread(get(a, name), digits) for a in names)
        lines.append(f"| {text} | {columns} | {expected} | {verdict(get(low, name), get(high, name), expected)} |")
    lines += ["",
              "| phase 2: the decoder alone, with attention | alpha | phase 1 | phase 2 | paper expects | verdict |",
              "|---" * 6 + "|"]
    for name, text, digits, expected in PHASES:
        for alpha, note, claim in ((high, "", expected), (low, " (control)", "")):  # the paper claims nothing of low
            before, after = get(alpha, name), get(alpha, name + "_2")
            lines.append(f"| {text} | {alpha:g}{note} | {spread(before, digits)} | {spread(after, digits)} | {claim} | "
                         f"{verdict(before, after, expected)} |")
    same = all(figures[a]["same_codes"] for figures in runs for a in names)
    lines.append("| encoder and codebook | all | | "
                 + ("bitwise unchanged | unchanged | reproduced |" if same else "CHANGED | unchanged | opposite |"))
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
            if (run / "ar1.json").exists():  # the last of a row's files
                l1, best = validation(run / "phase1")[-1]["l1"], lowest(run / "ar")
                rebuilt, samples = read_json(run / "phase1.json"), read_json(run / "ar1.json")
                lines.append(f"| {text} | {l1:.3f} | {rebuilt['FD']:.2f} | {100 * rebuilt['usage']:.1f} | "
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
        for j, image in enumerate(images.repeat(scale, 1).repeat(scale, 2)):
            picture.paste(Image.fromarray(image), (left + j * (scale * w + gap), i * (side + gap)))
    runtime.save_file(path, lambda file: picture.save(file, "PNG", optimize=True))
    print(f"wrote {path}")


def pixels(images):
    """Float (n, 3, H, W) in [-1, 1] -> uint8 (n, H, W, 3)."""
    return data.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def reconstructions(folders, device, n=10):
    """Rows for `sheet`, Figs. 5a and 11: inputs; for each alpha of `folders` (as `alphas` gives them) the
    reconstruction, the AR prior's teacher-forced top-1 prediction, and the reconstruction of phase 2."""
    rows = []
    for alpha, folder in folders.items():
        one, two, x, s, top1 = load(folder, n, device)
        rows = rows or [("input", pixels(x))]
        rows += [(f"alpha {alpha:g}\n{text}", pixels(tokenizer.decode_indices(codes)))
                 for text, tokenizer, codes in (("reconstruction", one, s), ("AR prediction", one, top1),
                                                ("reconstruction, phase 2", two, s))]
    return rows


def samples(folders, names, n=10):
    """Rows for `sheet`: each alpha's first n samples. `names` maps the folders of sample.py to captions."""
    return [(f"alpha {alpha:g}\n{caption}", np.load(folder / name / "samples.npz")["arr_0"][:n])
            for alpha, folder in folders.items() for name, caption in names.items()]


def curves(folders, runs, path):
    """Fig. 10: validation loss against step; Fig. 5b: FD against alpha. One line a seed."""
    try:
        import matplotlib
    except ImportError:
        print("the curves of Figs. 10 and 5b need the package: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    names = common(runs)
    for axis, kind in zip(axes, ("ar", "nar")):
        for i, alpha in enumerate(names):
            for j, folder in enumerate(folders):
                lines = validation(alphas(folder)[alpha] / kind)
                axis.plot([v["step"] for v in lines], [v["loss"] for v in lines], f"C{i}",
                          label=None if j else f"alpha {alpha:g}")
        axis.set(title=f"{kind.upper()} prior", xlabel="step", ylabel="validation loss, nats a code")
        axis.legend()
    for i, (name, text) in enumerate({"fd": "reconstructions", "ar_fd": "AR samples", "nar_fd": "NAR samples"}.items()):
        for j, figures in enumerate(runs):
            axes[2].semilogy(list(figures), [values[name] for values in figures.values()], f"C{i}o-",
                             label=None if j else text)
    axes[2].minorticks_off()
    axes[2].set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes[2].set(title="phase 1: distance against alpha", xlabel="alpha", ylabel="FD (evaluation classifier)")
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    parser = runtime.Parser(__doc__)
    parser.add_argument("runs", nargs="*", help="folders of demo.sh, one a seed")
    parser.add_argument("--ablations", default="", help="folder of ablations.sh")
    parser.add_argument("--out", default="", help="where tables and pictures go (default: the first folder)")
    parser.add_argument("--device", choices=runtime.DEVICES, default="auto", help="auto: cuda, then mps, then cpu")
    args = parser.parse_args()
    if not (args.runs or args.ablations):
        raise BadInput("nothing to do: name one or more folders of demo.sh, or --ablations FOLDER")
    device, out = runtime.setup(args), Path(args.out or args.ablations or args.runs[0])
    out.mkdir(parents=True, exist_ok=True)

    def write(name, text):
        print(text)
        runtime.save_file(out / name, lambda file: file.write(text.encode()))

    if args.ablations:
        write("ablations.md", ablation_tables(args.ablations))
    if args.runs:
        runs = [measure(run, device) for run in args.runs]
        first = {alpha: alphas(args.runs[0])[alpha] for alpha in common(runs)}
        write("table.md", tables(runs))
        runtime.save_json(out / "table.json", [read_json(f"{folder}/about.json") | {"alphas": figures}
                                               for folder, figures in zip(args.runs, runs)])
        sheet(out / "view.png", reconstructions(first, device))
        sheet(out / "samples.png", samples(first, {"ar2": "AR samples", "nar2": "NAR samples"}))
        sheet(out / "phases.png", samples(first, {"ar1": "AR, phase 1", "ar2": "the same, phase 2",
                                                  "nar1": "NAR, phase 1", "nar2": "the same, phase 2"}))
        curves(args.runs, runs, out / "curves.png")


if __name__ == "__main__":
    runtime.run(main)
