"""Inspect real checkpoints with wrong entries in valid safetensors headers.

`fuzz_headers.py` mutates the bytes of headers; this mutates their content. Tensors are renamed,
removed, swapped, or get another shape of as many bytes or another dtype of the same size, and
metadata is truncated. Each file must be read, or rejected with a specific error.
"""

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz.command import run_from_command_line
from mezzotint.checkpoint import inspect
from mezzotint.errors import MezzotintError
from mezzotint.verification import verify

SECONDS = 5.0
VERIFIED = 0.2
"""Share of the files that are verified too, which reads their numbers."""
SAME_SIZE = [
    ["U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"],
    ["BF16", "F16", "I16"],
    ["F32", "I32"],
]
SUFFIXES = [
    "weight",
    "bias",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
    "qweight",
    "wscales",
    "wzeros",
    "smooth_factor",
    "smooth",
    "proj_down",
    "lora_down",
    "comfy_quant",
    "scale_weight",
    "svdquant_lora_a",
    "weight_quantizer._amax",
]
Entries = dict[str, Any]


def parts_of(content: bytes) -> tuple[Entries, bytes]:
    """A file's header as an object, and the bytes behind it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(entries: Entries, data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def rename(entries: Entries, chance: random.Random, name: str) -> None:
    """Another suffix, another number, or a part of the path left out."""
    words = name.split(".")
    i = chance.randrange(len(words))
    kind = chance.randrange(3)
    if kind == 0:
        words[-1] = chance.choice(SUFFIXES)
    elif kind == 1:
        words[i] = chance.choice(("0", "7", "999999", "", "attn", "double_blocks", "qkv"))
    else:
        del words[i]
    entries[".".join(words)] = entries.pop(name)


def reshape(entries: Entries, chance: random.Random, name: str) -> None:
    """A shape of as many numbers."""
    entry = entries[name]
    size = 1
    for side in entry["shape"]:
        size *= side
    half = [2, size // 2] if size % 2 == 0 else [size]
    entry["shape"] = chance.choice(([size], [size, 1], [1, size], entry["shape"][::-1], half))


def recast(entries: Entries, chance: random.Random, name: str) -> None:
    """A dtype of the same size."""
    alike = next(
        (dtypes for dtypes in SAME_SIZE if entries[name]["dtype"] in dtypes),
        [entries[name]["dtype"]],
    )
    entries[name]["dtype"] = chance.choice(alike)


def exchange(entries: Entries, chance: random.Random, name: str) -> None:
    """The tensor under another's name."""
    other = chance.choice([key for key in entries if key != "__metadata__"])
    entries[name], entries[other] = entries[other], entries[name]


def cut_note(entries: Entries, chance: random.Random, _name: str) -> None:
    """A note of the header that ends in the middle, or is gone."""
    notes = entries.get("__metadata__", {})
    if notes:
        key = chance.choice(list(notes))
        notes[key] = notes[key][: chance.randrange(len(notes[key]) + 1)]


CHANGES = (rename, rename, reshape, recast, exchange, cut_note)


def take_away(entries: Entries, data: bytes, name: str) -> bytes:
    """Remove a tensor and its bytes; the offsets of the others move up."""
    start, end = entries.pop(name)["data_offsets"]
    for key, entry in entries.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    return data[:start] + data[end:]


def mutate(content: bytes, chance: random.Random) -> bytes:
    """The file with one to four changes."""
    entries, data = parts_of(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        name = chance.choice([key for key in entries if key != "__metadata__"])
        if chance.random() < 0.25:
            data = take_away(entries, data, name)
        else:
            chance.choice(CHANGES)(entries, chance, name)
    return joined(entries, data)


def fuzz(sources: list[Path], folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Inspect `number` mutated files next to their config.json; other errors are raised."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    contents = {source: source.read_bytes() for source in sources}
    slowest = 0.0
    verify(sources[0])  # which imports diffusers
    for _ in range(number):
        source = chance.choice(sources)
        file = folder / "changed.safetensors"
        file.write_bytes(mutate(contents[source], chance))
        config = source.with_name("config.json")
        (folder / "config.json").write_bytes(config.read_bytes() if config.is_file() else b"{}")
        started = time.process_time()
        try:
            report = inspect(file)
            counts["incomplete" if report.problems else "read"] += 1
        except MezzotintError as error:
            counts[type(error).__name__] += 1
        if chance.random() < VERIFIED:
            counts[f"verify: {verify(file).to_dict()['verdict']}"] += 1
        slowest = max(slowest, time.process_time() - started)
        assert slowest < SECONDS, f"took {slowest:.2f} s"
    return {"files": number, "sources": len(sources), **counts, "slowest_s": round(slowest, 3)}


def main() -> None:
    run_from_command_line(__doc__, "changed checkpoints, inspected", fuzz, number=10_000)


if __name__ == "__main__":
    main()
