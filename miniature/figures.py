"""Tables and pictures of runs of demo.sh: the paper's claims beside what was measured.

    python miniature/figures.py demo                               # one seed decides nothing
    python miniature/figures.py demo0 demo1 demo2 --out docs       # mean, spread and a verdict
    python miniature/figures.py --clutter demo0 demo1 plain0 plain1 --out docs    # when alpha helps
    python miniature/figures.py --ablations ablations              # Tables 1, 5 and 6 in miniature
    python miniature/figures.py --curves runs/tokenizer runs/prior # one's own runs: curves.png

A run is a folder as demo.sh leaves it: vgg/ (the network of the loss), classifier/ (the independent
one), and for each alpha a folder with phase1/, phase2/, ar/, ar_second/, nar/ and the JSON files of
fid.py. The curves (Figs. 10 and 5b) need matplotlib and are left out without it.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402
import vq  # noqa: E402
from miniature.shapes import KINDS  # noqa: E402
from transformer import load_prior  # noqa: E402

CPU = torch.device("cpu")
HELD_OUT = 500  # pictures that reconstructions are measured on
AR_PRIORS = ("ar", "ar_second")  # one prior decides nothing: a second one of another seed
# Name, what it is, digits, and what the paper expects of it as alpha rises. Names that end in _2
# are of phase 2; of a figure of AR samples NAME_apart is by how much two priors differ.
ROWS = [
    ("l1", "L1 of reconstructions", 3, "higher"),
    ("psnr", "PSNR, dB", 2, "lower"),
    ("sem", "L_sem of reconstructions, network of the loss", 3, "lower"),
    ("sem_other", "L_sem of reconstructions, independent network", 3, "lower"),
    ("parts", "parts of reconstructions classified correctly, %", 1, "higher"),
    ("fd", "FD of reconstructions", 2, "lower"),
    ("usage", "codes used, %", 1, ""),
    ("H", "unigram entropy of the codes, nats", 2, ""),
    ("ar_loss", "AR: validation loss, nats per token", 3, "lower"),
    ("nar_loss", "NAR: validation loss, nats per masked token", 3, "lower"),
    ("gain", "AR: improvement over the unigram entropy, nats", 3, "higher"),
    ("nar_gain", "NAR: improvement over the unigram entropy, nats", 3, "higher"),
    ("ar_context", "AR: loss at the first position minus mean loss, nats", 2, ""),
    ("nar_context", "NAR: loss with no code known minus loss with all but one known, nats", 2, ""),
    ("top1", "AR: teacher-forced top-1 accuracy, %", 1, "higher"),
    ("ar_fd_2", "AR samples, phase 2: FD, mean of the priors", 2, "lower"),
    ("ar_fd_2_apart", "   the two priors differ by", 2, ""),
    ("ratio", "   times FD of reconstructions, phase 2", 1, ""),
    ("ar_score_2", "AR samples, phase 2: inception score over the parts", 3, "higher"),
    ("ar_score_2_apart", "   the two priors differ by", 3, ""),
    ("ar_body_2", "AR samples, phase 2: class accuracy, %", 1, "higher"),
    ("ar_body_2_apart", "   the two priors differ by", 1, ""),
    ("nar_fd_2", "NAR samples, phase 2: FD", 2, "lower"),
    ("nar_body_2", "NAR samples, phase 2: class accuracy, %", 1, "higher"),
]
# Phase 1 (name) against phase 2 (name_2) of one alpha, and what the paper expects of phase 2.
PHASES = [("l1", "L1 of reconstructions", 3, "lower"), ("psnr", "PSNR, dB", 2, "higher"),
          ("fd", "FD of reconstructions", 2, "lower"), ("ar_fd", "FD of AR samples", 2, "lower"),
          ("ar_score", "inception score of AR samples over the parts", 3, "higher"),
          ("nar_fd", "FD of NAR samples", 2, "lower")]
# The method, alpha 1 in both phases, against its baseline, alpha 0 in one.
METHOD = [("ar_fd", "FD of AR samples", 2, "lower"),
          ("ar_score", "inception score of AR samples over the parts", 3, "higher"),
          ("ar_body", "AR samples: class accuracy, %", 1, "higher")]
# What alpha 1 gains, against clutter: name, what it is, and the sign of a gain.
GAINS = [("ar_loss", "AR loss, nats per token", -1), ("ar_fd_2", "FD of AR samples", -1),
         ("ar_score_2", "inception score over the parts", 1),
         ("ar_body_2", "class accuracy, %", 1)]


# ---------------------------------------------------------------------------------- measuring

def read(path):
    return json.loads(Path(path).read_text())


def validation(run):
    """The "val" lines of a run's metrics.jsonl."""
    lines = runtime.read_metrics(Path(run) / "metrics.jsonl")
    return [line for line in lines if line["split"] == "val"]


def lowest(run):
    """The validation line with the lowest loss of a prior's run: that of best.pt."""
    return min(validation(run), key=lambda line: line["loss"])


def alphas(run):
    """{alpha: folder} of a run, in rising order."""
    return dict(sorted((float(p.name[5:]), p) for p in Path(run).glob("alpha[0-9]*")))


def spec(run):
    """What --data named in a run."""
    state = torch.load(f"{run}/start/ckpt.pt", map_location="cpu", weights_only=True, mmap=True)
    return state["args"]["data"]


def held_out(spec, size, count):
    """Held-out pictures (count, 3, S, S) in [-1, 1], their labels, and the kinds of their parts."""
    source = data.open_source(spec, "val")
    images = data.EvalImages(source, size)
    x = data.to_float(torch.stack([images[i][0] for i in range(count)]), CPU)
    parts = torch.tensor([source.parts(i) for i in range(count)])
    return x, parts[:, 0], parts


@torch.no_grad()
def load(folder, count):
    """Of one alpha: both phases' tokenizers, held-out pictures and their parts, their codes s, and
    the AR prior's teacher-forced top-1 predictions of them."""
    (one, saved), (two, _) = (vq.load_tokenizer(folder / phase / "ckpt.pt")
                              for phase in ("phase1", "phase2"))
    prior, _ = load_prior(folder / "ar" / "best.pt")
    x, labels, parts = held_out(saved["args"]["data"], saved["args"]["image_size"], count)
    s = one.encode(x)[1]  # (n, h, w)
    return one, two, x, parts, s, prior(s.flatten(1), labels).argmax(-1).view_as(s)


@torch.no_grad()
def losses_by_context(prior, s, labels):
    """Loss in nats per token against the number of known codes, 0 to N - 1. AR: at each position.
    NAR: of the masked codes when so many others, chosen at random, are known. s (n, N)."""
    n, N = s.shape
    if prior.kind == "ar":
        losses = torch.nn.functional.cross_entropy(
            prior(s, labels).transpose(1, 2), s, reduction="none")
        return losses.mean(0).tolist()
    order = torch.rand(n, N, generator=torch.Generator().manual_seed(0)).argsort(1)
    found = []
    for known in range(N):
        mask = order >= known
        total, count = prior.loss(prior(s.masked_fill(mask, prior.mask_id), labels), s, mask)
        found.append((total / count).item())
    return found


def context_of(folder, kind):
    """losses_by_context of a prior of one alpha, on all held-out images."""
    prior, state = load_prior(folder / kind / "best.pt")
    tokenizer, saved = vq.load_tokenizer(folder / "phase1" / "ckpt.pt")
    count = len(data.open_source(saved["args"]["data"], "val"))
    x, labels, _ = held_out(saved["args"]["data"], saved["args"]["image_size"], count)
    s = torch.cat([tokenizer.encode(part)[1].flatten(1) for part in x.split(500)])
    return losses_by_context(prior, s, labels)


def explained(spec, size=32, fit=1500, test=500):
    """The share of the pixels' variance of held-out pictures that a linear regression on the parts
    explains. In photographs a label explains a few per cent."""
    x, _, parts = held_out(spec, size, fit + test)
    x = x.flatten(1).double()
    one_hot = [torch.nn.functional.one_hot(kinds, n) for kinds, n in zip(parts.T, KINDS)]
    given = torch.cat([*one_hot, torch.ones(len(x), 1)], 1).double()
    weights = torch.linalg.lstsq(given[:fit], x[:fit], driver="gelsd").solution
    error = (x[fit:] - given[fit:] @ weights).square().sum()
    return 1 - (error / (x[fit:] - x[:fit].mean(0)).square().sum()).item()


def score(images, network):
    """Inception score over the parts: the mean over the parts of exp of the mutual information of a
    picture and its part, as the network sees them. images: uint8 (n, H, W, 3)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    logits = torch.cat([network(data.to_float(some, CPU), ("logit",))["logit"]
                        for some in x.split(200)])
    terms = []
    for part in logits.double().split(KINDS, 1):
        log_p = part.log_softmax(1)
        terms.append((log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp())
    return torch.stack(terms).mean().item()


def ar_priors(folder):
    """Names of the AR priors of one alpha that have been sampled: one or two."""
    return [prior for prior in AR_PRIORS if (folder / f"{prior}2.json").exists()]


def ar_samples(folder, phase, network):
    """{name: [value of each prior]} of AR samples: FD, body as asked for in %, inception score."""
    priors = ar_priors(folder)
    found = [read(folder / f"{prior}{phase}.json") for prior in priors]
    return {"ar_fd": [one["FD"] for one in found],
            "ar_body": [100 * one["accuracy"] for one in found],
            "ar_score": [score(drawn(folder, f"{prior}{phase}", None), network)
                         for prior in priors]}


@torch.no_grad()
def measure(run):
    """{alpha: {name of a figure: value}} of one run."""
    figures = {}
    network, other = (losses.load_vgg(f"{run}/{name}/ckpt.pt") for name in ("vgg", "classifier"))
    share = explained(spec(run))
    for alpha, folder in alphas(run).items():
        print(f"measuring {folder}", flush=True)
        one, two, x, parts, s, top1 = load(folder, HELD_OUT)
        values = {"H": lowest(folder / "ar")["unigram_entropy"],
                  "top1": 100 * (top1 == s).float().mean().item(),
                  "same_codes": vq.fingerprint(one) == vq.fingerprint(two)}
        x_hat = one.decode_indices(s)
        values["sem"] = losses.PerceptualLoss(network, alpha=1)(x_hat, x)[0].item()
        values["sem_other"] = losses.PerceptualLoss(other, alpha=1)(x_hat, x)[0].item()
        told = [part.argmax(1) for part in other(x_hat, ("logit",))["logit"].split(KINDS, 1)]
        values["parts"] = 100 * (torch.stack(told, 1) == parts).float().mean().item()
        for phase, end, tokenizer in ((1, "", one), (2, "_2", two)):
            x_hat = tokenizer.decode_indices(s).clamp(-1, 1)
            mse = ((x_hat - x) / 2).square().mean((1, 2, 3))  # of values in [0, 1]
            values["l1" + end] = (x_hat - x).abs().mean().item()
            values["psnr" + end] = (-10 * mse.log10()).mean().item()
            found = read(folder / f"phase{phase}.json")
            values["fd" + end], values["usage" + end] = found["FD"], 100 * found["usage"]
            values["score" + end] = score(pixels(x_hat), other)
            for name, pair in ar_samples(folder, phase, other).items():
                values[name + end] = statistics.mean(pair)
                values[f"{name}{end}_apart"] = max(pair) - min(pair)
            found = read(folder / f"nar{phase}.json")
            values["nar_fd" + end], values["nar_body" + end] = found["FD"], 100 * found["accuracy"]
        values["explained"] = 100 * share
        values["ar_loss"] = statistics.mean(lowest(folder / p)["loss"] for p in ar_priors(folder))
        values["nar_loss"] = lowest(folder / "nar")["loss"]
        values["gain"] = values["H"] - values["ar_loss"]
        values["nar_gain"] = values["H"] - values["nar_loss"]
        by_context = {kind: context_of(folder, kind) for kind in ("ar", "nar")}
        values["ar_context"] = by_context["ar"][0] - statistics.mean(by_context["ar"])
        values["nar_context"] = by_context["nar"][0] - by_context["nar"][-1]
        values["by_context"] = by_context
        values["ratio"] = values["ar_fd_2"] / values["fd_2"]
        figures[alpha] = values
    return figures


# ------------------------------------------------------------------------------------- tables

def mean_and_spread(values, digits):
    """'0.101 ± 0.004': mean and standard deviation over the seeds; one seed has no spread."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def verdict(before, after, expected, apart=0.0):
    """What the seeds say of "`after` is higher (lower) than `before`", a figure of each in both.

    reproduced: so in every seed; opposite: the other way round in every seed; inconclusive: all
    else, whatever fewer than three seeds say, and a mean difference within `apart`, that of two
    priors of one tokenizer."""
    if not expected:
        return ""
    rises = [b - a if expected == "higher" else a - b for a, b in zip(before, after)]
    if len(rises) < 3:
        return f"{sum(rise > 0 for rise in rises)} of {len(rises)}: inconclusive"
    if abs(statistics.mean(rises)) <= apart:
        return "inconclusive"
    return "reproduced" if min(rises) > 0 else "opposite" if max(rises) < 0 else "inconclusive"


def tables(runs):
    """Both tables and the conditions as Markdown, of what `measure` found, a seed each."""
    names = sorted(set.intersection(*map(set, runs)))
    low, high = names[0], names[-1]

    def get(alpha, name):
        return [figures[alpha][name] for figures in runs]

    def apart(name):  # by how much two priors of one tokenizer differ, on average
        pairs = [figures[a].get(f"{name}_apart", 0.0) for figures in runs for a in (low, high)]
        return statistics.mean(pairs)

    lines = [f"| {len(runs)} seed(s) | " + " | ".join(f"alpha {a:g}" for a in names)
             + " | paper expects | verdict |", "|---|" + "---|" * (len(names) + 2)]
    for name, text, digits, expected in ROWS:
        if name.endswith("_apart") and not any(get(low, name) + get(high, name)):
            continue  # one prior per tokenizer
        columns = " | ".join(mean_and_spread(get(a, name), digits) for a in names)
        found = verdict(get(low, name), get(high, name), expected, apart(name))
        lines.append(f"| {text} | {columns} | {expected} | {found} |")
    lines += ["", f"| the method against its baseline | alpha {low:g}, phase 1 | alpha {high:g}, "
              "phase 2 | paper expects | verdict |", "|---" * 5 + "|"]
    for name, text, digits, expected in METHOD:
        before, after = get(low, name), get(high, name + "_2")
        columns = " | ".join(mean_and_spread(values, digits) for values in (before, after))
        found = verdict(before, after, expected, max(apart(name), apart(name + "_2")))
        lines.append(f"| {text} | {columns} | {expected} | {found} |")
    lines += ["", "| phase 2: the decoder alone | alpha | phase 1 | phase 2 | paper expects | "
              "verdict |", "|---" * 6 + "|"]
    for name, text, digits, expected in PHASES:
        for alpha in (high, low):
            before, after = get(alpha, name), get(alpha, name + "_2")
            columns = " | ".join(mean_and_spread(values, digits) for values in (before, after))
            claim = expected if alpha == high else "(control)"  # the paper claims nothing of low
            found = verdict(before, after, expected)
            lines.append(f"| {text} | {alpha:g} | {columns} | {claim} | {found} |")
    same = all(figures[a]["same_codes"] for figures in runs for a in names)
    lines += [f"| encoder and codebook | all | | {'bitwise unchanged' if same else 'CHANGED'} | "
              f"unchanged | {'reproduced' if same else 'opposite'} |", ""]
    for text, holds in (
            ("L_sem lower at the highest alpha, in the network of the loss",
             lambda f: f[high]["sem"] < f[low]["sem"]),
            ("the same in the independent network",
             lambda f: f[high]["sem_other"] < f[low]["sem_other"]),
            ("FD of AR samples at least 2.5 times FD of reconstructions, phase 2",
             lambda f: min(f[low]["ratio"], f[high]["ratio"]) >= 2.5),
            ("all codes used (99 %)", lambda f: min(f[low]["usage"], f[high]["usage"]) >= 99),
            ("the parts explain at most 15 % of the pixels' variance",
             lambda f: f[high]["explained"] <= 15),
            ("NAR gains from context at least 0.6 of what AR gains",
             lambda f: min(f[a]["nar_context"] / f[a]["ar_context"] for a in (low, high)) >= 0.6)):
        lines.append(f"- condition: {text}: {sum(map(holds, runs))} of {len(runs)} seed(s)")
    return "\n".join(lines) + "\n"


# Tables 1, 5 and 6: folder of ablations.sh -> row, and the paper's rFID and FID of AR samples.
ABLATIONS = {
    "Table 1": {"base": ("baseline", 3.45, 16.97), "conv": ("+Conv x2", 3.22, 17.19),
                "attention": ("+Attention x2", 2.90, 17.42), "long": ("2x training", 3.28, 16.19)},
    "Table 5": {"plain": ("no regularisation", 4.07, 17.19), "kmeans": ("K-means", 3.54, 16.84),
                "factorized": ("factorized, L2-normed", 2.93, 24.91),
                "entropy": ("entropy", 3.45, 16.97)},
    "Table 6": {"base": ("low: five ReLU layers", 3.45, 16.97),
                "A": ("A: low + logit", 3.01, 15.19), "B": ("B: A less relu1_2", 2.93, 14.47),
                "C": ("C: B less relu2_2", 2.81, 14.08), "D": ("D: C less relu3_3", 2.62, 13.34),
                "sem": ("sem: relu5_3 + logit", 2.77, 12.07), "E": ("E: logit alone", 4.65, 17.88)},
}


def ablation_tables(folders):
    """Tables 1, 5 and 6 as Markdown, beside the paper's figures; in a cell a figure of each folder.
    Rows not run in all of them are left out."""
    lines = []
    for title, rows in ABLATIONS.items():
        lines += [f"| {title} | L1 | FD of reconstructions | codes used, % | AR loss (H) | "
                  "FD of AR samples | paper: rFID | paper: FID, AR |", "|---|" + "---|" * 7]
        for name, (text, rfid, fid) in rows.items():
            runs = [Path(folder) / name for folder in folders]
            if not all((run / "ar1.json").exists() for run in runs):  # the last of a row's files
                continue
            found = []
            for run in runs:
                best, rebuilt = lowest(run / "ar"), read(run / "phase1.json")
                found.append((f"{validation(run / 'phase1')[-1]['l1']:.3f}",
                              f"{rebuilt['FD']:.2f}", f"{100 * rebuilt['usage']:.1f}",
                              f"{best['loss']:.2f} ({best['unigram_entropy']:.2f})",
                              f"{read(run / 'ar1.json')['FD']:.2f}"))
            cells = " | ".join(map(", ".join, zip(*found)))
            lines.append(f"| {text} | {cells} | {rfid:.2f} | {fid:.2f} |")
        lines.append("")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- pictures

def sheet(path, rows, scale=3):
    """One PNG of captioned rows: a list of (caption, uint8 images (n, H, W, 3)), all alike."""
    n, h, w = rows[0][1].shape[:3]
    side, gap, left = scale * h, 4, 170
    picture = Image.new("RGB", (left + n * (scale * w + gap), len(rows) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for i, (caption, images) in enumerate(rows):
        at = (left - 8, i * (side + gap) + side // 2)
        pen.text(at, caption, "black", font, anchor="rm", align="right")
        for j, image in enumerate(images.repeat(scale, 1).repeat(scale, 2)):
            picture.paste(Image.fromarray(image), (left + j * (scale * w + gap), i * (side + gap)))
    runtime.save_file(path, lambda file: picture.save(file, "PNG", optimize=True))
    print(f"wrote {path}")


def pixels(images):
    """Float (n, 3, H, W) in [-1, 1] -> uint8 (n, H, W, 3)."""
    return data.to_uint8(images).permute(0, 2, 3, 1).numpy()


def drawn(folder, name, count=10):
    return np.load(folder / name / "samples.npz")["arr_0"][:count]


@torch.no_grad()
def pictures(folders, out):
    """view.png (Figs. 5a and 11), method.png (README), samples.png and phases.png (Fig. 9)."""
    view, method, some, phases = [], [], [], []
    for alpha, folder in folders.items():
        one, two, x, _, s, top1 = load(folder, 10)
        rebuilt, predicted, fine = map(pixels, (one.decode_indices(s), one.decode_indices(top1),
                                                two.decode_indices(s)))
        view = view or [("input", pixels(x))]
        method = method or [("input", pixels(x))]
        view += [(f"alpha {alpha:g}\n{text}", images) for text, images in (
            ("reconstruction", rebuilt), ("AR prediction", predicted), ("phase 2", fine))]
        if alpha in (0, 1):
            method.append((f"alpha {alpha:g}", rebuilt))
        if alpha == 1:
            method += [("alpha 1,\nafter phase 2", fine), ("samples", drawn(folder, "ar2"))]
        some += [(f"alpha {alpha:g}\n{kind}", drawn(folder, name))
                 for kind, name in (("AR", "ar2"), ("NAR", "nar2"))]
        phases += [(f"alpha {alpha:g}\n{text}", drawn(folder, name))
                   for text, name in (("AR, phase 1", "ar1"), ("phase 2", "ar2"))]
    for name, rows in (("view", view), ("method", method), ("samples", some), ("phases", phases)):
        sheet(out / f"{name}.png", rows)


def plotting():
    """Is Matplotlib there? If so, it draws without a screen."""
    try:
        import matplotlib
    except ImportError:
        print("curves need a package: pip install matplotlib")
        return False
    matplotlib.use("Agg")
    return True


def images_seen(run):
    """Training images per step of a run."""
    state = torch.load(Path(run) / "ckpt.pt", map_location="cpu", weights_only=True, mmap=True)
    return state["args"]["batch_size"]


def curves(folders, runs, path):
    """Fig. 10: validation loss against images seen; Fig. 5b: FD against alpha. A line per seed."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, kind in zip(axes, ("ar", "nar")):
        for i, alpha in enumerate(sorted(set.intersection(*map(set, runs)))):
            for j, folder in enumerate(folders):
                run = alphas(folder)[alpha] / kind
                lines, batch = validation(run)[1:], images_seen(run)
                axis.plot([v["step"] * batch for v in lines], [v["loss"] for v in lines], f"C{i}",
                          label=None if j else f"alpha {alpha:g}")
        axis.set(title=f"{kind.upper()} prior", xlabel="images seen", ylabel="validation loss")
        axis.legend()
    for i, (name, text) in enumerate((("fd", "reconstructions"), ("ar_fd", "AR samples"),
                                      ("nar_fd", "NAR samples"))):
        for j, figures in enumerate(runs):
            axes[2].semilogy(list(figures), [values[name] for values in figures.values()],
                             f"C{i}o-", label=None if j else text)
    axes[2].set(title="phase 1: FD against alpha", xlabel="alpha", ylabel="FD")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def context_plot(runs, path):
    """Loss of both priors against the number of known codes. One line per seed."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    titles = {"ar": "AR: position (codes before it)", "nar": "NAR: known codes"}
    for axis, (kind, title) in zip(axes, titles.items()):
        for i, alpha in enumerate(sorted(set.intersection(*map(set, runs)))):
            for j, figures in enumerate(runs):
                axis.plot(figures[alpha]["by_context"][kind], f"C{i}.-",
                          label=None if j else f"alpha {alpha:g}")
        axis.set(title=title, xlabel="number of known codes", ylabel="loss, nats per token")
        axis.legend()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


@torch.no_grad()
def gains(run):
    """{alpha: {name of GAINS: value}} of one run, means over its two AR priors."""
    network, found = losses.load_vgg(f"{run}/classifier/ckpt.pt"), {}
    for alpha, folder in alphas(run).items():
        values = {"ar_loss": [lowest(folder / prior)["loss"] for prior in ar_priors(folder)]}
        values |= {f"{name}_2": of for name, of in ar_samples(folder, 2, network).items()}
        found[alpha] = {name: statistics.mean(of) for name, of in values.items()}
    return found


def clutter(runs, path):
    """What alpha 1 gains over alpha 0, phase 2, against the clutter of the pictures: a line a seed,
    and their table."""
    from matplotlib import pyplot
    found = []  # (clutter, seed, figures)
    for run in runs:
        seed = read(f"{run}/about.json")["command"].split()[0].removeprefix("DEMO_SEED=")
        found.append((float((spec(run) + "=1").split("=")[1]), seed, gains(run)))
    found.sort(key=lambda item: item[:2])
    shares = {amount: explained(f"shapes:clutter={amount}") for amount in {c for c, *_ in found}}
    seeds = {}  # seed: [(clutter, figures)]
    for amount, seed, figures in found:
        seeds.setdefault(seed, []).append((amount, figures))
    figure, axes = pyplot.subplots(1, len(GAINS), figsize=(12, 3), layout="constrained")
    for axis, (name, text, sign) in zip(axes, GAINS):
        axis.axhline(0, color="grey", linewidth=0.8)
        for seed, points in seeds.items():
            rises = [sign * (f[1.0][name] - f[0.0][name]) for _, f in points]
            axis.plot([amount for amount, _ in points], rises, "o-", label=f"seed {seed}")
        axis.set(title=text, xlabel="clutter")
    axes[0].set(ylabel="gain of alpha 1 over alpha 0")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    lines = ["| clutter | seed | parts explain, % | "
             + " | ".join(text for _, text, _ in GAINS) + " |", "|---" * (3 + len(GAINS)) + "|"]
    for amount, seed, f in found:
        cells = [f"{amount:g}", seed, f"{100 * shares[amount]:.0f}"]
        cells += [f"{f[0.0][name]:.4g}, {f[1.0][name]:.4g}" for name, _, _ in GAINS]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines) + f"\nwrote {path}")


def own_curves(runs, path):
    """What runs of one's own logged, against the step: a panel a value, a line a run and split."""
    from matplotlib import pyplot
    names = ("loss", "l1", "perceptual", "psnr", "relu5_3", "logit", "usage", "perplexity",
             "unigram_entropy")
    found = {}
    for run in runs:
        lines = runtime.read_metrics(Path(run) / "metrics.jsonl")
        if not lines:
            raise SystemExit(f"{run} has no metrics.jsonl with anything in it: no run")
        for name in names:
            for split in ("train", "val"):
                points = [(line["step"], line[name]) for line in lines
                          if line["split"] == split and line.get(name) is not None]
                if points:
                    found.setdefault(name, {})[f"{run}, {split}"] = points
    figure, axes = pyplot.subplots(-(-len(found) // 3), 3, figsize=(12, -(-len(found) // 3) * 2.6),
                                   layout="constrained", squeeze=False)
    for axis, (name, curves) in zip(axes.flat, found.items()):
        for label, points in curves.items():
            axis.plot(*zip(*points), ".-" if len(points) < 30 else "-", label=label)
        axis.set(title=name, xlabel="step")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(found):]:
        axis.axis("off")
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of demo.sh, one a seed")
    parser.add_argument("--clutter", nargs="+", help="folders of demo.sh, of more than one clutter")
    parser.add_argument("--curves", nargs="+", help="folders of one's own runs")
    parser.add_argument("--ablations", nargs="+", help="folders of ablations.sh, one a seed")
    parser.add_argument("--out", help="where tables and pictures go; default: the first folder")
    args = parser.parse_args()
    folders = args.curves or args.clutter or args.runs
    if not folders and not args.ablations:
        parser.error("name some runs")
    plots = folders and plotting()
    if (args.curves or args.clutter) and not plots:
        sys.exit(1)
    out = Path(args.out or (args.ablations or folders)[0])
    out.mkdir(parents=True, exist_ok=True)
    if args.curves:
        return own_curves(args.curves, out / "curves.png")
    if args.ablations:
        text = ablation_tables(args.ablations)
        (out / "ablations.md").write_text(text)
        print(text)
    if args.clutter:
        clutter(args.clutter, out / "clutter.png")
    if args.runs:
        runs = [measure(run) for run in args.runs]
        text = tables(runs)
        (out / "table.md").write_text(text)
        print(text)
        table = [read(f"{run}/about.json") | {"alphas": found}
                 for run, found in zip(args.runs, runs)]
        (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
        pictures({alpha: alphas(args.runs[0])[alpha] for alpha in runs[0]
                  if all(alpha in found for found in runs)}, out)
        if plots:
            curves(args.runs, runs, out / "curves.png")
            context_plot(runs, out / "context.png")


if __name__ == "__main__":
    main()
