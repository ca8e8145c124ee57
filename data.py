"""Images: where they come from, how they are cropped, and in which order they are seen.

    python data.py --data /data/photos                        # check a data set, write preview.png
    python data.py --data /data/imagenet/val --image_size 256 --out val256 --n 50000   # processed copies as PNG

A source has len(source), source.classes (names, empty if unlabelled), label(i), name(i), signature() (a hash of what
is in it), drawn (True: drawn at any size), splits (True: it has validation images of its own) and load(i, at_least),
which gives a PIL image in RGB. Sources: a folder of class folders, a flat folder, `torchvision:NAME` (a data set of
torchvision, downloaded to data/), `lsun:PATH` (an LSUN lmdb), `shapes` (drawn pictures, miniature/shapes.py).

Order: sample n = step * batch_size + position shows image permutation(seed, n // N)[n % N], cropped and flipped by
a generator seeded with (seed, n). So a batch depends on seed, step and position alone, not on the number of
processes or workers, and to resume is to start at another step.
"""
import contextlib
import difflib
import hashlib
import inspect
import io
import itertools
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid

import runtime
from runtime import BadInput

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# By content, whatever the name says. Not all that PIL knows: it would have Ghostscript run a PostScript "photo.jpg".
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
CROPS = ("random", "resized", "center")
MAX_BAD = 0.01  # a larger share of unreadable images stops a run


class Unreadable(Exception):
    """An image that can't be decoded; the text names it."""


# -------------------------------------------------------------------------------------------------- sources

def open_source(spec, split="train"):
    """The source that `--data` or `--val` names. `split` ("train" or "val") counts where a source has `splits`."""
    if spec == "shapes":
        from miniature.shapes import Shapes
        return Shapes(split)
    if spec.startswith("torchvision:"):
        return Torchvision(spec.removeprefix("torchvision:"), split)
    return Lsun(spec.removeprefix("lsun:")) if spec.startswith("lsun:") else Folder(spec)


def open_part(spec, split, part=True):
    """As open_source, but of a source without splits its `part` from `hold_out`, or all of it."""
    source = open_source(spec, split)
    return hold_out(source, spec)[split == "val"] if part and not source.splits else source


def open_data(args, like=None):
    """--data and --val -> training source, validation source. Without --val it is the source's own validation split,
    or a share of the training images (`hold_out`). Without --data they are those of `like`, a checkpoint's args."""
    if like and not args.data:
        args.data, args.val = like["data"], args.val or like["val"]
        if runtime.is_main():
            print(f"no --data: {args.data}, as the tokenizer was trained on", flush=True)
    began, source = time.perf_counter(), open_source(args.data or "shapes")
    if not args.data:
        args.data, _ = "shapes", [source.load(i, args.image_size) for i in range(5)]
        if runtime.is_main():
            print(f"NO --data: TRAINING ON DRAWN PICTURES (shapes), {5 / (time.perf_counter() - began):.0f} a second "
                  f"and core at this size; real images: --data FOLDER, torchvision:NAME or lsun:PATH", flush=True)
    check_size(source, args.image_size, args.data)
    if args.val or source.splits:
        val = open_source(args.val or args.data, "val")
        check_size(val, args.image_size, args.val or args.data)
    else:
        source, val = hold_out(source, args.data)
        if runtime.is_main():
            print(f"no --val: {len(val)} of the images are held out for validation", flush=True)
    if len(source) < args.batch_size:
        raise BadInput(f"--data {args.data} has {len(source)} training images, fewer than --batch_size "
                       f"{args.batch_size}: use a smaller batch")
    return source, val


def hold_out(source, spec):
    """Training and validation part of a source without a split of its own: 2 % are held out, 64 at least and 5,000 at
    most, the same ones in every script."""
    held = choose(len(source), min(max(64, len(source) // 50), 5000))
    kept = np.setdiff1d(np.arange(len(source)), held)
    if len(kept) < 64:
        raise BadInput(f"{spec} has {len(source)} images, too few to hold out 64 of them for validation: give --val")
    if isinstance(source, Folder) and source.classes:
        counts = np.bincount(source.labels[kept], minlength=len(source.classes))
        if not counts.all():
            raise BadInput(f"the validation images held out of {spec} are all of class "
                           f"{source.classes[counts.argmin()]}: give --val, or remove so small a class")
    return Part(source, kept), Part(source, held)


class Part:
    """The images `index` of a source, as a source."""

    splits = False

    def __init__(self, source, index):
        self.source, self.index, self.classes, self.drawn = source, index, source.classes, source.drawn

    def __len__(self):
        return len(self.index)

    def label(self, i):
        return self.source.label(int(self.index[i]))

    def name(self, i):
        return self.source.name(int(self.index[i]))

    def signature(self):
        return hashlib.sha256(self.source.signature().encode() + self.index.tobytes()).hexdigest()[:16]

    def load(self, i, at_least=0):
        return self.source.load(int(self.index[i]), at_least)


class Folder:
    """A folder of class folders (labels in alphabetical order, any depth below), or a flat folder (no labels)."""

    drawn = splits = False

    def __init__(self, root):
        def fail(error):  # a folder that can't be entered must not pass for an empty one
            raise error

        self.root = Path(root)
        if not self.root.is_dir():
            raise BadInput(f"{root}: no such folder; --data takes a folder of images, torchvision:NAME, lsun:PATH or "
                           f"shapes")
        names = [os.path.relpath(os.path.join(base, name), root)
                 for base, _, files in os.walk(root, onerror=fail, followlinks=True) for name in files]
        names = [name for name in names if not name.startswith(".") and os.sep + "." not in name]
        found = sorted((name.split(os.sep)[0] if os.sep in name else "", name) for name in names
                       if name.lower().endswith(EXTENSIONS))
        if not found:
            raise BadInput(f"{root} holds no images ({' '.join(EXTENSIONS)})")
        if len(found) < len(names) and runtime.is_main():
            print(f"note: {len(names) - len(found)} file(s) in {root} are left out, no images by name", flush=True)
        self.classes = sorted({folder for folder, _ in found} - {""})
        if self.classes and not found[0][0]:
            raise BadInput(f"{root} holds both images ({found[0][1]}, ...) and class folders of images "
                           f"({self.classes[0]}, ...): move one of them elsewhere")
        # One array of bytes, not a list of strings: workers share its memory, reference counts would copy it.
        self.files = np.array([os.fsencode(name) for _, name in found])
        index = {folder: i for i, folder in enumerate(self.classes)}
        self.labels = np.array([index.get(folder, 0) for folder, _ in found], np.int64)

    def __len__(self):
        return len(self.files)

    def label(self, i):
        return int(self.labels[i])

    def name(self, i):
        return str(self.root / os.fsdecode(self.files[i]))

    def signature(self):
        some = spread(len(self), 1000)  # names alone may be 00000.png, 00001.png
        sizes = np.array([os.stat(self.name(i)).st_size for i in some])
        return hashlib.sha256(self.files.tobytes() + self.labels.tobytes() + sizes.tobytes()).hexdigest()[:16]

    def load(self, i, at_least=0):
        return decode(self.name(i), self.name(i), at_least)


class Torchvision:
    """A data set of torchvision.datasets by name, in data/, where it is downloaded to the first time. It is unlabelled
    unless it has one label an image and names for them."""

    drawn = False

    def __init__(self, name, split):
        sets = {key: inspect.signature(getattr(torchvision.datasets, key)).parameters
                for key in torchvision.datasets.__all__}
        names = [key for key, flags in sets.items() if key == "FakeData" or "download" in flags
                 and all(flag.default is not flag.empty for flag in flags.values() if flag.name != "root")]
        if name not in names:
            close = difflib.get_close_matches(name, names, 5, 0.5) or names
            raise BadInput(f"torchvision:{name}: no data set that torchvision downloads, but {', '.join(close)}")
        flags, self.spec, self.last = sets[name], f"torchvision:{name}", (-1, None)
        self.splits = not flags.keys().isdisjoint({"train", "split"})
        words = ("train", "trainval", "train-standard") if split == "train" else ("val", "valid", "test")

        def construct(download):
            for word in words:  # a set has `train`, or `split` with one of these words, or neither
                options = dict(root="data", download=download, train=split == "train", split=word)
                try:
                    options = {key: value for key, value in options.items() if key in flags}
                    return getattr(torchvision.datasets, name)(**options)
                except ValueError as error:
                    unknown = error
            raise unknown

        def download_once():
            try:
                return construct(False)
            except (RuntimeError, OSError):
                return construct(True)

        with runtime.explain(f"{self.spec} is not in data/, and can't be downloaded: ",
                             (RuntimeError, OSError, ValueError)):
            self.set = runtime.main_first(download_once)
        with runtime.explain(f"{self.spec} is no set of images: ", Exception):
            image, label = self.set[0][:2]
            image.convert("RGB")
        classes = getattr(self.set, "classes", None) or range(getattr(self.set, "num_classes", 0))
        classes = [c if isinstance(c, (str, int)) else c[0] for c in classes]  # Imagenette's have several names
        self.classes = [str(c).replace("/", "_") for c in classes if isinstance(label, int)]
        if not self.classes and runtime.is_main():
            print(f"note: {self.spec} is used without labels: it has not one label an image, or no names for them")

    def __len__(self):
        return len(self.set)

    def item(self, i):  # the last one is kept: its label is asked for after its image
        if self.last[0] != i:
            self.last = i, self.set[i]
        return self.last[1]

    def label(self, i):
        return self.item(i)[1] if self.classes else 0

    def name(self, i):
        return f"{self.spec} image {i}"

    def signature(self):
        some = b"".join(self.load(i).tobytes() for i in spread(len(self), 16))
        return hashlib.sha256(f"{self.spec} {len(self)}".encode() + some).hexdigest()[:16]

    def load(self, i, at_least=0):
        try:
            return self.item(i)[0].convert("RGB")
        except Exception as error:
            raise Unreadable(f"{self.name(i)} ({type(error).__name__}: {error})") from None


class Lsun:
    """An LSUN lmdb: key -> bytes of a JPEG or WebP. torchvision's reader opens the database when constructed, which
    does not survive the move to a worker, and leaves a pickle in the working directory; so it is read here."""

    classes, drawn, splits = (), False, False

    def __init__(self, path):
        self.path = path
        with self.read() as transaction:
            self.keys = np.array(list(transaction.cursor().iternext(values=False)))
        if not len(self.keys):
            raise BadInput(f"lsun:{path} is empty")

    @contextlib.contextmanager
    def read(self):
        """A read transaction. The database is opened anew each time, which takes 0.1 ms: it must not cross a fork, nor
        be open twice in one process."""
        import lmdb
        with runtime.explain(f"lsun:{self.path} is no lmdb, or can't be read: ", lmdb.Error), \
                lmdb.open(self.path, readonly=True, lock=False, readahead=False, meminit=False) as env:
            if os.path.getsize(f"{self.path}/data.mdb") < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
                raise BadInput(f"lsun:{self.path} was cut short: download it again")  # to read it would be a bus error
            with env.begin() as transaction:
                yield transaction

    def __len__(self):
        return len(self.keys)

    def label(self, i):
        return 0

    def name(self, i):
        return f"lsun:{self.path} key {self.keys[i].decode(errors='replace')}"

    def signature(self):
        some = self.keys[spread(len(self), 1000)]
        with self.read() as transaction:  # of some images the sizes, too: a smaller copy has the same keys
            sizes = np.array([len(transaction.get(bytes(key))) for key in some])
        return hashlib.sha256(self.keys.tobytes() + sizes.tobytes()).hexdigest()[:16]

    def load(self, i, at_least=0):
        with self.read() as transaction:
            return decode(io.BytesIO(transaction.get(bytes(self.keys[i]))), self.name(i), at_least)


def decode(file, name, at_least=0):
    """A PIL image in RGB: EXIF rotation applied, transparency over white, 16 bits scaled to 8. A JPEG is decoded at
    1/2, 1/4 or 1/8 of its size where both sides stay >= at_least > 0 (most of the work is saved). Raises Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
            if at_least:
                image.draft(None, (at_least, at_least))
            ImageOps.exif_transpose(image, in_place=True)  # in place, and below only what must be: a copy costs 0.1 ms
            if image.mode in ("F", "I"):  # floats and 32 bits a pixel: nobody knows where white is
                raise ValueError(f"mode {image.mode}")
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = Image.fromarray((np.asarray(image, np.float32) / 257).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more on bad files
        raise Unreadable(f"{name} ({type(error).__name__}: {error})") from None


# -------------------------------------------------------------------------------------------- crops and order

def center(image, size):
    """The validation transform: shorter side to `size`, centre crop. PIL image -> uint8 (size, size, 3)."""
    (w, h), side = image.size, min(image.size)
    x, y = (w - side) / 2, (h - side) / 2
    # Crop and resize in one: `box` takes the square of the original that the crop of the resized image would show.
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)))


def augment(image, size, crop, rng):
    """The training transforms, -> uint8 (size, size, 3). Paper: silent; for LSUN it follows RQ-VAE, whose they are.

    random  (ImageNet): shorter side to `size`, random crop, flip.
    resized (FFHQ):     a square of 0.75 to 1 of the area, resized, flip.
    center  (LSUN):     shorter side to `size`, centre crop."""
    if crop == "center":
        return center(image, size)
    w, h = image.size
    side = round(min(w, h) * np.sqrt(rng.uniform(0.75, 1))) if crop == "resized" else min(w, h)
    x, y = round(rng.uniform(0, w - side)), round(rng.uniform(0, h - side))
    # The square of the original that the crop of the resized image would show, and only that is resized: by PyTorch,
    # whose bicubic filter for bytes is PIL's (within 1 of 255), at four times its speed.
    pixels = torch.from_numpy(np.array(image.crop((x, y, x + side, y + side)))[None]).permute(0, 3, 1, 2)
    if side != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    if rng.uniform() < 0.5:
        pixels = pixels.flip(-1)
    return pixels[0].permute(1, 2, 0).numpy()


def to_tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


class TrainImages(Dataset):
    """Item n of the endless training stream: (uint8 (3, S, S), label, -1), or with an unreadable image's index last
    and the next readable image in its place."""

    def __init__(self, source, size, crop, seed):
        self.source, self.size, self.crop, self.seed = source, size, crop, seed
        self.epoch, self.order = -1, None

    def __getitem__(self, n):
        epoch, j = divmod(n, len(self.source))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.source))
        return self.view(int(self.order[j]), n)

    def view(self, index, n):
        """Image `index`, cropped and flipped by the generator of (seed, n)."""
        rng = np.random.default_rng([self.seed, n])
        # `resized` cuts out a part: decode a little larger, so that the part still has `size` pixels
        at_least = self.size if self.crop != "resized" else int(np.ceil(self.size / np.sqrt(0.75)))
        for i in itertools.chain(range(index, len(self.source)), range(index)):
            with contextlib.suppress(Unreadable):
                image = augment(self.source.load(i, at_least), self.size, self.crop, rng)
                return to_tensor(image), self.source.label(i), -1 if i == index else index
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, index  # nothing is readable: `Bad` ends it


class EvalImages(Dataset):
    """Image i under the validation transform: (uint8 (3, S, S), label, -1); with i last where it can't be read."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:  # all that is not drawn is decoded whole: metrics need the exact pixels
            image = self.source.load(i, self.size if self.source.drawn else 0)
        except Unreadable:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, i
        return to_tensor(center(image, self.size)), self.source.label(i), -1


def to_float(images, device):
    """uint8 (B, 3, H, W) on the host -> float in [-1, 1] on the device, channels last (a quarter of the traffic)."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return images.float().div_(127.5).sub_(1)  # in place: new memory is what costs a CPU most


def to_uint8(images):
    """Float (B, 3, H, W) in [-1, 1], or a little outside -> uint8 of the same shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# -------------------------------------------------------------------------------------------------- batches

def _in_worker(_):
    # Ctrl-C and a group-wide SIGTERM reach the workers too, but the training process has a step to finish and a file
    # to write. So the first is ignored; on the second they leave 20 s later (ignoring it would hang the parent's exit).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
    torch.set_num_threads(1)


def loader(dataset, batches, workers, device):
    """A DataLoader over given batches of indices."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=_in_worker,
                      pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None)


def train_loader(dataset, args, start, device):
    """Micro-batches of this process, from step `start` to args.iters, args.accum of them a step.

    Micro-batch a of process r holds the positions [(a * world + r) * b, ... + b) of the global batch."""
    b = runtime.micro_batch(args)
    firsts = (step * args.batch_size + (a * runtime.world() + runtime.rank()) * b
              for step in range(start, args.iters) for a in range(args.accum))
    return loader(dataset, (range(n, n + b) for n in firsts), args.workers, device)


def choose(total, n):
    """Indices of all images (n 0), or of n drawn at random, always the same (the first n may be of one class)."""
    return np.sort(np.random.RandomState(0).permutation(total)[:n]) if 0 < n < total else np.arange(total)


def spread(total, n):
    """At most n of `total` indices, evenly spread: a list."""
    return np.unique(np.linspace(0, total - 1, n).astype(int)).tolist()


def eval_loader(dataset, batch_size, workers, device, n=0):
    """All images, or `choose`'s n, each once. Batches are dealt out over the processes in turn, none is padded."""
    chosen = choose(len(dataset), n)
    batches = [chosen[i:i + batch_size].tolist() for i in range(0, len(chosen), batch_size)]
    return loader(dataset, batches[runtime.rank()::runtime.world()], workers, device)


class Bad:
    """Names and counts unreadable images as the batches report them (their index, -1 for a good one); more than
    1 % of the set stops the run."""

    def __init__(self, source):
        self.source, self.found, self.seen = source, set(), 0

    def __call__(self, indices):
        self.seen += len(indices)
        for i in set(indices[indices >= 0].tolist()) - self.found:
            self.found.add(i)
            print(f"skipped: unreadable image {self.source.name(i)} ({len(self.found)} so far)", flush=True)
        # of the set, or of what this process has seen of it: eight processes meet an eighth each
        if len(self.found) > MAX_BAD * min(len(self.source), max(self.seen, 1000)):
            raise BadInput(f"{len(self.found)} of {len(self.source)} images can't be read, the last one "
                           f"{self.source.name(i)}: check the data with `python data.py --data ...`")


def check_size(source, size, spec):
    """Refuse a source most of whose images are smaller than the crop (64 are opened); a few small ones are enlarged, as
    ImageNet has some."""
    sides = []
    for i in spread(len(source), 64) if size and not source.drawn else ():
        with contextlib.suppress(Unreadable):  # one that can't be read is reported when it is met
            sides.append(min(source.load(i, size).size))
    if sides and (median := int(np.median(sides))) < size:
        raise BadInput(f"{spec}: images are smaller than the crop (median shorter side {median}, --image_size {size}): "
                       f"use a smaller --image_size or larger images")


def check_image_size(size, multiple):
    if size % multiple:
        raise BadInput(f"--image_size {size} is not a multiple of {multiple}, by which the network reduces it")


def save_grid(path, images, columns):
    """Save float images (N, 3, H, W) in [-1, 1] as one PNG, row by row, with a border of two white pixels. Small ones
    are enlarged: tiles of 32 pixels are too small to look at."""
    scale = max(1, 96 // images.shape[-1])
    sheet = make_grid(to_uint8(images).cpu(), columns, pad_value=255).permute(1, 2, 0).numpy()
    sheet = Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1))
    runtime.save_file(path, lambda file: sheet.save(file, "PNG"))


# ------------------------------------------------------------------------------------------- python data.py

def main():
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--data", default="shapes", help="as of the training scripts")
    add("--split", choices=["train", "val"], help="of a folder what is not held out for validation, or what is "
        "(default: all)")
    add("--image_size", type=runtime.positive, default=256, help="side of the processed images")
    add("--out", default="", help="write the processed images there as PNG, in class folders")
    add("--n", type=runtime.count, default=0, help="the first N images only (0: all)")
    add("--preview", default="preview.png", help="where the preview goes")
    add("--workers", type=runtime.count, default=min(8, os.cpu_count()), help="data loading processes")
    args = parser.parse_args()
    device, source = torch.device("cpu"), open_part(args.data, args.split or "train", bool(args.split))
    if args.out and Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise BadInput(f"--out {args.out} is not empty: choose another folder")
    n = min(args.n or len(source), len(source))
    print(f"{args.data}: {len(source)} images, {len(source.classes)} classes", flush=True)
    counts, images, bad = np.zeros(max(1, len(source.classes)), int), EvalImages(source, args.image_size), 0
    progress = runtime.Progress(n, "decoded")
    batches = [range(n)[i:i + 64] for i in range(0, n, 64)]
    for rows, (pixels, labels, index) in zip(batches, loader(images, batches, args.workers, device)):
        for i, image, label, unreadable in zip(rows, pixels, labels.tolist(), (index >= 0).tolist()):
            if unreadable:
                bad += 1
                print(f"  unreadable: {source.name(i)}", flush=True)
                continue
            counts[label] += 1
            if args.out:
                folder = Path(args.out) / (source.classes[label] if source.classes else "")
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:08}.png")
        progress(len(pixels))
    shown = [images[i][0] for i in spread(n, 40)]
    save_grid(args.preview, to_float(torch.stack(shown), device), columns=8)
    for name, number in list(zip(source.classes, counts))[:20]:
        print(f"  {name}: {number}")
    print(f"  unreadable: {bad} of {n}; preview in {args.preview}")
    if bad > MAX_BAD * n:
        raise BadInput(f"{bad} of {n} images of {args.data} can't be read: remove or repair them")
    check_size(source, args.image_size, args.data)


if __name__ == "__main__":
    runtime.run(main)
