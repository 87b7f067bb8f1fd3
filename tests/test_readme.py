"""The README's tables are what this run's tests have shown, and what backends answer."""

from importlib.machinery import ModuleSpec

import pytest

import kernel_table
from capabilities import in_readme, read_facts, table, write_readme
from conftest import PROVED, proves_all
from mezzotint.kernels import refusals
from mezzotint.kernels.libraries import Library


def test_the_table_in_the_readme_is_what_tests_have_shown(request: pytest.FixtureRequest) -> None:
    """Read what this run has shown, or with `--proved` an earlier one; `pytest --readme` writes what it asks for."""
    folder = request.config.getoption("--proved")
    if proves_all(request.session):
        facts = request.config.stash[PROVED]
    elif folder is not None and folder.is_dir():
        facts = read_facts(folder)
    else:
        pytest.skip("a part of the tests that prove something was left out")
    shown = table(facts)
    if request.config.getoption("--readme"):
        write_readme(shown)
    assert in_readme() == shown


def test_the_table_of_kernels_in_the_readme_is_what_backends_answer(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every optional library installed; `pytest --readme` writes what it asks for."""
    monkeypatch.setattr(Library, "missing", lambda _: None)
    monkeypatch.setattr(refusals, "find_spec", lambda name: ModuleSpec(name, None))
    answered = kernel_table.table()
    if request.config.getoption("--readme"):
        write_readme(answered, kernel_table.BEGIN)
    assert in_readme(kernel_table.BEGIN) == answered
