"""FID, Inception Score and rFID: equal to the published tools, and every number says what was measured.

    python fid.py --real imagenet/train --image_size 256 --save train256.npz  # statistics, once
    python fid.py --real train256.npz --fake runs/prior/samples.npz           # FID and IS of samples
    python fid.py --real imagenet/val --tokenizer runs/tokenizer/ckpt.pt      # rFID, usage, perplexity
    torchrun --nproc_per_node=8 fid.py ...                                    # the same on eight GPUs
    python fid.py --real shapes --image_size 64 --fake samples.npz --features runs/vgg/ckpt.pt  # FD, no FID

A side is a folder of images, `shapes`, `lsun:PATH`, an npz of samples (ADM's: arr_0 uint8 (N, H, W, 3),
labels in arr_1) or a statistics file (an npz with mu and sigma: ours, pytorch-fid's, ADM's). Real and
generated images both pass through uint8. Features are fp32 (no bf16, no TF32), sums over images float64.
"""
import json
import math
import os
import platform
import struct
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.models.inception as tv
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import Dataset

import data
import runtime
from runtime import BadInput

# TensorFlow's Inception of 2015-12-05, converted by pytorch-fid; the name ends in its sha256's first digits.
WEIGHTS, SHA256 = "pt_inception-2015-12-05-6726825d.pth", "6726825d"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
SPLITS, SHUFFLE_SEED = 10, 2020  # of the Inception Score; torch-fidelity's, so that equal images score equal


# -------------------------------------------------------------------------------------------- the two resizes

def resize_tf1(images):
    """TensorFlow 1's bilinear resize (torch-fidelity, ADM): uint8 (B, 3, H, W) -> (B, 3, 299, 299), [-1, 1).

    Output pixel i reads input position i * H / 299, without the half pixel that would centre it. This shifts
    the picture: a slip of TensorFlow 1 that is part of the published numbers."""
    x = images.float()
    for dim in (3, 2):  # along each row first, as TensorFlow does
        at = torch.arange(299, device=x.device, dtype=torch.float32) * (x.shape[dim] / 299)
        low = at.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        part = (at - low).view(-1, *[1] * (3 - dim))  # (299,) along rows, (299, 1) along columns
        x_low = x.index_select(dim, low)
        x = x_low + (x.index_select(dim, high) - x_low) * part
    return (x - 128) / 128  # not 127.5: so does the graph of 2015; 255 becomes 0.992


def resize_pytorch(images):
    """pytorch-fid's resize, without antialiasing: uint8 (B, 3, H, W) -> (B, 3, 299, 299) in [-1, 1]."""
    return 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1


RESIZES = {"tf1": resize_tf1, "pytorch": resize_pytorch}


# -------------------------------------------------------------------------------------------- the networks

def average(x):
    """3x3 average that leaves padding out of its count, as TensorFlow's; torchvision's blocks count it in."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(tv.InceptionA):  # Mixed_5b, 5c, 5d; patched: `average`
    def forward(self, x):
        b5 = self.branch5x5_2(self.branch5x5_1(x))
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b5, b3, self.branch_pool(average(x))], 1)


class BlockC(tv.InceptionC):  # Mixed_6b, 6c, 6d, 6e; patched: `average`
    def forward(self, x):
        b7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        b77 = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        b77 = self.branch7x7dbl_5(self.branch7x7dbl_4(b77))
        return torch.cat([self.branch1x1(x), b7, b77, self.branch_pool(average(x))], 1)


class BlockE(tv.InceptionE):
    """Mixed_7b and 7c; patched: `average` in 7b, the **maximum** in 7c. Other Inceptions average there, so it
    is likely a slip in the graph of 2015; but that graph's features are what FID is defined on."""

    def __init__(self, c_in, pool):
        super().__init__(c_in)
        self.pool = pool

    def forward(self, x):
        b3, b33 = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        b3 = torch.cat([self.branch3x3_2a(b3), self.branch3x3_2b(b3)], 1)
        b33 = torch.cat([self.branch3x3dbl_3a(b33), self.branch3x3dbl_3b(b33)], 1)
        return torch.cat([self.branch1x1(x), b3, b33, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The Inception of 2015. Its `weights` are the first 8 digits of the file's sha256."""

    name, dims, ways, fine = "FID", 2048, 1008, 1

    def __init__(self, path, resize):
        """path: a weight file, or None for the published one. resize: "tf1" or "pytorch"."""
        super().__init__()
        file = Path(path) if path else published_weights()
        if not file.is_file():
            raise BadInput(f"--inception {file}: no such file; leave the flag out to download {WEIGHTS}")
        self.resize, self.weights = resize, runtime.sha256(file)
        stranger = f"{file} is not the published file (its sha256 begins with {self.weights}, not {SHA256})"
        if not path and self.weights != SHA256:
            raise BadInput(f"{stranger}: it is damaged; delete it, and it is downloaded again")
        state = runtime.load_weights(file)
        net = tv.Inception3(num_classes=self.ways, aux_logits=False, init_weights=False)
        net.Mixed_5b, net.Mixed_5c, net.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e = map(BlockC, [768] * 4, [128, 160, 160, 192])
        net.Mixed_7b = BlockE(1280, average)
        net.Mixed_7c = BlockE(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        try:
            if len(state["fc.weight"]) == 1000:
                raise BadInput(f"{file} is torchvision's Inception with ImageNet's 1000 classes: FID is "
                               f"defined on that of 2015, with 1008; give {WEIGHTS}")
            net.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError, AttributeError, IndexError):
            raise BadInput(f"{file} does not have the layout of {WEIGHTS}") from None
        if self.weights != SHA256:
            warn(f"{stranger}: do not compare these numbers with a paper's")
        # IS is defined on logits **without** the bias: the first code multiplied pool3 by the weights alone.
        self.register_buffer("head", net.fc.weight.detach())  # (1008, 2048)
        net.fc = nn.Identity()
        net.requires_grad_(False).eval()
        for conv in [m for m in net.modules() if isinstance(m, tv.BasicConv2d)]:
            # Batch norm has fixed statistics, so it folds into the convolution: features move by 1e-6. With
            # channels last in memory the network then runs at 1.6 times its speed on a CPU.
            conv.conv, conv.bn = fuse_conv_bn_eval(conv.conv, conv.bn), nn.Identity()
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pool3 features (B, 2048) and logits without bias (B, 1008), fp32."""
        x = RESIZES[self.resize](images).contiguous(memory_format=torch.channels_last)
        features = self.net(x)
        return features, features @ self.head.T


def published_weights():
    """Path of the published file in torch.hub's cache; downloaded, once per machine, if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not path.exists() and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"the Inception weights could not be downloaded ({error}): fetch {URL} on another "
                           f"machine and name the copy with --inception") from None
    runtime.barrier()
    return path


class Classifier(nn.Module):
    """A network of train_vgg.py in Inception's place, for data far from ImageNet. Its distance is no FID."""

    resize = "none"  # it takes images of any size

    def __init__(self, path):
        super().__init__()
        import losses  # only here: Inception needs nothing of the tokenizer's code
        self.labels = runtime.load_checkpoint(path, "vgg")["labels"]  # refuses all other files
        self.net, self.weights, self.name = losses.load_vgg(path), runtime.sha256(path), f"FD (features of {path})"
        self.dims, self.ways = self.net.classifier.in_features, self.net.classifier.out_features
        with runtime.refusing(path):  # its labels are class * fine + colour family, or classes (fine 1)
            self.fine = self.labels["fine"]
            if len(self.labels["classes"]) * self.fine != self.ways:
                raise ValueError(f"{self.ways} outputs for {len(self.labels['classes'])} classes")

    def knows(self, source):
        """Whether the labels of `source` are this network's classes (in an npz they have no names)."""
        if isinstance(source, Samples):
            return 0 < len(source.classes) <= len(self.labels["classes"])
        return list(source.classes) == self.labels["classes"]

    def forward(self, images):
        """uint8 (B, 3, H, W) -> penultimate features (B, dims) and logits (B, ways), fp32."""
        out = self.net(data.to_float(images, images.device), ("penultimate", "logit"))
        return out["penultimate"], out["logit"]


# ------------------------------------------------------------------------------------------- sets of images

class Samples:
    """An npz of samples, with what is needed here of a source (data.py). BadInput on any other file.

    np.load would hold all of arr_0 in memory (10 GB for 50,000 of 256 x 256), in each process. np.savez does
    not compress, so an image can be read from its place in the file; a compressed array is loaded whole."""

    def __init__(self, path):
        self.path, self.array = path, None
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
                if damaged := archive.testzip():  # images are read past the checksums below
                    raise ValueError(f"{damaged} is damaged")
                np.lib.format.read_magic(member)
                self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                info, header = archive.getinfo("arr_0.npy"), member.tell()
            if not dtype.hasobject and info.file_size - header != math.prod(self.shape) * dtype.itemsize:
                raise ValueError(f"arr_0 is {info.file_size - header} bytes, too many or too few for {self.shape}")
            with open(path, "rb") as file:
                file.seek(info.header_offset + 26)  # a member begins with 30 bytes, its name, an extra field
                self.offset = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + header
            with np.load(path) as arrays:
                self.labels = arrays.get("arr_1")
                if not dtype.hasobject and (fortran or info.compress_type != zipfile.ZIP_STORED):
                    self.array = arrays["arr_0"]
        except Exception as error:  # a damaged file can raise nearly anything
            raise BadInput(f"{path} holds neither samples (arr_0) nor mu and sigma: {error}") from None
        if dtype.hasobject:
            raise BadInput(f"{path}: arr_0 is pickled Python objects, which can run code: it is not loaded")
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3:
            raise BadInput(f"{path}: arr_0 is {dtype} {self.shape}, but samples are uint8 (N, H, W, 3) in "
                           f"0..255: scale, round and clip them first, as a PNG would")
        if min(self.shape[1:]) < 1:
            raise BadInput(f"{path}: arr_0 is {self.shape}: images without pixels")
        if self.labels is not None and (self.labels.shape != self.shape[:1] or self.labels.dtype.kind not in "iu"):
            raise BadInput(f"{path}: {self.shape[0]} samples, but arr_1, their classes, is {self.labels.dtype} of the "
                           f"shape {self.labels.shape}")
        self.classes = () if self.labels is None else range(int(self.labels.max(initial=0)) + 1)

    def __len__(self):
        return self.shape[0]

    def label(self, i):
        return int(self.labels[i])

    def load(self, i, at_least=0):
        if self.array is not None:
            return Image.fromarray(self.array[i])
        size = int(np.prod(self.shape[1:]))
        pixels = np.fromfile(self.path, np.uint8, size, offset=self.offset + i * size)
        return Image.fromarray(pixels.reshape(self.shape[1:]))


class Images(Dataset):
    """Item j: (uint8 (3, H, W), label or -1, j), or -1 - j for an image that is refused."""

    def __init__(self, path, image_size=0, split="train", n=0):
        """path: what --real or --fake names. image_size 0: images as they are. n 0: all; else n drawn at
        random, always the same (the first n, or every k-th, could be of a few classes only)."""
        npz = path.endswith(".npz")
        self.path, self.source = path, Samples(path) if npz else data.open_source(path, split)
        self.size = 0 if npz else image_size  # samples are never resampled
        self.drawn, total = isinstance(self.source, data.Shapes), len(self.source)
        if self.drawn:
            self.path = f"shapes {split}"
            if not image_size:
                raise BadInput("shapes are drawn at any size: choose it with --image_size")
        if self.size:
            data.check_size(self.source, self.size, path)
        if n > total:
            raise BadInput(f"--n {n}: {path} holds only {total} images")
        self.index = np.sort(np.random.RandomState(0).permutation(total)[:n]) if n else np.arange(total)
        if len(self) < 2:
            raise BadInput(f"{path}: {len(self)} image(s), but a covariance needs two at least")
        self.labelled, self.shape = len(self.source.classes) > 0, None
        self.shape = self.read(0).shape

    def __len__(self):
        return len(self.index)

    def read(self, j):
        """uint8 (3, H, W). BadInput names an image that can't be read or has another size than the first."""
        i = int(self.index[j])
        try:  # shapes are drawn at their size; all else is decoded whole, for the exact pixels
            image = self.source.load(i, self.size if self.drawn else 0)
        except data.Unreadable as error:
            raise BadInput(f"unreadable image {error}: a metric skips none, mend or remove it") from None
        pixels = data.center(image, self.size) if self.size else np.asarray(image)
        pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self.shape and pixels.shape != self.shape:
            raise BadInput(f"{self.source.name(i)} is {image.width} x {image.height}, the first image of "
                           f"{self.path} {self.shape[2]} x {self.shape[1]}: crop them with --image_size")
        return pixels

    def __getitem__(self, j):
        label = self.source.label(int(self.index[j])) if self.labelled else -1
        try:
            return self.read(j), label, j
        except BadInput:  # a worker would add its traceback: the main process reads the image again
            return torch.zeros(self.shape, dtype=torch.uint8), label, -1 - j

    def __str__(self):
        crop = ", shorter side resized to it and centre crop" if self.size and not self.drawn else ""
        return f"{len(self)} images of {self.path} ({self.shape[2]} x {self.shape[1]}{crop})"


# ------------------------------------------------------------------------------------------- statistics

class Gaussian(NamedTuple):
    mean: torch.Tensor  # (D,) float64
    covariance: torch.Tensor  # (D, D) float64
    n: int  # number of images; 0: not known
    words: str  # what they are


class Sums:
    """All that is kept of a set of n images: float64 sums of constant size that add up over processes.

    Of the features x: the sums of x and of x x^T. Of the class probabilities p, in each of the ten splits of
    the Inception Score: the sums of p and of sum_c p_c log p_c. The shuffle is drawn beforehand, so the split
    of an image follows from its index, in whichever batch and process it comes."""

    def __init__(self, n, net, device):
        device = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.net, self.count, self.x, self.xx = net, zeros(1), zeros(net.dims), zeros(net.dims, net.dims)
        self.split_n, self.p, self.p_log_p = zeros(SPLITS), zeros(SPLITS, net.ways), zeros(SPLITS)
        self.hits = zeros(1)
        # Unshuffled, a split of images in order of class has a tenth of them: IS 62 where 298 was right.
        order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(n)).to(device)
        self.split = torch.empty_like(order)
        for k in range(SPLITS):
            self.split[order[k * n // SPLITS:(k + 1) * n // SPLITS]] = k

    def add(self, images, labels, index):
        """images uint8 (B, 3, H, W) on the network's device; labels (B,); index (B,), places in the set."""
        features, logits = (t.to(self.x.device).double() for t in self.net(images))
        self.count += len(features)
        self.x += features.sum(0)
        self.xx += features.T @ features
        split, log_p = self.split[index.to(self.x.device)], logits.log_softmax(1)
        self.split_n += split.bincount(minlength=SPLITS)
        self.p.index_add_(0, split, log_p.exp())
        self.p_log_p.index_add_(0, split, (log_p.exp() * log_p).sum(1))
        self.hits += (logits.argmax(1) // self.net.fine == labels.to(self.x.device)).sum()

    def merge(self, words):
        """Add up over the processes; all of them call it, once. `words` say what the images are."""
        for total in (self.count, self.x, self.xx, self.split_n, self.p, self.p_log_p, self.hits):
            runtime.sum_over_processes(total)
        if not self.xx.isfinite().all():
            raise BadInput(f"the features of {words} are not finite: damaged weights")
        if self.count <= self.net.dims:
            warn(f"{words}: no more than the {self.net.dims} features, so their covariance is singular; the "
                 f"distance is too large, and comparable only with those of as many images")
        self.words = words
        return self

    def gaussian(self):
        """Mean and unbiased covariance (np.cov's)."""
        mean = self.x / self.count
        covariance = (self.xx - self.count * mean.outer(mean)) / (self.count - 1)
        return Gaussian(mean.cpu(), covariance.cpu(), int(self.count), self.words)

    def inception_score(self):
        """exp E_x KL(p(y|x) || p(y)): mean and standard deviation over the splits. Needs ten images."""
        marginal = self.p / self.split_n[:, None]  # (10, 1008): p(y) of each split
        scores = (self.p_log_p / self.split_n + torch.special.entr(marginal).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def frechet(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians, |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2); float64.

    tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of the symmetric R^T S2 R, for any R with
    R R^T = S1: real, not negative even for singular S1 and S2, and faster than a matrix square root."""
    root, singular = torch.linalg.cholesky_ex(cov1)
    if singular:  # leave out the null space, whose rounding errors of 1e-16 would count as their roots, 1e-8
        values, vectors = torch.linalg.eigh(cov1)
        keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        root = vectors[:, keep] * values[keep].sqrt()  # (D, rank)
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return distance.clamp(min=0).item()  # equal Gaussians give +-1e-12


def is_statistics(path):
    """Whether the file holds mu and sigma. (ADM's references hold images too, but mu is of the whole set.)"""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except Exception:  # damaged, or no zip at all: whoever reads it says so
        return False


def load_statistics(path, net):
    """Statistics file -> Gaussian. BadInput if it was made with another network or resize than `net`'s."""
    try:
        with np.load(path) as arrays:
            mean, cov = (torch.from_numpy(np.asarray(arrays[key], np.float64)) for key in ("mu", "sigma"))
            notes = {key: arrays[key].item() for key in ("resize", "weights", "n", "words") if key in arrays}
            notes["n"] = int(notes.get("n", 0))
    except Exception as error:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} can't be read as statistics ({error})") from None
    if mean.shape != (net.dims,) or cov.shape != (net.dims, net.dims):
        raise BadInput(f"{path} holds statistics of {mean.numel()} features, not of {net.dims} as here")
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise BadInput(f"{path}: its mu or sigma are not finite")
    if (cov - cov.T).abs().max() > 1e-6 * cov.abs().max() or (cov.diagonal() < 0).any():
        raise BadInput(f"{path}: its sigma is no covariance (not symmetric, or a variance below 0)")
    for key, ours in (("resize", net.resize), ("weights", net.weights)):
        if notes.get(key, ours) != ours:
            raise BadInput(f"{path} was made with {key} {notes[key]}, not with {ours} as here: make it again")
    if "resize" not in notes:
        warn(f"{path} does not say how it was made; see to it that it was with --resize {net.resize}")
    return Gaussian(mean, cov, notes["n"], f"{path} ({notes.get('words', 'statistics')})")


# ------------------------------------------------------------------------------------------- measuring

@torch.inference_mode()
def measure(images, net, args, device, tokenizer=None):
    """One pass over a set -> its Sums; with a tokenizer also its reconstructions' Sums and the histogram of
    codes (K,). The processes share out whole batches: their number changes only the order of addition."""
    sums = Sums(len(images), net, device)
    if tokenizer:
        rebuilt, K = Sums(len(images), net, device), tokenizer.config["codebook_size"]
        histogram = torch.zeros(K, dtype=torch.int64, device=device)
    loader = data.eval_loader(images, args.batch_size, args.workers, device)
    progress = runtime.Progress(sum(map(len, loader.batch_sampler)), f"images of {images.path}")
    for batch, labels, index in loader:
        if (index < 0).any():
            images.read(-1 - int(index.min()))  # raises again, here without the traceback
            raise BadInput(f"{images.path}: an image could be read at the second try only, check the disk")
        batch = batch.to(device, non_blocking=True)
        sums.add(batch, labels, index)
        if tokenizer:
            z_q, indices, _ = tokenizer.encode(data.to_float(batch, device))
            x_hat = tokenizer.decode(z_q).clamp(-1, 1)
            rebuilt.add(((x_hat + 1) * 127.5).round().to(torch.uint8), labels, index)
            histogram += indices.flatten().bincount(minlength=K)
        progress(len(batch))
    sums.merge(str(images))
    if not tokenizer:
        return sums
    rebuilt.merge(f"{len(images)} reconstructions of {images.path}")
    return sums, rebuilt, runtime.sum_over_processes(histogram)


def warn(sentence):
    if runtime.is_main():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def parse(argv):
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--real", required=True, help="reference: a folder, shapes, lsun:PATH, npz of samples, statistics")
    add("--fake", help="what is judged: likewise")
    add("--tokenizer", help="checkpoint: judge its reconstructions of --real (rFID, usage, perplexity)")
    add("--image_size", type=runtime.side, default=0, help="shorter side to this and centre crop, not "
        "of an npz; default: the tokenizer's, or images as they are, which must then be of one size")
    add("--split", choices=["train", "val"], help="of shapes (default: val with --tokenizer, else train)")
    # torchrun reads the script's flags too, and takes --n for an abbreviation of its own: under it say --count
    add("--n", "--count", type=runtime.count, default=0, help="that many images of each set, drawn at random (0: all)")
    add("--resize", choices=list(RESIZES), help="default tf1 (torch-fidelity, ADM); or pytorch (pytorch-fid)")
    add("--inception", help=f"a local copy of {WEIGHTS} (default: downloaded)")
    add("--features", help="a classifier of train_vgg.py in Inception's place: another distance, no FID")
    add("--save", help="write the statistics of --real to this npz, to be --real later")
    add("--json", help="write the result, and all that it depends on, to this file")
    add("--batch_size", type=runtime.positive, default=64, help="images at a time, per process")
    add("--workers", type=runtime.workers, default=min(8, os.cpu_count()), help="that load data, per process")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the best there is")
    args = parser.parse_args(argv)
    same = args.fake and os.path.realpath(args.real) == os.path.realpath(args.fake)
    no_images = (args.tokenizer or args.save) and is_statistics(args.real)
    lost = [p for p in (args.save, args.json) if p and not Path(p).absolute().parent.is_dir()]
    pictures = [p for p in (args.real, args.fake) if p and not is_statistics(p)]
    bad_save = args.save and (not args.save.endswith(".npz") or Path(args.save).exists())
    for wrong, sentence in (
            (args.fake and args.tokenizer, "--fake and --tokenizer are two questions: ask one at a time"),
            (not (args.fake or args.tokenizer or args.save), "nothing to do: give --fake or --tokenizer"),
            (args.features and (args.inception or args.resize),
             "--features stands in Inception's place: leave out --inception and --resize"),
            (same, f"--real and --fake are both {args.real}: their distance is 0"),
            (args.split and "shapes" not in (args.real, args.fake), "--split is for shapes alone"),
            (not pictures and (args.n or args.image_size),
             "--n and --image_size choose and crop images, but --real and --fake are both statistics"),
            (no_images, f"{args.real} holds statistics, but --tokenizer and --save need images"),
            (lost, f"{', '.join(lost)}: there is no such folder to write to"),
            (bad_save, f"--save {args.save}: give a new file, with a name that ends in .npz")):
        if wrong:
            raise BadInput(sentence)
    return args


def main(argv=None):
    args = parse(argv)
    device = runtime.setup(args.device)
    net = Classifier(args.features) if args.features else Inception(args.inception, args.resize or "tf1")
    net.to(device)
    tokenizer = None
    if args.tokenizer:
        import vq  # only here: FID and IS need nothing of the tokenizer's code
        tokenizer = vq.load_tokenizer(args.tokenizer, device)
        args.image_size = args.image_size or tokenizer.image_size

    def side(path):
        if is_statistics(path):
            return load_statistics(path, net)
        return Images(path, args.image_size, args.split or ("val" if tokenizer else "train"), args.n)

    real, fake = side(args.real), side(args.fake) if args.fake else None  # both, before any work starts
    asked = real if tokenizer else fake  # the set whose labels say what the judged images should show
    if tokenizer:
        for length in real.shape[1:]:
            data.check_image_size(length, tokenizer.f)
        real, fake, histogram = measure(real, net, args, device, tokenizer)
    else:
        if isinstance(real, Images) and isinstance(fake, Images) and real.shape != fake.shape:
            warn(f"images of two sizes are compared: {real}, {fake}")
        real, fake = (measure(s, net, args, device) if isinstance(s, Images) else s for s in (real, fake))
    if not runtime.is_main():
        return None

    g_real, g_fake = (s.gaussian() if isinstance(s, Sums) else s for s in (real, fake))
    result = {"real": g_real.words, "n_real": g_real.n, "resize": net.resize, "weights": net.weights}
    if g_fake:
        name = "rFID" if tokenizer and not args.features else net.name
        value = frechet(g_real.mean, g_real.covariance, g_fake.mean, g_fake.covariance)
        print(f"{name} {value:.2f}")
        result |= {"fake": g_fake.words, "n_fake": g_fake.n, "FD" if args.features else name: value}
    if tokenizer:
        usage, perplexity, _ = vq.usage_and_perplexity(histogram.cpu())
        hit, K = int((histogram > 0).sum()), len(histogram)
        print(f"usage {100 * usage:.1f} % ({hit} of {K})\nperplexity {perplexity:.1f}")
        result |= {"usage": usage, "codes_used": hit, "codebook_size": K, "perplexity": perplexity}
    elif isinstance(fake, Sums) and not args.features and fake.count >= SPLITS:
        mean, deviation = fake.inception_score()
        print(f"IS {mean:.1f} +- {deviation:.1f}")
        result |= {"IS": mean, "IS_std": deviation}
    if args.features and isinstance(fake, Sums) and net.knows(asked.source):
        result["recognised"] = (fake.hits / fake.count).item()
        print(f"recognised {result['recognised']:.2f}")
    eye = f"features of {args.features}" if args.features else f"Inception of 2015, --resize {net.resize}"
    judged = f"{g_fake.words} against " if g_fake else ""
    print(f"measured: {judged}{g_real.words}; {eye}, weights {net.weights}")
    if args.save:  # mu and sigma, as pytorch-fid calls them: it can read the file too
        arrays = {"mu": g_real.mean.numpy(), "sigma": g_real.covariance.numpy(), "n": g_real.n,
                  "words": g_real.words, "resize": net.resize, "weights": net.weights}
        runtime.save_file(args.save, lambda file: np.savez(file, **arrays))
        print(f"saved the statistics of {g_real.words} in {args.save}")
    if args.json:
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
        result |= {"versions": versions | {"python": platform.python_version()}, "args": vars(args)}
        runtime.save_file(args.json, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    return result


if __name__ == "__main__":
    runtime.run(main)
