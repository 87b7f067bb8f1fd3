"""Names and row orders from diffusers' own converters, without running them on weights.

A converter takes {name: tensor} in the makers' spelling and gives {name: tensor} in diffusers'. It is fed tensors whose
entries are not weights but row numbers: every stored row, of whatever tensor, has a number of its own. What comes back
says for each tensor of the model which rows of which stored tensor it is. That plan then holds for every part of a
quantized layer, which the converters themselves know nothing of.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mezzotint.errors import MissingTensor, ShapeMismatch, UnknownFormat
from mezzotint.families.naming import Naming, Piece
from mezzotint.schemes import Shape

Converter = Callable[[dict[str, Tensor]], dict[str, Tensor]]

LEAVES = {"weight", "bias", "scale", "modulation"}
"""Last words of the names that models have; what is called otherwise is a quantizer's, and no converter is shown it."""
MAX_ROWS = 2**25
BROKEN = (LookupError, ValueError, RuntimeError, NameError)
"""What converters raise on names and shapes that they do not expect."""


def trace(converter: Converter, shapes: Mapping[str, Shape], stretch: int = 1) -> Naming:
    """The naming that `converter` carries out on tensors of these names and shapes.

    stretch   how many times each row is shown to the converter in succession, for one that counts on a fixed width
    Raises    MissingTensor, ShapeMismatch, UnknownFormat
    """
    names = [name for name in shapes if "." not in name or name.rpartition(".")[2] in LEAVES]
    starts = [0, *accumulate(_rows(shapes[name]) for name in names)]
    if starts[-1] * stretch > MAX_ROWS:
        raise UnknownFormat(f"its tensors have {starts[-1]:,} rows in all, and no known model has so many")
    numbers = torch.arange(starts[-1], dtype=torch.int32).repeat_interleave(stretch)
    spans = zip(names, pairwise(starts), strict=True)
    fed = {name: numbers[first * stretch : last * stretch] for name, (first, last) in spans}
    converted = _convert(converter, fed)
    return {name: (_piece(name, rows, names, starts, stretch),) for name, rows in converted.items() if len(rows)}


def _rows(shape: Shape) -> int:
    return shape[0] if shape and 0 not in shape else 1


def _convert(converter: Converter, fed: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return converter(fed)
    except BROKEN as error:
        if isinstance(error, KeyError) and str(error.args[0]).rpartition(".")[2] in LEAVES:
            raise MissingTensor(f"{error.args[0]} is not there, and the model needs it", "is it complete?") from error
        raise UnknownFormat(f"diffusers cannot convert the tensors' names ({type(error).__name__}: {error})") from error


def _piece(name: str, rows: Tensor, names: list[str], starts: list[int], stretch: int) -> Piece:
    """The piece that these row numbers stand for."""
    if len(rows) % stretch:
        raise ShapeMismatch(f"{name} would get {len(rows)} / {stretch} rows, which is no whole number")
    rows = rows[::stretch]
    number = bisect_right(starts, int(rows[0])) - 1
    first, last = starts[number], starts[number + 1]
    if len(rows) == last - first and bool((rows == torch.arange(first, last, dtype=rows.dtype)).all()):
        return Piece(names[number])
    if int(rows.min()) < first or int(rows.max()) >= last:
        raise UnknownFormat(f"{name} would be joined from several stored tensors, of which {names[number]} is one")
    return Piece(names[number], (rows - first).long())
