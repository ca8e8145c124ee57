"""Sources, decoding, crops, and the order of images."""
import gzip
import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import EvalImages, Folder, Shapes, Tar, TrainImages
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
    fine = [Shapes().fine_label(i) for i in range(300)]
    assert [f // 6 for f in fine] == [i % 10 for i in range(300)] and len(set(fine)) == 60


def test_fine_label_names_the_objects_colour():
    import colorsys
    s = Shapes()
    for i in range(1, 40, 10):  # hearts: main colour at the middle
        r, g, b = np.asarray(s.load(i, 64), float)[28:36, 28:36].reshape(-1, 3).mean(0) / 255
        hue, family = colorsys.rgb_to_hsv(r, g, b)[0], s.fine_label(i) % 6
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
    assert len(data.open_source(f"lsun:{tmp_path / 'cat'}")) == 10  # the same again, as --data without --val does
    assert len(source) == 10 and source.load(2).getpixel((5, 5)) == (50, 0, 0)  # open here, then in the workers
    got = sorted(int(image[0, 0, 0]) for batch in data.eval_loader(EvalImages(source, 16), 4, 2, CPU)
                 for image in batch[0])
    assert got == [25 * i for i in range(10)]


def jpeg(value):
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (value, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def make_tar(path, members):
    """A tar file of {name: bytes}, in that order; its bytes."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def shown(source):
    """Of every image its name within the tars, its label, and the red that it shows."""
    red = [np.asarray(source.load(i))[0, 0, 0] for i in range(len(source))]
    return [(os.fsdecode(source.names[i]), source.label(i), round(int(r), -1)) for i, r in enumerate(red)]


def test_a_tar_gives_what_the_folder_gives(photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "some/where")
    folder, tar = data.open_source(str(photos)), data.open_source(str(tmp_path / "photos.tar"))
    assert isinstance(tar, Tar) and tar.classes == folder.classes and len(tar) == len(folder) == 8
    for workers in (0, 2):
        for a, b in zip(stream(folder, workers=workers), stream(tar, workers=workers)):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
    data.check_size(tar, 32, "photos.tar")
    with pytest.raises(BadInput, match="smaller than the crop"):
        data.check_size(tar, 256, "photos.tar")


def test_imagenets_archive_of_archives(tmp_path):
    inner = {f"n0000000{c}.tar": make_tar(tmp_path / "classes" / f"n0000000{c}.tar",
                                          {f"{i}.JPEG": jpeg(100 * c + 10 * i) for i in (1, 0)}) for c in (1, 0)}
    make_tar(tmp_path / "train.tar", inner)
    expected = [(f"n0000000{c}/{i}.JPEG", c, 100 * c + 10 * i) for c in (0, 1) for i in (0, 1)]
    for spec in (tmp_path / "train.tar", tmp_path / "classes"):  # as published, and unpacked once
        source = data.open_source(str(spec))
        assert source.classes == ["n00000000", "n00000001"] and shown(source) == expected


def test_webdatasets_shards(tmp_path):
    shards = {"b": [(3, 2), (4, 0)], "a": [(1, 0), (2, 2)]}
    for shard, images in shards.items():
        make_tar(tmp_path / "web" / f"{shard}.tar",
                 {name: content for i, label in images for name, content in (
                     (f"./{i}.x.jpg", jpeg(10 * i)), (f"./{i}.cls", f"{label}\n".encode()), (f"./{i}.json", b"{}"))})
    source = data.open_source(str(tmp_path / "web"))
    assert source.classes == ["0", "1", "2"]
    assert shown(source) == [("1.x.jpg", 0, 10), ("4.x.jpg", 0, 40), ("2.x.jpg", 2, 20), ("3.x.jpg", 2, 30)]
    assert source.name(3) == f"{tmp_path}/web/b.tar/3.x.jpg"


def test_a_flat_tar_has_no_classes_and_an_index(tmp_path, monkeypatch, capsys):
    path = tmp_path / "flat.tar"
    make_tar(path, {"images/b.jpg": jpeg(20), "images/a.jpg": jpeg(10), "images/._a.jpg": b"", "notes.txt": b"x"})
    source = data.open_source(str(path))
    expected = [("images/a.jpg", 0, 10), ("images/b.jpg", 0, 20)]
    assert not source.classes and shown(source) == expected

    def never(*_):
        raise AssertionError("the headers are read again")
    with monkeypatch.context() as patch:
        patch.setattr(data, "_members", never)
        again = data.open_source(str(path))
    assert shown(again) == expected and again.signature() == source.signature()
    make_tar(path, {"c.jpg": jpeg(30), "d.jpg": jpeg(40)})  # another file under the same name
    os.utime(path, (1, 1))
    other = data.open_source(str(path))
    assert [name for name, *_ in shown(other)] == ["c.jpg", "d.jpg"] and other.signature() != source.signature()
    (tmp_path / "flat.tar.index.npz").write_bytes(b"damaged")
    assert len(data.open_source(str(path))) == 2

    def full(*_):
        raise BadInput("no room")
    (tmp_path / "flat.tar.index.npz").unlink()
    monkeypatch.setattr(data.runtime, "save_file", full)
    capsys.readouterr()
    assert len(data.open_source(str(path))) == 2 and "kept in memory" in capsys.readouterr().out


def test_bad_tars_are_refused(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    end = len(whole.rstrip(b"\0"))  # of the last image; zeros up to a whole block, then the archive's own end
    content = {"cut": whole[:1800], "headless": whole[:1024], "endless": whole[:end + -end % 512], "text": b"no tar",
               "empty": b"", "gz": gzip.compress(whole)}
    for name, text in content.items():
        (tmp_path / f"{name}.tar").write_bytes(text)
    make_tar(tmp_path / "outer.tar", {"n00000001.tar": whole[:1800]})
    make_tar(tmp_path / "none.tar", {"a.txt": b"x"})
    make_tar(tmp_path / "mixed.tar", {"a/1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    make_tar(tmp_path / "word.tar", {"1.jpg": jpeg(1), "1.cls": b"cat"})
    make_tar(tmp_path / "half.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2)})
    for name, words in [*[(name, r"can't be read as a tar file") for name in content],
                        ("outer", "outer.tar/n00000001.tar can't be read as a tar"), ("none", "holds no images"),
                        ("mixed", "both images and class folders"), ("word", "holds b'cat', not the number of a class"),
                        ("half", r"2.jpg has no .cls file beside it")]:
        with pytest.raises(BadInput, match=words):
            data.open_source(str(tmp_path / f"{name}.tar"))
    source = data.open_source(str(tmp_path / "whole.tar"))
    (tmp_path / "whole.tar").unlink()
    with pytest.raises(data.Unreadable, match="whole.tar/a/1.jpg"):
        source.load(0)


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
        indices += [i for b in data.eval_loader(EvalImages(Tiny(), 16), 3, 0, CPU, n=17) for i in b[2].tolist()]
    assert len(indices) == len(set(indices)) == 17 and set(indices) <= set(range(20))


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
    assert out.count("skipped") == 1 and "bad0.jpg" in out and len(bad.seen) == 1
    index = torch.cat([b[2] for b in data.eval_loader(EvalImages(source, 16), 8, 0, CPU)])
    assert (index < 0).sum() == 1 and source.name(-1 - int(index.min())).endswith("bad0.jpg")


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
    for spec, words in [(str(tmp_path / "none"), "no such folder"), (str(tmp_path / "empty"), "holds no images"),
                        ("lsun:" + str(tmp_path), "no lmdb")]:
        with pytest.raises(BadInput, match=words):
            data.open_source(spec)
    Image.new("RGB", (20, 20)).save(photos / "stray.png")
    with pytest.raises(BadInput, match="both images"):
        data.open_source(str(photos))


def test_signatures_tell_data_sets_apart(tmp_path):
    for name, first in (("a", 0), ("b", 50), ("c", 0)):
        (tmp_path / name).mkdir()
        for i in range(3):
            data.draw(first + i, i, 32).save(tmp_path / name / f"{i}.png")
    a, b, c = (Folder(tmp_path / name).signature() for name in "abc")
    assert a == c != b and Shapes("val").signature() != Shapes().signature()


def test_small_images_are_refused(photos):
    data.check_size(Folder(photos), 32, photos)
    with pytest.raises(BadInput, match="smaller than the crop"):
        data.check_size(Folder(photos), 256, photos)


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
