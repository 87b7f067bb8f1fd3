"""The pages on formats: each rule is backed by a test that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/formats").glob("*.md"))
TESTS = {
    name
    for file in ROOT.glob("tests/**/test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named
    assert not named - TESTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_rule_names_its_test(page: Path) -> None:
    rules = re.split(r"^## (?:MUST|MAY)$", page.read_text(), flags=re.M)[1:]
    for rule in (line for part in rules for line in re.split(r"\n(?=- )", part.strip())):
        assert re.search(r"`test_\w+`", rule), f"{page.name}: {rule}"
