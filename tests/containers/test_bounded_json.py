"""JSON of others: read where it is an object within the limits, refused by name where it is not."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mezzotint.errors import BrokenFile
from mezzotint.untrusted.json import MAX_DEPTH, MAX_VALUES, parse_object, read_object

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner)
    ),
    max_leaves=8,
)


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, {"b": "ü"}]}', encoding="utf-8")
    assert read_object(tmp_path / "a.json") == {"a": [1, {"b": "ü"}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[]", "holds list, expected an object"),
        (b"null", "holds NoneType, expected an object"),
        (b'"a"', "holds str, expected an object"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b'{"a": "\\ud800"}', "is not valid JSON"),
        (b'{"\\udc80": 1}', "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a":' * 50_000, "is not valid JSON"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "more than 64 deep"),
        (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "more than 64 deep"),
        (b'{"a":[' + b"1," * MAX_VALUES + b"1]}", "more than 1,000,000 JSON values"),
    ],
)
def test_other_json_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BrokenFile, match=message) as error:
        read_object(tmp_path / "a.json")
    assert len(str(error.value)) < 1000


def test_a_sparse_gigabyte_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(BrokenFile, match=r"has 1,073,741,824 bytes, more than the 16,777,216"):
        read_object(tmp_path / "a.json")


def test_a_folder_and_nothing_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(BrokenFile, match="is not a file"):
            read_object(path)


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match="has 8 bytes, more than the 7"):
        parse_object('{"a": 1}', "a note", limit=7)
    assert parse_object('{"a": 1}', "a note", limit=8) == {"a": 1}


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES))
def test_every_object_within_the_limits_is_read(value: dict[str, object]) -> None:
    for ascii_only in (True, False):
        assert parse_object(json.dumps(value, ensure_ascii=ascii_only), "it") == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with contextlib.suppress(BrokenFile):
        assert isinstance(parse_object(content, "it"), dict)
