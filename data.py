"""Images: where they come from, how they are cropped, and in which order they are seen.

    python data.py --data photos                                      # check it, write preview.png
    python data.py --data imagenet/val --out val256 --count 50000     # export cropped PNG files

A source is a Dataset with
    len(source)         number of images
    classes             names of the labels; empty if there are none
    name(i)             name of image i, unique; a hash of it decides whether i is held out
    load(i, size)       a PIL RGB image and its label. size > 0: a JPEG may be decoded at a
                        fraction of its size, but not below 2 * size
    has_splits          whether it has a validation split of its own; default: no

Sample n = step * batch_size + position shows image permutation(seed, n // N)[n % N], cropped and
flipped by a generator seeded with (seed, n). A batch is therefore a function of seed and step
only, whatever the number of processes and workers, and resuming means starting at another step.
"""
import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.utils import make_grid

import runtime

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Detected by content. A whitelist: PIL would run Ghostscript on a PostScript file named photo.jpg.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
Image.MAX_IMAGE_PIXELS = 125_000_000  # PIL rejects an image of more than twice as many
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # image generators write much text
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # not classes
HELD_OUT = 20  # without --val, 1 image in 20 is held out for validation


# ----------------------------------------------------------------------------------- sources

def open_source(spec, split="train", hold_out=False, classes=None):
    """The source that --data or --val names. split: "train" or "val". hold_out: also split a source
    that has no splits; 1 image in 20 is held out. classes: names that fix the numbers of labels."""
    kind, _, name = spec.partition(":")
    if kind == "shapes":
        from miniature.shapes import Shapes
        source = Shapes(split, float(name.removeprefix("clutter=") or 1))
    elif kind == "torchvision":
        source = Torchvision(name, split)
    elif kind == "lsun":
        source = Lsun(name)
    elif spec.endswith(".npz"):
        source = NpzSamples(spec)
    else:
        source = Folder(spec, classes)
    if hold_out and not getattr(source, "has_splits", False):
        names = (os.fsencode(source.name(i)) for i in range(len(source)))
        held_out = np.array([zlib.crc32(name) % HELD_OUT == 0 for name in names])
        source = HoldOutSplit(source, np.flatnonzero(held_out == (split == "val")))
    if not len(source):
        raise SystemExit(f"{spec}: no images" + " to hold out, pass --val" * hold_out)
    return source


def is_training_data(spec, args):
    """Whether a tokenizer with these flags held out images of `spec`."""
    return not args["val"] and os.path.realpath(spec) == os.path.realpath(args["data"])


def open_data(args, labels=False):
    """Training and validation source. labels: check that both have the same classes, in the same
    order."""
    source = open_source(args.data, "train", hold_out=not args.val)
    held_out = open_source(args.val or args.data, "val", not args.val, labels and source.classes)
    if labels and source.classes and list(held_out.classes) != list(source.classes):
        raise SystemExit(f"--val {args.val} needs the class folders of --data (a prior without "
                         f"classes: --num_classes 0)")
    names = ", ".join(source.classes[:5]) + ", ..." * (len(source.classes) > 5)
    runtime.print0(f"{args.data}: {len(source)} training images, {len(held_out)} for validation, "
                   f"{len(source.classes)} classes{names and ': ' + names}")
    return source, held_out


class HoldOutSplit(Subset):
    """A Subset that is a source."""

    def __init__(self, source, indices):
        super().__init__(source, indices)
        self.classes = source.classes

    def name(self, i):
        return self.dataset.name(int(self.indices[i]))

    def load(self, i, size=0):
        return self.dataset.load(int(self.indices[i]), size)


class Folder(Dataset):
    """A folder of class folders (images at any depth below), or a flat folder without labels.
    Labels follow the alphabetical order of the class folders, or `classes` if given."""

    def __init__(self, root, classes=None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise SystemExit(f"{root}: no such folder")
        files = sorted(list_files(root))
        images = [name for name in files if name.lower().endswith(EXTENSIONS)]
        if len(images) < len(files):
            n = len(files) - len(images)
            runtime.print0(f"note: {n} files in {root} have no image extension")
        folders = [os.path.dirname(name).split(os.sep)[0] for name in images]
        found = sorted({*folders} - {""})
        if found and "" in folders:
            raise SystemExit(f"{root} holds both images and class folders ({found[0]}, ...)")
        if len(SPLITS & {name.lower() for name in found}) > 1:
            raise SystemExit(f"{root} holds {' and '.join(found[:3])}, which are not classes: "
                             f"--data {self.root / found[0]} --val {self.root / found[-1]}")
        self.classes = list(classes or found) if found else []
        if strange := {*found} - {*self.classes}:
            raise SystemExit(f"{root}: --data has no class folder named {min(strange)}")
        # Workers share the memory of an array. They would copy a list: reading an item changes its
        # reference count.
        self.files = np.array([os.fsencode(name) for name in images])
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([index.get(folder, 0) for folder in folders])

    def __len__(self):
        return len(self.files)

    def name(self, i):
        return os.fsdecode(self.files[i])

    def load(self, i, size=0):
        return decode(self.root / self.name(i), size), int(self.labels[i])


def list_files(root):
    """Names of all files below `root`, relative to it. Follows links, but not in circles; skips
    hidden files and folders."""
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=runtime.print0):
        here = os.path.realpath(folder) + os.sep
        subfolders[:] = [name for name in subfolders if name[0] != "." and not here.startswith(
            os.path.realpath(os.path.join(folder, name)) + os.sep)]
        yield from (os.path.relpath(os.path.join(folder, name), root)
                    for name in names if name[0] != ".")


class NpzSamples(Dataset):
    """An npz of samples in ADM's layout: arr_0 uint8 (N, H, W, 3), labels in arr_1. An uncompressed
    one is memory-mapped, which np.load cannot do: 50,000 samples of 256 x 256 take 10 GB."""

    def __init__(self, path):
        try:
            with (zipfile.ZipFile(path) as archive, np.load(path) as arrays,
                  archive.open("arr_0.npy") as member):
                np.lib.format.read_magic(member)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                info = archive.getinfo("arr_0.npy")
                if info.compress_type == zipfile.ZIP_STORED and not fortran:
                    with open(path, "rb") as file:
                        file.seek(info.header_offset)
                        begin = info.header_offset + file.read(500).index(b"\x93NUMPY")
                    offset = begin + member.tell()
                    self.array = partial(np.memmap, path, np.uint8, "r", offset, shape)
                else:
                    self.array = partial(np.asarray, arrays["arr_0"])
                self.labels = arrays["arr_1"] if "arr_1" in arrays else np.zeros(shape[0], int)
                self.classes = [str(n) for n in range(self.labels.max() + 1) if "arr_1" in arrays]
            if (dtype, shape[3:], self.labels.shape) != (np.uint8, (3,), shape[:1]):
                raise ValueError(f"{dtype} {shape} with {len(self.labels)} labels")
        except Exception as error:
            raise SystemExit(f"{path} is not an npz of samples: uint8 arr_0 (N, H, W, 3), labels "
                             f"arr_1 ({runtime.describe(error)})") from error

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"sample {i}"

    def load(self, i, size=0):
        return Image.fromarray(self.array()[i]), int(self.labels[i])  # mapped anew in each worker


class Torchvision(Dataset):
    """A data set of torchvision, downloaded to data/."""

    # The constructor's arguments for each split. Add a line for another data set.
    SPLITS = {"CIFAR10": ({"train": True}, {"train": False}),
              "CIFAR100": ({"train": True}, {"train": False}),
              "Imagenette": ({"split": "train"}, {"split": "val"}),
              "Flowers102": ({"split": "train"}, {"split": "val"}),
              "CelebA": ({"split": "train"}, {"split": "valid"})}
    has_splits = True

    def __init__(self, name, split):
        if name not in self.SPLITS:
            raise SystemExit(f"torchvision:{name}: must be one of {', '.join(self.SPLITS)}")
        which = self.SPLITS[name][split == "val"]
        open_set = partial(getattr(datasets, name), "data", download=True, **which)
        try:
            self.set = runtime.main_first(open_set)
        except (OSError, RuntimeError) as error:  # of the download
            raise SystemExit(f"torchvision:{name}: {runtime.describe(error)}") from error
        # Imagenette has a tuple of synonyms for each class, CelebA no classes.
        names = getattr(self.set, "classes", [])
        self.classes = [name if isinstance(name, str) else name[0] for name in names]

    def __len__(self):
        return len(self.set)

    def name(self, i):
        return f"image {i}"

    def load(self, i, size=0):
        image, label = self.set[i]
        return image.convert("RGB"), label if self.classes else 0


class Lsun(Folder):
    """An LSUN lmdb: key -> bytes of a JPEG or WebP. It is opened for each read (0.1 ms), because an
    open one must not be shared with a worker."""

    def __init__(self, path):
        self.path, self.classes = path, []
        if not Path(path).exists():
            raise SystemExit(f"lsun:{path}: no such folder")
        with self.open() as env, env.begin() as transaction:
            self.files = np.array(list(transaction.cursor().iternext(values=False)))

    def open(self):
        lmdb = runtime.import_optional("lmdb")
        return lmdb.open(self.path, readonly=True, lock=False, readahead=False, meminit=False)

    def load(self, i, size=0):
        with self.open() as env, env.begin() as transaction:
            return decode(io.BytesIO(transaction.get(bytes(self.files[i]))), size), 0


@cache
def content_hash(source):
    """Hash of all names, and of 100 images with their labels. It is computed once per source."""
    digest = hashlib.sha256(repr([source.name(i) for i in range(len(source))]).encode())
    for i in evenly_spaced(len(source), 100):
        with contextlib.suppress(Exception):  # an unreadable image
            image, label = source.load(i, 32)
            digest.update(np.asarray(image).tobytes() + str(label).encode())
    return digest.hexdigest()[:16]


def decode(file, size=0):
    """A PIL RGB image: EXIF rotation applied, transparency over white, 16 bits scaled to 8. With
    size > 0 a JPEG is decoded at 1/2, 1/4 or 1/8 if both sides stay >= 2 * size."""
    image = Image.open(file, formats=FORMATS)
    if size:
        image.draft(None, (2 * size, 2 * size))
    image.load()
    with contextlib.suppress(Exception):  # a broken EXIF block
        ImageOps.exif_transpose(image, in_place=True)
    if image.format == "PPM" and image.mode == "I":  # PIL scales its white to 65535
        image = image.convert("I;16")
    if image.mode in ("F", "I"):
        raise ValueError(f"mode {image.mode}: unknown white level")
    if image.mode.startswith("I"):  # 16 bits per pixel
        image = Image.fromarray((np.asarray(image, np.float32) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ----------------------------------------------------------------------------- crops and order

def crop_resize(image, size, x, y, side):
    """The square of a PIL image at (x, y), resized -> uint8 (size, size, 3)."""
    box = (x, y, x + side, y + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def center_crop(image, size):
    """The validation transform: shorter side to `size`, center crop."""
    side = min(image.size)
    return crop_resize(image, size, (image.width - side) / 2, (image.height - side) / 2, side)


def augment(image, size, crop, rng):
    """The training transforms -> uint8 (size, size, 3). The paper does not specify them; these are
    RQ-VAE's, whose protocol it follows on LSUN.

    random  (ImageNet): shorter side to `size`, random crop, flip.
    resized (FFHQ):     a square of 0.75 to 1 of the area, resized, flip.
    center  (LSUN):     shorter side to `size`, center crop."""
    if crop == "center":
        return center_crop(image, size)
    side = min(image.size)
    if crop == "resized":
        side = round(side * np.sqrt(rng.uniform(0.75, 1)))
    x, y = (round(rng.uniform(0, length - side)) for length in image.size)
    pixels = crop_resize(image, size, x, y, side)
    return pixels[:, ::-1] if rng.uniform() < 0.5 else pixels


def to_tensor(array):
    """uint8 (H, W, 3) -> uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


class Unreadable(RuntimeError):
    """An image, or a whole data set, that can't be read."""

    def __str__(self):  # without the traceback that a data worker adds
        return super().__str__().rpartition("Unreadable: ")[2].strip()


report = cache(partial(print, flush=True))  # prints each text once


def load_image(source, i, size, strict=False):
    """Image i and its label. An unreadable image is reported, and the next one is taken. Raises
    Unreadable after a thousand unreadable images in succession; if `strict`, after the first."""
    for j in range(i, i + (1 if strict else min(1000, len(source)))):
        try:
            return source.load(j % len(source), size)
        except Exception as error:  # PIL raises nearly anything on bad files
            name = source.name(j % len(source))
            text = f"{name!r} can't be read ({runtime.describe(error)})"
        if strict:
            raise Unreadable(text)
        if report.cache_info().misses < 100:  # per process
            report(f"skipped: {text}")
    raise Unreadable(f"no image can be read from {source.name(i)!r} on")


class TrainImages(Dataset):
    """Item n of the endless training stream: uint8 (3, S, S), label."""

    def __init__(self, source, size, crop, seed):
        self.source, self.size, self.crop, self.seed = source, size, crop, seed
        self.epoch = -1

    def __getitem__(self, n):
        epoch, j = divmod(n, len(self.source))
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch, 1])
            self.epoch, self.order = epoch, rng.permutation(len(self.source))
        return self.view(int(self.order[j]), n)

    def view(self, index, n):
        """Image `index`, cropped and flipped by the generator of (seed, n)."""
        image, label = load_image(self.source, index, self.size)
        rng = np.random.default_rng([self.seed, n])
        return to_tensor(augment(image, self.size, self.crop, rng)), label


class EvalImages(Dataset):
    """Image i under the validation transform (size 0: as it is): uint8 (3, S, S), label. strict:
    raise on an unreadable image (for metrics)."""

    def __init__(self, source, size, strict=False):
        self.source, self.size, self.strict = source, size, strict

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image, label = load_image(self.source, i, self.size, self.strict)
        return to_tensor(center_crop(image, self.size) if self.size else np.asarray(image)), label


def to_float(images, device):
    """uint8 (B, 3, S, S) -> float in [-1, 1] on the device, channels last."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return images.float().div_(127.5).sub_(1)


def to_uint8(images):
    """Float (B, 3, S, S) in about [-1, 1] -> uint8 of the same shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ------------------------------------------------------------------------------------- batches

def loader(dataset, batches, workers, device):
    """A DataLoader over given batches of indices."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=min(workers, os.cpu_count()),
                      worker_init_fn=runtime.ignore_signals, pin_memory=device.type == "cuda")


def micro_batch_indices(args, step, a):
    """Positions in the training stream of micro-batch a of `step` in this process."""
    b = runtime.micro_batch_size(args)
    first = step * args.batch_size + (a * runtime.world_size() + runtime.rank()) * b
    return range(first, first + b)


def until_unreadable(batches, run):
    """Yield the batches. If no image can be read, end, and set the error with which the run will
    save and exit."""
    try:
        yield from batches
    except Unreadable as error:
        run.error = str(error)


def train_loader(dataset, args, start, device):
    """Micro-batches of this process from step `start` on, args.grad_accum of them per step."""
    batches = (micro_batch_indices(args, step, a)
               for step in range(start, args.iters) for a in range(args.grad_accum))
    return loader(dataset, batches, args.workers, device)


def eval_loader(dataset, batch_size, workers, device, count=None):
    """`count` evenly spaced images (None: all), split over the processes batch by batch."""
    chosen = evenly_spaced(len(dataset), count)
    batches = [chosen[i:i + batch_size] for i in range(0, len(chosen), batch_size)]
    return loader(dataset, batches[runtime.rank()::runtime.world_size()], workers, device)


def evenly_spaced(total, count=None):
    """At most `count` of `total` indices, evenly spaced (None: all)."""
    return np.linspace(0, total - 1, min(count or total, total)).astype(int).tolist()


def row_label(name, number):
    """A class's name as a label for `save_grid`, or its number: the font has ASCII only."""
    return name[:20] if name.isascii() else str(number)


def save_grid(path, rows, columns=8):
    """Save named rows of images, [(name, uint8 (n, 3, H, W)), ...], as one PNG. Small images are
    enlarged, rows of more than `columns` images continue below, shorter ones end in white."""
    n = max(len(images) for _, images in rows)
    columns = min(columns, n)
    rows = [(name, images[i:i + columns])
            for i in range(0, n, columns) for name, images in rows]
    # F.pad counts from the last dimension: nothing for W, H and channels, white images at the end.
    padded = [F.pad(images.cpu(), (0, 0) * 3 + (0, columns - len(images)), value=255)
              for _, images in rows]
    size, scale = padded[0].shape[2], max(1, 96 // padded[0].shape[3])
    grid = make_grid(torch.cat(padded), columns, pad_value=255).permute(1, 2, 0).numpy()
    sheet = Image.fromarray(grid.repeat(scale, 0).repeat(scale, 1))
    font = ImageFont.load_default(15)
    widths = [font.getlength(line) for name, _ in rows for line in name.split("\n")]
    if any(widths):
        margin = int(max(widths)) + 20
        sheet = ImageOps.expand(sheet, (margin, 0, 0, 0), "white")
        pen = ImageDraw.Draw(sheet)
        for row, (name, _) in enumerate(rows):
            y = scale * (2 + (size + 2) * row + size / 2)
            pen.text((margin - 8, y), name, "black", font, anchor="rm", align="right")
    runtime.save_file(path, lambda file: sheet.save(file, "PNG"))


# -------------------------------------------------------------------------------- python data.py

def main():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--data", default="shapes", help="as in the training scripts, or samples.npz")
    add("--split", choices=("train", "val"),
        help="default: all of a folder; for data sets with splits, train")
    add("--image_size", type=runtime.positive_int,
        help="size of the cropped images; default: 256 as in training, of samples their own")
    add("--out", help="folder for the cropped images as PNG, in class folders")
    add("--count", type=runtime.positive_int, help="number of images, evenly spaced; default: all")
    add("--workers", type=runtime.at_least(0), default=8, help="data loading workers")
    args = parser.parse_args()
    if "RANK" in os.environ:
        raise SystemExit("data.py runs in one process: python, not torchrun")
    if args.out and next(Path(args.out).rglob("*.*"), None):
        raise SystemExit(f"{args.out} is not empty: choose another --out")
    source = open_source(args.data, args.split or "train", hold_out=bool(args.split))
    size = args.image_size or (0 if args.data.endswith(".npz") else 256)
    images, chosen = EvalImages(source, size, strict=True), evenly_spaced(len(source), args.count)
    batches = iter(loader(images, [[i] for i in chosen], args.workers, torch.device("cpu")))
    names, progress = source.classes or [""], runtime.Progress(len(chosen), every=10)
    counts, shown = [0] * len(names), []
    for done, i in enumerate(chosen, 1):
        try:
            pixels, label = next(batches)
        except Unreadable as error:
            print(error, flush=True)
            continue
        counts[label] += 1
        if args.out:
            image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
            path = Path(args.out) / names[label].replace("/", "_") / f"{i:08}.png"
            runtime.save_file(path, partial(image.save, format="PNG"))
        elif len(shown) < 40 * done / len(chosen):  # evenly spaced
            shown.append(pixels[0])
        progress.show(f"{done} of {len(chosen)}", done)
    for number, name in enumerate(source.classes):
        print(f"{number} {name}: {counts[number]}")
    print(f"{sum(counts)} of {len(chosen)} images can be read")
    if shown:
        save_grid("preview.png", [("", torch.stack(shown))])
        print(f"{len(shown)} of them are in preview.png")
    if sum(counts) < 0.99 * len(chosen):
        raise SystemExit("more than 1 % of the images can't be read: remove or repair them")


if __name__ == "__main__":
    runtime.launch(main)
