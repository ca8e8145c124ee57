"""Images: where they come from, how they are cropped, and in which order they are seen.

    python data.py --data shapes                              # check a data set, write preview.png
    python data.py --data /data/imagenet/val --image_size 256 --out val256 --n 50000   # processed copies as PNG

A source has len(source), source.classes (names, empty if unlabelled), label(i), name(i), signature() (a hash of what
is in it) and load(i, at_least), which gives a PIL image in RGB. Sources: `shapes` (drawn here, nothing to download), a
folder of class folders, a flat folder, FILE.tar or a folder of tar files (read in place), `lsun:PATH` (an lmdb).

Order: sample n = step * batch_size + position shows image permutation(seed, n // N)[n % N], cropped and flipped by
a generator seeded with (seed, n). So a batch depends on seed, step and position alone, not on the number of
processes or workers, and resuming is starting at another step.
"""
import hashlib
import io
import os
import re
import signal
import tarfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset

import runtime
from runtime import BadInput

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# By content, whatever the name says. Not all that PIL knows: it would have Ghostscript run a PostScript "photo.jpg".
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_BAD = 0.01  # a larger share of unreadable images stops a run


class Unreadable(Exception):
    """An image that can't be decoded; the text names it."""


# ------------------------------------------------------------------------------------------- sources

def open_source(spec, split="train"):
    """The source that `--data` or `--val` names. Only `shapes` knows `split`: "val" has pictures of its own."""
    if spec == "shapes":
        return Shapes(split)
    if spec.startswith("lsun:"):
        return Lsun(spec.removeprefix("lsun:"))
    tars = Tar.files(spec)
    return Tar(spec, tars) if tars else Folder(spec)


class Folder:
    """A folder of class folders (labels in alphabetical order, any depth below), or a flat folder (no labels)."""

    def __init__(self, root):
        def fail(error):  # a folder that can't be entered must not pass for an empty one
            raise BadInput(f"{error.filename} can't be read ({error.strerror})")

        self.root = Path(root)
        if not self.root.is_dir():
            raise BadInput(f"{root}: no such folder; --data takes shapes, lsun:PATH, a tar file, or a folder "
                           f"of images or of tar files")
        folders = sorted(e.name for e in os.scandir(self.root) if e.is_dir() and not e.name.startswith("."))
        files, labels, self.classes, others = [], [], [], []
        for folder in folders:
            names = sorted(os.path.relpath(os.path.join(base, name), self.root)
                           for base, _, names in os.walk(self.root / folder, onerror=fail) for name in names)
            found = [name for name in names if _is_image(os.path.basename(name))]
            others += sorted({*names} - {*found})
            if found:
                files += found
                labels += [len(self.classes)] * len(found)
                self.classes.append(folder)
            else:
                others.append(folder + "/")
        visible = sorted(e.name for e in os.scandir(self.root) if e.is_file() and not e.name.startswith("."))
        flat = [name for name in visible if _is_image(name)]
        others += sorted({*visible} - {*flat})
        if others and runtime.is_main():
            print(f"note: {len(others)} file(s) or folder(s) in {root} are no images by their names and are left out: "
                  f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}", flush=True)
        if files and flat:
            raise BadInput(f"{root} holds both images ({flat[0]}, ...) and class folders of images "
                           f"({self.classes[0]}, ...): move one of them elsewhere")
        if not files and not flat:
            raise BadInput(f"{root} holds no images ({' '.join(EXTENSIONS)})")
        # One array of bytes, not a list of strings: workers share its memory, reference counts would copy it.
        self.files = np.array([os.fsencode(f) for f in files or flat])
        self.labels = np.array(labels or [0] * len(flat), np.int64)

    def __len__(self):
        return len(self.files)

    def label(self, i):
        return int(self.labels[i])

    def name(self, i):
        return str(self.root / os.fsdecode(self.files[i]))

    def signature(self):
        some = np.unique(np.linspace(0, len(self) - 1, 1000).astype(int))  # names alone may be 00000.png, 00001.png
        sizes = [os.stat(self.name(i)).st_size for i in some]
        return _hash(self.files.tobytes(), self.labels.tobytes(), np.array(sizes).tobytes())

    def file(self, i):
        """What PIL opens: a path, or a file in memory."""
        return self.name(i)

    def load(self, i, at_least=0):
        return decode(self.file(i), self.name(i), at_least)


def _hash(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _is_image(name):
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


class Tar:
    """Images inside tar files, read in place: nothing is unpacked. FILE.tar, or all tars of a folder.

    The headers are read once; where each image begins is then kept beside the tars (in memory alone, if nothing can
    be written there). After that an image is one read at a known place. An archive inside an archive, as in
    ILSVRC2012_img_train.tar, counts as a folder. Labels: the number in key.cls beside key.jpg (WebDataset); else the
    folder, counted from where the images' paths part (alphabetical order); else none."""

    opened = {}  # path -> descriptor. Of the class: does not travel to a worker; pread makes it safe in a forked one.

    def __init__(self, spec, tars):
        self.spec, self.tars = spec, tars
        stats = [os.stat(tar) for tar in tars]
        stamp = repr([(Path(tar).name, stat.st_size, stat.st_mtime_ns) for tar, stat in zip(tars, stats)])
        store = Path(spec + ".index.npz" if Path(spec).is_file() else Path(spec) / "tars.index.npz")
        if not runtime.is_main():
            runtime.barrier()  # process 0 reads the headers, the others find the index
        index = self._load(store, stamp)
        if index is None:
            index = self._scan(sum(stat.st_size for stat in stats))
            try:
                if runtime.is_main():
                    runtime.save_file(store, lambda file: np.savez(file, stamp=stamp, **index))
            except BadInput:
                print(f"{store} can't be written: the index is kept in memory, and made again next time", flush=True)
        if runtime.is_main():
            runtime.barrier()
        self.names, self.tar, self.offset, self.size, self.labels = (
            index[key] for key in ("names", "tar", "offset", "size", "labels"))
        self.classes = index["classes"].tolist()

    @staticmethod
    def files(spec):
        """The tar files that `spec` names; none if it is a folder with images or folders in it."""
        path = Path(spec)
        if path.is_file():
            return [spec]
        visible = [e for e in os.scandir(path) if not e.name.startswith(".")] if path.is_dir() else []
        if any(e.is_dir() or _is_image(e.name) for e in visible):
            return []
        return sorted(e.path for e in visible if e.name.endswith(".tar"))

    @staticmethod
    def _load(store, stamp):
        try:
            with np.load(store) as file:
                index = {key: file[key] for key in ("names", "tar", "offset", "size", "labels", "classes")}
                return index if str(file["stamp"]) == stamp else None
        except Exception:  # not there, or damaged, which can raise nearly anything: it is made again
            return None

    def _scan(self, size):
        """Read all headers: a dict of arrays, one entry an image, and the names of the classes."""
        images, numbers, progress = [], {}, runtime.Progress(size >> 20, f"index of {self.spec}, MB")
        # ImageNet, unpacked once: a folder of n01440764.tar, n01443537.tar, ...
        by_tar = all(re.fullmatch(r"n\d{8}\.tar", Path(tar).name) for tar in self.tars)
        for t, tar in enumerate(self.tars):
            folder, at = Path(tar).stem if by_tar else "", 0
            with open(tar, "rb") as file:
                for path, offset, size in _members(file, tar):
                    path = os.path.normpath(os.path.join(folder, path.lstrip("/")))
                    head, name = os.path.split(path)
                    key = t, head, name.split(".")[0]  # WebDataset's: up to the first dot
                    if _is_image(name):
                        images.append((path, t, offset, size, key))
                    elif name.endswith(".cls"):
                        text = os.pread(file.fileno(), size, offset).strip()
                        if not (text.isdigit() and int(text) < 1_000_000):
                            raise BadInput(f"{tar}: {path} holds {text[:20]!r}, not the number of a class")
                        numbers[key] = int(text)
                    progress((offset >> 20) - at)
                    at = offset >> 20
        if not images:
            raise BadInput(f"{self.spec} holds no images ({' '.join(EXTENSIONS)})")
        if numbers:
            classes = [str(i) for i in range(max(numbers.values()) + 1)]
            labels = [numbers.get(key, -1) for *_, key in images]
            if -1 in labels:
                raise BadInput(f"{self.spec}: {images[labels.index(-1)][0]} has no .cls file beside it, as others have")
        else:
            common = os.path.commonpath({os.path.dirname(path) for path, *_ in images})
            parts = [os.path.relpath(path, common or ".").split(os.sep) for path, *_ in images]
            classes = sorted({part[0] for part in parts if len(part) > 1})
            if classes and min(map(len, parts)) == 1:
                raise BadInput(f"{self.spec} holds both images and class folders of images ({classes[0]}, ...)")
            where = {name: i for i, name in enumerate(classes)}
            labels = [where.get(part[0], 0) for part in parts]
        rows = sorted((label, *image[:4]) for label, image in zip(labels, images))  # a folder's order
        labels, names, tar, offset, size = zip(*rows)
        return {"names": np.array([os.fsencode(name) for name in names]), "tar": np.array(tar, np.int32),
                "offset": np.array(offset, np.int64), "size": np.array(size, np.int64),
                "labels": np.array(labels, np.int64), "classes": np.array(classes, str)}

    def __len__(self):
        return len(self.names)

    def label(self, i):
        return int(self.labels[i])

    def name(self, i):
        return f"{self.tars[self.tar[i]]}/{os.fsdecode(self.names[i])}"

    def signature(self):
        return _hash(self.names.tobytes(), self.labels.tobytes(), self.size.tobytes())

    def file(self, i):
        tar = self.tars[self.tar[i]]
        if tar not in Tar.opened:
            if len(Tar.opened) >= 256:  # thousands of shards, but descriptors are few
                os.close(Tar.opened.pop(next(iter(Tar.opened))))
            Tar.opened[tar] = os.open(tar, os.O_RDONLY)
        return io.BytesIO(os.pread(Tar.opened[tar], int(self.size[i]), int(self.offset[i])))

    def load(self, i, at_least=0):
        try:
            file = self.file(i)
        except OSError as error:
            raise Unreadable(f"{self.name(i)} ({error})") from None
        return decode(file, self.name(i), at_least)


def _members(file, name):
    """(path, offset, size) of every plain file in an open tar; an archive inside it counts as a folder."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members = []  # it would keep every header that it has read: gigabytes for ImageNet
                if member.isreg() and member.name.endswith(".tar"):
                    for path, offset, size in _members(tar.extractfile(member), f"{name}/{member.name}"):
                        yield f"{member.name[:-4]}/{path}", member.offset_data + offset, size
                elif member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # an archive ends with zeros; tarfile itself is content without
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise BadInput(f"{name} can't be read as a tar file ({error}): it is cut short, damaged, compressed (unpack "
                       f"it to .tar) or something else") from None


class Lsun:
    """An LSUN lmdb: key -> bytes of a JPEG or WebP. torchvision's reader opens the database when constructed, which
    does not survive the move to a worker, and leaves a pickle in the working directory; so it is read here."""

    classes = ()
    opened = {}  # path -> (process, environment)

    def __init__(self, path):
        try:
            import lmdb  # noqa: F401 (optional package, wanted only here)
        except ImportError:
            raise BadInput("lsun:PATH needs the package: pip install lmdb") from None
        self.path = os.path.realpath(path)
        if not (Path(path) / "data.mdb").is_file():
            raise BadInput(f"lsun:{path}: no lmdb there (expected {path}/data.mdb)")
        with self._open().begin() as transaction, runtime.refusing(f"lsun:{path}"):
            self.keys = np.array(list(transaction.cursor().iternext(values=False)))
        if not len(self.keys):
            raise BadInput(f"lsun:{path} is empty")

    def _open(self):
        # Opened where it is used: a handle must not cross a fork, and lmdb allows one per process and path.
        pid, env = Lsun.opened.get(self.path, (None, None))
        if pid != os.getpid():
            import lmdb
            if env:
                env.close()  # the parent's: here this only frees the path
            try:
                env = lmdb.open(self.path, readonly=True, lock=False, readahead=False, meminit=False)
                size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
                if os.path.getsize(os.path.join(self.path, "data.mdb")) < size:  # reading on would be a bus error
                    raise lmdb.Error(f"data.mdb was cut: it had {size} bytes")
            except lmdb.Error as error:
                raise BadInput(f"lsun:{self.path} can't be opened ({error})") from None
            Lsun.opened[self.path] = os.getpid(), env
        return env

    def __len__(self):
        return len(self.keys)

    def label(self, i):
        return 0

    def name(self, i):
        return f"lsun:{self.path} key {self.keys[i].decode(errors='replace')}"

    def signature(self):
        with self._open().begin() as transaction:
            some = self.keys[np.unique(np.linspace(0, len(self) - 1, 1000).astype(int))]
            sizes = [len(transaction.get(bytes(key))) for key in some]
        return _hash(self.keys.tobytes(), np.array(sizes).tobytes())

    def load(self, i, at_least=0):
        with self._open().begin() as transaction:
            return decode(io.BytesIO(transaction.get(bytes(self.keys[i])) or b""), self.name(i), at_least)


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
            if image.mode.startswith("I"):  # 16 bits a pixel
                if not 0 <= image.getextrema()[0] <= image.getextrema()[1] <= 65535:
                    raise ValueError("32 bits a pixel")
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
            if image.mode == "F":  # of which nobody knows where white is
                raise ValueError("floats for pixels")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more on bad files
        raise Unreadable(f"{name} ({type(error).__name__}: {error})") from None


# -------------------------------------------------------------------------------------------- shapes

def _circle(x, y, rx, ry=None, start=0.0, stop=1.0, n=40):
    t = 2 * np.pi * np.linspace(start, stop, n)
    return np.stack([x + rx * np.cos(t), y + (ry or rx) * np.sin(t)], 1)


def _star():
    r, t = np.where(np.arange(10) % 2, 0.45, 1.0), np.pi * (np.arange(10) / 5 - 0.5)
    return [(np.stack([r * np.cos(t), r * np.sin(t)], 1), 0), (_circle(0, 0, 0.2), 1)]


def _heart():
    t = np.linspace(0, 2 * np.pi, 60)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(np.stack([np.sin(t) ** 3, -y / 16.5 - 0.08], 1), 0), (_circle(-0.42, -0.38, 0.15, 0.2), 2)]


def _flower():
    petals = [(_circle(0.6 * np.cos(a), 0.6 * np.sin(a), 0.38), 0) for a in 2 * np.pi * np.arange(6) / 6]
    return petals + [(_circle(0, 0, 0.34), 1)]


def _fish():
    tail = [(0.45, 0), (1, -0.5), (0.88, 0), (1, 0.5)]
    fin = [(-0.1, -0.35), (0.3, -0.75), (0.35, -0.2)]
    return [(tail, 1), (fin, 1), (_circle(-0.2, 0, 0.78, 0.46), 0), (_circle(-0.62, -0.1, 0.15), 2),
            (_circle(-0.65, -0.1, 0.07), 3), (_circle(0.0, 0.08, 0.2, 0.12), 1)]


def _house():
    return [([(-0.72, -0.15), (0.72, -0.15), (0.72, 0.9), (-0.72, 0.9)], 0),
            ([(0.35, -0.8), (0.6, -0.8), (0.6, -0.2), (0.35, -0.2)], 3),
            ([(-1, -0.1), (0, -0.95), (1, -0.1)], 1), ([(-0.18, 0.3), (0.18, 0.3), (0.18, 0.9), (-0.18, 0.9)], 3),
            ([(-0.58, 0.08), (-0.3, 0.08), (-0.3, 0.38), (-0.58, 0.38)], 2),
            ([(0.3, 0.08), (0.58, 0.08), (0.58, 0.38), (0.3, 0.38)], 2)]


def _pine():
    layers = [([(-w, y + 0.62), (0, y), (w, y + 0.62)], 0) for w, y in ((0.8, 0.05), (0.64, -0.4), (0.48, -0.95))]
    return [([(-0.14, 0.6), (0.14, 0.6), (0.14, 1), (-0.14, 1)], 3)] + layers + [
        (_circle(x, y, 0.08), 1) for x, y in ((-0.35, 0.5), (0.25, 0.42), (0.05, 0.05), (-0.15, -0.12), (0.05, -0.5))]


def _mushroom():
    cap = np.concatenate([_circle(0, 0, 0.95, 0.85, 0.5, 1.0), _circle(0, 0, 0.95, 0.2, 0.0, 0.5)])
    return [([(-0.26, 0), (0.26, 0), (0.36, 0.9), (-0.36, 0.9)], 2), (cap, 0), (_circle(-0.4, -0.32, 0.17), 2),
            (_circle(0.2, -0.52, 0.16), 2), (_circle(0.5, -0.15, 0.13), 2)]


def _moon():
    outer, inner = _circle(0, 0, 0.95, start=0.12, stop=0.88), _circle(0.42, 0, 0.72, start=0.83, stop=0.17)
    small = np.stack([np.where(np.arange(8) % 2, 0.1, 0.26) * f(np.pi * np.arange(8) / 4) for f in (np.cos, np.sin)], 1)
    return [(np.concatenate([outer, inner]), 0), (small + [0.55, -0.05], 1)]


def _mug():
    handle = np.concatenate([_circle(0.5, 0, 0.45, start=-0.25, stop=0.25),
                             _circle(0.5, 0, 0.24, start=0.25, stop=-0.25)])
    return [(handle, 1), ([(-0.75, -0.62), (0.55, -0.62), (0.46, 0.8), (-0.66, 0.8)], 0),
            (_circle(-0.1, -0.62, 0.65, 0.17), 2), (_circle(-0.1, -0.6, 0.52, 0.11), 3),
            ([(-0.73, 0.1), (0.5, 0.1), (0.49, 0.34), (-0.71, 0.34)], 1)]


def _umbrella():
    top = _circle(0, 0, 1, 0.9, 0.5, 1.0)
    hems = np.concatenate([_circle(x, 0, 0.2, -0.16, 0.0, 0.5, 12) for x in (0.8, 0.4, 0.0, -0.4, -0.8)])
    stick = [(-0.05, -0.2), (0.05, -0.2), (0.05, 0.7), (-0.05, 0.7)]
    hook = np.concatenate([_circle(-0.15, 0.7, 0.2, start=0.0, stop=0.5),
                           _circle(-0.15, 0.7, 0.1, start=0.5, stop=0.0)])
    return [(stick, 3), (hook, 3), (np.concatenate([top, hems]), 0),
            (np.concatenate([_circle(0, 0, 0.22, 0.9, 0.5, 1.0), [(0.2, 0.0), (-0.2, 0.0)]]), 1)]


# name -> polygons in [-1, 1]^2 (y down), each with its tint: 0 main colour, 1 second colour, 2 pale, 3 dark
OBJECTS = {f.__name__[1:]: f() for f in (_star, _heart, _flower, _fish, _house, _pine, _mushroom, _moon, _mug,
                                         _umbrella)}
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")


class Shapes:
    """Pictures drawn from (seed 0, index): one of ten objects before a terrazzo wall.

    Structure, which a prior can learn: the object. Nuisance, which it can't: colours (independent of the object),
    the wall's chips, stripes, light, shadow, grain, position, scale, rotation, flip. label(i) = i % 10."""

    classes = tuple(OBJECTS)
    SIZES = {"train": 20_000, "val": 2_000}

    def __init__(self, split="train"):
        self.n, self.first = self.SIZES[split], 0 if split == "train" else 10_000_000

    def __len__(self):
        return self.n

    def label(self, i):
        return i % len(OBJECTS)

    def fine_label(self, i):
        """Object x colour family: 60 labels, label * 6 + family."""
        family = int(np.random.default_rng([0, self.first + i]).integers(len(COLOURS)))
        return self.label(i) * len(COLOURS) + family

    def name(self, i):
        return f"shapes {self.first + i} ({self.classes[self.label(i)]})"

    def signature(self):
        first = draw(self.first, 0, 32).tobytes()  # codes of pictures that were drawn in another way are others
        return _hash(f"shapes {self.first} {self.n}".encode() + first)

    def load(self, i, at_least=0):
        return draw(self.first + i, self.label(i), at_least or 256)


def _rgb(h, s, v):
    """HSV, each in [0, 1] (the hue wraps round), any shape -> RGB in [0, 255] with a last axis of 3."""
    k = (np.array([5, 3, 1]) + 6 * np.asarray(h)[..., None]) % 6
    s, v = np.asarray(s)[..., None], np.asarray(v)[..., None]
    return 255 * v * (1 - s * np.clip(np.minimum(k, 4 - k), 0, 1))


def draw(index, label, size):
    """One picture as a PIL image, size x size, RGB; a function of its arguments alone."""
    rng = np.random.default_rng([0, index])
    family = int(rng.integers(len(COLOURS)))  # the first number drawn: fine_label repeats it
    hue = family / len(COLOURS) + rng.uniform(-0.05, 0.05)
    big = 3 * size  # polygons are drawn at three times the size and box-reduced: smooth edges

    # The wall: a gradient with 40 pale chips of stone, each of its own colour and shape.
    wall_hue, value, direction = rng.uniform(), rng.uniform(0.55, 0.95), rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, size)
    ramp = (axis[None] * np.cos(direction) + axis[:, None] * np.sin(direction))[..., None] / 2.8 + 0.5  # (S, S, 1)
    wall = ramp * _rgb(wall_hue, 0.18, value) + (1 - ramp) * _rgb(wall_hue + 0.08, 0.3, value * 0.82)
    chips = Image.new("RGBA", (2 * size, 2 * size))
    pen = ImageDraw.Draw(chips)
    a, b, c = rng.uniform(0, 1, (3, 40))
    corners = rng.uniform(0, 6.3, (40, 1)) + np.arange(5) * 1.2566 + a[:, None] * [0, 0.5, -0.4, 0.3, -0.5]
    stones = np.stack([np.cos(corners), (0.6 + 0.5 * b)[:, None] * np.sin(corners)], 2)  # (40, 5, 2)
    stones = (stones * rng.uniform(0.02, 0.07, (40, 1, 1)) + rng.uniform(0, 1, (40, 1, 2))) * 2 * size
    fills = _rgb(wall_hue + 0.5 * (c > 0.6) + 0.1 * a, 0.15 + 0.35 * b, 0.35 + 0.6 * c).astype(int)
    for stone, fill in zip(stones.reshape(40, 10).tolist(), fills.tolist()):
        pen.polygon(stone, fill=(*fill, 140))
    chips = np.asarray(chips.reduce(2), np.float32)

    # The object: polygons under a random similarity with a little aspect, flip and rotation.
    turn, scale, aspect = rng.uniform(-0.22, 0.22), rng.uniform(0.64, 0.80), rng.uniform(0.92, 1.08)
    shift = rng.uniform(-0.16, 0.16, 2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * scale
    matrix = matrix @ np.diag([aspect * rng.choice([-1, 1]), 1 / aspect])
    main = _rgb(hue, rng.uniform(0.6, 0.9), rng.uniform(0.75, 1.0))
    second = _rgb(hue + rng.choice([0.12, -0.12, 0.5]), 0.55, rng.uniform(0.6, 0.95))
    tints = main, second, np.array([246, 240, 228]), _rgb(hue, 0.45, 0.25)
    shape, body = Image.new("RGBA", (big, big)), Image.new("L", (big, big))
    pen, body_pen = ImageDraw.Draw(shape), ImageDraw.Draw(body)
    for points, tint in OBJECTS[Shapes.classes[label]]:
        points = (((np.asarray(points) @ matrix.T + shift) / 2 + 0.5) * big).ravel().tolist()
        pen.polygon(points, fill=(*tints[tint].astype(int), 255))
        body_pen.polygon(points, fill=255 if tint == 0 else 0)
    shape, body = np.asarray(shape.reduce(3), np.float32), np.asarray(body.reduce(3), np.float32)[..., None] / 255
    mask = shape[..., 3:] / 255  # (S, S, 1)

    # Stripes on the main colour, light from one side, a soft shadow on the wall, grain.
    angle, waves = rng.uniform(0, np.pi), rng.uniform(4, 9)
    stripes = np.sin(waves * np.pi * (axis[None] * np.cos(angle) + axis[:, None] * np.sin(angle)))[..., None] > 0.3
    paint = shape[..., :3] * (1 - 0.2 * stripes * body)
    light = rng.uniform(0, 2 * np.pi)
    paint = paint * (1.0 - 0.24 * (axis[None] * np.cos(light) + axis[:, None] * np.sin(light)))[..., None]
    offset = np.round(np.array([np.sin(light), np.cos(light)]) * size * 0.045).astype(int)
    shadow = Image.fromarray((mask[..., 0] * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size * 0.03))
    shadow = np.roll(np.asarray(shadow, np.float32), offset, (0, 1))[..., None] / 255
    picture = (wall + (chips[..., :3] - wall) * chips[..., 3:] / 255) * (1 - 0.45 * shadow)
    picture = picture * (1 - mask) + paint * mask + rng.normal(0, 3, (size, size, 1))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------- crops, batches, order

def center(image, size):
    """The validation transform: shorter side to `size`, centre crop. PIL image -> uint8 (size, size, 3)."""
    w, h = image.size
    x, y, side = (w - min(w, h)) / 2, (h - min(w, h)) / 2, min(w, h)
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


CROPS = ("random", "resized", "center")


class TrainImages(Dataset):
    """Item n of the endless training stream: (uint8 (3, S, S), label, -1), or with an unreadable image's index last
    and the next readable image in its place."""

    def __init__(self, source, size, crop, seed, label_of=None):
        self.source, self.size, self.crop, self.seed = source, size, crop, seed
        self.label_of = label_of or source.label
        self.epoch, self.order = -1, None

    def __getitem__(self, n):
        epoch, j = divmod(n, len(self.source))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.source))
        return self.view(int(self.order[j]), n)

    def view(self, index, n):
        """Image `index`, cropped and flipped by the generator of (seed, n)."""
        first, bad, rng = index, -1, np.random.default_rng([self.seed, n])
        # `resized` cuts out a part: decode a little larger, so that the part still has `size` pixels
        at_least = self.size if self.crop != "resized" else int(np.ceil(self.size / np.sqrt(0.75)))
        while True:
            try:
                image = augment(self.source.load(index, at_least), self.size, self.crop, rng)
                break
            except Unreadable:
                bad, index = first, (index + 1) % len(self.source)
                if index == first:
                    image = np.zeros((self.size, self.size, 3), np.uint8)  # nothing can be read: `Bad` ends the run
                    break
        return _to_tensor(image), self.label_of(index), bad


class EvalImages(Dataset):
    """Image i under the validation transform: (uint8 (3, S, S), label, i); i is -1 - i where it can't be read."""

    def __init__(self, source, size, label_of=None):
        self.source, self.size, self.label_of = source, size, label_of or source.label

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:  # shapes are drawn at the size asked for; all else is decoded whole: metrics want the exact pixels
            image = self.source.load(i, self.size if isinstance(self.source, Shapes) else 0)
        except Unreadable:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), self.label_of(i), -1 - i
        return _to_tensor(center(image, self.size)), self.label_of(i), i


def _to_tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def to_float(images, device):
    """uint8 (B, 3, H, W) on the host -> float in [-1, 1] on the device, channels last (a quarter of the traffic)."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return images.float().div_(127.5).sub_(1)  # in place: new memory is what costs a CPU most


def _in_worker(_):
    # Ctrl-C and a group-wide SIGTERM reach the workers too, but the training process has a step to finish and a file
    # to write. So the first is ignored; on the second they leave quietly and late (never would hang an exit).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
    torch.set_num_threads(1)


def loader(dataset, batches, workers, device):
    """A DataLoader over given batches of indices."""
    pin = device.type == "cuda"
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=_in_worker,
                      pin_memory=pin, prefetch_factor=4 if workers else None)


def train_loader(dataset, args, start, device):
    """Micro-batches of this process, from step `start` to args.iters, args.accum of them a step.

    Micro-batch a of process r holds the positions [(a * world + r) * b, ... + b) of the global batch."""
    b = runtime.micro_batch(args)
    offsets = [(a * runtime.world() + runtime.rank()) * b for a in range(args.accum)]
    return loader(dataset, _Positions(start, args.iters, args.batch_size, offsets, b), args.workers,
                  device)


class _Positions:
    """The batch sampler of `train_loader`: made as it goes, half a million lists would cost memory."""

    def __init__(self, *plan):
        self.plan = plan

    def __iter__(self):
        start, iters, batch_size, offsets, b = self.plan
        for step in range(start, iters):
            for offset in offsets:
                yield range(step * batch_size + offset, step * batch_size + offset + b)

    def __len__(self):
        start, iters, _, offsets, _ = self.plan
        return (iters - start) * len(offsets)


def choose(total, n):
    """Indices of all images, or of n drawn at random, the same ones every time (the first n may be of one class)."""
    return np.sort(np.random.default_rng(0).permutation(total)[:n]) if 0 < n < total else np.arange(total)


def eval_loader(dataset, batch_size, workers, device, n=0):
    """All images, or `choose`'s n. Batches are dealt out over the processes in turn; no image comes twice, none is
    padded in."""
    chosen = choose(len(dataset), n)
    batches = [chosen[i:i + batch_size].tolist() for i in range(0, len(chosen), batch_size)]
    return loader(dataset, batches[runtime.rank()::runtime.world()], workers, device)


class Bad:
    """Names and counts unreadable images as the batches report them; more than 1 % of the set stops the run."""

    def __init__(self, source):
        self.source, self.seen, self.drawn = source, set(), 0

    def __call__(self, indices):
        self.drawn += len(indices)
        for i in set(indices[indices >= 0].tolist()) - self.seen:
            self.seen.add(i)
            print(f"skipped: unreadable image {self.source.name(i)} ({len(self.seen)} so far)", flush=True)
        # of the set, or of what this process has seen of it: eight processes meet an eighth each
        if len(self.seen) > MAX_BAD * min(len(self.source), max(self.drawn, 1000)):
            raise BadInput(f"{len(self.seen)} of {len(self.source)} images can't be read, the last one "
                           f"{self.source.name(i)}: check the data with `python data.py --data ...`")


def check_size(source, size, spec):
    """Refuse a data set most of whose images are smaller than the crop; a few small ones are enlarged, as in ImageNet
    itself. Looks at the headers of up to 64 images spread over the set."""
    if not isinstance(source, (Folder, Tar)):
        return
    sides = []
    for i in np.unique(np.linspace(0, len(source) - 1, 64).astype(int)):
        try:
            with Image.open(source.file(i), formats=FORMATS) as image:
                sides.append(min(image.size))
        except Exception:  # unreadable: reported when it is met
            continue
    if sides and np.median(sides) < size:
        raise BadInput(f"{spec}: images are smaller than the crop (median shorter side {int(np.median(sides))}, "
                       f"--image_size {size}): use a smaller --image_size or larger images")


def check_image_size(size, multiple):
    if size % multiple:
        raise BadInput(f"--image_size {size} is not a multiple of {multiple}, by which the network reduces it")


def save_grid(path, images, columns, scale=1):
    """Save float images (N, 3, H, W) in [-1, 1] as one PNG, row by row, two white pixels between them."""
    images = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 2) - 2, columns * (w + 2) - 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + 2), i % columns * (w + 2)
        sheet[y:y + h, x:x + w] = image
    picture = Image.fromarray(sheet)
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    runtime.save_file(path, lambda file: picture.save(file, "PNG"))


# ----------------------------------------------------------------------------------------- python data.py

class _Whole(Dataset):
    """Every image decoded whole: (width, height, index), or (0, 0, index) if it can't be."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return (*self.source.load(i).size, i)
        except Unreadable:
            return 0, 0, i


def main():
    parser = runtime.Parser(__doc__)
    parser.add_argument("--data", default="shapes", help="as of the training scripts")
    parser.add_argument("--split", choices=["train", "val"], default="train", help="which of shapes' two sets")
    parser.add_argument("--image_size", type=runtime.side, default=256, help="side of the processed images")
    parser.add_argument("--out", default="", help="write the processed images there as PNG, in class folders")
    parser.add_argument("--n", type=runtime.count, default=0, help="look at the first N images only (0: all)")
    parser.add_argument("--preview", default="preview.png", help="where the preview goes")
    parser.add_argument("--workers", type=runtime.workers, default=min(8, os.cpu_count()),
                        help="data loading processes")
    args = parser.parse_args()
    if "split" in parser.given and args.data != "shapes":
        raise BadInput("--split is for shapes, which has two sets")
    device, source = torch.device("cpu"), open_source(args.data, args.split)
    n = min(args.n or len(source), len(source))
    if args.out and Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise BadInput(f"--out {args.out} is not empty: choose another folder")

    batches = [range(i, min(i + 64, n)) for i in range(0, n, 64)]
    chosen = np.unique(np.linspace(0, n - 1, 40).astype(int)).tolist()
    images = [EvalImages(source, args.image_size)[i] for i in chosen]
    images = torch.stack([image for image, _, i in images if i >= 0] or [images[0][0]])
    save_grid(args.preview, to_float(images, device), columns=8)
    print(f"{args.data}: {len(source)} images, {len(source.classes)} classes; preview in {args.preview}")
    counts = np.bincount([source.label(i) for i in range(len(source))], minlength=len(source.classes))
    for name, number in list(zip(source.classes, counts))[:20]:
        print(f"  {name}: {number}")
    if len(source.classes) > 20:
        print(f"  ... images a class: {counts.min()} to {counts.max()}")

    if not isinstance(source, Shapes):
        progress, sizes, bad = runtime.Progress(n, "decoded"), [], 0
        for w, h, index in loader(_Whole(source), batches, args.workers, device):
            sizes += torch.minimum(w, h)[w > 0].tolist()
            for i in index[w == 0].tolist():
                bad += 1
                print(f"  unreadable: {source.name(i)}")
            progress(len(w))
        if sizes:
            print(f"  shorter side: smallest {min(sizes)}, median {int(np.median(sizes))}, largest {max(sizes)}; "
                  f"{sum(s < args.image_size for s in sizes)} smaller than --image_size {args.image_size}")
        print(f"  unreadable: {bad} of {n}")
        if bad > MAX_BAD * n:
            raise BadInput(f"{bad} of {n} images of {args.data} can't be read: remove or mend them")

    if args.out:
        progress = runtime.Progress(n, "written")
        for images, labels, index in loader(EvalImages(source, args.image_size), batches, args.workers, device):
            for image, label, i in zip(images, labels.tolist(), index.tolist()):
                if i >= 0:
                    folder = Path(args.out) / (source.classes[label] if source.classes else "")
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:08}.png")
            progress(len(images))


if __name__ == "__main__":
    runtime.run(main)
