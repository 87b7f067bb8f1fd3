"""The README's table is what this run's tests have shown."""

import pytest

from capabilities import in_readme, table, write_readme
from conftest import PROVED, proves_all


def test_the_table_in_the_readme_is_what_tests_have_shown(request: pytest.FixtureRequest) -> None:
    """Comes last; `pytest --readme` writes what it asks for."""
    if not proves_all(request.session):
        pytest.skip("a part of the tests that prove something was left out")
    shown = table(request.config.stash[PROVED])
    if request.config.getoption("--readme"):
        write_readme(shown)
    assert in_readme() == shown
