"""The table of conversions says what conversions do."""

from collections.abc import Callable
from pathlib import Path

from cases import Case
from make_conversions import in_page, table


def test_the_page_of_conversions_is_what_conversions_give(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """`tools/make_conversions.py` writes what this asks for."""
    assert in_page() == table(cases("flux1"), tmp_path)
