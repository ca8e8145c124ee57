"""data.py: sources, decoding, crops, the order of images, unreadable ones, the command line."""
import io
import itertools
import os
import pickle
import shutil
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import noise
from PIL import EpsImagePlugin, Image

import data
from data import EvalImages, Folder, Part, TrainImages
from miniature.shapes import Shapes

CPU = torch.device("cpu")
array = partial(np.asarray, dtype=int)


class Tiny(Shapes):
    """Twenty pictures, labelled with their numbers."""

    SIZES = {"train": 20}

    def label(self, i):
        return i


def gather(batches):
    """-> all images, their labels, their reasons."""
    images, labels, reasons = zip(*batches)
    return torch.cat(images), torch.cat(labels).tolist(), [*itertools.chain(*reasons)]


def stream(source, start=0, size=16, **options):
    """The training images of steps `start` to 5."""
    args = Namespace(**dict(batch_size=8, accum=1, iters=6, workers=0) | options)
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
    assert np.abs(array(reduced) - one).mean() < 20  # the same picture at another size
    assert {*contents(Shapes()).values()} == {*range(len(Shapes.classes))}


def test_class_folders_of_any_depth(tmp_path, capsys):
    """Labels in alphabetical order; hidden files, other files and folders without images left out;
    links followed, but not in circles and not to nothing."""
    root = tmp_path / "root"
    where = {"b/1.png": 2, "a/z.png": 0, "a/deep/er/2.PNG": 0, "a-b/3.jpeg": 1}  # a-b/ before a/
    others = ["a/list.csv", "only/text.json", ".hidden.png", ".cache/4.png", "a/.thumbs/5.png"]
    for name in (*where, *others, "../outside/6.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (len(name), 0, 0)).save(root / name, "PNG")
    (root / "c").symlink_to(tmp_path / "outside")
    (root / "b/round").symlink_to(root)
    (root / "b/itself").symlink_to(root / "b/itself")
    (root / "b/nothing.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "outside/back").symlink_to(root / "c")
    source = Folder(root)
    assert source.classes == ["a", "a-b", "b", "c"] and "2 files" in capsys.readouterr().out
    assert contents(source) == where | {"c/6.png": 3} and len(source) == 5
    assert source.load([*contents(source)].index("c/6.png"))[0].getpixel((3, 3)) == (16, 0, 0)
    flat = Folder(root / "a-b")
    assert flat.classes == [] and contents(flat) == {"3.jpeg": 0}


def test_what_is_no_set_of_images_is_refused(refused, tmp_path, photos):
    assert "--val" in refused("train_tokenizer", "--data", photos, "--out", tmp_path / "out")
    assert "--val" in refused("data", "--data", photos, "--split", "val")  # too few for that
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").write_bytes(b"")
    Image.new("RGB", (20, 20)).save(photos / "stray.png")  # beside class folders
    folders = [str(tmp_path / name) for name in ("absent", "file.tar", "empty", "photos")]
    for spec in (*folders, "lsun:absent", "torchvision:Imagenete", "torchvision:ImageFolder"):
        assert spec in refused("data", "--data", spec)
    for part, folder in (("train", "cats"), ("val", "dogs")):  # parts of a set, no classes
        (tmp_path / "parts").mkdir(exist_ok=True)
        (photos / folder).rename(tmp_path / "parts" / part)
    sentence = refused("data", "--data", tmp_path / "parts")
    assert f"--data {tmp_path}/parts/train --val {tmp_path}/parts/val" in sentence


def test_signatures_are_of_what_is_in_the_files(photos):
    path, found = photos / "cats/grey.png", {Folder(photos).signature()}
    assert found == {Folder(photos).signature()}
    Image.new("L", (64, 64)).save(path)  # another picture under the same name
    found.add(Folder(photos).signature())
    for name in ("cats/black.png", "dogs/black.png"):
        path = path.rename(photos / name)
        found.add(Folder(photos).signature())
    assert Part(Folder(photos), "train").signature() not in found and len(found) == 4


def test_one_image_in_twenty_is_held_out_by_its_name(many_photos, monkeypatch):
    its, held = map(contents, both_parts(many_photos))
    assert its | held == contents(Folder(many_photos)) and not its.keys() & held
    assert 2 <= len(held) <= 20 and len(its) + len(held) == 160
    for part in both_parts(many_photos):
        for i in range(len(part)):
            assert np.array_equal(part.load(i)[0], Image.open(many_photos / part.name(i)))

    for i in range(160, 200):  # some come, some go: the others stay where they are
        Image.new("RGB", (9, 9)).save(many_photos / f"cats/{i}.png")
    gone = {f"dogs/{i}.png" for i in range(1, 160, 4)} | {min(held), min(its)}
    for name in gone:
        (many_photos / name).unlink()
    its_now, held_now = map(contents, both_parts(many_photos))
    assert its.keys() - gone <= its_now.keys() and held.keys() - gone <= held_now.keys()

    monkeypatch.setattr(Tiny, "SIZES", {"train": 4000})
    assert 150 < len(Part(Tiny(), "val")) < 250


def test_data_and_val(photos, many_photos, capsys):
    def sizes(training, val):
        args = Namespace(data=training and str(training), val=val and str(val), data_found="")
        return [len(part) for part in data.open_data(args)]

    assert sizes(None, None) == [60, 12] and "NO --data" in capsys.readouterr().out
    assert sizes("shapes", None) == [60, 12] and "NO --data" not in capsys.readouterr().out
    assert sizes(many_photos, None) == [len(part) for part in both_parts(many_photos)]
    assert sizes(many_photos, photos) == [160, 8] and sizes(photos, "shapes") == [8, 12]


def test_validation_labels_are_those_of_training(many_photos, tmp_path, capsys):
    """A class that --val lacks does not shift the others; flat or strange folders are refused."""
    def opened(*folders, labels=True):
        for folder in folders:
            (tmp_path / "val" / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "val" / folder / "a.png")
        args = Namespace(data=str(many_photos), val=str(tmp_path / "val"), data_found="")
        return data.open_data(args, labels)[1]

    val = opened("dogs")
    assert val.load(0)[1] == 1 and "1 of 2 classes" in capsys.readouterr().out
    assert val.classes == ["cats", "dogs"]
    with pytest.raises(SystemExit, match="--val.*wolves.*--data"):
        opened("wolves")
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(SystemExit, match="--val.*no classes"):
        opened("")
    assert len(opened("", labels=False)) == 1  # a tokenizer does not look at them
    for path in many_photos.rglob("*.png"):
        path.rename(many_photos / f"{path.parent.name} {path.name}")
    for folder in ("cats", "dogs"):
        (many_photos / folder).rmdir()
    shutil.rmtree(tmp_path / "val")
    assert len(opened("strange").classes) == 1  # a flat --data has no labels to be wrong


def test_only_links_are_looked_at_one_by_one(many_photos, monkeypatch):
    (many_photos / "cats/link.png").symlink_to(many_photos / "cats/0.png")
    looked, real = [], data.os.path.exists
    monkeypatch.setattr(data.os.path, "exists", lambda path: looked.append(path) or real(path))
    assert len(Folder(many_photos)) == 161 and len(looked) == 1


def test_lsun_is_read_in_workers(tmp_path):
    import lmdb
    with lmdb.open(str(tmp_path), map_size=1 << 24) as env, env.begin(write=True) as writer:
        for i in range(10):
            file = io.BytesIO()
            Image.new("RGB", (40, 30), (25 * i, 0, 0)).save(file, "WEBP", lossless=True)
            writer.put(f"key{i}".encode(), file.getvalue())
    source, again = (data.open_source(f"lsun:{tmp_path}") for _ in range(2))  # --data and --val
    assert contents(source) == {f"key{i}": 0 for i in range(10)} and len(source.classes) == 0
    assert source.signature() == again.signature()
    assert source.load(2)[0].getpixel((5, 5)) == (50, 0, 0)  # open here, then in the workers
    images, _, _ = gather(data.eval_loader(EvalImages(source, 16), 4, 2, CPU))
    assert images[:, 0, 0, 0].tolist() == [25 * i for i in range(10)]
    assert sum(map(len, both_parts(f"lsun:{tmp_path}"))) == 10


def test_torchvision_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar = torchvision.datasets.CIFAR10  # its layout, without the checksums of its files
    for name, value in (("train_list", [["some", None]]), ("test_list", [["others", None]]),
                        ("meta", cifar.meta | {"md5": None})):
        monkeypatch.setattr(cifar, name, value)
    folder = tmp_path / "data" / cifar.base_folder
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    for name, content in (("some", {"data": rows, "labels": [*range(5)]}),
                          ("others", {"data": rows[:2], "labels": [9, 8]}),
                          ("batches.meta", {"label_names": [*"abcdefghij"]})):
        (folder / name).write_bytes(pickle.dumps(content))
    source, val = both_parts("torchvision:CIFAR10")
    assert [[*contents(part).values()] for part in (source, val)] == [[0, 1, 2, 3, 4], [9, 8]]
    assert source.classes == val.classes == [*"abcdefghij"]
    assert (array(source.load(3)[0]).transpose(2, 0, 1).ravel() == rows[3]).all()
    assert source.signature() == both_parts("torchvision:CIFAR10")[0].signature() != val.signature()
    monkeypatch.setattr(cifar, "__getitem__", lambda *_: (Image.new("L", (9, 9)), torch.zeros(40)))
    unlabelled = data.open_source("torchvision:CIFAR10")  # as CelebA is, with 40 an image
    assert unlabelled.classes == [] and {*contents(unlabelled).values()} == {0}

    # Imagenette's: a split by name, names of classes in tuples; one image is unreadable
    folders = torchvision.datasets.imagenette.Imagenette._WNID_TO_CLASS
    files = ("train", "0.JPEG"), ("train", "1.JPEG"), ("val", "0.JPEG")
    for folder, (split, name) in itertools.product(folders, files):
        path = tmp_path / "data/imagenette2" / split / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), (200, 0, 0)).save(path)
    source, val = both_parts("torchvision:Imagenette")
    assert [*contents(source).values()][::2] == [*contents(val).values()] == [*range(10)]
    assert source.classes[1] == "English springer" and source.load(9)[0].size == (40, 50)
    path.write_bytes(b"x")
    assert [bool(EvalImages(val, 8)[i][2]) for i in (8, 9)] == [False, True]


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

    la = Image.fromarray(noise(8, 30, 20, 4)).convert("LA")
    la.save(tmp_path / "la.png")
    error = array(data.decode(tmp_path / "la.png")) - over_white(la.convert("RGBA"))
    assert np.abs(error).max() <= 1
    key = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8))
    key.save(tmp_path / "key.png", transparency=(9, 8, 7))  # this colour is transparent
    assert array(data.decode(tmp_path / "key.png")).tolist() == [[[255] * 3, [1, 2, 3]]]
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "deep.tiff")
    assert (array(data.decode(tmp_path / "deep.tiff")) == 40_000 // 257).all()
    deep = np.linspace(0, 65535, 81).round().reshape(9, 9).astype(">u2")
    (tmp_path / "deep.pgm").write_bytes(b"P5 9 9 65535\n" + deep.tobytes())
    assert np.abs(array(data.decode(tmp_path / "deep.pgm"))[..., 0] - deep / 257).max() <= 1
    whole = Image.fromarray(noise(9, 30, 20))
    whole.save(tmp_path / "exif.png", exif=b"Exif\0\0not a TIFF header")
    assert np.array_equal(array(data.decode(tmp_path / "exif.png")), array(whole))


def test_what_can_not_be_decoded_raises(tmp_path, monkeypatch):
    """PostScript in a .jpg among it: none of it is run."""
    picture, whole = Image.fromarray(noise(0, 30, 20)), tmp_path / "whole.png"
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: picture.im)
    picture.save(whole)
    assert data.decode(whole).size == (30, 20)
    picture.save(tmp_path / "script.jpg", "EPS")
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.eye(9, dtype=np.float32)).save(tmp_path / "floats.tiff")
    for path in {*tmp_path.iterdir()} - {whole}:
        with pytest.raises((OSError, ValueError)):
            data.decode(path)
    for size, word in (("15000 13000", "truncated"), ("15001 16667", "pixels")):
        (tmp_path / "large.ppm").write_bytes(f"P4 {size}\n".encode())
        with pytest.raises((OSError, ValueError), match=word):  # the first is not too large
            data.decode(tmp_path / "large.ppm")


def test_jpegs_are_decoded_at_a_fraction_only_where_fast(tmp_path):
    Shapes().load(3, 512)[0].save(tmp_path / "a.jpg", quality=95)
    source = Folder(tmp_path)
    for size, fast, side in ((100, False, 512), (0, True, 512), (100, True, 128), (128, True, 128),
                             (129, True, 256), (600, True, 512)):
        assert source.load(0, size, fast)[0].size == (side, side)


# --------------------------------------------------- crops, order, unreadable images, data.py

def test_crops_are_those_of_the_resized_image_and_come_from_everywhere():
    image = Image.fromarray(noise(0, 80, 40))
    resized = np.asarray(image.resize((40, 20), Image.Resampling.BICUBIC))
    for x in range(21):
        assert np.array_equal(data.square(image, 20, 2 * x, 0, 40), resized[:, x:x + 20])
    for view in (data.center(image, 20), data.augment(image, 20, "center", None)):
        assert np.array_equal(view, resized[:, 10:30])

    x, y = np.meshgrid(np.arange(80), np.arange(40))
    ramp = Image.fromarray(np.stack([x, y, y], 2).astype(np.uint8))  # a pixel is its place
    rng = np.random.default_rng(0)
    for crop, sides in (("random", {40}), ("resized", {*range(35, 41)})):  # 40 sqrt(0.75 .. 1)
        views = np.stack([data.augment(ramp, 40, crop, rng) for _ in range(600)]).astype(int)
        left, right, bottom = views[:, 20, 0, 0], views[:, 20, -1, 0], views[:, -1, 20, 1]
        assert {*np.round(abs(right - left) * 40 / 39)} == sides
        assert {*np.minimum(left, right)} >= {*range(41)} and 0.4 < (left < right).mean() < 0.6
        assert (bottom.min(), bottom.max()) == (min(sides) - 1, 39)


def test_batches_are_a_function_of_seed_and_position(monkeypatch):
    """Not of workers, micro-batches, processes or the step a run starts at."""
    whole, seen, _ = stream(Tiny(), iters=8)
    for n in (0, 19, 20, 63):
        assert torch.equal(whole[n], TrainImages(Tiny(), 16, "random", seed=3)[n][0])
    assert not torch.equal(whole[0], TrainImages(Tiny(), 16, "random", seed=4)[0][0])
    order = TrainImages(Tiny(), 16, "random", seed=3)
    assert len({order.view(0, n)[0].numpy().tobytes() for n in range(20)}) == 2  # flipped or not
    for options in (dict(workers=2), dict(accum=2), dict(start=4)):
        images = stream(Tiny(), iters=8, **options)[0]
        assert torch.equal(whole[-len(images):], images)
    monkeypatch.setattr(data.runtime, "world", lambda: 2)
    monkeypatch.setattr(data.runtime, "barrier", lambda: None)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(data.runtime, "rank", lambda rank=rank: rank)
        shares.append(stream(Tiny(), iters=8, accum=2)[0].split(2))
    assert torch.equal(whole, torch.cat([*itertools.chain(*zip(*shares))]))

    epochs = seen[:20], seen[20:40], seen[40:60]
    assert all(sorted(epoch) == [*range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and [*range(20)] not in epochs


def test_small_shared_memory_is_named_before_the_first_step(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(data.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(data.os.path, "isdir", lambda path: True)
    needed = 8 * 8 * 4 * 32 * 3 * 256 ** 2  # processes, workers, batches ahead, images, bytes
    for free in (needed, needed - 1):
        usage = Namespace(free=free)
        monkeypatch.setattr(data.shutil, "disk_usage", lambda path, usage=usage: usage)
        if free == needed:
            data.check_shared_memory(8, 32 * 3 * 256 ** 2)
    with pytest.raises(SystemExit, match="--workers.*--ipc=host.*--shm-size=2g"):
        stream(Tiny(), size=256, batch_size=32, workers=8)
    data.check_shared_memory(0, 1 << 40)
    seen, check = [], lambda *_: seen.append("looked")  # all look before one takes some of it
    monkeypatch.setattr(data, "check_shared_memory", check)
    monkeypatch.setattr(data.runtime, "barrier", lambda: seen.append("waited"))
    stream(Tiny())
    assert seen == ["looked", "waited"]


def test_count_takes_images_from_everywhere_and_each_once_over_all_processes(monkeypatch):
    assert data.spread(7) == data.spread(7, 7) == data.spread(7, 8) == [*range(7)]
    some = data.spread(1000, 100)
    assert len(some) == 100 and some[0] == 0 and some[-1] == 999 and {*np.diff(some)} == {10, 11}
    monkeypatch.setattr(data.runtime, "world", lambda: 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(data.runtime, "rank", lambda rank=rank: rank)
        dealt += data.eval_loader(EvalImages(Tiny(), 16), 3, 0, CPU, count=17).batch_sampler
    assert sorted(itertools.chain(*dealt)) == data.spread(20, 17) and len(dealt) == 6


def test_a_grid_is_row_by_row_with_two_white_pixels_around_each(tmp_path):
    images = torch.from_numpy(np.stack([noise(i, 32, 6) for i in range(5)]))  # (5, 6, 32, 3)
    path = tmp_path / "new/g.png"
    data.save_grid(path, images.movedim(3, 1), columns=3)
    expected = np.full((2 * 8 + 2, 3 * 34 + 2, 3), 255)
    for i, image in enumerate(images):
        y, x = 2 + i // 3 * 8, 2 + i % 3 * 34
        expected[y:y + 6, x:x + 32] = image
    assert np.array_equal(Image.open(path), expected.repeat(3, 0).repeat(3, 1))  # enlarged


def test_unreadable_images_are_named_skipped_and_counted(many_photos, capsys):
    """More than one percent of them, and more than ten, or all, are too many."""
    (many_photos / "cats/bad.png").write_bytes(b"x")
    source = Folder(many_photos)
    images, _, reasons = stream(source, size=8, iters=45)
    assert images.float().std((1, 2, 3)).min() > 0  # another image stands in its place
    unreadable = data.Unreadable(source)
    unreadable.note(reasons)
    unreadable.note(reasons)
    out = capsys.readouterr().out
    assert out.count("skipped") == 1 and "cats/bad.png" in out and not unreadable.too_many()
    images, _, reasons = gather(data.eval_loader(EvalImages(source, 16), 8, 0, CPU))
    black = images.flatten(1).sum(1) == 0
    assert [*map(bool, reasons)] == black.tolist() and "bad.png" in max(reasons)

    for total, few, many in ((8, 7, 8), (500, 10, 11), (5000, 50, 51)):
        unreadable = data.Unreadable(range(total))
        unreadable.note([*map(str, range(few))])
        assert not unreadable.too_many()
        unreadable.note([*map(str, range(many))])
        assert f"{many} of {total}" in unreadable.too_many()
    source.files[:] = b"\xff.png"  # not one is readable, and a name that is no text is printed
    for images in (TrainImages(source, 8, "random", 0), EvalImages(source, 8)):
        assert b".png" in images[0][2].encode()


def test_the_command_line_checks_shows_and_exports(script, refused, photos, tmp_path, capsys):
    preview, out = tmp_path / "p.png", tmp_path / "out"
    flags = ("--data", photos, "--image_size", 32, "--workers", 0, "--preview", preview)
    script("data", *flags, "--out", out)
    text = capsys.readouterr().out
    assert "8 images, 2 classes" in text and "cats: 4" in text and "unreadable: 0" in text
    for i in range(8):
        copy = Image.open(out / ("cats", "dogs")[i // 4] / f"{i:08}.png")
        assert np.array_equal(copy, data.center(Folder(photos).load(i)[0], 32))
    assert Image.open(preview).size[0] > 8 * 32
    script("data", *flags, "--count", 3, "--out", tmp_path / "some")
    assert len([*tmp_path.glob("some/*/*.png")]) == 3
    (photos / "dogs/bad.png").write_bytes(b"")
    assert "1 of 9" in refused("data", *flags)
    text = capsys.readouterr().out
    assert "bad.png" in text and "cats: 5" not in text  # it counts for no class


def test_blank_pictures_and_strange_names_of_classes(photos, tmp_path, capsys, monkeypatch):
    bars = np.zeros((32, 96, 3), np.uint8)
    bars[:, :32] = 255  # white, but not where it is cropped
    Image.fromarray(bars).save(photos / "cats/bars.png")
    os.rename(photos / "dogs", os.fsencode(photos) + b"/\xff")
    def rename(self, root, real=Folder.__init__):
        real(self, root)
        self.classes[0] = "../cats"
    monkeypatch.setattr(Folder, "__init__", rename)
    words = ["--image_size", 32, "--workers", 0, "--preview", tmp_path / "p.png"]
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", str(photos), *map(str, words),
                                      "--out", str(tmp_path / "out")])
    data.runtime.launch(data.main)
    text = capsys.readouterr().out
    assert "'cats/bars.png'" in text and text.count("one colour") == 1
    assert len([*tmp_path.glob("out/.._cats/*.png")]) == 5 and not (tmp_path / "cats").exists()
