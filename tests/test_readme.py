"""What README.md says of the code is true: the equation index, the files and scripts it names."""
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
INDEX = re.findall(r"^\| (Eqs?\. \d|Sec\. [\d.]+|Tables? \d+)[^|]*\| `(\w+\.py):(\d+)`", README, re.M)


def test_the_index_is_there():
    assert {where for where, *_ in INDEX} >= {"Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Sec. 3.2", "Sec. 3.4"}


@pytest.mark.parametrize("what, file, line", INDEX)
def test_each_equation_stands_at_its_line(what, file, line):
    text = (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert what.removesuffix(".") in text, f"{file}:{line} is {text.strip()!r}: mend the index in README.md"


def test_files_and_pictures_exist():
    for name in re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"^\| `(\w+\.(?:py|sh))` \|", README, re.M):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"(?:python|torchrun --nproc_per_node=8|bash) (\w+\.(?:py|sh))", README):
        assert (ROOT / name).exists(), name


def test_no_placeholder_is_left():
    assert "@@" not in README
