"""The public API: every name can be imported, and so can the type of every result."""

import inspect
import typing
from collections.abc import Iterator

import pytest

import mezzotint

FUNCTIONS = [n for n in mezzotint.__all__ if inspect.isfunction(getattr(mezzotint, n))]


@pytest.mark.parametrize("name", mezzotint.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(mezzotint, name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_public_function_returns_is_public(name: str) -> None:
    returned = typing.get_type_hints(getattr(mezzotint, name))["return"]
    for cls in classes_in(returned):
        if cls.__module__.startswith("mezzotint"):
            assert getattr(mezzotint, cls.__name__, None) is cls


def classes_in(annotation: object) -> Iterator[type]:
    """Yield the classes of an annotation such as `Iterator[GenerationResult] | None`."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        yield from classes_in(part)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nosuch"):
        mezzotint.nosuch  # noqa: B018
