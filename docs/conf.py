"""Sphinx configuration of the site. `make docs` builds it and fails on any warning."""

import re
from itertools import groupby

from sphinx.application import Sphinx

project = "Mezzotint"
author = "The Mezzotint authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
autodoc_typehints = (
    "none"  # signatures in full are unreadable; docstrings name the types that matter
)
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Mezzotint"
myst_heading_anchors = 3
nitpicky = True


def setup(app: Sphinx) -> None:
    """Register the hook for docstrings with Sphinx."""
    app.connect("autodoc-process-docstring", format_docstring)


def format_docstring(
    _app: Sphinx, _kind: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Rewrite a docstring in place: columns become a literal block, code in backquotes a literal.

    Docstrings describe arguments in two columns, which reStructuredText would join into one
    paragraph.
    """
    paragraphs = [
        list(group) for blank, group in groupby(lines, lambda line: not line) if not blank
    ]
    lines[:] = [line for paragraph in paragraphs for line in format_paragraph(paragraph)]


def format_paragraph(paragraph: list[str]) -> list[str]:
    """Return the paragraph in reStructuredText, with an empty line after it."""
    if paragraph[0].startswith(">>>"):
        return [*paragraph, ""]
    if any(re.search(r"\S {2,}\S", line) for line in paragraph):
        return ["::", "", *(f"    {line}" for line in paragraph), ""]
    return [
        *(re.sub(r"`+([^`]+)`+", r"``\1``", line.replace("*", r"\*")) for line in paragraph),
        "",
    ]
