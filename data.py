"""Images: where they come from, how they are cropped, and in which order they are seen.

    python data.py --data photos                                      # check it, write preview.png
    python data.py --data imagenet/val --out val256 --count 50000     # processed copies as PNG

A source has len(source), classes (names of the labels, empty if there are none), splits (whether
it has a validation part of its own), name(i), signature() (a hash of what is in it) and load(i,
size, fast): a PIL image in RGB and its label. `size` is the side to be shown, which drawn pictures
are drawn at; `fast` lets a photograph be decoded at a fraction that is still that large.

Order: sample n = step * batch_size + position shows image permutation(seed, n // N)[n % N], cropped
and flipped by a generator seeded with (seed, n). So a batch depends on seed, step and position
alone, not on processes or workers, and to resume is to start at another step.
"""
import collections
import contextlib
import hashlib
import inspect
import io
import itertools
import multiprocessing.util
import os
import re
import shutil
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.utils import make_grid

import runtime

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# By content, whatever the name says. Not all that PIL knows: it would have Ghostscript run a
# PostScript "photo.jpg".
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 250_000_000  # a larger image is unreadable: decoded, it would take a gigabyte
Image.MAX_IMAGE_PIXELS = None  # PIL's own limit, a third of that
PREFETCH = 4  # batches that each worker keeps ready
MAX_BAD = 0.01  # a larger share of unreadable images ends a run
HELD_OUT = 20  # one image in so many is held out for validation
ORDER, ROWS = 1, 2  # random streams of an epoch: order of images, rows of a code cache


# ----------------------------------------------------------------------------------- sources

def open_source(spec, split="train", hold_out=False):
    """The source that --data or --val names. split "train" or "val": which of its own parts, where
    it has any; with hold_out of any other source the part for training or the one held out."""
    kind, _, name = spec.partition(":")
    if kind == "shapes":
        from miniature.shapes import Shapes
        clutter = name.removeprefix("clutter=") or "1"
        if not re.fullmatch(r"[01]\.?0*|0?\.\d+", clutter):
            raise SystemExit(f"{spec}: clutter is a number in [0, 1], as in shapes:clutter=0.5")
        return Shapes(split, float(clutter))
    if kind == "torchvision":
        source = Torchvision(name, split)
    elif kind == "lsun":
        source = Lsun(name)
    else:
        source = Samples(spec) if spec.endswith(".npz") else Folder(spec)
    if not len(source):
        raise SystemExit(f"{spec} holds no images")
    return Part(source, split) if hold_out and not source.splits else source


def open_data(args, labels=False):
    """--data and --val -> training source, validation source. labels: whether they are used; then
    both number their classes alike."""
    if not args.data:
        args.data = "shapes"
        if runtime.is_main():
            print("NO --data: TRAINING ON DRAWN PICTURES (shapes); real images: --data FOLDER, "
                  "torchvision:NAME or lsun:PATH", flush=True)
    source = open_source(args.data, "train")
    if args.val or source.splits:
        val = open_source(args.val or args.data, "val")
    else:
        source, val = Part(source, "train"), Part(source, "val")
    if labels:
        number_alike(source, val, args.val)
    found = f"{len(source)} images for training ({source.signature()}), {len(val)} for validation"
    if runtime.is_main():
        print(f"{args.data}: {found}", flush=True)
        if args.data_found not in ("", found):
            print(f"THE DATA HAVE CHANGED since the run was stopped: {args.data_found}", flush=True)
    args.data_found = found
    return source, val


def number_alike(source, val, spec):
    """The classes of `val`, all or some of those of `source`, get the numbers that they have there,
    by name."""
    if not source.classes or list(val.classes) == list(source.classes):
        return
    strange = [name for name in val.classes if name not in source.classes]
    if strange or not val.classes or not isinstance(val, Folder):
        raise SystemExit(f"--val {spec} has {', '.join(strange[:3]) or 'no'} classes, which are "
                         f"not those of --data: its class folders must have the same names "
                         f"(a prior that uses none: --classes 0)")
    if runtime.is_main():
        print(f"--val {spec} has {len(val.classes)} of {len(source.classes)} classes", flush=True)
    val.labels = np.array([source.classes.index(name) for name in val.classes])[val.labels]
    val.classes = source.classes


class Part(Subset):
    """The part of a source for training, or the twentieth that is held out for validation. Which
    one an image is in follows from its name: other images come and go without moving it."""

    def __init__(self, source, split):
        names = (os.fsencode(source.name(i)) for i in range(len(source)))
        held = np.array([zlib.crc32(name) % HELD_OUT == 0 for name in names])
        super().__init__(source, np.flatnonzero(held == (split == "val")))
        if not len(self):
            raise SystemExit("there are too few images to hold some out: give --val")
        self.classes, self.split = source.classes, split

    def name(self, i):
        return self.dataset.name(int(self.indices[i]))

    def load(self, i, size=0, fast=False):
        return self.dataset.load(int(self.indices[i]), size, fast)

    def signature(self):
        return f"{self.dataset.signature()} {self.split}"


class Folder(Dataset):
    """A folder of class folders (labels in alphabetical order, any depth below), or a flat one."""

    splits = False

    def __init__(self, root):
        self.root = Path(root)
        if not self.root.is_dir():
            raise SystemExit(f"{root}: no such folder; --data takes a folder of images, "
                             f"an .npz of samples, torchvision:NAME, lsun:PATH or shapes")
        names = sorted(files_below(self.root))
        images = [name for name in names if name.lower().endswith(EXTENSIONS)]
        others = {Path(name).suffix.lower() for name in {*names} - {*images}}
        if others and runtime.is_main():
            print(f"note: {len(names) - len(images)} files in {root} are left out, no images by "
                  f"name ({' '.join(sorted(others)[:8])})", flush=True)
        folders = [name.split(os.sep)[0] if os.sep in name else "" for name in images]
        self.classes = sorted({*folders} - {""})
        if self.classes and "" in folders:
            raise SystemExit(f"{root} holds both images and class folders ({self.classes[0]}, ...)")
        if {*self.classes} in ({"train", "val"}, {"train", "val", "test"}):
            raise SystemExit(f"{root} holds {' and '.join(self.classes)}, which are no classes: "
                             f"--data {self.root / 'train'} --val {self.root / 'val'}")
        index = {folder: i for i, folder in enumerate(self.classes)}
        # Arrays, not lists: workers share their memory, reference counts would copy it.
        self.files = np.array([os.fsencode(name) for name in images])
        self.labels = np.array([index.get(folder, 0) for folder in folders])

    def __len__(self):
        return len(self.files)

    def name(self, i):
        return os.fsdecode(self.files[i])

    def load(self, i, size=0, fast=False):
        return decode(self.root / self.name(i), size if fast else 0), int(self.labels[i])

    def signature(self):
        # names alone may be 00000.png, 00001.png
        sizes = [(self.root / self.name(i)).stat().st_size for i in spread(len(self), 1000)]
        return digest(self.files.tobytes(), self.labels.tobytes(), str(sizes))


class Samples(Dataset):
    """An npz of samples, ADM's: arr_0 uint8 (N, H, W, 3), labels in arr_1. An uncompressed one is
    mapped, image by image: np.load would hold all of it in memory, 10 GB for 50,000 of 256 x 256.
    """

    splits = False

    def __init__(self, path):
        if not Path(path).exists():
            raise SystemExit(f"{path}: no such file")
        with np.load(path) as arrays, arrays.zip.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            if dtype != np.uint8 or shape[3:] != (3,):
                raise SystemExit(f"{path}: arr_0 is {dtype} {shape}, but samples are uint8 "
                                 f"(N, H, W, 3) in 0..255: scale, round and clip them first")
            info = arrays.zip.getinfo("arr_0.npy")
            if info.compress_type == zipfile.ZIP_STORED and not fortran:
                with open(path, "rb") as file:
                    file.seek(info.header_offset)
                    begin = info.header_offset + file.read(500).index(b"\x93NUMPY")
                self.array = partial(np.memmap, path, np.uint8, "r", begin + member.tell(), shape)
            else:
                self.array = partial(np.asarray, arrays["arr_0"])
            self.labels = arrays["arr_1"] if "arr_1" in arrays else np.zeros(shape[0], int)
            if self.labels.dtype.kind not in "iu":
                raise SystemExit(f"{path}: the class labels, arr_1, are {self.labels.dtype}, but "
                                 f"must be integers")
            # numbers: an npz has no names
            self.classes = [str(n) for n in range(self.labels.max() + 1) if "arr_1" in arrays]

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"sample {i}"

    def load(self, i, size=0, fast=False):
        return Image.fromarray(self.array()[i]), int(self.labels[i])  # mapped anew in each worker

    def signature(self):
        some = [self.array()[i].tobytes() for i in spread(len(self), 100)]
        return digest(self.labels.tobytes(), *some)


def files_below(root, folder="", seen=()):
    """Names of all files below, relative to `root`. Links are followed, but not round in circles;
    links to nothing and hidden files are left out."""
    here = os.path.realpath(root / folder)
    if here in seen:
        return
    for entry in os.scandir(here):  # which knows what an entry is; only links need a look
        name = os.path.join(folder, entry.name)
        if entry.name.startswith(".") or entry.is_symlink() and not os.path.exists(entry):
            continue
        if entry.is_dir():
            yield from files_below(root, name, (*seen, here))
        else:
            yield name


class Torchvision(Dataset):
    """A data set of torchvision.datasets by name, downloaded to data/ the first time. It has labels
    if it has one an image and names for them."""

    WORDS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}

    def __init__(self, name, split):
        make = getattr(torchvision.datasets, name, None)
        flags = inspect.signature(make).parameters if make else {}
        if "download" not in flags:
            raise SystemExit(f"torchvision:{name}: torchvision downloads no data set of that name")
        self.spec, self.splits = f"torchvision:{name}", bool({"train", "split"} & flags.keys())

        def construct():  # a set has `train`, or `split` with one of these words, or neither
            for word, download in itertools.product(self.WORDS[split], (False, True)):
                given = dict(root="data", download=download, train=split == "train", split=word)
                try:
                    return make(**{key: given[key] for key in given if key in flags})
                except (ValueError, RuntimeError, OSError) as error:
                    reason = error
            raise reason

        self.set = runtime.main_first(construct)
        named = getattr(self.set, "classes", ()) if isinstance(self.set[0][1], int) else ()
        self.classes = [c if isinstance(c, str) else c[0] for c in named]  # Imagenette's have many

    def __len__(self):
        return len(self.set)

    def name(self, i):
        return f"image {i}"

    def load(self, i, size=0, fast=False):
        image, label = self.set[i][:2]
        return image.convert("RGB"), label if self.classes else 0

    def signature(self):
        some = [self.load(i)[0].tobytes() for i in spread(len(self), 16)]
        return digest(f"{self.spec} {len(self)}", *some)


class Lsun(Dataset):
    """An LSUN lmdb: key -> bytes of a JPEG or WebP. It is opened anew for each read (0.1 ms), since
    an open one must not cross into a worker; so it is not torchvision's reader."""

    classes, splits = (), False

    def __init__(self, path):
        self.path = path
        if not Path(path).exists():
            raise SystemExit(f"lsun:{path}: no such folder")
        with self.read() as transaction:
            self.keys = np.array(list(transaction.cursor().iternext(values=False)))

    def read(self):
        import lmdb
        env = lmdb.open(self.path, readonly=True, lock=False, readahead=False, meminit=False)
        return env.begin()

    def __len__(self):
        return len(self.keys)

    def name(self, i):
        return os.fsdecode(self.keys[i])

    def load(self, i, size=0, fast=False):
        with self.read() as transaction:
            file = io.BytesIO(transaction.get(bytes(self.keys[i])))
            return decode(file, size if fast else 0), 0

    def signature(self):
        return digest(self.keys.tobytes())


def digest(*parts):
    """A short hash of bytes and strings."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:16]


def decode(file, at_least=0):
    """A PIL image in RGB: EXIF rotation applied, transparency over white, 16 bits scaled to 8. A
    JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides stay >= at_least > 0, which
    saves most of the work."""
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    if at_least:
        image.draft(None, (at_least, at_least))
    image.load()
    with contextlib.suppress(Exception):  # of a broken EXIF block: the pixels are there
        ImageOps.exif_transpose(image, in_place=True)
    if image.format == "PPM" and image.mode == "I":  # PIL scales its white to 65535
        image = image.convert("I;16")
    if image.mode in ("F", "I"):
        raise ValueError(f"mode {image.mode}: nobody knows which value is white")
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image, np.float32) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# ----------------------------------------------------------------------------- crops and order

def square(image, size, x, y, side):
    """The square of a PIL image at (x, y), resized -> uint8 (size, size, 3)."""
    box = (x, y, x + side, y + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def center(image, size):
    """The validation transform: shorter side to `size`, centre crop."""
    side = min(image.size)
    return square(image, size, (image.width - side) / 2, (image.height - side) / 2, side)


def augment(image, size, crop, rng):
    """The training transforms, -> uint8 (size, size, 3). Paper: silent; RQ-VAE's for LSUN.

    random  (ImageNet): shorter side to `size`, random crop, flip.
    resized (FFHQ):     a square of 0.75 to 1 of the area, resized, flip.
    center  (LSUN):     shorter side to `size`, centre crop."""
    if crop == "center":
        return center(image, size)
    side = min(image.size)
    if crop == "resized":
        side = round(side * np.sqrt(rng.uniform(0.75, 1)))
    x, y = (round(rng.uniform(0, length - side)) for length in image.size)
    pixels = square(image, size, x, y, side)
    return pixels[:, ::-1] if rng.uniform() < 0.5 else pixels


def to_tensor(array):
    """uint8 (H, W, 3) -> uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


class TrainImages(Dataset):
    """Item n of the endless training stream: (uint8 (3, S, S), label, ""). For an unreadable image
    the next readable one, with the name and the reason last."""

    def __init__(self, source, size, crop, seed):
        self.source, self.size, self.crop, self.seed = source, size, crop, seed
        self.epoch = -1

    def __getitem__(self, n):
        epoch, j = divmod(n, len(self.source))
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch, ORDER])
            self.epoch, self.order = epoch, rng.permutation(len(self.source))
        return self.view(int(self.order[j]), n)

    def view(self, index, n):
        """Image `index`, cropped and flipped by the generator of (seed, n)."""
        rng, bad = np.random.default_rng([self.seed, n]), ""
        # `resized` cuts out a part: decode a little larger, so that it still has `size` pixels
        size = int(np.ceil(self.size / np.sqrt(0.75))) if self.crop == "resized" else self.size
        for i in itertools.chain(range(index, len(self.source)), range(index)):
            try:
                image, label = self.source.load(i, size, fast=True)
            except Exception as error:  # PIL raises nearly anything on bad files
                bad = bad or f"{self.source.name(i)!r} ({type(error).__name__}: {error})"
                continue
            return to_tensor(augment(image, self.size, self.crop, rng)), label, bad
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, bad


class EvalImages(Dataset):
    """Image i under the validation transform (size 0: as it is): (uint8 (3, S, S), label, ""), or
    black, 0, reason."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            image, label = self.source.load(i, self.size)
        except Exception as error:
            bad = f"{self.source.name(i)!r} ({type(error).__name__}: {error})"
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, bad
        return to_tensor(center(image, self.size) if self.size else np.asarray(image)), label, ""


def to_float(images, device):
    """uint8 (B, 3, S, S) -> float in [-1, 1] on the device, channels last."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return images.float().div_(127.5).sub_(1)


def to_uint8(images):
    """Float (B, 3, S, S) in [-1, 1], or a little outside -> uint8 of the same shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ------------------------------------------------------------------------------------- batches

def loader(dataset, batches, workers, device):
    """A DataLoader over given batches of indices."""
    workers = min(workers, os.cpu_count())
    multiprocessing.util.Finalize(None, runtime.end_workers, exitpriority=0)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                      worker_init_fn=runtime.in_worker, pin_memory=device.type == "cuda",
                      prefetch_factor=PREFETCH if workers else None)


def check_shared_memory(workers, batch_bytes):
    """Workers hand batches over in /dev/shm. In a container it is small, and where it is full a
    worker dies and the run may hang."""
    workers = min(workers, os.cpu_count()) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = workers * PREFETCH * batch_bytes
    if needed and os.path.isdir("/dev/shm") and needed > shutil.disk_usage("/dev/shm").free:
        raise SystemExit(f"/dev/shm is too small for what {workers} data workers hold, "
                         f"{needed >> 20} MiB: lower --workers, or start the container with "
                         f"--ipc=host or --shm-size={needed // 2 ** 30 + 1}g")


def train_loader(dataset, args, start, device):
    """Micro-batches of this process, from step `start` to args.iters, args.accum of them a step."""
    check_shared_memory(args.workers, runtime.micro_batch(args) * 3 * dataset.size ** 2)
    runtime.barrier()  # all have looked before one takes some of it
    batches = (positions(args, step, a)
               for step in range(start, args.iters) for a in range(args.accum))
    return loader(dataset, batches, args.workers, device)


def positions(args, step, a):
    """Positions in the endless stream of images that micro-batch a of a step has in this process.
    """
    b = runtime.micro_batch(args)
    first = step * args.batch_size + (a * runtime.world() + runtime.rank()) * b
    return range(first, first + b)


def eval_loader(dataset, batch_size, workers, device, count=None):
    """`count` images (None: all), evenly spread, dealt out over the processes batch by batch."""
    chosen = spread(len(dataset), count)
    batches = [chosen[i:i + batch_size] for i in range(0, len(chosen), batch_size)]
    return loader(dataset, batches[runtime.rank()::runtime.world()], workers, device)


def spread(total, count=None):
    """At most `count` of `total` indices, evenly spread: a list. None: all of them."""
    return np.linspace(0, total - 1, min(count or total, total)).astype(int).tolist()


class Unreadable:
    """Names and counts unreadable images of a source, as batches report them."""

    def __init__(self, source):
        self.total, self.found = len(source), set()

    def note(self, reasons):
        for reason in {*reasons} - self.found - {""}:
            self.found.add(reason)
            print(f"skipped: {reason}", flush=True)

    def too_many(self):
        """Why training can't go on, or "": all, or more than ten and more than 1 %."""
        if len(self.found) <= min(self.total - 1, max(10, MAX_BAD * self.total)):
            return ""
        return (f"{len(self.found)} of {self.total} images can't be read: look at them with "
                f"python data.py --data ...")


def save_grid(path, images, columns, names=()):
    """Save uint8 images (N, 3, H, W) as one PNG, row by row, small ones enlarged. names: what
    stands to the left of each row."""
    scale = max(1, 96 // images.shape[-1])
    sheet = make_grid(images.cpu(), columns, pad_value=255).permute(1, 2, 0).numpy()
    sheet = Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1))
    if names:
        bare, font = sheet, ImageFont.load_default(15)
        left = max(int(font.getlength(name)) for name in names) + 20
        sheet = Image.new("RGB", (left + bare.width, bare.height), "white")
        sheet.paste(bare, (left, 0))
        for row, name in enumerate(names):
            y = scale * (2 + (images.shape[2] + 2) * row + images.shape[2] / 2)
            ImageDraw.Draw(sheet).text((left - 8, y), name, "black", font, anchor="rm")
    runtime.save_file(path, lambda file: sheet.save(file, "PNG"))


# -------------------------------------------------------------------------------- python data.py

def main():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--data", default="shapes", help="as of the training scripts")
    add("--split", choices=("train", "val"),
        help="a part of it; default: all of a folder, of other sets the part that is trained on")
    add("--image_size", type=runtime.at_least_1, default=256, help="side of the processed images")
    add("--out", help="write the processed images there as PNG, in class folders")
    add("--count", type=runtime.at_least_1, help="so many images, evenly spread; default: all")
    add("--preview", default="preview.png", help="where the preview goes")
    add("--workers", type=int, default=8, help="data loading processes")
    args = parser.parse_args()
    source = open_source(args.data, args.split or "train", hold_out=bool(args.split))
    print(f"{args.data}: {len(source)} images, {len(source.classes)} classes", flush=True)
    images, chosen = EvalImages(source, args.image_size), spread(len(source), args.count)
    progress, classes, bad = runtime.Progress(len(chosen)), collections.Counter(), 0
    batches = loader(images, [[i] for i in chosen], args.workers, torch.device("cpu"))
    for done, (i, (pixels, label, reasons)) in enumerate(zip(chosen, batches), 1):
        name = source.classes[label] if source.classes else ""
        if reasons[0]:
            bad += 1
            print(f"  unreadable: {reasons[0]}", flush=True)
        elif pixels.min() == pixels.max():
            print(f"  of one colour after the crop: {source.name(i)!r}", flush=True)
        if args.out and not reasons[0]:
            path = Path(args.out) / name.replace("/", "_") / f"{i:08}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(path)
        classes[name] += not reasons[0]
        progress.show(f"{done} of {len(chosen)}", done, every_s=10)
    shown = torch.stack([images[i][0] for i in spread(len(source), 40)])
    save_grid(args.preview, shown, columns=8)
    for number, name in enumerate(source.classes):
        print(f"  {number} {name}: {classes[name]}")
    print(f"  unreadable: {bad} of {len(chosen)}; preview in {args.preview}")
    if bad > MAX_BAD * len(chosen):
        raise SystemExit(f"{bad} of {len(chosen)} images can't be read: remove or repair them")


if __name__ == "__main__":
    main()
