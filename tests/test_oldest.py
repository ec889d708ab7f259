"""What `make test-oldest` installs is what pyproject.toml promises."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINS = re.findall(r"^([\w-]+)==(.+)$", (ROOT / "tests/oldest.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "oldest"), PINS)
def test_the_oldest_release_is_the_one_that_is_promised(name, oldest):
    promises = (ROOT / "pyproject.toml").read_text()
    assert set(re.findall(rf'"{name}>=([\d.]+)', promises)) == {oldest}


def test_all_that_the_package_and_its_examples_import_has_an_oldest_release():
    section = re.search(r"^dependencies.*?(?=^docs)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    needed = re.findall(r'"([\w-]+)>=', section[0])
    assert sorted(set(needed)) == sorted(name for name, _ in PINS)
