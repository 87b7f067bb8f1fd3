"""JSON objects that others wrote: size, number of values and depth are bounded before anything is built from them.

Every reader of a configuration, an index or a note goes through here, so that no file takes seconds or gigabytes.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mezzotint.errors import BrokenFile
from mezzotint.hub import AnyPath

MAX_BYTES = 16 * 2**20
MAX_VALUES = 1_000_000
"""Commas and opening brackets; an object of one entry takes 250 bytes, so this bounds memory to 250 MB."""
MAX_DEPTH = 64
HINT = "restore the file, or download it again."
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(path: AnyPath, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    limit    most bytes that the file may have
    Raises   BrokenFile if it is no file, is too large or too deep, or holds no JSON object in UTF-8
    """
    if not path.is_file():
        raise BrokenFile(f"{path}: is no file, expected a JSON object", HINT)
    _check_size(path.stat().st_size, path, limit)
    local = path if isinstance(path, Path) else path.fetch()
    with local.open("rb") as stream:
        content = stream.read(limit + 1)
    return parse_object(content, path, limit)


def parse_object(content: bytes | str, where: object, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object that `content` holds.

    where    the file that it is from, for the message
    limit    most bytes, or characters, of `content`
    Raises   BrokenFile if it is too large or too deep, or is no JSON object in UTF-8
    """
    _check_size(len(content), where, limit)
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        _check_number_of_values(text, where)
        value = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode(
                "utf-8"
            )  # half a character cannot be encoded
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{where}: is not valid JSON ({error})", HINT) from error
    if not isinstance(value, dict):
        raise BrokenFile(f"{where}: holds {type(value).__name__}, expected an object", HINT)
    if _is_too_deep(value):
        raise BrokenFile(f"{where}: nests its values more than {MAX_DEPTH} deep", HINT)
    return value


def _check_size(size: int, where: object, limit: int) -> None:
    if size > limit:
        raise BrokenFile(
            f"{where}: has {size:,} bytes, more than the {limit:,} that are read as JSON", HINT
        )


def _check_number_of_values(text: str, where: object) -> None:
    if sum(text.count(mark) for mark in ",[{") > MAX_VALUES:
        raise BrokenFile(f"{where}: holds more than {MAX_VALUES:,} JSON values", HINT)


def _is_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
