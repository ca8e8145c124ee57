"""What README.md and docs/ say of the code is true: files, functions, equations, flags. No line numbers."""
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from conftest import FOLDERS, ROOT, SCRIPTS, parser_of
from torch.distributed.run import get_args_parser

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
         if path.name != "LOG.md"}  # a diary: it tells what was
MODULES = {path.stem for folder in FOLDERS for path in folder.glob("*.py")}
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.M | re.S)
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
        for name in re.findall(r"\]\((?!http)([^)#]+)", text):
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
                  "python train_prior.py --data shapes --workers 0", "bash miniature/demo.sh"):
        assert any(line.startswith(start) for line in found), start


def test_no_placeholder_is_left():
    texts = PAGES | {path.name: path.read_text().split('"""')[1] for path in SCRIPTS.values()}
    for name, text in texts.items():
        assert not re.search(r"@@|LINES\(|LAPTOP|CPU_TIME|TODO", text), name
