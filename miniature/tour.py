"""The pictures of docs/tour.md, from a run of demo.sh with alpha 0 and 1, and from ablations.sh.

    python miniature/tour.py demo --ablations ablations
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parent.parent))

import vq  # noqa: E402
from miniature.figures import alphas, load, pixels, sheet, validation  # noqa: E402
from transformer import load_prior  # noqa: E402


def enlarge(maps, side):
    """Maps of codes (n, h, w, ...) as (n, side, side, ...): a square for each code."""
    scale = side // maps.shape[1]
    return maps.repeat(scale, 1).repeat(scale, 2)


def code_map(tokenizer, s, side):
    """Codes s (n, h, w) as images: a code's colour is its place on the codebook's first three
    principal axes."""
    codes = tokenizer.quantizer.codebook_vectors().detach()
    torch.manual_seed(0)
    axes = torch.pca_lowrank(codes, 3, niter=10)[2]
    colours = (codes - codes.mean(0)) @ axes  # (K, 3)
    colours = (255 * (0.5 + colours / (4 * colours.std(0))).clamp(0, 1)).byte().numpy()
    return enlarge(colours[s.numpy()], side)


def attended(dilated, side=16, at=(5, 9)):
    """(side, side) bool: what one output of a BlockAttention depends on, by its gradient."""
    torch.manual_seed(0)
    block = vq.BlockAttention(64, dilated)
    block.norm = nn.Identity()  # its statistics depend on every position a little
    nn.init.normal_(block.out.weight)
    x = torch.randn(1, 64, side, side, requires_grad=True)
    block(x)[0, :, at[0], at[1]].sum().backward()
    return x.grad[0].abs().sum(0) > 0


def attention(path, cell=20):
    """What block and dilated attention connect, side by side; the query is red."""
    boards = []
    for dilated in (False, True):
        board = Image.new("RGB", (16 * cell + 1, 16 * cell + 1), "white")
        pen = ImageDraw.Draw(board)
        for (y, x), connected in np.ndenumerate(attended(dilated).numpy()):
            fill = "#d62728" if (y, x) == (5, 9) else "#6baed6" if connected else "white"
            pen.rectangle((x * cell, y * cell, (x + 1) * cell, (y + 1) * cell), fill, "#bbbbbb")
        boards.append(np.asarray(board))
    sheet(path, [("block (left)\nand dilated\nattention", np.stack(boards))], 1)


@torch.no_grad()
def drawing(prior, tokenizer, labels, seed, **options):
    """Samples as they are drawn, in about ten frames; grey is not drawn yet."""
    known, N = [], prior.length
    # What a NAR prior's forward pass is given at each step; codes that are known stay.
    hook = prior.register_forward_pre_hook(
        lambda _, inputs: known.append(inputs[0] != prior.mask_id))
    torch.manual_seed(seed)
    s = prior.generate(len(labels), labels, **options)
    hook.remove()
    known = known[1:]
    if prior.kind == "ar":
        known = [(torch.arange(N) < n).expand_as(s) for n in range(N // 10, N, N // 10)]
    side = round(N ** 0.5)
    final = pixels(tokenizer.decode_indices(s.view(-1, side, side)))
    shown = [enlarge(mask.view(-1, side, side, 1).numpy(), final.shape[1]) for mask in known]
    frames = [np.where(mask, final, np.uint8(200)) for mask in shown]
    return np.stack([*frames, final], 1)  # (n, frames, H, W, 3)


def usage(folder, path):
    """Codes in use against step, with the entropy term and without (Table 5's rows)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for name, text in (("entropy", "with the entropy term"), ("plain", "without")):
        lines = validation(Path(folder) / name / "phase1")
        axis.plot([v["step"] for v in lines], [100 * v["usage"] for v in lines], ".-", label=text)
    axis.set(xlabel="step", ylabel="codes in use, %", ylim=(0, 103))
    axis.legend()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of demo.sh")
    parser.add_argument("--ablations", help="folder of ablations.sh")
    parser.add_argument("--out", default="docs/tour", help="where the pictures go")
    args = parser.parse_args()
    out, found = Path(args.out), alphas(args.run)
    out.mkdir(parents=True, exist_ok=True)
    zero, _, x, _, s_zero, _ = load(found[0], 10)
    one, two, _, _, s, top1 = load(found[1], 10)
    given, rebuilt = pixels(x), pixels(one.decode_indices(s))
    fine, predicted = pixels(two.decode_indices(s)), pixels(one.decode_indices(top1))
    sheet(out / "codes.png", [("input", given), ("its codes", code_map(one, s, x.shape[-1])),
                              ("reconstruction", fine)])
    sheet(out / "alpha.png", [("input", given), ("alpha 0", pixels(zero.decode_indices(s_zero))),
                              ("alpha 1", rebuilt)])
    sheet(out / "phases.png", [("input", given), ("phase 1", rebuilt),
                               ("phase 2, same codes", fine)])
    right = enlarge((s == top1)[..., None].numpy(), x.shape[-1])
    sheet(out / "teacher_forced.png", [
        ("input", given), ("reconstruction", rebuilt),
        ("AR prediction, given\nthe true codes before", predicted),
        ("correct codes white", np.where(right, 255, 60).repeat(3, 3).astype(np.uint8))])
    with torch.enable_grad():
        attention(out / "attention.png")
    for kind, options in (("ar", {"top_p": 0.92}), ("nar", {"choice_temperature": 9.0})):
        prior, state = load_prior(found[1] / kind / "best.pt")
        picks = torch.tensor([0, 2, 5])
        names = [state["classes"][label] for label in picks]
        sheet(out / f"{kind}.png", list(zip(names, drawing(prior, two, picks, 1, **options))))
    if args.ablations:
        usage(args.ablations, out / "usage.png")


if __name__ == "__main__":
    main()
