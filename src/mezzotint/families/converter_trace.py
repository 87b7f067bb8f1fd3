"""Names and row orders from diffusers' own converters, without running them on weights.

A converter takes {name: tensor} with the original names and returns {name: tensor} with diffusers'
names. Here it gets row numbers instead of weights, and every stored row has a unique number. The
result tells which rows of which stored tensors each tensor of the model consists of. The same rows
apply to every part of a quantized layer, although converters do not know these parts.
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

MODEL_LEAF_NAMES = {"weight", "bias", "scale", "modulation"}
"""Last parts of the names in models; other names belong to quantizers and are not converted."""
MAX_ROWS = 2**25
CONVERTER_ERRORS = (LookupError, ValueError, RuntimeError, NameError)
"""What converters raise on unexpected names and shapes."""


def trace_converter(converter: Converter, shapes: Mapping[str, Shape], repeat: int = 1) -> Naming:
    """Return the naming that `converter` carries out on tensors of these names and shapes.

    repeat   copies of each row to pass in succession, for a converter that assumes a fixed width
    Raises   MissingTensor, ShapeMismatch, UnknownFormat
    """
    names = [
        name for name in shapes if "." not in name or name.rpartition(".")[2] in MODEL_LEAF_NAMES
    ]
    starts = [0, *accumulate(_rows(shapes[name]) for name in names)]
    if starts[-1] * repeat > MAX_ROWS:
        raise UnknownFormat(
            f"its tensors have {starts[-1]:,} rows in all, and no known model has so many"
        )
    numbers = torch.arange(starts[-1], dtype=torch.int32).repeat_interleave(repeat)
    spans = zip(names, pairwise(starts), strict=True)
    inputs = {name: numbers[first * repeat : last * repeat] for name, (first, last) in spans}
    return {
        name: (_piece(name, rows, names, starts, repeat),)
        for name, rows in _convert(converter, inputs).items()
        if len(rows)
    }


def _rows(shape: Shape) -> int:
    return shape[0] if shape and 0 not in shape else 1


def _convert(converter: Converter, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return converter(inputs)
    except CONVERTER_ERRORS as error:
        key = str(error.args[0]) if isinstance(error, KeyError) else ""
        if key.rpartition(".")[2] in MODEL_LEAF_NAMES:
            raise MissingTensor(
                f"{key} is not there, and the model needs it", "is it complete?"
            ) from error
        raise UnknownFormat(
            f"diffusers cannot convert the tensors' names ({type(error).__name__}: {error})"
        ) from error


def _piece(name: str, rows: Tensor, names: list[str], starts: list[int], repeat: int) -> Piece:
    """Return the piece of a stored tensor with these row numbers."""
    if len(rows) % repeat:
        raise ShapeMismatch(
            f"{name} would get {len(rows)} / {repeat} rows, which is not an integer"
        )
    rows = rows[::repeat]
    number = bisect_right(starts, int(rows[0])) - 1
    first, last = starts[number], starts[number + 1]
    if len(rows) == last - first and bool(
        (rows == torch.arange(first, last, dtype=rows.dtype)).all()
    ):
        return Piece(names[number])
    if int(rows.min()) < first or int(rows.max()) >= last:
        raise UnknownFormat(
            f"{name} would be joined from several stored tensors, of which {names[number]} is one"
        )
    return Piece(names[number], (rows - first).long())
