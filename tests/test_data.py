"""Sources, decoding, crops, and the order of images."""
import io
import itertools
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
from data import EvalImages, Folder, Part, TrainImages
from miniature.shapes import Shapes, draw
from runtime import BadInput


class Args:
    batch_size, accum, iters, workers = 8, 1, 6, 0


CPU = torch.device("cpu")


def stream(source, start=0, **options):
    args = type("A", (Args,), options)
    images = TrainImages(source, 16, "random", seed=3)
    return [batch for batch in data.train_loader(images, args, start, CPU)]


class Tiny(Shapes):
    SIZES = {"train": 20, "val": 10}


def test_shapes_are_a_function_of_index_and_size():
    one, again = Shapes().load(7, 48), Shapes().load(7, 48)
    assert one.size == (48, 48) and one.mode == "RGB" and np.array_equal(one, again)
    assert not np.array_equal(one, Shapes("val").load(7, 48))
    small = np.asarray(Shapes().load(7, 96).resize((48, 48), Image.Resampling.BOX), float)
    assert np.abs(small - np.asarray(one, float)).mean() < 20  # the same picture at another size
    labels = [Shapes().label(i) for i in range(20)]
    assert labels == [*range(10)] * 2 and len(Shapes.classes) == 10
    fine = Shapes()
    fine.fine = True
    fine = [fine.label(i) for i in range(300)]
    assert [f // 6 for f in fine] == [i % 10 for i in range(300)] and len(set(fine)) == 60


def test_fine_label_names_the_objects_colour():
    import colorsys
    s = Shapes()
    s.fine = True
    for i in range(1, 40, 10):  # hearts: main colour at the middle
        r, g, b = np.asarray(s.load(i, 64), float)[28:36, 28:36].reshape(-1, 3).mean(0) / 255
        hue, family = colorsys.rgb_to_hsv(r, g, b)[0], s.label(i) % 6
        assert min(abs(hue - family / 6 + k) for k in (-1, 0, 1)) < 0.1


def test_folder_reads_every_mode(photos):
    source = Folder(photos)
    assert len(source) == 8 and source.classes == ["cats", "dogs"]
    assert [source.label(i) for i in range(8)] == [0] * 4 + [1] * 4
    for i in range(8):
        image = source.load(i)
        assert image.mode == "RGB" and np.asarray(image).std() > 5, source.name(i)
    by_name = {source.name(i).rsplit("/", 1)[1]: source.load(i) for i in range(8)}
    assert by_name["turned.jpeg"].size == (40, 100)
    grey = np.asarray(Image.open(photos / "cats" / "grey.png"))
    assert np.array_equal(np.asarray(by_name["grey.png"])[..., 1], grey)
    sixteen = np.asarray(Image.open(photos / "dogs" / "sixteen.png"))
    assert np.abs(np.asarray(by_name["sixteen.png"])[..., 0].astype(int) - sixteen // 257).max() <= 1


def test_transparency_lies_over_white(tmp_path):
    image = np.zeros((4, 4, 4), np.uint8)
    image[:2, :, 3] = 255  # black above, nothing below
    Image.fromarray(image).save(tmp_path / "a.png")
    out = np.asarray(Folder(tmp_path).load(0))
    assert (out[:2] == 0).all() and (out[2:] == 255).all()


def test_flat_folder_has_no_classes(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "b.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg")
    source = Folder(tmp_path)
    assert not source.classes and [source.name(i)[-5:] for i in range(2)] == ["a.jpg", "b.png"]


def test_class_folders_of_any_depth(tmp_path, capsys):
    where = {"b/1.png": 2, "a/z.png": 0, "a/deep/er/2.PNG": 0, "a-b/3.jpeg": 1}  # "a-b/" sorts before "a/"
    hidden = [".hidden.png", ".cache/4.png", "a/.thumbs/5.png", "b/._1.png"]
    for i, name in enumerate([*where, *hidden, "outside/6.png"]):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(tmp_path / "root" / name, "PNG")
    (tmp_path / "root/outside").rename(tmp_path / "outside")
    (tmp_path / "root/c").symlink_to(tmp_path / "outside")
    for other in ("notes.txt", "a/list.csv", "only/text.json"):  # no images, and a folder without one is no class
        (tmp_path / "root" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "root" / other).write_text("x")
    source = Folder(tmp_path / "root")
    assert source.classes == ["a", "a-b", "b", "c"] and len(source) == 5
    got = {source.name(i).removeprefix(f"{tmp_path}/root/"): source.label(i) for i in range(5)}
    assert got == where | {"c/6.png": 3}
    assert [source.label(i) for i in range(5)] == [0, 0, 1, 2, 3]
    assert source.load(4).getpixel((3, 3)) == (80, 0, 0)
    assert "3 file(s)" in capsys.readouterr().out


def test_jpegs_are_decoded_at_reduced_size(tmp_path):
    image = Shapes().load(3, 512)
    image.save(tmp_path / "a.jpg", quality=95)
    source = Folder(tmp_path)
    assert source.load(0).size == (512, 512) and source.load(0, 100).size == (128, 128)
    assert source.load(0, 128).size == (128, 128) and source.load(0, 129).size == (256, 256)
    a, b = data.center(source.load(0), 64).astype(float), data.center(source.load(0, 64), 64).astype(float)
    assert np.abs(a - b).mean() < 3


def test_lsun_is_read_in_workers(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    env = lmdb.open(str(tmp_path / "cat"), map_size=1 << 24)
    with env.begin(write=True) as transaction:
        for i in range(10):
            file = io.BytesIO()
            Image.new("RGB", (40, 30), (25 * i, 0, 0)).save(file, "WEBP", lossless=True)
            transaction.put(f"key{i}".encode(), file.getvalue())
    env.close()
    source = data.open_source(f"lsun:{tmp_path / 'cat'}")
    assert len(data.open_source(f"lsun:{tmp_path / 'cat'}")) == 10  # the same again, for --val
    assert len(source) == 10 and source.load(2).getpixel((5, 5)) == (50, 0, 0)  # open here, then in the workers
    got = sorted(int(image[0, 0, 0]) for batch in data.eval_loader(EvalImages(source, 16), 4, 2, CPU)
                 for image in batch[0])
    assert got == [25 * i for i in range(10)]


def test_batches_depend_on_seed_step_and_position_alone(monkeypatch):
    whole = [b[0] for b in stream(Tiny())]
    with_workers = [b[0] for b in stream(Tiny(), workers=2)]
    later = [b[0] for b in stream(Tiny(), start=4)]
    assert all(torch.equal(a, b) for a, b in zip(whole, with_workers))
    assert len(later) == 2 and all(torch.equal(a, b) for a, b in zip(whole[4:], later))
    split = [b[0] for b in stream(Tiny(), accum=2)]
    assert torch.equal(torch.cat(split[:2]), whole[0])
    shares = []
    for rank in range(2):
        monkeypatch.setattr(data.runtime, "world", lambda: 2)
        monkeypatch.setattr(data.runtime, "rank", lambda rank=rank: rank)
        shares.append([b[0] for b in stream(Tiny())])
    assert all(torch.equal(torch.cat(pair), w) for *pair, w in zip(*shares, whole))


def test_an_epoch_shows_every_image_once():
    images = TrainImages(Tiny(), 16, "random", seed=3)
    seen = []
    for n in range(60):
        images[n]
        seen.append(int(images.order[n % 20]))
    assert all(sorted(seen[20 * e:20 * e + 20]) == list(range(20)) for e in range(3))
    assert seen[:20] != seen[20:40] != list(range(20))


def test_eval_images_come_once_over_all_processes(monkeypatch):
    indices = []
    for rank in range(3):
        monkeypatch.setattr(data.runtime, "world", lambda: 3)
        monkeypatch.setattr(data.runtime, "rank", lambda rank=rank: rank)
        indices += itertools.chain(*data.eval_loader(EvalImages(Tiny(), 16), 3, 0, CPU, n=17).batch_sampler)
    assert len(indices) == len(set(indices)) == 17 and set(indices) <= set(range(20))


def test_choose_takes_some_of_all_and_always_the_same():
    assert data.choose(7, 0).tolist() == data.choose(7, 7).tolist() == data.choose(7, 8).tolist() == [*range(7)]
    some = data.choose(1000, 100)
    assert np.array_equal(some, data.choose(1000, 100)) and (np.diff(some) > 0).all() and 0 <= some[0]
    assert len(some) == 100 and some[-1] < 1000
    assert (np.histogram(some, 4, (0, 1000))[0] > 10).all()  # from everywhere, not the first class


def test_crops():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    image = Image.merge("RGB", [Image.fromarray(ramp)] * 3)  # 200 wide, 100 high, value = x
    centre = data.center(image, 100)
    assert centre.shape == (100, 100, 3) and (centre[0, 0, 0], centre[0, -1, 0]) == (50, 149)
    rng = np.random.default_rng(0)
    outs = [data.augment(image, 100, "random", rng).astype(int) for _ in range(50)]
    steps = [o[0, 60, 0] - o[0, 40, 0] for o in outs]
    assert set(np.sign(steps)) == {-1, 1} and all(abs(abs(s) - 20) <= 1 for s in steps)  # flips, scale 1
    assert len({o.min() for o in outs}) > 20  # places
    zooms = [abs(o[0, 60, 0] - o[0, 40, 0]) for o in (data.augment(image, 100, "resized", rng).astype(int)
                                                      for _ in range(100))]
    assert 17 <= min(zooms) < 19 and 19 < max(zooms) <= 20  # side sqrt(0.75 .. 1)
    assert np.array_equal(data.augment(image, 100, "center", rng), centre)
    square = Shapes().load(5, 120)
    for size in (47, 200):  # PyTorch's resize is PIL's
        outs = [data.augment(square, size, "random", rng) for _ in range(8)]
        expected = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        errors = [min(np.abs(out - e).max() for e in (expected, expected[:, ::-1])) for out in outs]
        assert max(errors) <= 1


def test_float_range():
    x = data.to_float(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4), CPU)
    assert x[0].eq(-1).all() and x[1].eq(1).all()
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(data.to_uint8(data.to_float(every, CPU).to(dtype)), every)
    assert data.to_uint8(torch.tensor([-1.2, 0.003, 0.005, 0.013, 1.5])).tolist() == [0, 128, 128, 129, 255]


@pytest.mark.parametrize("w, scale", [(4, 24), (32, 3), (64, 1), (200, 1)])
def test_a_grid_is_row_by_row_with_two_white_pixels_around_each(tmp_path, w, scale):
    torch.manual_seed(0)
    images = torch.randint(256, (5, 3, 6, w), dtype=torch.uint8)
    data.save_grid(tmp_path / "new" / "g.png", data.to_float(images, CPU), columns=3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["g.png"]
    expected = np.full((2 * 8 + 2, 3 * (w + 2) + 2, 3), 255)
    for i, image in enumerate(images):
        y, x = 2 + i // 3 * 8, 2 + i % 3 * (w + 2)
        expected[y:y + 6, x:x + w] = image.permute(1, 2, 0)
    grid = np.asarray(Image.open(tmp_path / "new" / "g.png"))
    assert np.array_equal(grid, expected.repeat(scale, 0).repeat(scale, 1))


def broken_folder(tmp_path, good, bad):
    for i in range(good):
        Shapes().load(i, 32).save(tmp_path / f"{i:03}.jpg")
    for i in range(bad):
        whole = (tmp_path / "000.jpg").read_bytes()
        (tmp_path / f"bad{i}.jpg").write_bytes([whole[:300], b"", b"text"][i % 3])
    return Folder(tmp_path)


def test_unreadable_images_are_named_skipped_and_counted(tmp_path, capsys):
    source = broken_folder(tmp_path, 120, 1)
    bad = data.Bad(source)
    for images, _, index in stream(source, iters=40):
        bad(index)
        assert images.float().std((1, 2, 3)).min() > 0  # another image stands in its place
    out = capsys.readouterr().out
    assert out.count("skipped") == 1 and "bad0.jpg" in out and len(bad.found) == 1 and bad.seen == 320
    index = torch.cat([b[2] for b in data.eval_loader(EvalImages(source, 16), 8, 0, CPU)])
    assert (index >= 0).sum() == 1 and source.name(int(index.max())).endswith("bad0.jpg")


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    source = broken_folder(tmp_path, 30, 3)
    bad = data.Bad(source)
    with pytest.raises(BadInput, match="can't be read"):
        for _, _, index in stream(source, iters=40):
            bad(index)


def test_a_folder_of_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"1 of 1 images can't be read.*a\.png"):
        data.Bad(Folder(tmp_path))(TrainImages(Folder(tmp_path), 16, "random", 0)[0][2] * torch.ones(1, dtype=int))


def test_bad_sources_are_refused(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").write_bytes(b"")
    for spec, words in [(str(tmp_path / "none"), "no such folder"), (str(tmp_path / "empty"), "holds no images"),
                        (str(tmp_path / "file.tar"), "no such folder"),
                        ("lsun:" + str(tmp_path), "no lmdb")]:
        with pytest.raises(BadInput, match=words):
            data.open_source(spec)
    Image.new("RGB", (20, 20)).save(photos / "stray.png")
    with pytest.raises(BadInput, match="both images"):
        data.open_source(str(photos))


def test_an_empty_lmdb_is_refused(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    lmdb.open(str(tmp_path / "empty"), map_size=1 << 24).close()
    with pytest.raises(BadInput, match="empty"):
        data.open_source(f"lsun:{tmp_path / 'empty'}")


def test_signatures_tell_data_sets_apart(tmp_path):
    for name, first in (("a", 0), ("b", 50), ("c", 0)):
        (tmp_path / name).mkdir()
        for i in range(3):
            draw(first + i, i, 32).save(tmp_path / name / f"{i}.png")
    a, b, c = (Folder(tmp_path / name).signature() for name in "abc")
    assert a == c != b and Shapes("val").signature() != Shapes().signature()


def test_signatures_are_of_what_is_in_the_files(photos):
    first = Folder(photos).signature()
    path = photos / "cats" / "grey.png"
    Image.new("L", (64, 64)).save(path)  # another picture under the same name
    second = Folder(photos).signature()
    path.rename(photos / "cats" / "black.png")
    third = Folder(photos).signature()
    (photos / "cats" / "black.png").rename(photos / "dogs" / "black.png")
    assert len({first, second, third, Folder(photos).signature()}) == 4


def test_small_images_are_refused(photos):
    data.check_size(Folder(photos), 32, photos)
    with pytest.raises(BadInput, match="smaller than the crop"):
        data.check_size(Folder(photos), 256, photos)


def open_data(training=None, val=None, batch_size=1, like=None):
    args = Namespace(data=training and str(training), val=val and str(val), image_size=32, batch_size=batch_size)
    return args, *data.open_data(args, like)


def test_data_and_val(photos, capsys):
    args, source, val = open_data()
    assert args.data == "shapes" and "NO --data: TRAINING ON DRAWN PICTURES" in capsys.readouterr().out
    for _ in range(2):
        assert (len(source), len(val)) == (20_000, 2_000) and source.signature() != val.signature()
        args, source, val = open_data("shapes")
        assert capsys.readouterr().out == ""  # as asked for
    for training in (photos, "shapes"):
        _, source, val = open_data(training, photos)
        assert val is not source and len(val) == 8 and "no --val" not in capsys.readouterr().out
    _, source, val = open_data(photos, "shapes")
    assert len(val) == 2_000
    args, source, val = open_data(like={"data": str(photos), "val": "shapes"})  # of the tokenizer
    assert (args.data, args.val, len(source), len(val)) == (str(photos), "shapes", 8, 2_000)
    with pytest.raises(BadInput, match="8 training images, fewer than --batch_size 9"):
        open_data(photos, photos, batch_size=9)
    Image.new("RGB", (8, 8)).save(photos / "cats" / "small.png")  # one does no harm, a majority does
    open_data("shapes", photos)
    for i in range(9):
        Image.new("RGB", (8, 8)).save(photos / "cats" / f"small{i}.png")
    for training, val in ((photos, None), ("shapes", photos)):
        with pytest.raises(BadInput, match=f"{photos}: images are smaller than the crop"):
            open_data(training, val)


def test_validation_images_are_held_out(tmp_path, photos, capsys):
    for i in range(200):
        folder = tmp_path / "many" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
    _, source, val = open_data(tmp_path / "many")
    assert "64 of the images are held out" in capsys.readouterr().out and source.classes == val.classes == ["a", "b"]
    values = [[part.load(i).getpixel((0, 0))[0] for i in range(len(part))] for part in (source, val)]
    assert len(values[1]) == 64 and sorted(values[0] + values[1]) == [*range(200)]
    for part, its in zip((source, val), values):
        assert [part.label(i) for i in range(len(part))] == [value % 2 for value in its]
        assert [part.name(i).split("/")[-1] for i in range(len(part))] == [f"{value}.png" for value in its]
    for split, its in zip(("train", "val"), values):  # the same ones for fid.py and data.py
        part = data.open_part(str(tmp_path / "many"), split)
        assert [part.load(i).getpixel((0, 0))[0] for i in range(len(part))] == its
    assert len(data.open_part(str(tmp_path / "many"), "val", False)) == 200
    assert len(data.open_part("shapes", "val")) == 2_000
    signatures = {part.signature() for part in (source, val, data.open_source(str(tmp_path / "many")))}
    assert len(signatures) == 3
    sizes = {n: len(data.hold_out(Part(Shapes(), np.arange(n)), "x")[1]) for n in (1000, 10_000)}
    assert sizes == {1000: 64, 10_000: 200}
    with pytest.raises(BadInput, match="8 images, too few to hold out 64 of them for validation: give --val"):
        open_data(photos)
    many = Folder(tmp_path / "many")
    many.classes, many.labels[data.choose(200, 64)[5]] = ["a", "b", "rare"], 2  # its one image is held out
    with pytest.raises(BadInput, match="all of class rare: give --val"):
        data.hold_out(many, "many")


def test_torchvision_by_name(tmp_path, monkeypatch, capsys, imagenette):
    monkeypatch.chdir(tmp_path)
    source = data.open_source("torchvision:FakeData")
    assert (len(source), len(source.classes), source.splits) == (1000, 10, False)
    assert source.load(3).size == (224, 224) and source.load(3).mode == "RGB" and source.label(3) in range(10)
    assert source.label(3) == source.set[3][1]
    assert source.signature() == data.open_source("torchvision:FakeData").signature()
    _, training, val = open_data("torchvision:FakeData")
    assert (len(training), len(val)) == (936, 64)
    # Imagenette's layout; what is there is not downloaded again
    folder = imagenette(train=3, val=2)
    args, source, val = open_data("torchvision:Imagenette")
    assert (len(source), len(val), source.splits) == (30, 20, True) and source.signature() != val.signature()
    assert source.classes == val.classes and source.classes[:2] == ["tench", "English springer"]
    assert [source.label(i) for i in range(0, 30, 3)] == [*range(10)] and source.load(29).size == (40, 50)
    assert len(data.open_source("torchvision:Imagenette", "val")) == 20
    images, labels, index = EvalImages(source, 32)[29]
    assert images.shape == (3, 32, 32) and (labels, index) == (9, -1)
    (folder / "train" / "n01440764" / "1.JPEG").write_bytes(b"x")
    assert TrainImages(source, 32, "random", 0).view(1, 0)[1:] == (0, 1) and EvalImages(source, 32)[1][2] == 1
    assert capsys.readouterr().out.count("note") == 0


class Attributes(torchvision.datasets.FakeData):  # as CelebA's 40
    def __getitem__(self, i):
        return super().__getitem__(i)[0], torch.zeros(40)


class Moving(torchvision.datasets.FakeData):  # as MovingMNIST
    def __getitem__(self, i):
        return torch.zeros(20, 1, 64, 64), 0


def test_torchvision_sets_that_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, words in (("Imagenete", "no data set that torchvision downloads, but Imagenette"),
                        ("ImageFolder", "no data set"), ("xyz", "but FakeData, CIFAR10, CIFAR100, ")):
        with pytest.raises(BadInput, match=f"torchvision:{name}: .*{words}"):
            data.open_source(f"torchvision:{name}")
    monkeypatch.setattr(torchvision.datasets, "FakeData", Attributes)
    source = data.open_source("torchvision:FakeData")
    assert source.classes == [] and source.label(5) == 0 and "without labels" in capsys.readouterr().out
    monkeypatch.setattr(torchvision.datasets, "FakeData", Moving)
    with pytest.raises(BadInput, match="torchvision:FakeData is no set of images"):
        data.open_source("torchvision:FakeData")

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(BadInput, match="torchvision:CIFAR10 is not in data/, and can't be downloaded: no route"):
        data.open_source("torchvision:CIFAR10")


def test_data_py_checks_and_exports(script, photos, tmp_path, capsys):
    out = tmp_path / "export"
    script("data", "--data", photos, "--image_size", 32, "--preview", tmp_path / "p.png", "--out", out, "--workers", 0)
    text = capsys.readouterr().out
    assert "8 images, 2 classes" in text and "unreadable: 0 of 8" in text
    assert len(list((out / "cats").iterdir())) == 4 and Image.open(next((out / "dogs").iterdir())).size == (32, 32)
    assert Image.open(tmp_path / "p.png").size[0] > 32
    with pytest.raises(BadInput, match="not empty"):
        script("data", "--data", photos, "--out", out)
    (photos / "dogs" / "broken.jpg").write_bytes(b"x")
    with pytest.raises(BadInput, match="1 of 9"):
        script("data", "--data", photos, "--preview", tmp_path / "p.png", "--workers", 0)
    assert "broken.jpg" in capsys.readouterr().out
