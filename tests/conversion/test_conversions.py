"""The table of conversions says what conversions do."""

from collections.abc import Callable
from pathlib import Path

from support.conversion_table import in_page, table
from support.pipeline_cases import Case


def test_the_page_of_conversions_is_what_conversions_give(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    """`support/conversion_table.py` writes what this asks for."""
    assert in_page() == table(cases("flux1"), tmp_path)
