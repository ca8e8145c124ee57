"""Shared by the tests: running the scripts as a user would, in this process or by torchrun."""
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = map(str, (ROOT, ROOT / "miniature", ROOT / "benchmarks"))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402
import vq  # noqa: E402
from miniature.shapes import Shapes  # noqa: E402
from transformer import Transformer  # noqa: E402

torch.set_num_threads(1)
# Tiny runs in which all parts are at work.
COMMON = ["--batch_size", 8, "--lr", 1e-3, "--workers", 0, "--log_every", 1, "--eval_every", 3,
          "--iters", 6, "--device", "cpu", "--data", "shapes"]
TINY = [*COMMON, "--image_size", 16, "--channels", 16, 16, "--z_dim", 8, "--codebook_size", 16,
        "--disc_channels", 8, 8, "--disc_warmup", 2]
PRIOR = [*COMMON, "--size", "tiny", "--views", 2]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A small drawn data set, and no unreadable image that an earlier test has reported. Afterwards
    signals are handled as before."""
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 12})
    data.report.cache_clear()
    before = {number: signal.getsignal(number) for number in (*runtime.SIGNALS, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def script(monkeypatch):
    """script("train_tokenizer", "--iters", 3): its main() with these words as the command line."""
    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        try:
            return importlib.import_module(name).main()
        except BaseException as error:
            while error:  # data workers end when no frame refers to their loader any more
                traceback.clear_frames(error.__traceback__)
                error = error.__context__
            raise
        finally:  # the others ignore the SIGTERM that would end them with this process
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for worker in (p for p in multiprocessing.active_children() if p.daemon):
                worker.kill()
                worker.join()
    return call


@pytest.fixture
def rejected(script, capsys):
    """rejected("sample", "--count", 0): the sentence with which the script exits, code not 0."""
    def call(name, *words):
        with pytest.raises(SystemExit) as ended:
            script(name, *words)
        sentence = ended.value.code
        if sentence == 2:  # argparse's own
            sentence = capsys.readouterr().err.splitlines()[-1]
        assert isinstance(sentence, str) and "\n" not in sentence, sentence
        return sentence
    return call


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(3): from now on a SIGTERM arrives when a run has taken three steps. The script then
    saves a checkpoint of step 3 and exits with 143. signal_at(None) undoes it."""
    stop_if_requested = runtime.Run.stop_if_requested

    def arrive(at):
        def receive(self, step):
            if step == at:
                signal.raise_signal(signal.SIGTERM)
            stop_if_requested(self, step)
        monkeypatch.setattr(runtime.Run, "stop_if_requested", receive)
    return arrive


def command(words, processes=0):
    """The command line of a script, under torchrun if there are processes."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(ROOT / words[0]), *map(str, words[1:])]


def environment(**variables):
    """For a bash script, whose `python` is to be this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | variables


def launch(words, processes=0, check=True, **options):
    """Run the real command in a process of its own; its result."""
    done = subprocess.run(command(words, processes), capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


RUN_SCRIPTS = """
import importlib, json, sys
sys.path[1:1] = json.loads(sys.argv[1])
import data, runtime
from miniature.shapes import Shapes
Shapes.SIZES = {"train": 60, "val": 12}
BEFORE

def main():
    for sys.argv in json.loads(sys.argv[2]):
        importlib.import_module(sys.argv[0]).main()
        runtime.dist.init_process_group = lambda *_, **__: None  # once
runtime.launch(main)
"""


def run_scripts(folder, runs, before="", processes=2, **options):
    """Run scripts one after another in processes that start once, by a program in `folder`, which
    may hold changed copies of the scripts. before: lines of it that come first."""
    (folder / "run_scripts.py").write_text(RUN_SCRIPTS.replace("BEFORE", before))
    runs = [[*map(str, words)] for words in runs]
    words = [folder / "run_scripts.py", json.dumps(sys.path), json.dumps(runs)]
    return launch(words, processes, timeout=300, **options)


def lines(folder, split):
    """The lines of a run's metrics.jsonl."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


def same(a, b):
    """Equal to the last bit, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)


class NoFloat64(torch.overrides.TorchFunctionMode):
    """float64 is an error, as on a Mac's GPU, except for tensors that come from .cpu()."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if function is torch.Tensor.cpu:
            found = found.detach().clone()
            found.on_host = True
        elif given and isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            assert any(hasattr(t, "on_host") or t.dtype == torch.float64 for t in given), function
        return found


class Code:
    """An object in a file that writes the file `ran` when it is unpickled."""

    def __reduce__(self):
        return open, ("ran", "w")


# ------------------------------------------------------------------- files that scripts start from

@pytest.fixture(scope="session")
def vgg(tmp_path_factory):
    """An untrained checkpoint in train_vgg.py's format."""
    torch.manual_seed(1)
    net = losses.SmallVGG([8, 8, 16, 16, 16], [6, 4])
    for _ in range(30):  # batch norm's statistics, so that its features are of order 1
        net(torch.randn(8, 3, 32, 32), losses.LAYERS)
    net.eval()
    net.layer_scale.copy_(torch.linspace(0.5, 1.0, 6))
    path = tmp_path_factory.mktemp("vgg") / "ckpt.pt"
    torch.save({"component": "vgg", "args": {}, "step": 0, "model": net.state_dict(),
                "config": net.config, "classes": list(Shapes.classes)}, path)
    return path


def save_tokenizer(path, seed=0, **options):
    """A checkpoint of an untrained tokenizer. Its codes are encoder outputs: images differ in them.
    options: arguments of VQModel, and other flags that the checkpoint is to hold."""
    torch.manual_seed(seed)
    args = {"image_size": 16, "data": "shapes", "val": None, "crop": "random",
            "disc_channels": [8, 8]}
    args |= {name: options.pop(name) for name in args.keys() & options.keys()}
    model = vq.VQModel(**dict(channels=[16, 16], z_dim=8, codebook_size=16) | options)
    images = data.EvalImages(Shapes(), 16)
    x = torch.stack([images[i][0] for i in range(16)])
    z = model.encoder(data.to_float(x, torch.device("cpu"))).detach()
    z = z.permute(0, 2, 3, 1).flatten(0, 2)
    codes = torch.randperm(len(z))[:model.quantizer.codebook_size]
    model.quantizer.codebook.data = z[codes].clone()
    torch.save({"component": "tokenizer", "args": model.config | args, "step": 0,
                "config": model.config, "model": model.state_dict()}, path)
    return path


def save_prior(path, tokenizer, **options):
    """A checkpoint of an untrained prior for the codes of that tokenizer."""
    torch.manual_seed(0)
    classes = list(Shapes.classes)
    prior = Transformer(**dict(kind="ar", size="tiny", codebook_size=16, length=64,
                               num_classes=len(classes)) | options)
    args = {"data": "shapes", "val": None, "image_size": 16}
    torch.save({"component": "prior", "args": args, "step": 3, "config": prior.config,
                "model": prior.state_dict(), "grid": 8, "classes": classes,
                "tokenizer": vq.fingerprint(vq.load_tokenizer(tokenizer)[0])}, path)
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer.pt")


@pytest.fixture
def prior(tmp_path, tokenizer):
    return save_prior(tmp_path / "prior.pt", tokenizer)


def noise(seed, width, height, channels=3):
    """A smooth random image (height, width, channels), uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return np.asarray(Image.fromarray(small.squeeze()).resize((width, height)))


def to_pixels(images):
    return data.to_uint8(images).permute(0, 2, 3, 1).numpy().astype(int)


def cells(path, columns):
    """The 16 x 16 images of a sheet, row by row. They are enlarged six times, and names stand on
    their left."""
    grid = np.asarray(Image.open(path))[:, -6 * (18 * columns + 2):]
    grid = grid[::6, ::6][2:, 2:].astype(int)
    grid = grid.reshape(-1, 18, columns, 18, 3).swapaxes(1, 2)
    return grid[:, :, :16, :16].reshape(-1, 16, 16, 3)


@pytest.fixture
def many_photos(tmp_path):
    """A folder of two classes with 160 small images: enough to hold some out."""
    for i in range(160):
        path = tmp_path / "many" / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, 40, 40)).save(path)
    return tmp_path / "many"


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes with images of many modes, sizes and formats, all decodable."""
    cats, dogs = tmp_path / "photos" / "cats", tmp_path / "photos" / "dogs"
    cats.mkdir(parents=True)
    dogs.mkdir()
    Image.fromarray(noise(0, 90, 60)).save(cats / "rgb.jpg", quality=95)
    Image.fromarray(noise(1, 64, 64, 1), "L").save(cats / "grey.png")
    Image.fromarray(noise(2, 70, 50, 4), "CMYK").save(cats / "cmyk.jpg")
    Image.fromarray(noise(3, 50, 80, 4), "RGBA").save(cats / "alpha.png")
    Image.fromarray(noise(4, 60, 60)).convert("P").save(dogs / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    Image.fromarray(noise(5, 100, 40)).save(dogs / "turned.jpeg", exif=exif)
    Image.fromarray(noise(6, 48, 48, 1).astype(np.uint16) * 257).save(dogs / "sixteen.png")
    Image.fromarray(noise(7, 300, 200)).save(dogs / "large.webp")
    return tmp_path / "photos"
