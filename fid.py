"""The numbers that papers quote, equal to the published tools' (tested); every number says what was measured.

    python fid.py --real imagenet/train --image_size 256 --save train256.npz  # statistics, once
    python fid.py --real train256.npz --fake samples/samples.npz              # FID and IS of samples
    python fid.py --real imagenet/train --fake samples/samples.npz --full     # and sFID, precision, recall
    python fid.py --real imagenet/val --tokenizer runs/tokenizer/ckpt.pt      # rFID, PSNR, SSIM, usage, perplexity
    torchrun --nproc_per_node=8 fid.py ...                                    # the same on eight GPUs
    python fid.py --real shapes --image_size 64 --fake samples.npz --features runs/vgg/ckpt.pt  # FD, no FID

--real and --fake name a folder of images, `shapes`, `lsun:PATH`, an npz of samples (ADM's: arr_0 uint8 (N, H, W, 3),
labels in arr_1) or a statistics file (an npz with mu and sigma: ours, pytorch-fid's, ADM's). Real and generated images
both pass through uint8. Features are fp32 (no bf16, no TF32), sums over images float64.
"""
import difflib
import json
import os
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.models.inception as tv
from PIL import Image
from torch import nn

import data
import runtime
from metrics import NEIGHBOURS, WINDOW, frechet, precision_recall, psnr_ssim
from runtime import BadInput

# TensorFlow's Inception of 2015-12-05, converted by pytorch-fid; the name ends in its sha256's first digits.
WEIGHTS, SHA256 = "pt_inception-2015-12-05-6726825d.pth", "6726825d"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
SPLITS, SHUFFLE_SEED = 10, 2020  # of the Inception Score; torch-fidelity's, so that equal images score equal
REAL, FAKE = 10_000, 50_000  # of precision and recall: the most images of each side, as ADM has them
KEYS = "mu", "sigma", "n", "description", "resize", "weights"  # of a statistics file; pytorch-fid's has the first two
FULL = "mu_s", "sigma_s", "features"  # and with --full; ADM's has the first two, and images


def resize_tf1(images):
    """TensorFlow 1's bilinear resize (torch-fidelity, ADM): uint8 (B, 3, H, W) -> (B, 3, 299, 299) in [-1, 1).
    Output pixel i reads position i * H / 299, without the half pixel that would centre it: a slip of TensorFlow 1 that
    is part of the published numbers."""
    x = images.float()
    for dim in (3, 2):  # along each row first, as TensorFlow does
        at = torch.arange(299, device=x.device, dtype=torch.float32) * (x.shape[dim] / 299)
        low = at.long()
        x_low, x_high = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1))
        x = x_low + (x_high - x_low) * (at - low).view(-1, *[1] * (3 - dim))  # (299,) in rows, (299, 1) in columns
    return (x - 128) / 128  # not 127.5: so does the graph of 2015; 255 becomes 0.992


class Inception(nn.Module):
    """The Inception of 2015, from a file in the published layout, or from the published one (path None)."""

    def __init__(self, path, resize):
        super().__init__()
        if not path:
            path = os.path.join(torch.hub.get_dir(), "checkpoints", WEIGHTS)
            with runtime.explain(f"no download: fetch {URL} elsewhere and name the copy with --inception: ", Exception):
                runtime.main_first(lambda: os.path.exists(path) or torch.hub.load_state_dict_from_url(
                    URL, map_location="cpu", weights_only=True, check_hash=True))
        net = tv.Inception3(1008, aux_logits=False, init_weights=False)
        with runtime.explain(f"{path} does not have the layout of {WEIGHTS}, nor has torchvision's: ", Exception):
            net.load_state_dict(runtime.load_file(path))
        self.name, self.resize, self.description = "FID", resize, f"Inception of 2015, --resize {resize}"
        self.feature_dim, self.num_classes, self.labels_per_class, self.weights = 2048, 1008, 1, runtime.sha256(path)
        if self.weights != SHA256:
            warn(f"{path} is not the published file, of sha256 {SHA256}: do not compare these numbers with a paper's")
        average, maximum = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1)
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):  # the last branch: torchvision's average of x, and a convolution of it
                # TensorFlow's average leaves padding out of its count. The last block takes the **maximum**, where
                # other Inceptions average: likely a slip of 2015, but it is in the features that FID is defined on.
                block.pool = maximum if name == "Mixed_7c" else average
                block.pool_conv, block.branch_pool = block.branch_pool, nn.Identity()
                block.forward = lambda x, b=block: torch.cat([*b._forward(x)[:-1], b.pool_conv(b.pool(x))], 1)
        # sFID, as in ADM: 7 channels of the graph's mixed_6/conv:0; docs/deviations.md says why that is Mixed_6d.
        net.Mixed_6d.branch1x1.register_forward_hook(
            lambda _, inputs, out: setattr(self, "spatial", out[:, :7].permute(0, 2, 3, 1).flatten(1)))  # (B, 2023)
        # IS is defined on logits **without** the bias: the first code multiplied pool3 by the weights alone.
        self.register_buffer("head", net.fc.weight.detach())  # (1008, 2048)
        net.fc = nn.Identity()
        self.net = net.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # 1.3 times as fast on a CPU

    def forward(self, images):
        """uint8 (B, 3, H, W) -> pool3 features (B, 2048) and logits without bias (B, 1008), fp32."""
        if self.resize == "tf1":
            x = resize_tf1(images)
        else:  # pytorch-fid's, without antialiasing
            x = 2 * nn.functional.interpolate(images.float() / 255, (299, 299), mode="bilinear") - 1
        features = self.net(x.contiguous(memory_format=torch.channels_last))
        return features, features @ self.head.T


def load_classifier(spec):
    """NAME, NAME:WEIGHTS or NAME:FILE (a copy) -> a classifier of torchvision, its transforms, its weights' hash."""
    models, (name, _, choice) = torchvision.models, spec.partition(":")
    if name not in (names := models.list_models(models)):
        raise BadInput(f"--features {spec} is no file, and not one of torchvision.models.list_models(): did you mean "
                       f"{' or '.join(difflib.get_close_matches(name, names, cutoff=0))}?")
    known, copy = models.get_model_weights(name), os.path.isfile(choice)
    choice = choice or known.DEFAULT.name
    fit = [w for w in known if (runtime.sha256(choice) in w.url if copy else w.name == choice)]  # names end in the hash
    if not fit:
        raise BadInput(f"--features {spec}: {choice} is no copy of its weights, and none of {[w.name for w in known]}")
    advice = f"{choice} does not fit" if copy else f"no download: fetch {fit[0].url} elsewhere and give {name}:FILE"
    with runtime.explain(f"{advice}: ", Exception):
        net = runtime.main_first(lambda: models.get_model(name, weights=None if copy else fit[0]))
        if copy:
            net.load_state_dict(runtime.load_file(choice))
            net.transform_input = True  # GoogLeNet and Inception v3 need it, as torchvision knows; others don't read it
    return net.requires_grad_(False).eval(), fit[0].transforms(), fit[0].url.split("-")[-1][:8]


class Classifier(nn.Module):
    """Another network in Inception's place: train_vgg.py's, for data far from ImageNet, or one of torchvision. Features
    are what its last linear layer reads. Its distance is no FID."""

    def __init__(self, spec):
        super().__init__()
        self.name, self.description, self.resize = f"FD ({spec})", f"features of {spec}", "its own transforms"
        labels = {"classes": [], "fine": 1}
        if os.path.isfile(spec):
            from train_tokenizer import load_vgg  # only here: Inception needs nothing of the tokenizer's code
            labels = runtime.load_file(spec, "vgg")["labels"]  # refuses all other files
            self.net, self.weights = load_vgg(spec), runtime.sha256(spec)
            self.name, self.resize = f"FD ({self.description})", "none"  # it takes images of any size
            self.logits = lambda images: self.net(data.to_float(images, images.device), ("logit",))["logit"]
        else:
            self.net, transforms, self.weights = load_classifier(spec)
            self.logits = lambda images: self.net(transforms(images))
        self.classes, self.labels_per_class = labels["classes"], labels["fine"]  # a label is class * fine + colour
        with runtime.explain(f"--features {spec} has no linear layer, whose input would be the features: "):
            *_, last = (module for module in self.net.modules() if isinstance(module, nn.Linear))
        last.register_forward_pre_hook(lambda _, inputs: setattr(self, "features", inputs[0]))
        self.feature_dim, self.num_classes = last.in_features, last.out_features

    def has_classes(self, classes):
        """Whether they are this network's, in its order. Those of an npz have no names, but numbers (a range)."""
        return 0 < len(classes) <= len(self.classes) and (isinstance(classes, range) or list(classes) == self.classes)

    def forward(self, images):
        """uint8 (B, 3, H, W) -> features (B, feature_dim) and logits (B, num_classes), fp32."""
        logits = self.logits(images)
        return self.features, logits


class Samples:
    """An npz of samples, as a source of images (data.py). np.load would hold all of it in memory, 10 GB for 50,000 of
    256 x 256; an uncompressed one is mapped instead, image by image."""

    drawn = splits = False

    def __init__(self, path):
        with runtime.explain(f"{path} holds neither samples (arr_0) nor mu and sigma: ", Exception), \
                np.load(path) as arrays, arrays.zip.open("arr_0.npy") as member, open(path, "rb") as file:
            if damaged := arrays.zip.testzip():  # a memory map looks at no checksum
                raise ValueError(f"{damaged} is damaged")
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            if dtype != np.uint8 or shape[3:] != (3,):
                raise BadInput(f"{path}: arr_0 is {dtype} {shape}, but samples are uint8 (N, H, W, 3) in 0..255: "
                               f"scale, round and clip them first, as a PNG would")
            info = arrays.zip.getinfo("arr_0.npy")
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset)
                offset = info.header_offset + file.read(500).index(b"\x93NUMPY") + member.tell()  # of the first pixel
                self.array = partial(np.memmap, path, np.uint8, "r", offset, shape, "F" if fortran else "C")
            else:
                self.array = partial(np.asarray, arrays["arr_0"])
            self.labels = arrays.get("arr_1", np.full(shape[0], -1))
            if self.labels.shape != shape[:1]:
                raise BadInput(f"{path}: {shape[0]} samples, but their classes, arr_1, are {self.labels.shape}")
            self.label, self.classes = self.labels.item, range(self.labels.max(initial=-1) + 1)

    def __len__(self):
        return len(self.labels)

    def load(self, i, at_least=0):
        return Image.fromarray(self.array()[i])  # mapped anew: on its way to a worker an open map would be copied


class Images:
    """What --real or --fake names. Item j: uint8 (3, H, W), label, j. image_size 0: images as they are. n 0: all."""

    def __init__(self, path, image_size=0, split="train", n=0, part=False):
        npz, self.shape = path.endswith(".npz"), None
        self.source = Samples(path) if npz else data.open_part(path, split, part)
        self.size = 0 if npz else image_size  # samples are never resampled
        self.path = f"{path} {split}" if self.source.splits or part and not npz else path
        self.index = data.choose(len(self.source), n)
        if len(self) < max(n, 2):
            raise BadInput(f"{path} holds only {len(self)} image(s): --n {n}, and two at least for a covariance")
        data.check_size(self.source, self.size, path)
        self.shape = self[0][0].shape
        crop = ", shorter side resized to it and centre crop" if self.size and not self.source.drawn else ""
        self.description = f"{len(self)} images of {self.path} ({self.shape[2]} x {self.shape[1]}{crop})"

    def __len__(self):
        return len(self.index)

    def __getitem__(self, j):
        i = int(self.index[j])
        with runtime.explain("a metric skips no unreadable image, fix or remove it: ", data.Unreadable):
            # shapes are drawn at their size; all else is decoded whole, for the exact pixels
            image = self.source.load(i, self.size if self.source.drawn else 0)
        pixels = data.to_tensor(data.center(image, self.size) if self.size else np.asarray(image))
        if self.shape and pixels.shape != self.shape:
            raise BadInput(f"{self.source.name(i)} is {image.width} x {image.height}, the first image of {self.path} "
                           f"{self.shape[2]} x {self.shape[1]}: crop them with --image_size")
        return pixels, self.source.label(i), j


@torch.inference_mode()
def measure(images, net, args, device, tokenizer=None, keep=0):
    """One pass over a set of images, or over a tokenizer's reconstructions of them -> {name: value}. What is kept adds
    up over batches and processes in any order: float64 sums, and with --full the features of at most `keep` images."""
    sums_device = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    zeros, D, n = partial(torch.zeros, dtype=torch.float64, device=sums_device), net.feature_dim, len(images)
    S = D + 17 * 17 * 7 if keep else D  # with --full x are features and sFID's behind them, else features alone
    x_sum, xx_sum, correct, quality = zeros(S), zeros(S, S), zeros(1), zeros(2)  # xx_sum is the sum of x x^T
    kept = torch.from_numpy(data.choose(n, keep)[:keep]).to(sums_device)
    features = torch.zeros(len(kept), D, device=sums_device)
    p_sum, p_log_p_sum = zeros(SPLITS, net.num_classes), zeros(SPLITS)  # of p(y|x) and sum_y p log p, for each split
    histogram = torch.zeros(tokenizer.quantizer.K if tokenizer else 1, dtype=torch.int64, device=device)
    # Unshuffled, a split of images in order of class has a tenth of them: IS 62 where 298 was right. The shuffle is
    # drawn here, so that an image's split follows from its index, in whichever batch and process it comes.
    place = np.argsort(np.random.RandomState(SHUFFLE_SEED).permutation(n))
    split = torch.from_numpy(np.searchsorted(np.arange(1, SPLITS) * n // SPLITS, place, side="right")).to(sums_device)
    loader = data.eval_loader(images, args.batch_size, args.workers, device)
    progress = runtime.Progress(sum(map(len, loader.batch_sampler)), f"images of {images.path}")
    try:
        for batch, labels, index in loader:  # uint8 (B, 3, H, W), (B,), (B,)
            batch, labels, index = batch.to(device, non_blocking=True), labels.to(sums_device), index.to(sums_device)
            if tokenizer:
                z_q, indices, _ = tokenizer.encode(data.to_float(batch, device))
                histogram += indices.flatten().bincount(minlength=len(histogram))
                x_hat = [tokenizer.decode(part) for part in z_q.split(64)]  # kernels of attention on a GPU have a limit
                original, batch = batch, data.to_uint8(torch.cat(x_hat))
                quality += sum(map(psnr_ssim, original.to(sums_device), batch.to(sums_device)))
            x, logits = (t.to(sums_device).double() for t in net(batch))
            if keep:
                here = torch.isin(index, kept)
                features[torch.searchsorted(kept, index[here])] = x[here].float()
                x = torch.cat([x, net.spatial.to(sums_device).double()], 1)
            x_sum += x.sum(0)
            xx_sum += x.T @ x
            log_p = logits.log_softmax(1)
            p_sum.index_add_(0, split[index], log_p.exp())
            p_log_p_sum.index_add_(0, split[index], (log_p.exp() * log_p).sum(1))
            correct += (logits.argmax(1) // net.labels_per_class == labels).sum()
            progress(len(batch))
    except BadInput as error:  # a worker's text begins with its traceback; ours would keep the workers alive for 20 s
        raise BadInput(str(error.with_traceback(None)).split("BadInput: ")[-1].strip()) from None
    for total in (x_sum, xx_sum, p_sum, p_log_p_sum, correct, histogram, quality, features):
        runtime.sum_over_processes(total)
    description = f"{n} reconstructions of {images.path}" if tokenizer else images.description
    if not xx_sum.isfinite().all():
        raise BadInput(f"the features of {description} are not finite: damaged weights")
    if n <= D:
        warn(f"{description}, {D} features: the covariance is singular, compare only with sets of as many images")
    mu, split_n = x_sum / n, p_sum.sum(1)  # (S,), (10,): one image's p sums to 1
    cov = (xx_sum - n * mu.outer(mu)) / (n - 1)
    # Of each split: exp E_x KL(p(y|x) || p(y)).
    scores = (p_log_p_sum / split_n + torch.special.entr(p_sum / split_n[:, None]).sum(1)).exp()
    return {"mu": mu[:D].cpu(), "sigma": cov[:D, :D].cpu(), "n": n, "description": description, "resize": net.resize,
            "weights": net.weights, "mu_s": mu[D:].cpu(), "sigma_s": cov[D:, D:].cpu(), "features": features.cpu(),
            "IS": scores.mean().item(), "IS_std": scores.std(correction=0).item(), "accuracy": correct.item() / n,
            "histogram": histogram.cpu(), **dict(zip(("PSNR", "SSIM"), (quality / n).tolist()))}


def is_statistics(path):
    """Whether the file holds mu and sigma. (ADM's references hold images too, but mu is of the whole set.)"""
    with runtime.explain(f"{path} is damaged: ", Exception):
        return zipfile.is_zipfile(path) and {"mu.npy", "sigma.npy"} <= set(zipfile.ZipFile(path).namelist())


def load_statistics(path, net, full=False):
    """As `measure`, from a file (n 0: not known). Refuses one that was made with another network or resize."""
    with runtime.explain(f"{path} can't be read as statistics: ", Exception), np.load(path) as arrays:
        made = {key: arrays[key].item() for key in KEYS[2:] if key in arrays}
        if len(made) not in (0, 4):  # others' files have none of these
            raise ValueError(f"a part of {', '.join(KEYS)} is missing")
        made = {"n": 0, "description": "statistics"} | made
        if full and not ({*FULL[:2]} <= {*arrays} and {"features", "arr_0"} & {*arrays}):
            raise BadInput(f"{path} holds statistics alone, --full needs images (or a file that --full --save made)")
        values = {k: torch.from_numpy(arrays[k].astype(np.float64)) for k in KEYS[:2] + full * FULL if k in arrays}
        mu, sigma = values["mu"], values["sigma"]
    if sigma.shape != (net.feature_dim, *mu.shape) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise BadInput(f"{path} has statistics of {mu.numel()} features, not {net.feature_dim}, or they are not finite")
    for key, ours in (("resize", net.resize), ("weights", net.weights)):
        if made.get(key, ours) != ours:
            raise BadInput(f"{path} was made with {key} {made[key]}, not with {ours} as here: make it again")
    if "resize" not in made:
        warn(f"{path} does not say how it was made; see to it that it was with --resize {net.resize}")
    return made | values | {"description": f"{path} ({made['description']})"}


def warn(sentence):
    if runtime.is_main():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def default_real(args):
    """Fill in --real, --split and --image_size from the checkpoint, or from the file that sample.py left beside the
    samples: images that were not trained on for reconstructions, those that were for samples."""
    if args.tokenizer:
        made = runtime.load_file(args.tokenizer, "tokenizer")["args"]
    else:
        path = Path(args.fake or "samples").with_name("sampler.json")
        if not path.is_file():
            raise BadInput(f"{path}: no such file, so --real is needed; python sample.py makes it, with samples")
        made = json.loads(path.read_text())
    args.real = args.tokenizer and made["val"] or made["data"]
    args.split = args.split or (None if made["val"] else "val" if args.tokenizer else "train")
    args.image_size = args.image_size or made["image_size"]


def parse(argv):
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--real", help="reference: a folder, torchvision:NAME, shapes, lsun:PATH, npz of samples, statistics; default: "
        "the data that the tokenizer (validation part) or the samples' prior (training part) was trained on")
    add("--fake", help="the images to evaluate: likewise; default, without --tokenizer and --save: samples/samples.npz")
    add("--full", action="store_true", help="sFID, precision and recall as well, as in ADM's evaluator")
    add("--tokenizer", help="checkpoint: evaluate its reconstructions of --real (rFID, PSNR, SSIM, usage, perplexity)")
    add("--image_size", type=runtime.positive, default=0, help="resize, centre crop (no npz); default: the tokenizer's")
    add("--split", choices=["train", "val"], help="of shapes and torchvision:NAME (default: val with --tokenizer, else "
        "train); of a folder what is held out for validation, or the rest (default: all)")
    add("--n", "--count", type=runtime.count, default=0, help="images of each set, at random; under torchrun: --count")
    add("--resize", choices=["tf1", "pytorch"], help="default tf1 (torch-fidelity, ADM); or pytorch (pytorch-fid)")
    add("--inception", help=f"a local copy of {WEIGHTS} (default: downloaded)")
    add("--features", help="a file of train_vgg.py, or torchvision's NAME, NAME:WEIGHTS or NAME:FILE: an FD, no FID")
    add("--save", help="write the statistics of --real to this npz, to be --real later")
    add("--json", help="write the result, and all that it depends on, to this file")
    add("--batch_size", type=runtime.positive, default=64, help="images at a time, per process")
    add("--workers", type=runtime.count, default=min(8, os.cpu_count()), help="that load data, per process")
    add("--device", choices=runtime.DEVICES, default="auto", help="auto: cuda, then mps, then cpu")
    args = parser.parse_args(argv)
    if not (args.fake or args.tokenizer or args.save):
        args.fake = "samples/samples.npz"
        if not os.path.exists(args.fake):
            raise BadInput(f"{args.fake}: no such file; python sample.py makes it, or give --fake or --tokenizer")
    if not args.real:
        default_real(args)
    images = [path for path in (args.real, args.fake) if path and not is_statistics(path)]
    for wrong, sentence in (
            (args.fake and args.tokenizer, "--fake and --tokenizer are two questions: ask one at a time"),
            (args.features and (args.inception or args.resize), "--inception and --resize do not go with --features"),
            (args.full and (args.features or args.tokenizer), "--full does not go with --features or --tokenizer"),
            (args.full and args.fake and args.fake not in images, f"--full: {args.fake} holds statistics, not images"),
            (args.fake and os.path.realpath(args.real) == os.path.realpath(args.fake),
             f"--real and --fake are both {args.real}: their distance is 0"),
            ("shapes" in images and not (args.image_size or args.tokenizer), "shapes need an --image_size"),
            (not images and (args.n or args.image_size or args.split), "both sides are statistics, not images"),
            ((args.tokenizer or args.save) and args.real not in images, f"{args.real} holds statistics, not images"),
            (args.save and (not args.save.endswith(".npz") or os.path.exists(args.save)),
             f"--save {args.save}: give a new file, with a name that ends in .npz")):
        if wrong:
            raise BadInput(sentence)
    return args


def main(argv=None):
    args = parse(argv)
    device, tokenizer = runtime.setup(args), None
    net = (Classifier(args.features) if args.features else Inception(args.inception, args.resize or "tf1")).to(device)
    if args.tokenizer:
        import vq  # only here: FID and IS need nothing of the tokenizer's code
        from train_tokenizer import load_tokenizer
        tokenizer = load_tokenizer(args.tokenizer, device)
        args.image_size = args.image_size or tokenizer.image_size
    split = args.split or ("val" if tokenizer else "train")
    real, fake = ({} if not path else load_statistics(path, net, args.full) if is_statistics(path) else
                  Images(path, args.image_size, split, args.n, bool(args.split)) for path in (args.real, args.fake))
    sets = [side for side in (real, fake) if isinstance(side, Images)]
    if args.full and real not in sets and "features" not in real:
        sets.append(Images(args.real))  # ADM's statistics come with images, for precision and recall
    if args.full and (n := min(map(len, sets))) <= NEIGHBOURS:
        raise BadInput(f"--full: {n} images are too few for the {NEIGHBOURS} nearest neighbours of each")
    if tokenizer:
        data.check_image_size(real.shape[1], tokenizer.f)
        if min(real.shape[1:]) < WINDOW:
            raise BadInput(f"{real.description}: SSIM needs {WINDOW} pixels at least on each side")
        fake = real  # its reconstructions
    elif len({side.shape for side in sets}) > 1:
        sentence = f"images of two sizes are compared: {', '.join(side.description for side in sets)}"
        if args.full:
            raise BadInput(f"--full: {sentence}")
        warn(sentence)
    classes = fake.source.classes if isinstance(fake, Images) else ()
    real, fake = (measure(s, net, args, device, coder, keep) if isinstance(s, Images) else s
                  for s, coder, keep in ((real, None, REAL * args.full), (fake, tokenizer, FAKE * args.full)))
    if args.full and "features" not in real:
        real["features"] = measure(sets[-1], net, args, device, keep=REAL)["features"]
    if not runtime.is_main():
        return None

    result = {"real": real["description"], "n_real": real["n"], "resize": net.resize, "weights": net.weights}
    if fake:
        name = "rFID" if tokenizer and not args.features else net.name
        value = frechet(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
        print(f"{name} {value:.2f}")
        result |= {"fake": fake["description"], "n_fake": fake["n"], "FD" if args.features else name: value}
    if fake and args.full:
        result["sFID"] = frechet(real["mu_s"], real["sigma_s"], fake["mu_s"], fake["sigma_s"])
        x, y = (side["features"].to(device if device.type == "cuda" else "cpu") for side in (real, fake))
        result["precision"], result["recall"] = precision_recall(x, y)
        net.description += f", precision and recall by {NEIGHBOURS} neighbours, {len(x)} real and {len(y)} fake images"
        print("sFID {sFID:.2f}\nprecision {precision:.4f}\nrecall {recall:.4f}".format_map(result))
    if tokenizer:
        result |= {key: fake[key] for key in ("PSNR", "SSIM")}
        print("PSNR {PSNR:.2f}\nSSIM {SSIM:.4f}".format_map(result))
        usage, perplexity, _ = vq.usage_and_perplexity(fake["histogram"])
        used, K = int((fake["histogram"] > 0).sum()), len(fake["histogram"])
        print(f"usage {100 * usage:.1f} % ({used} of {K})\nperplexity {perplexity:.1f}")
        result |= {"usage": usage, "codes_used": used, "codebook_size": K, "perplexity": perplexity}
    elif "IS" in fake and not args.features and fake["n"] >= SPLITS:
        print(f"IS {fake['IS']:.1f} +- {fake['IS_std']:.1f}")
        result |= {"IS": fake["IS"], "IS_std": fake["IS_std"]}
    if args.features and net.has_classes(classes):
        print(f"accuracy {fake['accuracy']:.2f}")
        result["accuracy"] = fake["accuracy"]
    compared = " against ".join(s["description"] for s in (fake, real) if s)
    result["measured"] = f"{compared}; {net.description}, weights {net.weights}"
    print(f"measured: {result['measured']}")
    if args.save:
        runtime.save_file(args.save, lambda file: np.savez(file, **{key: real[key] for key in KEYS + args.full * FULL}))
        print(f"saved the statistics of {real['description']} in {args.save}")
    if args.json:
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, np)} | {"python": sys.version.split()[0]}
        runtime.save_json(args.json, result | {"versions": versions, "args": vars(args)})
    return result


if __name__ == "__main__":
    runtime.run(main)
