"""Header fixtures: the tensors of a full-size checkpoint, in a few kB.

A fixture is {name: shape} for single tensors, and {pattern: [count, shape]} for equal tensors of
`count` blocks, where `*` in the pattern stands for the block's number.
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from mezzotint.containers import TensorInfo
from mezzotint.formats import Header

FOLDER = Path(__file__).parents[1] / "data/headers"
MODELS = sorted(path.stem for path in FOLDER.glob("*.json"))

Shape = tuple[int, ...]


def collapse(shapes: dict[str, Shape]) -> dict[str, Any]:
    """The fixture of these tensors."""
    groups: dict[tuple[str, Shape], list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        groups[re.sub(r"\.\d+\.", ".*.", name, count=1), shape].append(name)
    fixture: dict[str, Any] = {}
    for (pattern, shape), names in groups.items():
        if len(names) > 1 and names == [pattern.replace("*", str(i)) for i in range(len(names))]:
            fixture[pattern] = [len(names), list(shape)]
        else:
            fixture |= {name: list(shape) for name in names}
    return fixture


def expand(fixture: dict[str, Any]) -> dict[str, Shape]:
    """The tensors that a fixture stands for."""
    shapes: dict[str, Shape] = {}
    for pattern, entry in fixture.items():
        count, shape = entry if "*" in pattern else (1, entry)
        shapes |= {pattern.replace("*", str(i)): tuple(shape) for i in range(count)}
    return shapes


def read_fixture(model: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{model}.json").read_text()))


def header_of(shapes: dict[str, Shape], config: dict[str, Any]) -> Header:
    """A header whose file need not exist, all tensors in BF16."""
    file = Path("model.safetensors")
    tensors, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        tensors[name] = TensorInfo(name, torch.bfloat16, shape, file, position, end)
        position = end
    return Header(file, (file,), tensors, config=config)
