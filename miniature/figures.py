"""Tables and figures from runs of demo.sh and ablations.sh, and training curves of any run.

    python miniature/figures.py demo                               # one seed: numbers, no verdict
    python miniature/figures.py demo0 demo1 demo2 --out docs       # mean, spread and verdict
    python miniature/figures.py --clutter demo0 demo1 plain0 plain1 --out docs
    python miniature/figures.py --ablations ablations0 ablations1  # Tables 1, 5 and 6 in miniature
    python miniature/figures.py --curves runs/tokenizer runs/prior # training curves

demo.sh leaves a folder with vgg/ (network of the loss), classifier/ (independent network) and one
folder per alpha: phase1/, phase2/, ar/, nar/, their samples and fid.py's JSON files, with
DEMO_SECOND=1 also those of ar_second/ and nar_second/. --clutter does not need the NAR priors.
Plots are skipped if Matplotlib is not installed.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

try:
    import matplotlib
    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot
except ImportError:
    pyplot = None

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402
import vq  # noqa: E402
from miniature.shapes import KINDS  # noqa: E402
from transformer import load_prior  # noqa: E402

CPU = torch.device("cpu")
HELD_OUT = 500  # number of validation images on which reconstructions are measured
# Key, description, digits, and the direction that the paper predicts as alpha rises. A key that
# ends in _2 belongs to phase 2, one that ends in _range is the difference between two priors.
ROWS = [
    ("l1", "L1 of reconstructions", 3, "higher"),
    ("psnr", "PSNR, dB", 2, "lower"),
    ("L_sem", "L_sem of reconstructions, network of the loss", 3, "lower"),
    ("L_sem_independent", "L_sem of reconstructions, independent network", 3, "lower"),
    ("parts", "parts of reconstructions classified correctly, %", 1, "higher"),
    ("fd", "FD of reconstructions", 2, "lower"),
    ("usage", "codes used, %", 1, ""),
    ("unigram_entropy", "unigram entropy of the codes, nats per token", 2, ""),
    ("ar_loss", "AR: validation loss, nats per token", 3, "lower"),
    ("nar_loss", "NAR: validation loss, nats per masked token", 3, "lower"),
    ("ar_improvement", "AR: improvement over the unigram entropy, nats per token", 3, "higher"),
    ("nar_improvement", "NAR: improvement over the unigram entropy, nats per token", 3, "higher"),
    ("ar_context", "AR: loss at the first position minus mean loss, nats", 2, ""),
    ("nar_context", "NAR: loss with no code known minus loss with all but one known, nats", 2, ""),
    ("top1", "AR: teacher-forced top-1 accuracy, %", 1, "higher"),
    ("ar_fd_2", "FD of AR samples, phase 2", 2, "lower"),
    ("ar_fd_2_range", "   difference between two priors", 2, ""),
    ("fd_ratio", "   relative to FD of reconstructions, phase 2", 1, ""),
    ("ar_score_2", "inception score of AR samples over the parts, phase 2", 3, "higher"),
    ("ar_score_2_range", "   difference between two priors", 3, ""),
    ("ar_accuracy_2", "class accuracy of AR samples, phase 2, %", 1, "higher"),
    ("ar_accuracy_2_range", "   difference between two priors", 1, ""),
    ("nar_fd_2", "FD of NAR samples, phase 2", 2, "lower"),
    ("nar_fd_2_range", "   difference between two priors", 2, ""),
    ("nar_score_2", "inception score of NAR samples over the parts, phase 2", 3, "higher"),
    ("nar_score_2_range", "   difference between two priors", 3, ""),
    ("nar_accuracy_2", "class accuracy of NAR samples, phase 2, %", 1, "higher"),
    ("nar_accuracy_2_range", "   difference between two priors", 1, ""),
]
LABELS = {key.removesuffix("_2"): (text.replace(", phase 2", ""), digits)
          for key, text, digits, _ in ROWS}
# Phase 1 (key) against phase 2 (key_2) at one alpha: what the paper predicts for phase 2.
PHASES = {"l1": "lower", "psnr": "higher", "fd": "lower", "ar_fd": "lower", "ar_score": "higher",
          "nar_fd": "lower", "nar_score": "higher"}
# The baseline (alpha 0, only phase 1) against the method (alpha 1, both phases).
METHOD = {"ar_fd": "lower", "ar_score": "higher", "ar_accuracy": "higher",
          "nar_fd": "lower", "nar_score": "higher", "nar_accuracy": "higher"}
CLUTTER = [row for row in ROWS if row[0] in (
    "unigram_entropy", "ar_loss", "ar_improvement", "ar_fd_2", "ar_score_2")]


# ---------------------------------------------------------------------------------- measuring

def read_json(path):
    return json.loads(Path(path).read_text())


def validation_lines(run):
    """The "val" lines of a run's metrics.jsonl."""
    lines = runtime.read_metrics(Path(run) / "metrics.jsonl")
    return [line for line in lines if line["split"] == "val"]


def best_validation(run):
    """The validation line of a prior's best.pt, which has the lowest loss."""
    return min(validation_lines(run), key=lambda line: line["loss"])


def alpha_folders(run):
    """{alpha: folder} of a run of demo.sh, in rising order."""
    return dict(sorted((float(p.name[5:]), p) for p in Path(run).glob("alpha[0-9]*")))


def flags_of(run):
    """The flags with which a run was trained."""
    return torch.load(f"{run}/ckpt.pt", "cpu", weights_only=True, mmap=True)["args"]


def held_out(flags, count=None):
    """Validation images (count, 3, S, S) in [-1, 1], all by default, and the kinds of their parts
    (count, 7). The first part is the label. flags: those of the tokenizer."""
    source = data.open_source(flags["data"], "val")
    images = data.EvalImages(source, flags["image_size"])
    chosen = range(count or len(source))
    x = data.to_float(torch.stack([images[i][0] for i in chosen]), CPU)
    return x, torch.tensor([source.parts(i) for i in chosen])


def variance_explained(x, parts):
    """How much of the pixels' variance a linear regression on the parts explains, from 0 to 1. The
    arguments are what `held_out` returns."""
    x = x.flatten(1).double()
    one_hot = [torch.nn.functional.one_hot(kind, n) for kind, n in zip(parts.T, KINDS)]
    given = torch.cat([*one_hot, torch.ones(len(x), 1)], 1).double()
    fit = 3 * len(x) // 4  # the other images test it
    weights = torch.linalg.lstsq(given[:fit], x[:fit], driver="gelsd").solution
    error = (x[fit:] - given[fit:] @ weights).square().sum()
    return 1 - (error / (x[fit:] - x[:fit].mean(0)).square().sum()).item()


@torch.no_grad()
def load_alpha(folder, count):
    """The tokenizers of both phases at one alpha, validation images and the kinds of their parts,
    their codes s (count, h, w), and the AR prior's teacher-forced top-1 predictions of s."""
    phase1, state = vq.load_tokenizer(folder / "phase1" / "ckpt.pt")
    phase2, _ = vq.load_tokenizer(folder / "phase2" / "ckpt.pt")
    prior, _ = load_prior(folder / "ar" / "best.pt")
    x, parts = held_out(state["args"], count)
    s = phase1.encode(x)[1]
    predicted = prior(s.flatten(1), parts[:, 0]).argmax(-1).view_as(s)
    return phase1, phase2, x, parts, s, predicted


@torch.no_grad()
def losses_by_context(prior, s, labels):
    """Loss in nats per token for each number of known codes, 0 to N - 1. s: (n, N).

    AR: the loss at each position. NAR: the loss of the masked codes if the known ones are chosen at
    random."""
    n, N = s.shape
    if prior.kind == "ar":
        logits = prior(s, labels).transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, s, reduction="none").mean(0).tolist()
    order = torch.rand(n, N, generator=torch.Generator().manual_seed(0)).argsort(1)
    by_context = []
    for known in range(N):
        mask = order >= known
        total, count = prior.loss(prior(s.masked_fill(mask, prior.mask_id), labels), s, mask)
        by_context.append((total / count).item())
    return by_context


def inception_score(images, network):
    """The mean over the parts of exp of the mutual information between an image and its part, by
    the network's softmax of that part. images: uint8 (n, H, W, 3)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    logits = torch.cat([network(data.to_float(batch, CPU), ("logit",))["logit"]
                        for batch in x.split(200)])
    scores = []
    for part in logits.double().split(KINDS, 1):
        log_p = part.log_softmax(1)
        scores.append((log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def load_samples(folder, name, count=None):
    """The first `count` samples (default: all) as uint8 (n, H, W, 3)."""
    return np.load(folder / name / "samples.npz")["arr_0"][:count]


@torch.no_grad()
def measure_priors(folder, kind, network):
    """{key: value} for the priors of one kind at one alpha and their samples, decoded by either
    phase. Each value is the mean over the one or two priors."""
    priors = [kind]
    if (folder / f"{kind}_second2.json").exists():
        priors.append(f"{kind}_second")
    best = [best_validation(folder / prior) for prior in priors]
    H, loss = best[0]["unigram_entropy"], mean(line["loss"] for line in best)
    values = {"unigram_entropy": H, f"{kind}_loss": loss, f"{kind}_improvement": H - loss}
    for phase, suffix in ((1, ""), (2, "_2")):
        metrics = [read_json(folder / f"{prior}{phase}.json") for prior in priors]
        samples = [load_samples(folder, f"{prior}{phase}") for prior in priors]
        for key, per_prior in (
                ("fd", [found["FD"] for found in metrics]),
                ("accuracy", [100 * found["accuracy"] for found in metrics]),
                ("score", [inception_score(images, network) for images in samples])):
            key = f"{kind}_{key}{suffix}"
            values[key] = mean(per_prior)
            if len(priors) > 1:
                values[key + "_range"] = max(per_prior) - min(per_prior)
    return values


@torch.no_grad()
def measure(run):
    """{alpha: {key: value}} of one run, for all tables and plots."""
    results = {}
    vgg, independent = (losses.load_vgg(f"{run}/{name}/ckpt.pt") for name in ("vgg", "classifier"))
    for alpha, folder in alpha_folders(run).items():
        print(f"measuring {folder}", flush=True)
        phase1, phase2, x, parts, s, predicted = load_alpha(folder, HELD_OUT)
        values = (measure_priors(folder, "ar", independent)
                  | measure_priors(folder, "nar", independent))
        values["same_codes"] = vq.fingerprint(phase1) == vq.fingerprint(phase2)
        values["top1"] = 100 * (predicted == s).float().mean().item()
        x_hat = phase1.decode_indices(s)
        for key, network in (("L_sem", vgg), ("L_sem_independent", independent)):
            values[key] = losses.PerceptualLoss(network, alpha=1)(x_hat, x)[0].item()
        logits = independent(x_hat, ("logit",))["logit"].split(KINDS, 1)
        classified = torch.stack([part.argmax(1) for part in logits], 1)
        values["parts"] = 100 * (classified == parts).float().mean().item()
        for phase, suffix, tokenizer in ((1, "", phase1), (2, "_2", phase2)):
            l1, psnr = vq.l1_and_psnr(tokenizer.decode_indices(s), x)
            values["l1" + suffix], values["psnr" + suffix] = l1.item(), psnr.item()
            metrics = read_json(folder / f"phase{phase}.json")
            values["fd" + suffix], values["usage" + suffix] = metrics["FD"], 100 * metrics["usage"]
        values["fd_ratio"] = values["ar_fd_2"] / values["fd_2"]
        x, parts = held_out(flags_of(folder / "phase1"))
        values["variance_explained"] = variance_explained(x, parts)
        s = torch.cat([phase1.encode(batch)[1].flatten(1) for batch in x.split(500)])
        ar, nar = (losses_by_context(load_prior(folder / kind / "best.pt")[0], s, parts[:, 0])
                   for kind in ("ar", "nar"))
        values["loss_by_context"] = {"ar": ar, "nar": nar}
        values["ar_context"] = ar[0] - mean(ar)
        values["nar_context"] = nar[0] - nar[-1]
        results[alpha] = values
    return results


def measure_clutter(run):
    """The clutter and the seed of a run of demo.sh, and {alpha: `measure_priors` of "ar"}."""
    flags, network = flags_of(f"{run}/start"), losses.load_vgg(f"{run}/classifier/ckpt.pt")
    return {"clutter": data.open_source(flags["data"], "val").clutter, "seed": flags["seed"],
            "alphas": {alpha: measure_priors(folder, "ar", network)
                       for alpha, folder in alpha_folders(run).items()}}


# ------------------------------------------------------------------------------------- tables

def mean_and_spread(values, digits):
    """'0.101 ± 0.004': mean and standard deviation over the seeds. One seed has no spread."""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def verdict(before, after, expected, noise=0.0):
    """Do the seeds support that `after` is higher (lower) than `before`? Both are lists over seeds.

    reproduced: every seed does. opposite: every seed shows the reverse. inconclusive: otherwise,
    with fewer than three seeds, or if the mean difference is at most `noise`."""
    if not expected:
        return ""
    differences = [b - a if expected == "higher" else a - b for a, b in zip(before, after)]
    if len(differences) < 3:
        return f"{sum(d > 0 for d in differences)} of {len(differences)}: inconclusive"
    if abs(mean(differences)) <= noise or min(differences) <= 0 <= max(differences):
        return "inconclusive"
    return "reproduced" if min(differences) > 0 else "opposite"


def table(*header):
    """The first two lines of a Markdown table."""
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]


def tables(runs):
    """The tables and conditions as Markdown. runs: what `measure` returned for each seed."""
    alphas = sorted(set.intersection(*map(set, runs)))
    low, high = alphas[0], alphas[-1]

    def get(alpha, key):
        return [results[alpha][key] for results in runs]

    def noise(key):  # mean difference between two priors of one tokenizer
        key += "_range"
        return mean([r[a][key] for r in runs for a in (low, high) if key in r[a]] or [0.0])

    def row(cells, columns, digits, expected, noise, claim):
        cells = [*cells, *(mean_and_spread(values, digits) for values in columns), claim]
        return f"| {' | '.join(cells)} | {verdict(columns[0], columns[-1], expected, noise)} |"

    end = "paper predicts", "verdict"
    lines = table(f"{len(runs)} seed(s)", *(f"alpha {a:g}" for a in alphas), *end)
    for key, text, digits, expected in ROWS:
        if key.endswith("_range") and not all(key in r[a] for r in runs for a in alphas):
            continue  # no second priors
        columns = [get(a, key) for a in alphas]
        lines.append(row([text], columns, digits, expected, noise(key), expected))
    lines += ["", *table("the method against its baseline", f"alpha {low:g}, phase 1",
                         f"alpha {high:g}, phase 2", *end)]
    for key, expected in METHOD.items():
        (text, digits), columns = LABELS[key], [get(low, key), get(high, key + "_2")]
        larger = max(noise(key), noise(key + "_2"))
        lines.append(row([text], columns, digits, expected, larger, expected))
    lines += ["", *table("phase 2 trains only the decoder", "alpha", "phase 1", "phase 2", *end)]
    for key, expected in PHASES.items():
        for alpha in (high, low):  # the paper predicts nothing for `low`
            (text, digits), columns = LABELS[key], [get(alpha, key), get(alpha, key + "_2")]
            claim = expected if alpha == high else "(control)"
            lines.append(row([text, f"{alpha:g}"], columns, digits, expected, 0.0, claim))
    same = all(results[a]["same_codes"] for results in runs for a in alphas)
    lines += [f"| encoder and codebook | all | | {'bitwise unchanged' if same else 'CHANGED'} | "
              f"unchanged | {'reproduced' if same else 'opposite'} |", ""]
    for text, holds in (
            ("L_sem is lower at the highest alpha, network of the loss",
             lambda r: r[high]["L_sem"] < r[low]["L_sem"]),
            ("L_sem is lower at the highest alpha, independent network",
             lambda r: r[high]["L_sem_independent"] < r[low]["L_sem_independent"]),
            ("FD of AR samples is at least 2.5 times FD of reconstructions, phase 2",
             lambda r: min(r[low]["fd_ratio"], r[high]["fd_ratio"]) >= 2.5),
            ("99 % of the codes are used", lambda r: min(r[low]["usage"], r[high]["usage"]) >= 99),
            ("the parts explain at most 15 % of the pixels' variance",
             lambda r: r[high]["variance_explained"] <= 0.15),
            ("the NAR prior gains at least 0.6 times as much from context as the AR prior",
             lambda r: min(r[a]["nar_context"] / r[a]["ar_context"] for a in (low, high)) >= 0.6)):
        lines.append(f"- condition: {text}: {sum(map(holds, runs))} of {len(runs)} seed(s)")
    return "\n".join(lines) + "\n"


def clutter_table(runs):
    """Mean over the seeds at alpha 0 and 1 for each clutter, and the difference in each seed, as
    Markdown. runs: what `measure_clutter` returned, in order of clutter and seed."""
    lines = table("clutter (seeds)", "", "alpha 0", "alpha 1", "alpha 1 - alpha 0, each seed")
    for clutter, same in itertools.groupby(runs, lambda run: run["clutter"]):
        same = list(same)
        seeds = ", ".join(str(run["seed"]) for run in same)
        for key, text, digits, _ in CLUTTER:
            before, after = ([run["alphas"][a][key] for run in same] for a in (0, 1))
            differences = ", ".join(f"{b - a:+.{digits}f}" for a, b in zip(before, after))
            lines.append(f"| {clutter:g} ({seeds}) | {text} | {mean_and_spread(before, digits)} | "
                         f"{mean_and_spread(after, digits)} | {differences} |")
    return "\n".join(lines) + "\n"


# Tables 1, 5 and 6: folder of ablations.sh -> description, the paper's rFID and FID of AR samples.
ABLATIONS = {
    "Table 1": {"entropy": ("baseline", 3.45, 16.97), "conv": ("+Conv x2", 3.22, 17.19),
                "attention": ("+Attention x2", 2.90, 17.42), "long": ("2x training", 3.28, 16.19)},
    "Table 5": {"plain": ("no regularization", 4.07, 17.19),
                "kmeans": ("K-means, once at step 0", 3.54, 16.84),
                "factorized": ("factorized, L2-normalized", 2.93, 24.91),
                "entropy": ("entropy", 3.45, 16.97)},
    "Table 6": {"base": ("low: five ReLU layers", 3.45, 16.97),
                "A": ("A: low + logit", 3.01, 15.19), "B": ("B: A without relu1_2", 2.93, 14.47),
                "C": ("C: B without relu2_2", 2.81, 14.08),
                "D": ("D: C without relu3_3", 2.62, 13.34),
                "sem": ("sem: relu5_3 + logit", 2.77, 12.07), "E": ("E: only logit", 4.65, 17.88)},
}


def ablation_tables(folders):
    """Tables 1, 5 and 6 as Markdown, beside the paper's numbers. Each cell has a number per folder.
    Rows that are not complete in all folders are left out."""
    lines = []
    for title, rows in ABLATIONS.items():
        lines += table(title, "L1", "FD of reconstructions", "codes used, %",
                       "AR loss (unigram entropy), nats per token", "FD of AR samples",
                       "paper: rFID", "paper: FID, AR")
        for name, (text, rfid, fid) in rows.items():
            runs = [Path(folder) / name for folder in folders]
            if not all((run / "ar1.json").exists() for run in runs):  # the last file of a row
                continue
            numbers = []
            for run in runs:
                best, metrics = best_validation(run / "ar"), read_json(run / "phase1.json")
                numbers.append((f"{validation_lines(run / 'phase1')[-1]['l1']:.3f}",
                                f"{metrics['FD']:.2f}", f"{100 * metrics['usage']:.1f}",
                                f"{best['loss']:.2f} ({best['unigram_entropy']:.2f})",
                                f"{read_json(run / 'ar1.json')['FD']:.2f}"))
            cells = " | ".join(map(", ".join, zip(*numbers)))
            lines.append(f"| {text} | {cells} | {rfid:.2f} | {fid:.2f} |")
        lines.append("")
    return "\n".join(lines)


# --------------------------------------------------------------------------- images and plots

def image_sheet(path, rows):
    """Save named rows of at most twenty images, [(name, uint8 (n, H, W, 3)), ...], as one PNG."""
    data.save_grid(path, [(name, torch.as_tensor(images).movedim(3, 1)) for name, images in rows],
                   columns=20)
    print(f"wrote {path}")


def to_pixels(images):
    """Float (n, 3, H, W) in [-1, 1] -> uint8 (n, H, W, 3)."""
    return data.to_uint8(images).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def image_sheets(folders, out):
    """Write view.png (Figs. 5a and 11), method.png (README), samples.png and phases.png (Fig. 9).
    folders: {alpha: folder}."""
    view, method, samples, phases = [], [], [], []
    for alpha, folder in folders.items():
        phase1, phase2, x, _, s, predicted = load_alpha(folder, 10)
        inputs = [("input", to_pixels(x))]
        images1, images2, prediction = map(to_pixels, (
            phase1.decode_indices(s), phase2.decode_indices(s), phase1.decode_indices(predicted)))
        ar1, ar2, nar2 = (load_samples(folder, name, 10) for name in ("ar1", "ar2", "nar2"))
        title = f"alpha {alpha:g}"
        view = (view or inputs) + [(f"{title}\nreconstruction", images1),
                                   (f"{title}\nAR prediction", prediction),
                                   (f"{title}\nphase 2", images2)]
        if alpha in (0, 1):
            method = (method or inputs) + [(title, images1)]
        if alpha == 1:
            method += [("alpha 1,\nafter phase 2", images2), ("samples", ar2)]
        samples += [(f"{title}\nAR", ar2), (f"{title}\nNAR", nar2)]
        phases += [(f"{title}\nAR, phase 1", ar1), (f"{title}\nphase 2", ar2)]
    sheets = {"view": view, "method": method, "samples": samples, "phases": phases}
    for name, rows in sheets.items():
        image_sheet(out / f"{name}.png", rows)


def subplots(count, columns, **options):
    """A figure and its `count` axes."""
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, layout="constrained", squeeze=False,
                                   figsize=(4 * columns, 3 * rows), **options)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def save_plot(figure, path):
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def plot_priors(folders, runs, out):
    """Write curves.png: validation loss against images seen (Fig. 10), FD against alpha (Fig. 5b);
    and context.png: loss against the number of known codes. One line per seed."""
    figure, axes = subplots(3, 3)
    context_figure, context_axes = subplots(2, 2, sharey=True)
    unit = "nats per (masked) token"
    for axis, context_axis, kind in zip(axes, context_axes, ("ar", "nar")):
        for i, alpha in enumerate(sorted(set.intersection(*map(set, runs)))):
            for j, (folder, results) in enumerate(zip(folders, runs)):
                run = alpha_folders(folder)[alpha] / kind
                lines, batch_size = validation_lines(run)[1:], flags_of(run)["batch_size"]
                label = None if j else f"alpha {alpha:g}"
                axis.plot([line["step"] * batch_size for line in lines],
                          [line["loss"] for line in lines], f"C{i}", label=label)
                context_axis.plot(results[alpha]["loss_by_context"][kind], f"C{i}.-", label=label)
        for shown, xlabel in ((axis, "images seen"), (context_axis, "number of known codes")):
            shown.set(title=f"{kind.upper()} prior: validation loss", xlabel=xlabel, ylabel=unit)
            shown.legend()
    for i, key in enumerate(("fd", "ar_fd", "nar_fd")):
        for j, results in enumerate(runs):
            axes[2].semilogy(list(results), [values[key] for values in results.values()],
                             f"C{i}o-", label=None if j else LABELS[key][0])
    axes[2].set(title="phase 1", xlabel="alpha", ylabel="FD")
    axes[2].legend()
    save_plot(figure, out / "curves.png")
    save_plot(context_figure, out / "context.png")


def plot_clutter(runs, path):
    """How much better alpha 1 is than alpha 0, against clutter. One line per seed."""
    rows = [row for row in CLUTTER if row[3]]
    figure, axes = subplots(len(rows), 2)
    for axis, (key, text, _, expected) in zip(axes, rows):
        sign = 1 if expected == "higher" else -1
        axis.axhline(0, color="grey", linewidth=0.8)
        for seed in sorted({run["seed"] for run in runs}):
            points = [(run["clutter"], sign * (run["alphas"][1][key] - run["alphas"][0][key]))
                      for run in runs if run["seed"] == seed]
            axis.plot(*zip(*points), "o-", label=f"seed {seed}")
        axis.set(xlabel="clutter", ylabel="improvement by alpha 1")
        axis.set_title(text.replace(", ", "\n", 1), fontsize=10)
    axes[0].legend()
    save_plot(figure, path)


# Panels of --curves: title, unit, and one or two values that the component logs.
CURVES = {
    "tokenizer": [
        ("tokenizer: loss (Eq. 2)", "weighted sum", "loss"),
        ("L1 (pixels in [-1, 1])", "mean |difference|", "l1"),
        ("PSNR", "dB", "psnr"),
        ("perceptual loss (Eq. 4, --alpha)", "squared feature difference", "perceptual"),
        ("terms of L_sem", "squared feature difference", "relu5_3", "logit"),
        ("L_low (Eq. 4)", "squared feature difference", "L_low"),
        ("L_sem (Eq. 4)", "squared feature difference", "L_sem"),
        ("discriminator", "logit", "real_logit", "fake_logit"),
        ("codebook usage", "fraction of codes", "usage"),
        ("perplexity of the codes", "codes", "perplexity"),
        ("entropy of the soft code usage", "nats", "soft_entropy")],
    "prior": [
        ("prior: loss", "nats per (masked) token", "loss"),
        ("loss with little and much context", "nats per (masked) token",
         "loss_little_context", "loss_much_context"),
        ("unigram entropy of the codes", "nats per token", "unigram_entropy")],
    "classifier": [
        ("classifier: loss", "nats per image", "loss"), ("accuracy", "fraction", "accuracy")],
}


def plot_training(runs, path):
    """What runs of any component logged, against the step. One color per run. Validation has dots;
    the second value of a panel is dashed."""
    panels = {}  # (title, unit): [(points, color and style, label)]
    for i, run in enumerate(runs):
        lines = runtime.read_metrics(Path(run) / "metrics.jsonl")
        if not lines:
            raise SystemExit(f"{run}/metrics.jsonl is missing or empty")
        logged = set().union(*lines)
        component = ("prior" if "unigram_entropy" in logged else
                     "tokenizer" if "l1" in logged else "classifier")
        for title, unit, *keys in CURVES[component]:
            for (key, style), split in itertools.product(zip(keys, ("-", "--")), ("train", "val")):
                points = [(line["step"], line[key]) for line in lines
                          if line["split"] == split and line.get(key) is not None]
                if points:
                    color_and_style = f"C{i}{'.' if split == 'val' else ''}{style}"
                    label = f"{run} {split} {key}" if len(keys) > 1 else f"{run} {split}"
                    panels.setdefault((title, unit), []).append((points, color_and_style, label))
    figure, axes = subplots(len(panels), 3)
    for axis, ((title, unit), curves) in zip(axes, panels.items()):
        for points, color_and_style, label in curves:
            axis.plot(*zip(*points), color_and_style, label=label, linewidth=1)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend(fontsize=6)
    save_plot(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", help="folders of demo.sh, one per seed; writes table.md, table.json, "
        "image sheets and plots")
    add("--clutter", nargs="+", metavar="RUN", help="folders of demo.sh with several values of "
        "DEMO_CLUTTER, alpha 0 and 1; writes clutter.md, clutter.json and clutter.png")
    add("--ablations", nargs="+", metavar="FOLDER",
        help="folders of ablations.sh, one per seed; writes ablations.md")
    add("--curves", nargs="+", metavar="RUN", help="run folders of any script; writes curves.png")
    add("--out", help="output folder; default: the first folder given")
    args = parser.parse_args()
    folders = args.curves or args.clutter or args.ablations or args.runs
    if not folders:
        parser.error("no run folder given")
    if pyplot is None:
        print("plots need Matplotlib: pip install matplotlib")
        if args.curves:
            sys.exit(1)
    out = Path(args.out or folders[0])
    out.mkdir(parents=True, exist_ok=True)
    if args.curves:
        return plot_training(args.curves, out / "curves.png")
    if args.ablations:
        name, text = "ablations.md", ablation_tables(args.ablations)
    elif args.clutter:
        runs = sorted(map(measure_clutter, args.clutter), key=lambda r: (r["clutter"], r["seed"]))
        name, text = "clutter.md", clutter_table(runs)
        (out / "clutter.json").write_text(json.dumps(runs, indent=1) + "\n")
        if pyplot:
            plot_clutter(runs, out / "clutter.png")
    else:
        runs = [measure(run) for run in args.runs]
        name, text = "table.md", tables(runs)
        measured = [read_json(f"{run}/about.json") | {"alphas": results}
                    for run, results in zip(args.runs, runs)]
        (out / "table.json").write_text(json.dumps(measured, indent=1) + "\n")
        image_sheets(alpha_folders(args.runs[0]), out)
        if pyplot:
            plot_priors(args.runs, runs, out)
    (out / name).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
