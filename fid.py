"""FID, IS, rFID and codebook usage. Tested to match torch-fidelity and pytorch-fid.

    python fid.py --real imagenet/train --image_size 256 --save train256.npz    # statistics, once
    python fid.py --real train256.npz --fake samples/samples.npz                # FID and IS
    python fid.py --real imagenet/val --tokenizer runs/phase2/ckpt.pt           # rFID, usage
    torchrun --nproc_per_node=8 fid.py ...                                      # on eight GPUs

--real and --fake name a data set, an npz of samples (ADM's: arr_0 uint8 (N, H, W, 3), labels in
arr_1) or a statistics file (an npz with mu and sigma: ours, pytorch-fid's, ADM's). All images pass
through uint8. Features are fp32 (no bf16, no TF32), sums over images float64.
"""
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.models.inception as tv
from torch import nn
from torch.utils.data import Subset

import data
import losses
import runtime
import vq

# TensorFlow's Inception of 2015-12-05 as pytorch-fid converted it; the digits begin its sha256.
WEIGHTS, SHA256 = "pt_inception-2015-12-05-6726825d.pth", "6726825d"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
SPLITS, SHUFFLE_SEED = 10, 2020  # of the Inception Score: torch-fidelity's splits


# ------------------------------------------------------------------------------------ formulas

def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians, |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2);
    float64. tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of the symmetric R^T S2 R,
    for any R with R R^T = S1: real and not negative, even for singular S1 and S2."""
    root, singular = torch.linalg.cholesky_ex(cov1)
    if singular:  # drop the null space: errors of 1e-16 there would enter as square roots, 1e-8
        values, vectors = torch.linalg.eigh(cov1)
        keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        root = vectors[:, keep] * values[keep].sqrt()  # (D, rank)
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return distance.clamp(min=0).item()  # equal Gaussians give +-1e-12


# ------------------------------------------------------------------------------------ networks
# net(uint8 (B, 3, H, W)) -> features (B, feature_dim) and logits (B, num_classes), fp32.

def resize_tf1(images):
    """TensorFlow 1's bilinear resize (torch-fidelity, ADM): uint8 (B, 3, H, W) -> (B, 3, 299, 299)
    in [-1, 1). Output pixel i reads position i * H / 299, without the half pixel that would center
    it: a bug of TensorFlow 1 that is part of the published numbers."""
    x = images.float()
    for dim in (3, 2):  # along each row first, as TensorFlow does
        at = torch.arange(299, device=x.device, dtype=torch.float32) * (x.shape[dim] / 299)
        low = at.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        x_low, x_high = x.index_select(dim, low), x.index_select(dim, high)
        fraction = (at - low).view(-1, *[1] * (3 - dim))  # (299,) in rows, (299, 1) in columns
        x = x_low + (x_high - x_low) * fraction
    return (x - 128) / 128  # 128, as in the 2015 graph, not 127.5; 255 maps to 0.992


class Inception(nn.Module):
    """The Inception of 2015. path: a copy of the published file; None: it is downloaded."""

    name, description, feature_dim, num_classes = "FID", "Inception of 2015", 2048, 1008

    def __init__(self, path, resize):
        super().__init__()
        file = path or os.path.join(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        net = tv.Inception3(1008, aux_logits=False, init_weights=False)
        try:
            if not path:
                runtime.main_first(lambda: losses.download(URL, file, "--inception"))
            net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except (Exception, SystemExit) as error:
            reason = error if isinstance(error, SystemExit) else runtime.describe(error)
            raise SystemExit(f"no Inception from {file}: {reason}. Without it pass --feature_net "
                             f"FILE, a network of train_vgg.py (an FD, not an FID)") from error
        self.resize, self.weights = resize, losses.sha256(file)[:8]
        self.provenance = f"weights {self.weights}, --resize {resize}"
        if self.weights != SHA256:
            runtime.print0(f"warning: {file} is not the published file: do not compare these "
                           f"numbers with a paper's")
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        maximum = nn.MaxPool2d(3, 1, 1)
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):  # torchvision's average of x, and a convolution of it
                # TensorFlow's average pooling excludes padding. The last block takes the maximum,
                # where other Inceptions average: likely a bug of 2015, but FID is defined on it.
                block.pool = maximum if name == "Mixed_7c" else average
                block.pool_conv, block.branch_pool = block.branch_pool, nn.Identity()
                block.forward = lambda x, b=block: torch.cat(
                    [*b._forward(x)[:-1], b.pool_conv(b.pool(x))], 1)
        # IS is defined on logits without the bias: the first code multiplied pool3 by the weights.
        self.register_buffer("head", net.fc.weight.detach())  # (1008, 2048)
        net.fc = nn.Identity()
        self.net = net.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images):
        if self.resize == "tf1":
            x = resize_tf1(images)
        else:  # pytorch-fid's, without antialiasing
            x = F.interpolate(images.float() / 255, (299, 299), mode="bilinear") * 2 - 1
        features = self.net(x.contiguous(memory_format=torch.channels_last))  # pool3
        return features, features @ self.head.T


class SmallVGGFeatures(nn.Module):
    """A network of train_vgg.py instead of Inception, for data far from ImageNet. Features are the
    input of its last layer; logits are those of its first head, the classes. The distance is
    called FD, because it is not an FID."""

    name = "FD"

    def __init__(self, path):
        super().__init__()
        self.net, self.weights = losses.load_vgg(path), losses.sha256(path)[:8]
        self.provenance = f"weights {self.weights}, --resize none"
        self.description = f"features of {path}"
        self.feature_dim = self.net.classifier.in_features
        self.num_classes = self.net.config["num_classes_per_head"][0]

    def forward(self, images):
        found = self.net(data.to_float(images, images.device), ("relu5_3", "logit"))
        return found["relu5_3"].mean((2, 3)), found["logit"][:, :self.num_classes]


# -------------------------------------------------------------------------------- sets of images

class EvalSet(Subset):
    """The images that --real or --fake names. An item is uint8 (3, H, W), label. image_size 0: the
    images as they are, all of the first one's size. Samples (.npz) are never resized or split."""

    def __init__(self, path, image_size, split, count):
        if path.endswith(".npz"):
            image_size, split = 0, None
        self.source = data.open_source(path, split or "train", hold_out=bool(split))
        images = data.EvalImages(self.source, image_size, strict=True)
        super().__init__(images, data.evenly_spaced(len(self.source), count))
        self.classes, self.shape = self.source.classes, None
        self.path = f"{path} ({split})" if split else path
        self.shape = self[0][0].shape
        crop = ", shorter side resized and center crop" if image_size else ""
        self.description = (f"{len(self)} images of {self.path} ({self.shape[2]} x "
                            f"{self.shape[1]}{crop})")

    def __getitem__(self, j):
        image, label = self.dataset[self.indices[j]]
        if self.shape and image.shape != self.shape:
            name = self.source.name(self.indices[j])
            raise data.Unreadable(f"{name!r} has {[*image.shape[1:]]} pixels, not "
                                  f"{[*self.shape[1:]]}: pass --image_size")
        return image, label

    __getitems__ = None  # Subset.__getitems__ would bypass __getitem__


def open_side(path, net, args):
    """What --real or --fake names: the images, or a dict like `compute_statistics`'s if the file
    holds mu and sigma (ADM's references hold images as well). n is 0 if the file has none."""
    if (Path(path) / "samples.npz").exists():  # a folder that sample.py wrote
        path = str(Path(path) / "samples.npz")
    try:
        arrays = np.load(path) if path.endswith(".npz") else {}
        if "mu" not in arrays:
            return EvalSet(path, args.image_size, args.split, args.count)
        mu, sigma = (torch.from_numpy(arrays[key]).double() for key in ("mu", "sigma"))
        n = int(arrays["n"]) if "n" in arrays else 0
        made = str(arrays["made"]) if "made" in arrays else ""
    except Exception as error:
        raise SystemExit(f"{path} can't be measured ({runtime.describe(error)})") from error
    D = net.feature_dim
    if mu.shape != (D,) or sigma.shape != (D, D) or made not in ("", net.provenance):
        raise SystemExit(f"{path}: statistics of {[*sigma.shape]} features ({made}), but this "
                         f"network has {D} ({net.provenance}): compute them again")
    if not made:
        runtime.print0(f"warning: {path} has no provenance: make sure that it was computed with "
                       f"{net.provenance}")
    return {"mu": mu, "sigma": sigma, "n": n, "description": f"statistics {path}"}


@torch.inference_mode()
def compute_statistics(images, net, args, device, tokenizer=None):
    """One pass over the images of an EvalSet, or over a tokenizer's reconstructions of them -> a
    dict. Sums are float64, so that the result does not depend on batches and processes."""
    zeros = partial(torch.zeros, dtype=torch.float64)  # on the host: MPS has no float64
    n, D = len(images), net.feature_dim
    x_sum, xx_sum, correct = zeros(D), zeros(D, D), zeros(1)
    # Sums of p(y|x), and of p log p, in each split
    p_sum, p_log_p_sum = zeros(SPLITS, net.num_classes), zeros(SPLITS)
    K = tokenizer.quantizer.codebook_size if tokenizer else 1
    histogram = torch.zeros(K, dtype=torch.int64, device=device)
    # IS uses ten random splits. If images ordered by class were not shuffled, each split would
    # have a tenth of the classes, and IS would collapse (62 instead of 298).
    position = np.argsort(np.random.RandomState(SHUFFLE_SEED).permutation(n))
    ends = np.arange(1, SPLITS) * n // SPLITS
    split = torch.from_numpy(np.searchsorted(ends, position, side="right"))
    loader = data.eval_loader(images, args.batch_size, args.workers, device)
    progress, done, batches = runtime.Progress(n, every=10), 0, iter(loader)
    for index in loader.batch_sampler:
        try:
            batch, labels = next(batches)
        except data.Unreadable as error:
            raise SystemExit(f"cannot compute a metric: {error}") from error
        batch = batch.to(device, non_blocking=True)
        if tokenizer:
            z_q, codes, _ = tokenizer.encode(data.to_float(batch, device))
            histogram += codes.flatten().bincount(minlength=K)
            batch = data.to_uint8(tokenizer.decode(z_q))
        x, logits = (t.cpu().double() for t in net(batch))
        x_sum += x.sum(0)
        xx_sum += x.T @ x
        log_p, i = logits.log_softmax(1), split[index]
        p_sum.index_add_(0, i, log_p.exp())
        p_log_p_sum.index_add_(0, i, (log_p.exp() * log_p).sum(1))
        correct += (logits.argmax(1) == labels).sum()
        done += len(batch) * runtime.world_size()
        progress.show(f"images of {images.path}", done)
    for total in (x_sum, xx_sum, p_sum, p_log_p_sum, correct, histogram):
        runtime.all_reduce_sum(total)
    description = f"{n} reconstructions of {images.path}" if tokenizer else images.description
    if n < 2:
        raise SystemExit(f"{description}: needs at least two images")
    if n <= D:
        runtime.print0(f"warning: {description}: fewer than the {D} features, so compare only with "
                       f"results of equally many images")
    mu, split_n = x_sum / n, p_sum.sum(1)  # (D,), (10,): one image's p sums to 1
    cov = (xx_sum - n * mu.outer(mu)) / (n - 1)
    # Of each split: exp E_x KL(p(y|x) || p(y)).
    scores = (p_log_p_sum / split_n + torch.special.entr(p_sum / split_n[:, None]).sum(1)).exp()
    return {"mu": mu, "sigma": cov, "n": n, "description": description,
            "IS": scores.mean().item(), "IS_std": scores.std(correction=0).item(),
            "accuracy": correct.item() / n, "histogram": histogram.cpu(),
            "classes": images.classes}


# ---------------------------------------------------------------------------------------- fid.py

def parse(argv):
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--real", required=True, help="the reference: a data set as in the training scripts, an "
        "npz of samples, or an npz of statistics")
    add("--fake", help="the images to evaluate; the same kinds as --real")
    add("--tokenizer", help="evaluate the reconstructions of --real by this checkpoint")
    add("--image_size", type=runtime.at_least(0), default=0,
        help="resize the shorter side to this many pixels and center crop (never an npz); 0: the "
             "tokenizer's size, or without a tokenizer no resizing")
    add("--split", choices=("train", "val"), help="part of the data; default: all of a folder, "
        "train of a data set with splits, the held-out part of the --tokenizer's training data")
    add("--count", type=runtime.positive_int,
        help="number of images of each set, evenly spaced; default: all")
    add("--resize", choices=("tf1", "pytorch"), default="tf1",
        help="resize to 299 pixels as torch-fidelity and ADM (tf1), or as pytorch-fid (pytorch)")
    add("--inception", help=f"a local copy of {WEIGHTS}; default: it is downloaded")
    add("--feature_net", help="use this checkpoint of miniature/train_vgg.py, not Inception; the "
        "distance is then an FD, not an FID")
    add("--save", help="write the statistics of --real to this npz, for later use as --real")
    add("--json", help="write the result, and all that it depends on, to this file")
    add("--batch_size", type=runtime.positive_int, default=64, help="images per batch and process")
    runtime.add_device_flags(add)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    (device, _), tokenizer = runtime.setup(args), None
    net = (SmallVGGFeatures(args.feature_net) if args.feature_net
           else Inception(args.inception, args.resize)).to(device)
    if args.tokenizer:
        tokenizer, saved = vq.load_tokenizer(args.tokenizer, device)
        args.image_size = args.image_size or saved["args"]["image_size"]
        if data.is_training_data(args.real, saved["args"]):
            args.split = args.split or "val"  # not the images that it was trained on
        vgg = Path(saved["args"].get("vgg") or "")
        if vgg.is_file() and losses.sha256(vgg)[:8] == net.weights:
            runtime.print0(f"warning: {args.feature_net} is also the network of the tokenizer's "
                           f"loss: it is not an independent judge")
    real = open_side(args.real, net, args)
    if tokenizer and (args.fake or isinstance(real, dict)):
        raise SystemExit("--tokenizer needs images as --real, and no --fake")
    fake = real if tokenizer else args.fake and open_side(args.fake, net, args)
    if isinstance(real, EvalSet):
        real = compute_statistics(real, net, args, device)
    if isinstance(fake, EvalSet):
        fake = compute_statistics(fake, net, args, device, tokenizer)
    if not runtime.is_main():
        return None

    result = {"real": real["description"], "n_real": real["n"], "weights": net.weights}
    if fake:
        name = "rFID" if tokenizer and net.name == "FID" else net.name
        value = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
        print(f"{name} {value:.2f}")
        numbers = {real["n"], fake["n"]} - {0}
        if len(numbers) > 1 and min(numbers) < 10_000:
            print(f"warning: {name} depends on the numbers of images, {real['n']} and {fake['n']}")
        result |= {"fake": fake["description"], "n_fake": fake["n"], name: value}
    if tokenizer:
        histogram = fake["histogram"]
        usage, perplexity, _ = vq.usage_and_perplexity(histogram)
        result |= {"usage": usage, "perplexity": perplexity}
        print(f"usage {100 * usage:.1f} % ({int((histogram > 0).sum())} of {len(histogram)})\n"
              f"perplexity {perplexity:.1f}")
    elif fake and "IS" in fake and not args.feature_net:
        if fake["n"] < SPLITS:
            print(f"no IS: it needs at least {SPLITS} images")
        else:
            print(f"IS {fake['IS']:.1f} +- {fake['IS_std']:.1f}")
            result |= {"IS": fake["IS"], "IS_std": fake["IS_std"]}
    if args.feature_net and fake and len(fake.get("classes", ())):
        print(f"class accuracy {fake['accuracy']:.2f}: the fraction of images whose label "
              f"--feature_net predicts")
        result["accuracy"] = fake["accuracy"]
    compared = " against ".join(side["description"] for side in (fake, real) if side)
    result["measured"] = f"{compared}; {net.description}, {net.provenance}"
    print(f"measured: {result['measured']}")
    if args.save:
        found = {key: real[key] for key in ("mu", "sigma", "n")} | {"made": net.provenance}
        runtime.save_file(args.save, lambda file: np.savez(file, **found))
    if args.json:
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
        text = json.dumps(result | {"versions": versions, "args": vars(args)}, indent=1)
        runtime.save_file(args.json, lambda file: file.write(text.encode()))
    return result


if __name__ == "__main__":
    runtime.launch(main)
