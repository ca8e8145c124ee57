"""Train a small VGG-shaped classifier: a perceptual network for data far from ImageNet.

    python miniature/train_vgg.py --data birds --image_size 64

Its ckpt.pt is for `train_tokenizer.py --vgg` and `fid.py --feature_net`. The network learns the
classes, or for `shapes` the kinds of all parts, with one softmax per part. Its inputs are blurred,
faded, noisy and adversarially perturbed, so that networks of different seeds agree on
reconstructions. The script runs in one process.
"""
import argparse
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402


def parse():
    parser = runtime.parser(__doc__)
    runtime.add_training_flags(parser, out="runs/vgg", iters=1500, batch_size=64, lr=2e-3,
                               image_size=64, log_every=100)
    parser.add_argument("--widths", type=runtime.positive_int, nargs=5,
                        default=[16, 32, 64, 96, 128], help="channels of each stage")
    parser.add_argument("--fgsm_eps", type=runtime.at_least(0, float), default=0.05,
                        help="final epsilon of FGSM, for images in [-1, 1]. Each batch is used a "
                             "second time with an adversarial perturbation; otherwise decoders "
                             "learn patterns that deceive the network. 0: off, for classes with "
                             "few images")
    given, defaults = runtime.parse_flags(parser)
    saved = runtime.resumed_flags(given, defaults, "vgg")
    return argparse.Namespace(**defaults | saved | given)


def perturb(x, generator):
    """Imitate the errors of reconstructions: blur half of the images, reduce color and contrast,
    add blotches and noise. x (B, 3, S, S) in [-1, 1] -> the same shape, not clamped."""
    def uniform():
        return torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)

    def normal(side):
        return torch.randn(len(x), 3, side, side, generator=generator).to(x.device)

    sigma = 0.5 + 1.5 * torch.rand((), generator=generator).item()
    x = torch.where(uniform() < 0.5, x, TF.gaussian_blur(x, [5, 5], [sigma, sigma]))
    x = torch.lerp(x.mean(1, keepdim=True), x, 0.3 + 0.7 * uniform())  # from grey to full color
    x = x * (0.7 + 0.5 * uniform())
    blotches = F.interpolate(normal(8), x.shape[2:], mode="bilinear")
    return x + blotches * 0.3 * uniform() + normal(x.shape[2]) * 0.3 * uniform()


def cross_entropy(logits, labels, kinds, **options):
    """logits (B, sum(kinds)), labels (B,) -> cross-entropy, summed over the softmaxes, and the
    accuracy of each softmax, (len(kinds),)."""
    parts = list(zip(logits.float().split(kinds, 1), torch.unravel_index(labels, kinds)))
    right = torch.stack([(part.argmax(1) == y).float().mean() for part, y in parts])
    return sum(F.cross_entropy(part, y, **options) for part, y in parts), right


def validate(net, val, run, args, device):
    """Cross-entropy, mean accuracy and the accuracy of each softmax, on the validation set."""
    loss = right = n = 0
    images = data.EvalImages(val, args.image_size)
    batches = data.eval_loader(images, 200, 0, device, 5000)
    for batch, labels in data.until_unreadable(batches, run):
        with runtime.eval_mode(net, device, "fp32"):
            logits = net(data.to_float(batch, device), ("logit",))["logit"]
        terms = cross_entropy(logits, labels.to(device), net.config["num_classes_per_head"])
        n += len(batch)
        loss, right = (total + len(batch) * term for total, term in zip((loss, right), terms))
    if run.error:
        return {"loss": torch.tensor(torch.nan)}
    each = {f"accuracy_{i}": share for i, share in enumerate((right / n).tolist())}
    return {"loss": loss / n, "accuracy": right.mean() / n} | each


def measure_scale(net, batches, device):
    """Set layer_scale, by which the perceptual loss divides each layer: the variance over training
    images, averaged over the layer's features."""
    n, sums, squares = 0, [0] * len(losses.LAYERS), [0] * len(losses.LAYERS)
    for images, _ in batches:
        with runtime.eval_mode(net, device, "fp32"):
            features = net(data.to_float(images, device), losses.LAYERS)
        n += len(images)
        for i, f in enumerate(features.values()):
            f = f.cpu().double()  # MPS has no float64
            sums[i] = sums[i] + f.sum(0)
            squares[i] = squares[i] + f.square().sum(0)
    variance = [(b / n - (a / n).square()).mean() for a, b in zip(sums, squares)]
    if variance[-2] <= 1e-9 * squares[-2].mean() / n:  # relu5_3's is zero, up to rounding
        raise SystemExit("all training images have the same features, so there is no variance to "
                         "scale the perceptual loss by. Are the images equal?")
    net.layer_scale.copy_(torch.stack(variance))


def main():
    args = parse()
    device, compiled = runtime.setup(args)
    if runtime.world_size() > 1:
        raise SystemExit("train_vgg.py runs in one process: start it with python, not torchrun")
    run = runtime.Run(args, "vgg", shown=("loss", "accuracy", "skipped"))
    source, val = data.open_data(args, labels=True)
    if len(source.classes) < 2:
        raise SystemExit(f"--data {args.data} has no classes, or one: a classifier needs a folder "
                         f"of class folders, or torchvision:NAME")
    source.fine = val.fine = True  # labels of `shapes` are those of all parts; others ignore it
    kinds = getattr(source, "kinds", [len(source.classes)])
    torch.manual_seed(args.seed)
    net = losses.SmallVGG(args.widths, kinds).to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
    constants = {"config": net.config, "classes": list(source.classes),
                 "content": data.content_hash(source)}
    start, _ = run.resume(constants, model=net, opt=opt)
    if compiled:
        net.compile(dynamic=False)

    stream = data.TrainImages(source, args.image_size, args.crop, args.seed)
    batches = data.until_unreadable(data.train_loader(stream, args, start, device), run)
    scale_images = data.EvalImages(source, args.image_size)
    scale_batches = data.eval_loader(scale_images, 64, 0, device, 1024)
    averages = runtime.Averages()

    micro_batches = list(islice(batches, args.grad_accum))
    for step in range(start, args.iters + 1):
        run.stop_if_requested(step)
        if run.validation_is_due(step):
            values = validate(net, val, run, args, device)
            run.log(step, "val", **values)
            if not run.error:
                measure_scale(net, scale_batches, device)
            run.validated = step
            run.save(step, loss=float(values["loss"]))
        if step == args.iters:
            break

        batch = []
        for a, (x, y) in enumerate(micro_batches):
            x, y = data.to_float(x, device), y.to(device, non_blocking=True)
            generator = torch.Generator().manual_seed(runtime.mix_seeds(args.seed, step, a))
            batch.append((perturb(x, generator).requires_grad_(args.fgsm_eps > 0), y))
        for attacked in (False, True) if args.fgsm_eps else (False,):
            if attacked:  # FGSM; epsilon rises from 0
                size = args.fgsm_eps * step / args.iters
                batch = [((x + size * x.grad.sign()).detach(), y) for x, y in batch]
            buffers = [buffer.clone() for buffer in net.buffers()]
            for x, y in batch:
                with runtime.autocast(device, args.dtype):
                    logits = net(x, ("logit",))["logit"]
                loss, right = cross_entropy(logits, y, kinds, label_smoothing=0.1)
                (loss / args.grad_accum).backward()
                averages.add(loss=loss, accuracy=right.mean())
            run.step([opt], runtime.cosine(step, args.iters, args.lr, 0))
            if run.skipped_in_a_row:  # the running statistics of batch norm may hold NaN
                for buffer, before in zip(net.buffers(), buffers):
                    buffer.copy_(before)
        if run.due(step + 1, args.log_every):
            run.log(step + 1, "train", skipped=run.skipped, **averages.pop())
        micro_batches = list(islice(batches, args.grad_accum))


if __name__ == "__main__":
    runtime.launch(main)
