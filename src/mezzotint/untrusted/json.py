"""Read JSON objects of untrusted files, with limits on their size, number of values and depth.

Configurations and indices are read with this module, so that no file takes seconds or gigabytes.
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
"""Most commas and opening brackets. An object of one entry takes 250 bytes: the limit is 250 MB."""
MAX_DEPTH = 64
HINT = "restore the file, or download it again."
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(path: AnyPath, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object of a file.

    limit    most bytes
    Raises   BrokenFile if it is not a file, too large or too deep, or not a JSON object in UTF-8
    """
    if not path.is_file():
        raise BrokenFile(f"{path}: is not a file, expected a JSON object", HINT)
    _check_size(path.stat().st_size, path, limit)
    local = path if isinstance(path, Path) else path.fetch()
    with local.open("rb") as stream:
        content = stream.read(limit + 1)
    return parse_object(content, path, limit)


def parse_object(content: bytes | str, where: object, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Parse a JSON object.

    where    the file of the content, for the message
    limit    most bytes or characters
    Raises   BrokenFile if it is too large or too deep, or is no JSON object in UTF-8
    """
    _check_size(len(content), where, limit)
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        _check_number_of_values(text, where)
        value = json.loads(text)
        if SURROGATE.search(text):  # a lone surrogate cannot be encoded
            json.dumps(value, ensure_ascii=False).encode("utf-8")
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
            f"{where}: has {size:,} bytes, more than the {limit:,} allowed for JSON", HINT
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
