"""Sentences of the README, help lines and pages are short, and links lead to files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROSE = ("README.md", "CONTRIBUTING.md", "benchmarks/NOTES.md", "docs/*.md", "docs/*/*.md")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
MAX_WORDS = 35


def sentences(text: str) -> list[str]:
    """Return the sentences of a page, without code and tables."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.S)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "!["))]
    paragraphs = re.split(r"\n\s*\n|\n(?=- |\d+\. )", "\n".join(lines))
    return [part for each in paragraphs for part in re.split(r"(?<=[.:;?!])\s+", each.strip())]


@pytest.mark.parametrize(
    "page",
    [page for pattern in PROSE for page in sorted(ROOT.glob(pattern))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_no_sentence_is_long(page: Path) -> None:
    found = [s for s in sentences(page.read_text()) if len(s.split()) > MAX_WORDS]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_glossary_fits_a_page() -> None:
    assert len((ROOT / "docs/glossary.md").read_text().splitlines()) <= 40
