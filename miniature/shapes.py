"""The built-in data set: drawings of little monsters. A drawing is a function of its index.

    python data.py --data shapes                   # a preview
    python data.py --data shapes:clutter=0         # the same monsters without clutter
"""
import colorsys

import numpy as np
from PIL import Image, ImageDraw


def _oval(x, y, rx, ry=None, start=0.0, stop=1.0, n=24):
    t = 2 * np.pi * np.linspace(start, stop, n)
    return np.stack([x + rx * np.cos(t), y + (ry or rx) * np.sin(t)], 1)


def _box(x1, y1, x2, y2):
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def _bar(x1, y1, x2, y2, width):
    side = np.array([y1 - y2, x2 - x1]) * width / 2 / np.hypot(x2 - x1, y2 - y1)
    return np.array([[x1, y1], [x2, y2]]).repeat(2, 0) + np.outer([1, -1, -1, 1], side)


def _eye(x, y, r):
    return [(_oval(x, y, r + 0.05), "k"), (_oval(x, y, r), "w"), (_oval(x, y + 0.02, r / 2), "k")]


def _both(*shapes):
    """Shapes on the right side, followed by their mirror images."""
    return [(np.array(points) * (sign, 1), tint) for sign in (1, -1) for points, tint in shapes]


# Each kind of a part is a list of polygons in [-1, 1]^2 (y points down), each with a tint, a key of
# `tints` in draw: 1 main color, 2 darker, p pale, w white, k black, r red, y yellow, g green.
_SPIKES = np.resize([1, 0.54], (11, 1))
BODY = {
    "bean": [*_oval(0, -0.2, 0.4, 0.4, 0.5, 1), *_oval(0, 0.3, 0.4, 0.4, 0, 0.5)],
    "box": _box(-0.5, -0.52, 0.5, 0.64), "bun": _oval(0, 0.07, 0.76, 0.5),
    "cone": [(-0.2, -0.56), (0.2, -0.56), (0.78, 0.62), (-0.78, 0.62)],
    "cup": [(-0.72, -0.5), (0.72, -0.5), (0.3, 0.64), (-0.3, 0.64)],
    "star": _oval(0, 0, 0.88, 0.84, -0.25, 0.75, 11) * _SPIKES + (0, 0.08)}
TOP = {
    "horns": _both(([(0.12, -0.45), (0.42, -0.4), (0.62, -0.95)], "w")),
    "antennae": _both((_bar(0.12, -0.4, 0.3, -0.85, 0.09), "k"), (_oval(0.32, -0.84, 0.15), "2")),
    "ears": _both((_oval(0.24, -0.68, 0.17, 0.32), "1"), (_oval(0.24, -0.66, 0.08, 0.22), "r")),
    "hat": [(_box(-0.3, -0.98, 0.3, -0.5), "k"), (_box(-0.52, -0.52, 0.52, -0.38), "k"),
            (_box(-0.3, -0.66, 0.3, -0.52), "r")],
    "crown": _both(([(0, -0.4), (0.4, -0.4), (0.46, -0.92), (0.2, -0.66), (0, -0.98)], "y")),
    "sprout": [(_bar(0, -0.4, 0, -0.8, 0.1), "g"), *_both((_oval(0.26, -0.8, 0.27, 0.15), "g"))]}
EYES = {
    "one": _eye(0, -0.14, 0.26), "two": _both(*_eye(0.23, -0.14, 0.17)),
    "three": _both(*_eye(0.31, -0.08, 0.13)) + _eye(0, -0.26, 0.13),
    "happy": _both(([*_oval(0.2, 0, 0.18, 0.24, 0.5, 1), *_oval(0.2, 0, 0.08, 0.1, 1, 0.5)], "k")),
    "shades": _both((_box(0, -0.28, 0.42, -0.18), "k"), (_oval(0.22, -0.2, 0.2, 0.2, 0, 0.5), "k")),
    "angry": _both(([(0.04, -0.12), (0.42, -0.32), (0.36, -0.02), (0.16, 0.02)], "w"),
                   (_oval(0.2, -0.08, 0.08), "k"), (_bar(0.02, -0.16, 0.44, -0.36, 0.1), "k"))}
MOUTH = {
    "smile": [([*_oval(0, 0.2, 0.3, 0.24, 0, 0.5), *_oval(0, 0.2, 0.2, 0.08, 0.5, 0)], "k")],
    "oh": [(_oval(0, 0.3, 0.15, 0.17), "k"), (_oval(0, 0.37, 0.09), "r")],
    "grin": [(_box(-0.3, 0.18, 0.3, 0.42), "k"), *_both((_box(0.03, 0.22, 0.25, 0.38), "w"))],
    "fangs": _both((_box(0, 0.18, 0.3, 0.26), "k"), ([(0.06, 0.2), (0.26, 0.2), (0.16, 0.5)], "w")),
    "beak": [([(-0.24, 0.14), (0.24, 0.14), (0, 0.48)], "y")],
    "lips": [(_oval(0, 0.3, 0.22, 0.13), "r"), *_both((_oval(0.09, 0.22, 0.11, 0.1), "r"))]}
_UP = [(_bar(0.4, 0.2, 0.8, -0.2, 0.16), "2"), (_oval(0.82, -0.26, 0.14), "2")]
_DOWN = [(_bar(0.4, 0.1, 0.78, 0.42, 0.16), "2"), (_oval(0.8, 0.46, 0.14), "2")]
ARMS = {
    "up": _both(*_UP), "down": _both(*_DOWN), "wave": _both(*_UP)[:2] + _both(*_DOWN)[2:],
    "wings": _both(([(0.4, 0.3), (0.62, -0.35), (1, -0.44), (0.97, -0.08), (0.74, 0.3)], "w")),
    "claws": _both((_bar(0.4, 0.15, 0.78, 0.05, 0.12), "r"),
                   ([*_oval(0.83, -0.1, 0.21, 0.24, 0.85, 1.62), (0.81, -0.07)], "r")),
    "gloves": _both((_oval(0.83, 0.1, 0.2), "r"), (_box(0.55, -0.05, 0.66, 0.25), "w"))}
LEGS = {
    "shoes": _both((_bar(0.22, 0.5, 0.22, 0.85, 0.14), "2"), (_oval(0.32, 0.88, 0.22, 0.11), "k")),
    "bird": _both((_box(0.15, 0.5, 0.25, 0.8), "y"), ([(0.2, 0.7), (0.46, 1), (0.02, 1)], "y")),
    "wheels": _both((_oval(0.34, 0.74, 0.23), "k"), (_oval(0.34, 0.74, 0.1), "w")),
    "flame": [*_both(([(0, 0.5), (0.36, 0.5), (0.3, 0.78), (0.18, 0.72), (0, 1)], "r")),
              ([(-0.18, 0.5), (0.18, 0.5), (0, 0.88)], "y")],
    "tentacles": _both(*[(_oval(x, 0.66, 0.14, 0.3), "1") for x in (0.16, 0.48)]),
    "spring": [(_bar(-0.2, 0.6, 0.26, 0.68, 0.08), "k"), (_bar(0.26, 0.68, -0.26, 0.8, 0.08), "k"),
               (_bar(-0.26, 0.8, 0.3, 0.9, 0.08), "k"), (_box(-0.4, 0.86, 0.4, 0.97), "k")]}
PATTERN = {
    "plain": [], "bands": [(_box(-1, y, 1, y + 0.17), "p") for y in (-0.44, -0.06, 0.32)],
    "stripes": [(_box(x, -1, x + 0.2, 1), "p") for x in (-0.56, -0.1, 0.36)],
    "spots": _both(*((_oval(*at, 0.13), "p") for at in ((0.4, 0.14), (0.2, 0.54), (0.4, -0.36)))),
    "belly": [(_oval(0, 0.42, 0.42, 0.36), "p")], "halves": [(_box(0, -1, 1, 1), "p")]}
LOOKS = {"body": BODY, "top": TOP, "eyes": EYES, "mouth": MOUTH, "arms": ARMS, "legs": LEGS,
         "pattern": PATTERN}
PARTS = {part: tuple(kinds) for part, kinds in LOOKS.items()}
KINDS = [len(kinds) for kinds in PARTS.values()]


class Shapes:
    """Drawings of monsters with labels, as a data source (see data.py).

    Seven parts have six kinds each, independent of each other: 280,000 monsters. They are what a
    prior can learn. Color, background, confetti, texture, position, size and rotation are nuisance.
    clutter in [0, 1] is the amount of nuisance. At 1 a linear regression on the parts explains 11 %
    of the pixels' variance (in photographs a label explains little, too), at 0 it explains 81 %.

    The label is the kind of the body. With `fine` it is the index of the combination of all kinds.
    """

    classes, kinds, has_splits = PARTS["body"], KINDS, True
    SIZES = {"train": 30_000, "val": 2_000}

    def __init__(self, split="train", clutter=1.0):
        if not 0 <= clutter <= 1:
            raise SystemExit(f"shapes:clutter={clutter:g}: clutter must be in [0, 1]")
        self.n, self.first, self.fine = self.SIZES[split], 12_000_000 * (split != "train"), False
        self.clutter = clutter

    def __len__(self):
        return self.n

    def parts(self, i):
        return choose(self.first + i)[0]

    def label(self, i):
        parts = self.parts(i)
        return int(np.ravel_multi_index(parts, KINDS)) if self.fine else parts[0]

    def name(self, i):
        return f"picture {self.first + i}"  # part of the data's hash: renaming voids code caches

    def load(self, i, size=0):
        return draw(self.first + i, size or 256, self.clutter), self.label(i)


def choose(index):
    """The kind of each part of a drawing, and the generator of its nuisance."""
    rng = np.random.default_rng([0, index])
    return rng.integers(KINDS).tolist(), rng


def _rgb(h, s, v):
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h % 1, s, v))


def draw(index, size, clutter=1.0):
    """The drawing of an index as a PIL image (RGB, size x size). It depends only on the arguments.
    Nuisance ranges around its middle shrink in proportion to clutter."""
    kinds, rng = choose(index)
    looks = (list(part.values())[k] for part, k in zip(LOOKS.values(), kinds))
    body, top, eyes, mouth, arms, legs, pattern = looks
    big = 3 * size  # draw at three times the size, then average: edges become smooth

    def vary(middle, largest):
        return middle + clutter * np.array(largest) * rng.uniform(-1, 1, np.shape(largest))

    # At clutter 0 the hue is a function of the body's kind, at 1 it is uniform.
    hue, s, v = vary((kinds[0] / 6, 0.75, 0.85), (0.5, 0.15, 0.15))
    tints = {"1": _rgb(hue, s, v), "2": _rgb(hue, s, 0.6 * v), "p": _rgb(hue + 0.03, 0.35 * s, 1),
             "w": "#faf8f0", "k": "#262230", "r": "#d62846", "y": "#ffa51e", "g": "#3ca046"}
    angle, scale, x, y = vary((0, 0.84, 0, 0), (0.15, 0.1, 0.12, 0.12))
    c, s = scale * np.cos(angle) * big / 2, scale * np.sin(angle) * big / 2
    matrix, shift = np.array([[c, s], [-s, c]]), np.array([1 + x, 1 + y]) * big / 2

    def smooth(array):
        return Image.fromarray(array.astype(np.uint8)).resize((big, big), Image.BILINEAR)

    def paint(pen, shapes):
        for points, tint in shapes:
            pen.polygon((points @ matrix + shift).ravel().tolist(), tints.get(tint, 255))

    # The background: a smooth mixture of two neighboring hues, dark to pale, and colored confetti.
    hue, s, v = vary((0.6, 0.4, 0.7), (0.5, 0.3, 0.3))
    colors = np.array([_rgb(hue, s, v), _rgb(hue + 0.1, s, 0.8 * v)])
    mixture = rng.uniform(0, 1, (3, 3, 1))
    image = smooth(mixture * colors[0] + (1 - mixture) * colors[1])
    pen = ImageDraw.Draw(image)
    low, high = (0, 0, 0.06, 0, 0.4, 0.5), (1, 1, 0.13, 1, 0.9, 1)
    for i, (x, y, r, *tint) in enumerate(rng.uniform(low, high, (16, 6))[:round(16 * clutter)]):
        piece = pen.ellipse if i % 2 else pen.rectangle
        piece([big * (x - r), big * (y - r), big * (x + r), big * (y + r)], _rgb(*tint))

    # The monster: limbs, then the body with its pattern and a blotchy texture, then top and face.
    paint(pen, legs + arms)
    mask, skin = Image.new("L", (big, big)), Image.new("RGB", (big, big), tints["1"])
    paint(ImageDraw.Draw(mask), [(body, "")])
    paint(ImageDraw.Draw(skin), pattern)
    skin.paste(0, mask=smooth(rng.integers(0, 64, (9, 9)) * clutter))
    image.paste(skin, mask=mask)
    paint(pen, top + eyes + mouth)
    return image.reduce(3)
