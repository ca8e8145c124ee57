"""data.py: sources, decoding, crops, the order of images, unreadable ones, the command line."""
import inspect
import io
import itertools
import os
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import noise
from PIL import EpsImagePlugin, Image, PngImagePlugin

import data
from data import EvalImages, Folder, TrainImages
from miniature.shapes import Shapes

CPU = torch.device("cpu")
array = partial(np.asarray, dtype=int)


class Tiny(Shapes):
    """Twenty drawings, labelled with their numbers."""

    SIZES = {"train": 20}

    def label(self, i):
        return i


def gather(batches):
    """-> all images, their labels."""
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels).tolist()


def stream(source, start=0, size=16, **options):
    """The training images of steps `start` to 5, and their labels."""
    args = Namespace(**dict(batch_size=8, grad_accum=1, iters=6, workers=0) | options)
    return gather(data.train_loader(TrainImages(source, size, "random", seed=3), args, start, CPU))


def contents(source):
    return {source.name(i): source.load(i, 8)[1] for i in range(len(source))}  # labels


def both_parts(spec):
    return [data.open_source(str(spec), split, hold_out=True) for split in ("train", "val")]


# ------------------------------------------------------------------------ sources and decoding

def test_shapes_are_a_function_of_index_and_size():
    one, again, other = (array(s.load(7, 48)[0]) for s in (Shapes(), Shapes(), Shapes("val")))
    assert one.shape == (48, 48, 3) and (one == again).all() and (one != other).any()
    reduced = Shapes().load(7, 96)[0].resize((48, 48), Image.Resampling.BOX)
    assert np.abs(array(reduced) - one).mean() < 20  # the same drawing at another size
    assert {*contents(Shapes()).values()} == {*range(len(Shapes.classes))}


def test_class_folders_of_any_depth(tmp_path, capsys, monkeypatch):
    """Labels are in alphabetical order. Hidden files, other files and folders without images are
    left out, links are followed."""
    root = tmp_path / "root"
    where = {"b/1.png": 2, "a/z.png": 0, "a/deep/er/2.PNG": 0, "a-b/3.jfif": 1}  # a-b/ before a/
    others = ["a/list.csv", "only/text.json", ".hidden.png", ".cache/4.png", "a/.thumbs/5.png"]
    for name in (*where, *others, "../outside/6.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (len(name), 0, 0)).save(root / name, "PNG")
    (root / "c").symlink_to(tmp_path / "outside")
    source = Folder(root)
    assert source.classes == ["a", "a-b", "b", "c"] and "2 files" in capsys.readouterr().out
    assert contents(source) == where | {"c/6.png": 3} and len(source) == 5
    assert source.load([*contents(source)].index("c/6.png"))[0].getpixel((3, 3)) == (16, 0, 0)
    flat = Folder(root / "a-b")
    assert flat.classes == [] and contents(flat) == {"3.jfif": 0}

    def scandir(path, scandir=os.scandir):
        if path == f"{root}/only":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", scandir)
    assert contents(Folder(root)) == contents(source)
    assert f"Permission denied: '{root}/only'" in capsys.readouterr().out


def test_the_content_hash_is_of_names_labels_and_pixels(photos):
    path, found = photos / "cats/grey.png", [data.content_hash(Folder(photos))]
    path.write_bytes(b"x")  # an unreadable image does not stop it
    found.append(data.content_hash(Folder(photos)))
    Image.new("L", (64, 64)).save(path)  # another image under the same name
    found.append(data.content_hash(Folder(photos)))
    path.rename(photos / "cats/black.png")
    found.append(data.content_hash(Folder(photos)))
    found.append(data.content_hash(Folder(photos, classes=["dogs", "cats"])))  # other labels
    assert len({*found}) == 5 and found[3] == data.content_hash(Folder(photos))


def test_one_image_in_twenty_is_held_out_by_its_name(many_photos):
    its, held = map(contents, both_parts(many_photos))
    assert its | held == contents(Folder(many_photos)) and not its.keys() & held
    assert 2 <= len(held) <= 20 and len(its) + len(held) == 160
    for val, sizes in ((None, [len(its), len(held)]), ("shapes", [160, 12])):
        parts = data.open_data(Namespace(data=str(many_photos), val=val))
        assert [*map(len, parts)] == sizes

    for i in range(160, 200):  # some come, some go: the others stay where they are
        Image.new("RGB", (9, 9)).save(many_photos / f"cats/{i}.png")
    gone = {f"dogs/{i}.png" for i in range(1, 160, 4)} | {min(held), min(its)}
    for name in gone:
        (many_photos / name).unlink()
    its_now, held_now = map(contents, both_parts(many_photos))
    assert its.keys() - gone <= its_now.keys() and held.keys() - gone <= held_now.keys()


def test_validation_labels_are_those_of_training(many_photos, tmp_path):
    """A class that --val lacks does not shift the others; flat or unknown folders are rejected."""
    def opened(folder, training=many_photos, labels=True):
        path = tmp_path / f"val {folder}" / folder / "a.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
        args = Namespace(data=str(training), val=str(tmp_path / f"val {folder}"))
        return data.open_data(args, labels)[1]

    assert opened("dogs").classes == ["cats", "dogs"] and opened("dogs").load(0)[1] == 1
    source = data.open_source(f"{tmp_path}/val dogs", classes=["wolves", "cats", "dogs"])
    assert source.classes == ["wolves", "cats", "dogs"] and source.load(0)[1] == 2
    with pytest.raises(SystemExit, match="wolves"):
        opened("wolves")
    with pytest.raises(SystemExit, match="--val.*class folders"):
        opened("")
    for folder in ("", "wolves"):  # a tokenizer does not look at labels; a flat --data has none
        assert len(opened(folder, labels=False)) == len(opened(folder, many_photos / "cats")) == 1


def test_lsun_is_read_in_workers(tmp_path, monkeypatch):
    import lmdb
    with lmdb.open(str(tmp_path), map_size=1 << 24) as env, env.begin(write=True) as writer:
        for i in range(10):
            file = io.BytesIO()
            Image.new("RGB", (40, 30), (25 * i, 0, 0)).save(file, "WEBP", lossless=True)
            writer.put(f"key{i}".encode(), file.getvalue())
    source, val = (data.open_source(f"lsun:{tmp_path}") for _ in range(2))  # --data and --val
    assert contents(source) == contents(val) == {f"key{i}": 0 for i in range(10)}
    assert source.load(2)[0].getpixel((5, 5)) == (50, 0, 0)  # read here, then in the workers
    images, _ = gather(data.eval_loader(EvalImages(source, 16), 4, 2, CPU))
    assert images[:, 0, 0, 0].tolist() == [25 * i for i in range(10)]
    assert sum(map(len, both_parts(f"lsun:{tmp_path}"))) == 10
    monkeypatch.setitem(sys.modules, "lmdb", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="lmdb"):
        data.open_source(f"lsun:{tmp_path}")


def test_torchvision_by_name(monkeypatch):
    class Fake(list):
        def __init__(self, root, download, **which):
            inspect.signature(real).bind(root, download=download, **which)
            seen.append(which)
            super().__init__([(Image.new("L", (9, 9)), 2 - len(seen))] * len(seen))

    for name in data.Torchvision.SPLITS:
        real, seen = getattr(torchvision.datasets, name), []
        monkeypatch.setattr(torchvision.datasets, name, Fake)
        source, val = both_parts(f"torchvision:{name}")
        assert [len(source), len(val)] == [1, 2] and seen[0] != seen[1]
        assert source.load(0)[0].mode == "RGB" and source.load(0)[1] == 0 and source.classes == []
    Fake.classes, seen = [("tench", "Tinca tinca"), "church"], []  # Imagenette's are tuples
    source, val = both_parts("torchvision:Imagenette")
    assert source.load(0)[1] == 1 and val.load(0)[1] == 0 and val.classes == ["tench", "church"]


def test_what_is_no_set_of_samples_or_cannot_be_downloaded_is_one_sentence(monkeypatch, tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    for i, arrays in enumerate((
            dict(x=images), dict(arr_0=images, arr_1=np.arange(2)), dict(arr_0=images[0]),
            dict(arr_0=images, arr_1=np.zeros(3)), dict(arr_0=images / 255))):
        np.savez(tmp_path / f"{i}.npz", **arrays)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "0.npz").read_bytes()[:300])
    (tmp_path / "page.npz").write_bytes(b"<html>Not found</html>")
    for path in tmp_path.iterdir():
        with pytest.raises(SystemExit, match=f"{path.name}.*arr_0"):
            data.NpzSamples(path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *_, **__: open("/no network"))
    for spec in ("torchvision:CIFAR10", "absent.npz"):
        with pytest.raises(SystemExit, match=f"{spec}.*No such file"):
            data.open_source(spec)


def over_white(rgba):
    """(H, W, 4) -> (H, W, 3), in exact arithmetic."""
    alpha = array(rgba)[..., 3:] / 255
    return array(rgba)[..., :3] * alpha + 255 * (1 - alpha)


def test_every_mode_is_decoded_as_slow_references_do(photos, tmp_path):
    source = Folder(photos)
    found = {source.name(i)[5:]: source.load(i)[0] for i in range(8)}
    raw = {path.name: Image.open(path) for path in photos.glob("*/*")}
    exact = {name: array(image.convert("RGB")) for name, image in raw.items()}
    exact["turned.jpeg"] = np.rot90(exact["turned.jpeg"], -1)
    exact["sixteen.png"] = np.stack([array(raw["sixteen.png"]) // 257] * 3, 2)
    exact["alpha.png"] = over_white(raw["alpha.png"])
    assert exact.keys() == found.keys()
    for name, image in found.items():
        assert image.mode == "RGB" and np.asarray(image).std() > 5, name
        assert np.abs(array(image) - exact[name]).max() <= (name == "alpha.png"), name


def test_rare_kinds_of_transparency_and_depth_are_decoded(tmp_path):
    def decoded(image, name, **options):
        image.save(tmp_path / name, **options)
        return array(data.decode(tmp_path / name))
    la = Image.fromarray(noise(8, 30, 20, 4)).convert("LA")
    assert np.abs(decoded(la, "la.png") - over_white(la.convert("RGBA"))).max() <= 1
    colors = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8))
    found = decoded(colors, "key.png", transparency=(9, 8, 7))  # this color is transparent
    assert found.tolist() == [[[255] * 3, [1, 2, 3]]]
    deep = np.linspace(0, 65535, 81).round().reshape(9, 9)
    for name in ("deep.tiff", "deep.ppm"):
        found = decoded(Image.fromarray(deep.astype(np.uint16)), name)
        assert np.abs(found - deep[..., None] / 257).max() <= 1, name
    whole, text = Image.fromarray(noise(9, 30, 20)), PngImagePlugin.PngInfo()
    text.add_text("workflow", "0" * 3_000_000, zip=True)
    for options in ({"exif": b"Exif\0\0not a TIFF header"}, {"pnginfo": text}):
        assert np.array_equal(decoded(whole, "notes.png", **options), array(whole))


def test_what_cannot_be_decoded_raises(tmp_path, monkeypatch):
    """So does PostScript in a file named .jpg: PIL would run it."""
    image, whole = Image.fromarray(noise(0, 30, 20)), tmp_path / "whole.png"
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: image.im)
    image.save(whole)
    image.save(tmp_path / "script.jpg", "EPS")
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.eye(9, dtype=np.float32)).save(tmp_path / "floats.tiff")
    for path in {*tmp_path.iterdir()} - {whole}:
        with pytest.raises((OSError, ValueError)):
            data.decode(path)
    for size, word in (("15000 13000", "truncated"), ("15001 16667", "pixels")):
        (tmp_path / "large.ppm").write_bytes(f"P4 {size}\n".encode())
        with pytest.raises(Exception, match=word):  # the first is not too large
            data.decode(tmp_path / "large.ppm")


def test_jpegs_are_decoded_at_a_fraction_of_at_least_twice_the_size(tmp_path):
    """In training as in validation, so that both see equal images."""
    image = Shapes().load(3, 512)[0]
    for name, width, height in (("a.jpg", 512, 512), ("b.jpg", 512, 300), ("c.png", 512, 512)):
        image.resize((width, height)).save(tmp_path / name)
    source = Folder(tmp_path)
    for size, side in ((0, 512), (64, 128), (65, 256), (128, 256), (129, 512), (999, 512)):
        assert source.load(0, size)[0].size == (side, side), size
        assert source.load(2, size)[0].size == (512, 512)  # only a JPEG
    assert source.load(1, 64)[0].size == (256, 150)  # the shorter side decides
    wanted = data.to_tensor(data.center_crop(source.load(0, 100)[0], 100))
    assert torch.equal(EvalImages(source, 100)[0][0], wanted)
    assert torch.equal(TrainImages(source, 100, "center", seed=0).view(0, 5)[0], wanted)


# --------------------------------------------------- crops, order, unreadable images, data.py

def test_crops_are_those_of_the_resized_image_and_come_from_everywhere():
    image = Image.fromarray(noise(0, 80, 40))
    resized = np.asarray(image.resize((40, 20), Image.Resampling.BICUBIC))
    for x in range(21):
        assert np.array_equal(data.crop_resize(image, 20, 2 * x, 0, 40), resized[:, x:x + 20])
    for view in (data.center_crop(image, 20), data.augment(image, 20, "center", None)):
        assert np.array_equal(view, resized[:, 10:30])

    x, y = np.meshgrid(np.arange(80), np.arange(40))
    ramp = Image.fromarray(np.stack([x, y, y], 2).astype(np.uint8))  # a pixel is its position
    rng = np.random.default_rng(0)
    for crop, sides in (("random", {40}), ("resized", {*range(35, 41)})):  # 40 sqrt(0.75 .. 1)
        views = np.stack([data.augment(ramp, 40, crop, rng) for _ in range(600)]).astype(int)
        left, right, bottom = views[:, 20, 0, 0], views[:, 20, -1, 0], views[:, -1, 20, 1]
        assert {*np.round(abs(right - left) * 40 / 39)} == sides
        assert {*np.minimum(left, right)} >= {*range(41)} and 0.4 < (left < right).mean() < 0.6
        assert (bottom.min(), bottom.max()) == (min(sides) - 1, 39)


def test_batches_are_a_function_of_seed_and_position(monkeypatch):
    """Not of workers, micro-batches, processes or the step a run starts at."""
    whole, seen = stream(Tiny(), iters=8)
    for n in (0, 19, 20, 63):
        assert torch.equal(whole[n], TrainImages(Tiny(), 16, "random", seed=3)[n][0])
    assert not torch.equal(whole[0], TrainImages(Tiny(), 16, "random", seed=4)[0][0])
    order = TrainImages(Tiny(), 16, "random", seed=3)
    assert len({order.view(0, n)[0].numpy().tobytes() for n in range(20)}) == 2  # flipped or not
    for options in (dict(workers=2), dict(grad_accum=2), dict(start=4)):
        images = stream(Tiny(), iters=8, **options)[0]
        assert torch.equal(whole[-len(images):], images)
    monkeypatch.setattr(data.runtime, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(data.runtime, "rank", lambda rank=rank: rank)
        shares.append(stream(Tiny(), iters=8, grad_accum=2)[0].split(2))
    assert torch.equal(whole, torch.cat([*itertools.chain(*zip(*shares))]))

    epochs = seen[:20], seen[20:40], seen[40:60]
    assert all(sorted(epoch) == [*range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and [*range(20)] not in epochs


def test_count_means_evenly_spaced_images():
    assert [data.evenly_spaced(7, count) for count in (None, 7, 8)] == [[*range(7)]] * 3
    some = data.evenly_spaced(1000, 100)
    assert len(some) == 100 and some[0] == 0 and some[-1] == 999 and {*np.diff(some)} == {10, 11}
    loader = data.eval_loader(EvalImages(Tiny(), 16), 3, 0, CPU, count=17)
    assert [*itertools.chain(*loader.batch_sampler)] == data.evenly_spaced(20, 17)


def test_a_row_is_labelled_by_the_name_of_its_class_if_the_font_has_it():
    names = ["house finch", "\u732b", "n" * 99]  # the second one would be a box
    assert [data.row_label(*pair) for pair in zip(names, (7, 8, 9))] == [names[0], "8", "n" * 20]


def test_an_unreadable_image_is_reported_once_and_replaced_by_the_next(many_photos, capsys):
    (many_photos / "cats/0.png").write_bytes(b"x")
    source = Folder(many_photos)
    training, validation = TrainImages(source, 8, "center", seed=0), EvalImages(source, 8)
    for view in (lambda i: training.view(i, 0), lambda i: validation[i]):
        assert torch.equal(view(0)[0], view(1)[0]) and view(0)[1] == view(1)[1]
    assert stream(source, size=8, iters=45)[0].float().std((1, 2, 3)).min() > 0
    out = capsys.readouterr().out
    assert source.name(0) == "cats/0.png" and out.count("skipped: 'cats/0.png'") == 1
    with pytest.raises(data.Unreadable, match="0.png"):  # as a metric reads it
        EvalImages(source, 8, strict=True)[0]
    source.files[-1] = b"\xff.png"  # not text; the images after the last one are the first ones
    assert np.array_equal(data.load_image(source, 159, 8)[0], source.load(1)[0])
    assert capsys.readouterr().out.count("skipped") == 1


def test_a_thousand_unreadable_images_in_succession_are_an_error(capsys):
    """The run then saves and exits (test_faults.py)."""
    class Broken(Tiny):
        SIZES = {"train": 1500}

        def load(self, i, size=0):
            if i != 1200:
                raise OSError("truncated")
            return super().load(i, size)

    assert data.load_image(Broken(), 201, 8)[1] == 1200
    with pytest.raises(data.Unreadable, match="no image can be read from 'picture 200'"):
        data.load_image(Broken(), 200, 8)
    assert capsys.readouterr().out.count("skipped") == 100  # at most, per process


def test_the_command_line_checks_shows_and_exports(script, rejected, photos, tmp_path, capsys,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Folder(photos)
    images = EvalImages(source, 32)
    (photos / "cats/bad.png").write_bytes(b"")  # the first image
    for workers in (0, 1):  # the next batches are read after an error, too
        with pytest.raises(SystemExit, match="1 %"):  # 1 of 9 is unreadable
            script("data", "--data", photos, "--image_size", 32, "--workers", workers)
        text = capsys.readouterr().out
        for words in ("8 of 9", "0 cats: 4", "1 dogs: 4", "'cats/bad.png' can't be read"):
            assert text.count(words) == 1
    data.save_grid("wanted.png", [("", torch.stack([images[i][0] for i in range(8)]))])
    assert np.array_equal(Image.open("preview.png"), Image.open("wanted.png"))
    (photos / "cats/bad.png").unlink()
    flags = ("--data", photos, "--image_size", 32, "--workers", 0, "--out")
    script("data", *flags, "out")
    for i in range(8):
        copy = Image.open(tmp_path / "out" / source.classes[source.labels[i]] / f"{i:08}.png")
        assert np.array_equal(copy.resize((32, 32)), data.center_crop(source.load(i)[0], 32))
    assert "out is not empty" in rejected("data", *flags, "out")
    np.savez("samples.npz", np.zeros((2, 24, 24, 3), np.uint8))  # keep their size
    script("data", "--data", "samples.npz", "--workers", 0, "--out", "pngs", "--count", 1)
    assert [Image.open(path).size for path in tmp_path.glob("pngs/*.png")] == [(24, 24)]
