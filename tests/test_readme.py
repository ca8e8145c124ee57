"""What README.md and docs/ say about the code is true: files, names, equations, flags, patches."""
import inspect
import pickle
import pkgutil
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, NoFloat64, load, run_scripts, same
from PIL import Image
from torch.distributed.run import get_args_parser

import data
import losses
import runtime
import sample
from transformer import Transformer
from vq import VQModel

FOLDERS = ROOT, ROOT / "miniature", ROOT / "benchmarks"
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
         if path.name != "LOG.md"}  # a diary
SCRIPTS = {path.stem: path for folder in FOLDERS for path in folder.glob("*.py")}
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.M | re.S)
DIFF = re.compile(r"```diff\n(.*?)```", re.S)
NAMED = {name for page in PAGES.values()
         for name in re.findall(r"`(\w+\.[A-Za-z_][\w.]*)`", page)
         if name.split(".")[0] in SCRIPTS and not name.endswith(".py")}
EQUATIONS = re.findall(r"\b(Eq\. \d|Sec\. [\d.]*\d|Table \d)[:,]?\s+`([\w.]+)`", README)


def test_what_is_named_exists_and_each_equation_stands_in_its_function():
    assert len(NAMED) >= 15
    named = {name: pkgutil.resolve_name(name.replace(".", ":", 1)) for name in NAMED}
    for where, name in EQUATIONS:
        assert where.startswith("Table") or where in inspect.getsource(named[name]), name
    assert {where for where, _ in EQUATIONS} >= {"Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Sec. 3.2"}


def test_files_and_images_exist():
    pattern = r"(?<![\w./-])((?:docs|miniature|benchmarks|tests)/[\w./-]*\w|\w+\.py)\b"
    for name in re.findall(pattern, README):
        assert any((folder / name).exists() for folder in FOLDERS), name
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for name in re.findall(r"\]\((?!http)([^)#]+)", DIFF.sub("", text)):
            assert (folder / name).exists(), f"{page}: {name}"


def test_the_loss_in_five_lines_runs(vgg):
    x, tokens = torch.rand(2, 3, 16, 16), torch.randint(16, (2, 64))
    model = VQModel(channels=(16, 16), z_dim=8, codebook_size=16)
    names = {"x": x, "model": model, "disc": losses.Discriminator(16, (8, 8)), "tokens": tokens,
             "perceptual": losses.PerceptualLoss(losses.load_vgg(vgg)), "labels": None,
             "generator_loss": losses.generator_loss, "mask": tokens >= 0,
             "prior": Transformer("nar", "tiny", 16, 64, num_classes=0)}
    code = next(block for block in FENCE.findall(README) if "x_hat" in block)
    code = code.replace("indices, mask", "indices.flatten(1), mask")
    exec(code, names)
    assert names["loss"] > 0 and names["total"] > 0


def test_a_tokenizer_in_ones_own_script(tmp_path, monkeypatch):
    """Its lines encode and decode one image, draw eight samples, and complete the image."""
    code = next(block for block in FENCE.findall(PAGES["forking.md"]) if "load_prior" in block)
    (tmp_path / "miniature").symlink_to(ROOT / "miniature")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), "red").save("picture.png")
    exec(code, names := {})
    codes = names["codes"].flatten(1)
    assert codes.shape == (1, 16) and Image.open("mine.png").width > 17 * 96
    assert names["samples"].shape == names["completed"].shape == (8, 16)
    assert (names["completed"][:, 8:] == codes[:, 8:]).all()  # the lower half is known
    assert (names["completed"][:, :8] != codes[:, :8]).any()


def test_the_shipped_weights_are_whole_and_belong_together():
    folder = ROOT / "miniature/weights"
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, check=True)
    for kind in ("ar", "nar"):
        sample.load_pair(folder / f"{kind}.pt", folder / "tokenizer.pt", torch.device("cpu"))


def commands(text):
    """Command lines of a page as lists of words: of fenced blocks and of the text."""
    lines = [line for block in FENCE.findall(DIFF.sub("", text))
             for line in re.sub(r"\\\n", " ", block).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    variables = dict(re.findall(r'^([A-Z])="(.+)"$', text, re.M))
    lines = [re.sub(r"\$([A-Z])\b", lambda found: variables[found[1]], line) for line in lines]
    for line in lines:
        for part in re.split(r"&&|\|\||;", line):
            try:
                yield shlex.split(part, comments=True)
            except ValueError:  # no command: an apostrophe
                pass


def flags(name):
    """The flags of a script, as its source adds them."""
    text = SCRIPTS[name].read_text()
    if "add_training_flags" in text or "add_device_flags" in text:
        text += (ROOT / "runtime.py").read_text()
    return {*re.findall(r'\(\s*"(--\w+)"', text), "--no-compile", "--help"}


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    torchrun = {option for action in get_args_parser()._actions for option in action.option_strings}
    anywhere = torchrun.union({"--ipc", "--shm-size"}, *map(flags, SCRIPTS))  # and docker's
    for words in commands(PAGES[page]):
        at = [i for i, word in enumerate(words) if Path(word).stem in SCRIPTS and ".py" in word]
        for i, word in enumerate(words):
            if re.match(r"--[a-z]", word):
                known = flags(Path(words[at[0]]).stem) if at and i > at[0] else anywhere
                known |= {*re.findall(r'^\+.*"(--\w+)"', PAGES[page], re.M)}  # of patches
                assert word.split("=")[0] in known, f"{page}: {' '.join(words)}"


SMALL = ["--image_size", 32, "--channels", 16, 16, 32, "--z_dim", 8, "--disc_channels", 8, 8]
SHORT = ["--iters", 2, "--batch_size", 4, "--workers", 0, "--device", "cpu"]


def write_shards(folder, images):
    """Two tar files: images as KEY.jpg, and the numbers of their class folders as KEY.cls."""
    files = sorted(images.rglob("*.png"))
    classes = sorted({path.parent.name for path in files})
    for shard in (0, 1):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for path in files[shard::2]:
                tar.add(path, f"{path.stem}.jpg")  # content decides, not the name
                label = path.with_suffix(".cls")
                label.write_text(str(classes.index(path.parent.name)))
                tar.add(label, label.name)


def test_patches_of_the_fork_guide(tmp_path, vgg, many_photos):
    """Each applies alone, and all together. A quantizer trains in both phases on tar shards, with a
    prior and samples after it. Records without labels train an unconditional prior. Averaged
    weights are what samples are drawn from, and resume exactly."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    patches = DIFF.findall(PAGES["forking.md"])
    assert len(patches) == 3
    for options in (["--check", "-"], ["-"]):
        for patch in patches:
            subprocess.run(["git", "apply", *options], input=patch, text=True, cwd=tmp_path,
                           check=True)
    code = next(block for block in FENCE.findall(PAGES["forking.md"]) if "tarfile" in block)
    (tmp_path / "shards.py").write_text(code)
    (tmp_path / "unlabeled.py").write_text("from shards import rows\nclasses = []\n")
    (tmp_path / "keep.py").write_text("import shutil, sys\n\ndef main():\n"
                                      "    shutil.copytree(*sys.argv[1:])\n")
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", many_photos)

    longer, constant = [*SHORT, "--iters", 3], ["--lr", 1e-3, "--lr_end", 1e-3]
    train = ["train_tokenizer", *SMALL, *constant, "--vgg", vgg, "--quantizer", "fsq",
             "--data", "records:shards", "--codebook_size", 64]
    prior = ["train_prior", "--size", "tiny", *constant]
    runs = [[*train, *SHORT], ["train_tokenizer", "--phase", 2, *SHORT], [*prior, *SHORT],
            ["sample", "--count", 2, "--device", "cpu"], ["keep", "runs", "kept"],
            [*prior, *longer, "--resume"], [*prior, *longer, "--out", "whole/prior"],
            [*train, *longer, "--resume"], [*train, *longer, "--out", "whole/tokenizer"],
            [*train, *SHORT, "--data", "records:unlabeled", "--out", "unlabeled"],
            [*prior, *SHORT, "--tokenizer", "unlabeled/ckpt.pt", "--out", "unconditional"]]
    rejects = "import pytest, vq\nwith pytest.raises(SystemExit):\n    vq.FSQ(100, 8, 0, 0)"
    run_scripts(tmp_path, runs, rejects, processes=0, cwd=tmp_path)  # 100 is no power of four
    assert (tmp_path / "samples/samples.npz").exists()
    assert load(tmp_path / "runs/prior/ckpt.pt")["classes"] == ["cats", "dogs"]
    assert load(tmp_path / "unconditional/ckpt.pt")["config"]["num_classes"] == 0
    assert load(tmp_path / "runs/phase2/ckpt.pt")["step"] == 2
    for name in ("tokenizer", "prior"):
        kept, resumed, whole = (load(tmp_path / folder / name / "ckpt.pt")
                                for folder in ("kept", "runs", "whole"))
        assert all(same(resumed[part], whole[part]) for part in ("trained", "model", "opt"))
        for key, mean in kept["model"].items():  # what the loaders read
            new = mean.lerp(whole["trained"][key], 9 / 13)
            assert torch.equal(whole["model"][key], new), key


BLOCKS = FENCE.findall(README.split("## Training")[1])[:3]


@pytest.mark.parametrize("block", BLOCKS, ids=["laptop", "one", "eight"])
def test_the_blocks_run(block, script, vgg, many_photos, tmp_path, monkeypatch):
    """The commands as they stand, in a fresh folder, shortened, with their data made up. A Mac's
    GPU has no float64; Python 3.14 pickles what it sends to workers."""
    monkeypatch.chdir(tmp_path)
    loader = data.loader
    monkeypatch.setattr(data, "loader", lambda dataset, *rest: loader(
        pickle.loads(pickle.dumps(dataset)), *rest))
    pickle.dumps(runtime.ignore_signals)
    many_photos.rename("photos")
    Path("imagenet").mkdir()
    for part in ("train", "val"):
        Path("imagenet", part).symlink_to(tmp_path / "photos")
    short = {"train_tokenizer": ["--codebook_size", 16, "--disc_warmup", 1, *SMALL, *SHORT],
             "train_prior": ["--size", "tiny", "--views", 1, *SHORT], "data": ["--workers", 0],
             "train_vgg": ["--widths", *"44444", *SHORT], "sample": ["--count", 12]}
    names = []
    for words in filter(None, commands(f"```\n{block}```\n")):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name, words = Path(words[at]).stem, [*words[at + 1:], *short[Path(words[at]).stem]]
        if name == "train_tokenizer" and "--vgg" not in words and "--phase" not in words:
            words += ["--vgg", vgg]
        with NoFloat64():
            script(name, *words)
        names.append(name)
    assert names[-4:] == ["train_tokenizer", "train_tokenizer", "train_prior", "sample"]
    assert np.load("samples/samples.npz")["arr_0"].shape == (12, 32, 32, 3)
