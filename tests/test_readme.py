"""What README.md and docs/ say of the code is true: files, functions, equations, flags, patches. No line numbers."""
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import FOLDERS, ROOT, SCRIPTS, parser_of
from torch.distributed.run import get_args_parser

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
         if path.name != "LOG.md"}  # a diary: it tells what was
MODULES = {path.stem for folder in FOLDERS for path in folder.glob("*.py")}
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.M | re.S)
DIFF = re.compile(r"```diff\n(.*?)```", re.S)
NAMED = sorted({name for name in re.findall(r"`(\w+\.[A-Za-z_][\w.]*)(?:\(.*?\))?`", README)
                if name.split(".")[0] in MODULES and not name.endswith(".py")})
EQUATIONS = re.findall(r"\b(Eq\. \d|Sec\. [\d.]*\d)[:,]?\s+`([\w.]+)`", README)


def named(name):
    """What `vq.Quantizer.forward` is."""
    module, *attributes = name.split(".")
    found = importlib.import_module(module)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def test_it_is_one_page():
    assert len(README.splitlines()) <= 160 and len(README.split()) <= 1600


def test_functions_are_named():
    assert len(NAMED) >= 20
    assert {where for where, _ in EQUATIONS} >= {"Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Sec. 3.2", "Sec. 3.4"}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_exists(name):
    named(name)


@pytest.mark.parametrize("where, name", EQUATIONS)
def test_each_equation_stands_in_its_function(where, name):
    assert where in inspect.getsource(named(name))


def test_files_and_pictures_exist():
    for name in re.findall(r"(?<![\w./-])((?:docs|miniature|benchmarks|tests)/[\w./-]*\w|\w+\.py)\b", README):
        assert any((folder / name).exists() for folder in FOLDERS), name
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for name in re.findall(r"\]\((?!http)([^)#]+)", DIFF.sub("", text)):
            assert (folder / name).exists(), f"{page}: {name}"


def commands(text):
    """Command lines of a page as lists of words: in fenced blocks, with their variables filled in, and in the text."""
    for block in FENCE.findall(text):
        variables = {}
        for name, value, line in re.findall(r'^(\w+)="([^"]*)"$|^(.+)$', re.sub(r"\\\n", " ", block), re.M):
            fill = re.sub(r"\$(\w+)", lambda m, v=variables: v.get(m[1], m[0]), name and value or line)
            if name:
                variables[name] = fill
            else:
                yield from split(fill)
    short = dict(re.findall(r"`([A-Z])` (?:stands )?for\s+`([^`]+)`", text))  # `T` stands for `torchrun ...`
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        first, _, rest = span.partition(" ")
        yield from split(f"{short[first]} {rest}" if first in short else span)


def split(line):
    for part in re.split(r"&&|\|\||;", line):
        try:
            yield shlex.split(part, comments=True)
        except ValueError:  # no command: an apostrophe
            pass


@pytest.fixture(scope="module")
def known():
    """script -> its flags."""
    patch = pytest.MonkeyPatch()
    trials = {"trials": set(re.findall(r'"(--\w+)"', (ROOT / "tests/trials.py").read_text()))}
    return trials | {name: {option for action in parser_of(name, patch)._actions for option in action.option_strings}
                     for name in SCRIPTS}


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page, known):
    anywhere = set.union(*known.values(), {option for action in get_args_parser()._actions
                                           for option in action.option_strings})
    for words in commands(PAGES[page]):
        at = [i for i, word in enumerate(words) if word.endswith(".py") and Path(word).stem in known]
        for i, word in enumerate(words):
            if re.match(r"--[a-z]", word):
                script = known[Path(words[at[0]]).stem] if at and i > at[0] else anywhere
                assert word.split("=")[0] in script, f"{page}: {' '.join(words)}"


def test_commands_are_found():
    """So that the test above does not pass for want of them."""
    found = [" ".join(words) for page in PAGES.values() for words in commands(page)]
    for start in ("python data.py --data", "torchrun --nproc_per_node=8 train_tokenizer.py --phase 2 --init",
                  "torchrun --nproc_per_node=8 train_prior.py --tokenizer runs/ff1/ckpt.pt --data ffhq/train",
                  "python train_prior.py --size tiny --views 1", "bash miniature/demo.sh"):
        assert any(line.startswith(start) for line in found), start


PATCHES = dict(zip(("fsq", "convnext", "listed"), DIFF.findall(PAGES["forking.md"]), strict=True))
SMALL = ["--image_size", "32", "--channels", "16", "16", "32", "--z_dim", "8", "--disc_channels", "8", "8",
         "--iters", "2", "--batch_size", "4", "--workers", "0"]


@pytest.mark.parametrize("name, words", [
    ("fsq", ["--codebook", "fsq", "--codebook_size", "64", "--data", "{photos}", "--vgg", "{vgg}"]),
    ("convnext", ["--vgg", "convnext_tiny", "--perceptual_layers", "logit", "--data", "{photos}"]),
    ("listed", ["--data", "list:{photos}/list.txt", "--vgg", "{vgg}"])])
def test_patches_of_the_fork_guide(name, words, tmp_path, vgg, many_photos):
    """Each applies, is small, and trains in both phases, with a prior and samples after them."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "miniature", tmp_path / "miniature", ignore=shutil.ignore_patterns("*.png", "weights"))
    changed = [line for line in PATCHES[name].splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]
    assert 5 <= len(changed) <= 25
    subprocess.run(["git", "apply", "-"], input=PATCHES[name], text=True, cwd=tmp_path, check=True)
    (many_photos / "list.txt").write_text("".join(f"{path.relative_to(many_photos)}\t{path.parent.name}\n"
                                                  for path in sorted(many_photos.rglob("*.png"))))
    words = [word.format(vgg=vgg, photos=many_photos) for word in words]
    start = [sys.executable]
    if name == "convnext":  # its weights can't be downloaded here: random ones, by a stand-in for the download
        (tmp_path / "offline.py").write_text("""
import runpy, sys, torchvision
make = torchvision.models.convnext_tiny
torchvision.models._api.WeightsEnum.get_state_dict = lambda self, **_: make().state_dict()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
        start += ["offline.py"]
    for command in (["train_tokenizer.py", *SMALL, *words],
                    ["train_tokenizer.py", "--phase", "2", "--iters", "2", "--batch_size", "4", "--workers", "0",
                     *words[words.index("--vgg"):]],
                    ["train_prior.py", "--size", "tiny", "--iters", "2", "--batch_size", "4", "--workers", "0"],
                    ["sample.py", "--n", "2"]):
        if name == "convnext" and command[0] != "train_tokenizer.py":
            break  # a prior is the same as ever
        done = subprocess.run([*start, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    state = torch.load(tmp_path / "runs/tokenizer/ckpt.pt", weights_only=True)
    assert state["step"] == 2 and state["args"]["data"] == words[words.index("--data") + 1]


RECIPES = FENCE.findall(PAGES["recipes.md"])


@pytest.mark.parametrize("block", RECIPES, ids=["photographs", "imagenette", "cifar", "laptop"])
def test_recipes_run(block, script, vgg, many_photos, imagenette, tmp_path, monkeypatch):
    """The commands as they stand, in a fresh folder, shortened by steps and sizes, on made data."""
    monkeypatch.chdir(tmp_path)
    many_photos.rename("photos")
    imagenette(train=1, val=1)
    class CIFAR10(torchvision.datasets.FakeData):
        def __init__(self, root, train=True, download=False):
            super().__init__(200, (3, 32, 32))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    short = {"data": ["--image_size", "32", "--workers", "0"],
             "train_tokenizer": ["--vgg", vgg, *SMALL, "--codebook_size", "16", "--disc_ramp", "1"],
             "train_prior": ["--size", "tiny", "--iters", "2", "--batch_size", "4", "--workers", "0", "--views", "1"],
             "train_vgg": ["--iters", "2", "--batch_size", "4", "--widths", *"44444"],
             "sample": ["--n", "12"], "fid": ["--features", vgg, "--workers", "0"]}
    done = []
    for words in filter(None, (shlex.split(line, comments=True) for line in block.splitlines())):
        if words[0] == "export":
            continue
        assert words[0] == "python"
        name = Path(words[1]).stem
        script(name, *words[2:], *short[name])
        done.append(name)
    assert [*dict.fromkeys(done)][-4:] == ["train_tokenizer", "train_prior", "sample", "fid"]
    assert np.load("samples/samples.npz")["arr_0"].shape == (12, 32, 32, 3)


def test_no_placeholder_is_left():
    texts = PAGES | {path.name: path.read_text().split('"""')[1] for path in SCRIPTS.values()}
    for name, text in texts.items():
        text = DIFF.sub("", text)  # a patch has @@ of its own
        assert not re.search(r"@@|LINES\(|LAPTOP|CPU_TIME|TODO", text), name
