"""What README.md and docs/ say about the code is true: files, names, equations, flags, patches."""
import inspect
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load, save_prior
from PIL import Image
from torch.distributed.run import get_args_parser

import losses
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
    """Its lines encode and decode one's own image, and draw eight samples."""
    code = next(block for block in FENCE.findall(PAGES["forking.md"]) if "load_prior" in block)
    (tmp_path / "miniature").symlink_to(ROOT / "miniature")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), "red").save("picture.png")
    exec(code, names := {})
    assert names["codes"].shape[0] == 1 and Image.open("mine.png").width > 9 * 96


def test_the_shipped_weights_are_whole_and_belong_together():
    folder = ROOT / "miniature/weights"
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert losses.sha256(folder / name) == digest, name
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
# Runs commands in one process. ConvNeXt's weights can't be downloaded here: they are random.
RUN = """
import importlib, json, sys, torchvision
make = torchvision.models.convnext_tiny
torchvision.models._api.WeightsEnum.get_state_dict = lambda self, **_: make().state_dict()
for sys.argv in json.loads(sys.argv[1]):
    try:
        importlib.import_module(sys.argv[0]).main()
    except SystemExit as error:
        print("exit", error)
"""


def test_patches_of_the_fork_guide(tmp_path, vgg, many_photos, tokenizer, photos):
    """Each applies. A quantizer trains in both phases on a list of files, with a prior and samples
    after it; another perceptual network trains; images are completed within a box."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    patches = DIFF.findall(PAGES["forking.md"])
    assert len(patches) == 4
    for patch in patches:
        subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    (many_photos / "list.txt").write_text("".join(
        f"{path.relative_to(many_photos)}\t{path.parent.name}\n"
        for path in sorted(many_photos.rglob("*.png"))))
    train = ["train_tokenizer", *SMALL, *SHORT, "--data", f"list:{many_photos}/list.txt"]
    complete = ["sample", "--complete", photos, "--count", 3, "--tokenizer", tokenizer, "--prior",
                save_prior(tmp_path / "nar.pt", tokenizer, kind="nar", num_classes=2),
                "--device", "cpu", "--out", tmp_path, "--box"]
    runs = [[*train, "--quantizer", "fsq", "--codebook_size", 64, "--vgg", vgg],
            ["train_tokenizer", "--phase", 2, *SHORT], ["train_prior", "--size", "tiny", *SHORT],
            ["sample", "--count", 2, "--device", "cpu"],
            [*train, "--vgg", "convnext_tiny", "--perceptual_layers", "logit", "--out", "convnext"],
            *([*complete, *box] for box in ([4, 4, 4, 9], [0, 0, 17, 16], [0, 0, 16, 8]))]
    runs = json.dumps([[*map(str, words)] for words in runs])
    done = subprocess.run([sys.executable, "-c", RUN, runs], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exit --box") == done.stdout.count("exit ") == 2, done.stdout
    for out in ("runs/tokenizer", "runs/phase2", "runs/prior", "convnext"):
        assert load(tmp_path / out / "ckpt.pt")["step"] == 2
    assert (tmp_path / "samples/samples.npz").exists()
    # Outside the box the decoded codes of the input are shown.
    shown = np.asarray(Image.open(tmp_path / "complete.png"))[2 * 6:, 2 * 6:]  # enlarged
    cells = [shown[:96, 108 * i:108 * i + 96].astype(int) for i in range(6)]
    assert (cells[1][:48] == cells[1][0, 0]).all() and (cells[0][48:] == cells[1][48:]).all()
    difference = [abs(cells[i] - cells[2]) for i in (3, 4, 5)]
    assert all(d[:48].mean() > d[72:].mean() for d in difference)


BLOCKS = FENCE.findall(README.split("## Training")[1])[:3]


@pytest.mark.parametrize("block", BLOCKS, ids=["laptop", "one", "eight"])
def test_the_blocks_run(block, script, vgg, many_photos, tmp_path, monkeypatch):
    """The commands as they stand, in a fresh folder, shortened, with their data made up."""
    monkeypatch.chdir(tmp_path)
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
        script(name, *words)
        names.append(name)
    assert names[-4:] == ["train_tokenizer", "train_tokenizer", "train_prior", "sample"]
    assert np.load("samples/samples.npz")["arr_0"].shape == (12, 32, 32, 3)
