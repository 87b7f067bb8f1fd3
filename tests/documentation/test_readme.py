"""The tables of docs/support.md are what tests have shown, and what backends answer."""

from importlib.machinery import ModuleSpec

import pytest

from conftest import PROVED, proves_all
from mezzotint.kernels import requirements
from mezzotint.kernels.optional_library import OptionalLibrary
from support import backend_table as kernel_table
from support.support_table import in_page, read_facts, table, write_page


def test_the_table_of_support_is_what_tests_have_shown(request: pytest.FixtureRequest) -> None:
    """Check against this run, or an earlier one (`--proved`); `pytest --readme` writes the page."""
    folder = request.config.getoption("--proved")
    if proves_all(request.session):
        facts = request.config.stash[PROVED]
    elif folder is not None and folder.is_dir():
        facts = read_facts(folder)
    else:
        pytest.skip("a part of the tests that prove something was left out")
    shown = table(facts)
    if request.config.getoption("--readme"):
        write_page(shown)
    assert in_page() == shown


def test_the_table_of_backends_is_what_backends_answer(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check with every optional library installed; `pytest --readme` writes the page."""
    monkeypatch.setattr(OptionalLibrary, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(requirements, "find_spec", lambda name: ModuleSpec(name, None))
    answered = kernel_table.table()
    if request.config.getoption("--readme"):
        write_page(answered, kernel_table.BEGIN)
    assert in_page(kernel_table.BEGIN) == answered
