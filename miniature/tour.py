"""The images of docs/tour.md, from a run of demo.sh with alpha 0 and 1, and from ablations.sh.

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
from miniature import figures  # noqa: E402
from transformer import load_prior, maskgit  # noqa: E402


def enlarge(maps, side):
    """Maps (n, h, w, ...) -> (n, side, side, ...). Each position becomes a square."""
    scale = side // maps.shape[1]
    return maps.repeat(scale, 1).repeat(scale, 2)


def code_map(tokenizer, s, side):
    """Codes s (n, h, w) -> uint8 images (n, side, side, 3). The color of a code is its position on
    the first three principal axes of the codebook."""
    codes = tokenizer.quantizer.codebook_vectors().detach()
    torch.manual_seed(0)
    axes = torch.pca_lowrank(codes, 3, niter=10)[2]
    colors = (codes - codes.mean(0)) @ axes  # (K, 3)
    colors = (255 * (0.5 + colors / (4 * colors.std(0))).clamp(0, 1)).byte().numpy()
    return enlarge(colors[s.numpy()], side)


def receptive_field(dilated, side=16, query=(5, 9)):
    """(side, side) bool: the inputs on which one output of a BlockAttention depends, by its
    gradient."""
    torch.manual_seed(0)
    block = vq.BlockAttention(64, dilated)
    block.norm = nn.Identity()  # its statistics make every output depend on every input
    nn.init.normal_(block.out.weight)
    x = torch.randn(1, 64, side, side, requires_grad=True)
    block(x)[0, :, query[0], query[1]].sum().backward()
    return x.grad[0].abs().sum(0) > 0


def draw_attention(path, cell=20):
    """Which positions block and dilated attention connect, side by side. The query is red."""
    boards = []
    for dilated in (False, True):
        board = Image.new("RGB", (16 * cell + 1, 16 * cell + 1), "white")
        pen = ImageDraw.Draw(board)
        for (y, x), connected in np.ndenumerate(receptive_field(dilated).numpy()):
            fill = "#d62728" if (y, x) == (5, 9) else "#6baed6" if connected else "white"
            pen.rectangle((x * cell, y * cell, (x + 1) * cell, (y + 1) * cell), fill, "#bbbbbb")
        boards.append(np.asarray(board))
    figures.image_sheet(path, [("block (left)\nand dilated\nattention", np.stack(boards))])


@torch.no_grad()
def sampling_frames(prior, tokenizer, labels, seed, **options):
    """Sampling in about ten frames: uint8 (n, frames, H, W, 3). Grey is not sampled yet."""
    known, N = [], prior.length
    # A NAR prior's input at each step shows which codes are known. They do not change any more.
    hook = prior.register_forward_pre_hook(
        lambda _, inputs: known.append(inputs[0] != prior.mask_id))
    torch.manual_seed(seed)
    s = prior.generate(len(labels), labels, **options)
    hook.remove()
    known = known[1:]
    if prior.kind == "ar":
        known = [(torch.arange(N) < n).expand_as(s) for n in range(N // 10, N, N // 10)]
    side = round(N ** 0.5)
    final = figures.to_pixels(tokenizer.decode_indices(s.view(-1, side, side)))
    masks = [enlarge(mask.view(-1, side, side, 1).numpy(), final.shape[1]) for mask in known]
    frames = [np.where(mask, final, np.uint8(200)) for mask in masks]
    return np.stack([*frames, final], 1)


@torch.no_grad()
def completion(prior, tokenizer, s, labels, seed):
    """Images (n, H, W, 3) whose upper half of the codes s (n, h, w) a NAR prior has replaced."""
    tokens = s.flatten(1).clone()
    tokens[:, :prior.length // 2] = prior.mask_id
    torch.manual_seed(seed)
    tokens = maskgit(tokens, lambda t: prior(t, labels), 12, prior.mask_id, choice_temperature=9.0)
    return figures.to_pixels(tokenizer.decode_indices(tokens.view_as(s)))


def plot_usage(folder, path):
    """Codebook usage against the step, with and without the entropy term (rows of Table 5)."""
    figure, (axis,) = figures.subplots(1, 1)
    for name, text in (("entropy", "with the entropy term"), ("plain", "without")):
        lines = figures.validation_lines(Path(folder) / name / "phase1")
        axis.plot([line["step"] for line in lines], [100 * line["usage"] for line in lines], ".-",
                  label=text)
    axis.set(xlabel="step", ylabel="codes in use, %", ylim=(0, 103))
    axis.legend()
    figures.save_plot(figure, path)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of demo.sh with alpha 0 and 1")
    parser.add_argument("--ablations", help="folder of ablations.sh with the rows `entropy` and "
                        "`plain`; writes usage.png; default: none")
    parser.add_argument("--out", default="docs/tour", help="output folder; default: docs/tour")
    args = parser.parse_args()
    out, folders = Path(args.out), figures.alpha_folders(args.run)
    out.mkdir(parents=True, exist_ok=True)
    baseline, _, x, parts, s_baseline, _ = figures.load_alpha(folders[0], 10)
    phase1, phase2, _, _, s, predicted = figures.load_alpha(folders[1], 10)
    inputs, images0, images1, images2, predictions = map(figures.to_pixels, (
        x, baseline.decode_indices(s_baseline), phase1.decode_indices(s), phase2.decode_indices(s),
        phase1.decode_indices(predicted)))
    figures.image_sheet(out / "codes.png", [
        ("input", inputs), ("its codes", code_map(phase1, s, x.shape[-1])),
        ("reconstruction", images2)])
    figures.image_sheet(out / "alpha.png", [
        ("input", inputs), ("alpha 0", images0), ("alpha 1", images1)])
    figures.image_sheet(out / "phases.png", [
        ("input", inputs), ("phase 1", images1), ("phase 2, same codes", images2)])
    correct = enlarge((s == predicted)[..., None].numpy(), x.shape[-1])
    figures.image_sheet(out / "teacher_forced.png", [
        ("input", inputs), ("reconstruction", images1),
        ("AR prediction, given\nthe true codes before", predictions),
        ("correct codes white", np.where(correct, 255, 60).repeat(3, 3).astype(np.uint8))])
    with torch.enable_grad():
        draw_attention(out / "attention.png")
    for kind, options in (("ar", {"top_p": 0.92}), ("nar", {"choice_temperature": 9.0})):
        prior, state = load_prior(folders[1] / kind / "best.pt")
        labels = torch.tensor([0, 2, 5])
        names = [state["classes"][label] for label in labels]
        frames = sampling_frames(prior, phase2, labels, 1, **options)
        figures.image_sheet(out / f"{kind}.png", list(zip(names, frames)))
    lower = images2.copy()  # the last prior of the loop above is the NAR prior
    lower[:, :x.shape[-1] // 2] = 200
    figures.image_sheet(out / "complete.png", [
        ("reconstruction", images2), ("known codes", lower)] + [
        (f"completion {seed + 1}", completion(prior, phase2, s, parts[:, 0], seed))
        for seed in range(3)])
    if args.ablations:
        plot_usage(args.ablations, out / "usage.png")


if __name__ == "__main__":
    main()
