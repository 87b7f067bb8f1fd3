"""Read mutated safetensors headers: each is read or rejected, with limited time and memory.

Every header that is accepted is also given to `safetensors.safe_open`, which must accept it too.
"""

import json
import random
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fuzz.hostile import Figures, run_from_command_line
from fuzz.hostile import fuzz as fuzz_files
from mezzotint.errors import CheckpointError
from mezzotint.formats import read_header

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    -1,
    -8,
    2**16,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    1e308,
    True,
    None,
    1.5,
)
STRINGS = (
    "",
    "F32",
    "f32",
    "U8",
    "BF16",
    "F8_E4M3",
    "F4",
    "I64",
    "\u0000",
    "\ud800",
    "__metadata__",
    "a" * 300,
)

BYTES = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\",
    b"\x00",
    b"\xff",
    b"9",
    b"-",
    b"e",
    b"NaN",
    b"Infinity",
    b" ",
)


def seed_header(size: random.Random) -> tuple[dict[str, object], int]:
    """A sound header, as an object, and how many bytes of tensors it describes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}} if size.random() < 0.5 else {}
    start = 0
    for i in range(size.randint(0, 6)):
        dtype, item = size.choice([("F32", 4), ("BF16", 2), ("U8", 1), ("F8_E4M3", 1), ("I64", 8)])
        shape = [size.randint(0, 4) for _ in range(size.randint(0, 3))]
        nbytes = item
        for side in shape:
            nbytes *= side
        entries[f"layer.{i}.weight"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [start, start + nbytes],
        }
        start += nbytes
    return entries, start


def mutate(chance: random.Random) -> bytes:
    """A whole file with a few things wrong in it, or none."""
    entries, size = seed_header(chance)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        mutate_object(entries, chance)
    text = json.dumps(entries).encode()
    for _ in range(chance.choice((0, 0, 1, 2, 4))):
        text = mutate_text(text, chance)
    length = len(text)
    if chance.random() < 0.1:
        length = chance.choice(
            (0, 1, length - 1, length + 1, length * 2, 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1)
        )
    data = bytes(max(size + chance.choice((0, 0, 0, 0, 1, -1, 8)), 0))
    return struct.pack("<Q", max(length, 0)) + text + data


def mutate_object(entries: dict[str, object], chance: random.Random) -> None:
    """Change one field of one entry, or an entry as a whole."""
    names = list(entries)
    value: object = chance.choice(
        (*NUMBERS, *STRINGS, [], {}, [[]], [1, 2, 3], {"a": 1}, [2**62] * 300, [1] * 9)
    )
    if not names or chance.random() < 0.1:
        entries[str(chance.choice(STRINGS))] = value
        return
    entry = entries[chance.choice(names)]
    if isinstance(entry, dict) and entry and chance.random() < 0.9:
        field = chance.choice(list(entry))
        inner = entry[field]
        if isinstance(inner, list) and inner and chance.random() < 0.7:
            inner[chance.randrange(len(inner))] = value
        else:
            entry[field] = value
        if chance.random() < 0.1:
            del entry[field]
    else:
        entries[chance.choice(names)] = value


def mutate_text(text: bytes, chance: random.Random) -> bytes:
    """Change, drop, repeat or insert some bytes."""
    position = chance.randrange(len(text) + 1)
    length = chance.choice((0, 1, 1, 2, 5, 40))
    middle = chance.choice(
        (
            b"",
            chance.choice(BYTES),
            text[position : position + length] * 2,
            bytes([chance.randrange(256)]),
        )
    )
    return text[:position] + middle + text[position + length :]


def reads(file: Path) -> bool:
    """Return whether Mezzotint reads the header; errors of other classes are raised."""
    try:
        read_header(file)
    except CheckpointError:
        return False
    return True


def accepts(file: Path) -> bool:
    """Return whether Mezzotint reads the header, which safetensors must then read, too."""
    accepted = reads(file)
    assert not accepted or safetensors_accepts(file), "safetensors refuses this"
    return accepted


def safetensors_accepts(file: Path) -> bool:
    try:
        with safe_open(file, framework="np") as opened:
            opened.keys()
    except SafetensorError:
        return False
    return True


def fuzz(file: Path, number: int, seed: int) -> Figures:
    """Try `number` files; raises AssertionError for the first that breaks a promise."""
    return fuzz_files(file, number, seed, mutate, accepts)


def main() -> None:
    run_from_command_line(__doc__, "mutated headers", mutate, accepts)


if __name__ == "__main__":
    main()
