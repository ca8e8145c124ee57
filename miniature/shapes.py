"""The built-in pictures: ten objects before a wall, drawn from their index. Nothing to download.

    python data.py --data shapes        # look at them

They are what `--data shapes` names: enough to try every stage on a CPU, and not a benchmark.
"""
import hashlib

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


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
    """Pictures drawn from (seed 0, index): one of ten objects before a dotted wall.

    Structure, which a prior can learn: the object. Nuisance, which it can't: colours (independent of the object), the
    wall's dots, light, shadow, position, scale, rotation, flip. label(i) is the object, i % 10; with `fine` it is
    object * 6 + colour family: 60 labels."""

    drawn = splits = True  # at any size, exactly; with validation pictures of its own
    classes, COLOURS = tuple(OBJECTS), len(COLOURS)
    SIZES = {"train": 20_000, "val": 2_000}

    def __init__(self, split="train"):
        self.n, self.first, self.fine = self.SIZES[split], 0 if split == "train" else 10_000_000, False

    def __len__(self):
        return self.n

    def label(self, i):
        family = int(np.random.default_rng([0, self.first + i]).integers(self.COLOURS)) if self.fine else 0
        return i % len(OBJECTS) * (self.COLOURS if self.fine else 1) + family

    def name(self, i):
        return f"shapes {self.first + i} ({self.classes[i % len(OBJECTS)]})"

    def signature(self):
        first = draw(self.first, 0, 32).tobytes()  # codes of pictures that were drawn in another way are others
        return hashlib.sha256(f"shapes {self.first} {self.n}".encode() + first).hexdigest()[:16]

    def load(self, i, at_least=0):
        return draw(self.first + i, i % len(OBJECTS), at_least or 256)


def _rgb(h, s, v):
    """HSV, each in [0, 1] (the hue wraps round), any shape -> RGB in [0, 255] with a last axis of 3."""
    k = (np.array([5, 3, 1]) + 6 * np.asarray(h)[..., None]) % 6
    s, v = np.asarray(s)[..., None], np.asarray(v)[..., None]
    return 255 * v * (1 - s * np.clip(np.minimum(k, 4 - k), 0, 1))


def draw(index, label, size):
    """One picture as a PIL image, size x size, RGB; a function of its arguments alone."""
    rng = np.random.default_rng([0, index])
    family = int(rng.integers(len(COLOURS)))  # the first number drawn: `label` repeats it
    hue = family / len(COLOURS) + rng.uniform(-0.05, 0.05)
    big = 3 * size  # polygons are drawn at three times the size and box-reduced: smooth edges

    # The wall: a pale gradient with four large dots, each of its own colour and place.
    wall_hue, value, direction = rng.uniform(), rng.uniform(0.88, 1.0), rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, size)
    ramp = (axis[None] * np.cos(direction) + axis[:, None] * np.sin(direction))[..., None] / 2.8 + 0.5  # (S, S, 1)
    wall = ramp * _rgb(wall_hue, 0.08, value) + (1 - ramp) * _rgb(wall_hue + 0.08, 0.2, value * 0.9)
    dots = Image.new("RGBA", (big, big))
    pen = ImageDraw.Draw(dots)
    for x, y, radius, tint, dark in rng.uniform(0, 1, (4, 5)):
        x, y, radius = x * big, y * big, (0.07 + 0.07 * radius) * big
        fill = _rgb(wall_hue + 0.4 * tint, 0.35, value * (0.7 + 0.25 * dark)).astype(int)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*fill.tolist(), 255))
    dots = np.asarray(dots.reduce(3), np.float32)

    # The object: polygons under a random similarity with a little aspect, flip and rotation.
    turn, scale, aspect = rng.uniform(-0.2, 0.2), rng.uniform(0.74, 0.88), rng.uniform(0.94, 1.06)
    shift = rng.uniform(-0.1, 0.1, 2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * scale
    matrix = matrix @ np.diag([aspect * rng.choice([-1, 1]), 1 / aspect])
    main = _rgb(hue, rng.uniform(0.6, 0.9), rng.uniform(0.75, 1.0))
    second = _rgb(hue + rng.choice([0.12, -0.12, 0.5]), 0.55, rng.uniform(0.6, 0.95))
    tints = main, second, np.array([246, 240, 228]), _rgb(hue, 0.45, 0.25)
    shape = Image.new("RGBA", (big, big))
    pen = ImageDraw.Draw(shape)
    for points, tint in OBJECTS[Shapes.classes[label]]:
        points = (((np.asarray(points) @ matrix.T + shift) / 2 + 0.5) * big).ravel().tolist()
        pen.polygon(points, fill=(*tints[tint].astype(int), 255))
    shape = np.asarray(shape.reduce(3), np.float32)
    mask = shape[..., 3:] / 255  # (S, S, 1)

    # Light from one side, a soft shadow on the wall.
    light = rng.uniform(0, 2 * np.pi)
    paint = shape[..., :3] * (1.0 - 0.2 * (axis[None] * np.cos(light) + axis[:, None] * np.sin(light)))[..., None]
    offset = np.round(np.array([np.sin(light), np.cos(light)]) * size * 0.045).astype(int)
    shadow = Image.fromarray((mask[..., 0] * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size * 0.03))
    shadow = np.roll(np.asarray(shadow, np.float32), offset, (0, 1))[..., None] / 255
    picture = (wall + (dots[..., :3] - wall) * dots[..., 3:] / 255) * (1 - 0.35 * shadow)
    picture = picture * (1 - mask) + paint * mask
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))
