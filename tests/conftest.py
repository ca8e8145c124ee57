"""Shared by the tests: running the scripts as a user would, in this process (quick) or through torchrun."""
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ROOT, ROOT / "miniature", ROOT / "benchmarks"  # where scripts are
sys.path[:0] = map(str, FOLDERS)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import runtime  # noqa: E402

torch.set_num_threads(1)
IMAGENETTE = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
              "n03445777", "n03888257")  # its class folders
SCRIPTS = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.py"))
           if "runtime.Parser(" in path.read_text()}


@pytest.fixture
def script(monkeypatch):
    """script("train_tokenizer", "--iters", 3): its main() with these words as the command line."""
    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        try:
            return importlib.import_module(name).main()
        finally:  # a Run handles them
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return call


@pytest.fixture
def signal_in(monkeypatch):
    """signal_in(3): from now on a SIGTERM arrives while a script takes step 3; signal_in(None) undoes it."""
    after_step = runtime.Run.after_step

    def arrive(step):
        def after(self, done, *rest):
            if done == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return after_step(self, done, *rest)
        monkeypatch.setattr(runtime.Run, "after_step", after)
    return arrive


@pytest.fixture
def launch():
    """launch(["miniature/train_vgg.py", ...]), launch(["train_tokenizer.py", ...], processes=2): the real command in a
    process of its own; its result."""
    def call(words, processes=0, check=True, **options):
        start = [sys.executable]
        if processes:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*start, str(ROOT / words[0]), *map(str, words[1:])], capture_output=True, text=True,
                              timeout=300, **options)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    return call


class Caught(Exception):
    pass


def parser_of(name, monkeypatch):
    """The parser that a script makes."""
    def catch(self, *words):
        raise Caught(self)
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Parser, "parse_args", catch)
        patch.setattr(sys, "argv", [f"{name}.py"])
        patch.setattr(os, "cpu_count", lambda: 64)
        with pytest.raises(Caught) as caught:
            importlib.import_module(name).main()
    return caught.value.args[0]


@pytest.fixture(scope="session")
def vgg(tmp_path_factory):
    """A checkpoint of train_vgg.py's kind, untrained: the mechanics don't care what it sees."""
    import losses
    torch.manual_seed(1)
    net = losses.SmallVGG([8, 8, 16, 16, 16], 10)
    for _ in range(30):  # batch norm's statistics, so that its features are of order 1
        net(torch.randn(8, 3, 32, 32), losses.LAYERS)
    net.eval()
    net.mean_square.copy_(torch.linspace(0.5, 1.0, 6))
    path = tmp_path_factory.mktemp("vgg") / "ckpt.pt"
    torch.save({"kind": "vgg", "args": {}, "step": 0, "model": net.state_dict(), "config": net.config,
                "labels": {"classes": [str(i) for i in range(10)], "fine": 1}}, path)
    return path


@pytest.fixture
def many_photos(tmp_path):
    """A folder of two classes with 160 small pictures: enough to hold some out."""
    for i in range(160):
        path = tmp_path / "many" / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "many"


@pytest.fixture
def imagenette(tmp_path):
    """imagenette(train, val): so many pictures of each class, where torchvision looks for the set in data/."""
    def make(**counts):
        for split, n in counts.items():
            for k, name in enumerate(IMAGENETTE):
                folder = tmp_path / "data" / "imagenette2" / split / name
                folder.mkdir(parents=True)
                for i in range(n):
                    Image.new("RGB", (40, 50), (k, i, 0)).save(folder / f"{i}.JPEG")
        return tmp_path / "data" / "imagenette2"
    return make


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes with pictures of many modes, sizes and formats, all decodable."""
    rng = np.random.default_rng(0)

    def noise(w, h, c=3):
        small = rng.integers(0, 256, (4, 4, c), dtype=np.uint8)
        return np.asarray(Image.fromarray(small.squeeze()).resize((w, h), Image.Resampling.BICUBIC))

    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    cats, dogs = tmp_path / "photos" / "cats", tmp_path / "photos" / "dogs"
    Image.fromarray(noise(90, 60)).save(cats / "rgb.jpg", quality=95)
    Image.fromarray(noise(64, 64, 1), "L").save(cats / "grey.png")
    Image.fromarray(noise(70, 50, 4), "CMYK").save(cats / "cmyk.jpg")
    Image.fromarray(noise(50, 80, 4), "RGBA").save(cats / "alpha.png")
    Image.fromarray(noise(60, 60)).convert("P").save(dogs / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    Image.fromarray(noise(100, 40)).save(dogs / "turned.jpeg", exif=exif)
    Image.fromarray((noise(48, 48, 1).astype(np.uint16) * 257)).save(dogs / "sixteen.png")
    Image.fromarray(noise(300, 200)).save(dogs / "large.webp")
    return tmp_path / "photos"
