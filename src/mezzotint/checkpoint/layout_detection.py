"""How a file's bytes are arranged, where its headers do not prove it: a few of its layers are read."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mezzotint.checkpoint.names import NamedContents
from mezzotint.errors import BadScale, MezzotintError, UnknownFormat
from mezzotint.families.naming import Piece
from mezzotint.formats import Contents, StoredLinear
from mezzotint.formats.detection.evidence import sample_linears
from mezzotint.formats.detection.from_base import Sample, detect_from_samples
from mezzotint.formats.detection.from_statistics import LayerPairSample, infer_codes, infer_scales
from mezzotint.formats.detection.svdquant_from_base import detect_vector_order, row_major_linears
from mezzotint.formats.detection.svdquant_order import smallest_linears
from mezzotint.schemes import NVFP4

SAMPLE_ROWS = 256
SAMPLE_COLUMNS = 2048
MAX_LAYER_PAIRS = 6
READER_ROWS = 512


def detect_from_base(checkpoint: NamedContents, base: NamedContents) -> Contents:
    """The contents with the layout under which a few layers' numbers agree with the base's.

    Raises  UnknownFormat if no layout agrees, or the base has other layers
    """
    header, where = checkpoint.header, str(base.header.path)
    sound, contents = sample_linears(header, checkpoint.contents)
    if samples := _samples(checkpoint, sound, base):
        contents = detect_from_samples(header, contents, samples, where)
    elif sound:
        raise UnknownFormat(
            f"{header.path}: {where} has no unquantized layer that matches {sound[0].module} or its like in shape",
            "is the base the unquantized form of the same model?",
        )
    if samples := _samples(checkpoint, smallest_linears(header, row_major_linears(contents)), base):
        contents = detect_vector_order(header, contents, samples, where)
    return contents


def detect_from_statistics(own: NamedContents) -> Contents:
    """The contents with what was only assumed of their layout settled by statistics, where they can tell.

    Reads a few rows of a few layers; of files on the Hub none, whose weights only loading asks for.
    """
    if own.header.local and "scales" in own.contents.assumed:
        own = replace(own, contents=infer_scales(own.header, own.contents))
    if own.header.local and "codes" in own.contents.assumed:
        links, contents = _layer_pair_samples(own)
        return infer_codes(contents, links)
    return own.contents


def _samples(
    own: NamedContents, linears: Iterable[StoredLinear], base: NamedContents
) -> list[Sample]:
    """Some output features of those stored linears that the base holds unquantized."""
    return [sample for linear in linears for sample in _sample(own, linear, base)]


def _sample(own: NamedContents, linear: StoredLinear, base: NamedContents) -> Iterator[Sample]:
    for module, pieces in own.linears.items():
        name = f"{module}.weight"
        rows = _row_range(pieces, linear) if pieces[0].source == linear.module else None
        if rows is None or name not in base.plain:
            continue
        shape, wanted = (len(rows), linear.shape[1]), base.shape(name)
        if shape == wanted or replace(linear, shape=shape).may_be_padded_from(wanted):
            weight = base.tensor(name)[:SAMPLE_ROWS]
            yield Sample(linear, rows[0], rows[0] + len(weight), weight)
            return


def _row_range(pieces: Sequence[Piece], linear: StoredLinear) -> range | None:
    """The rows of `linear` that a module is made of, where it is one piece and they follow one another."""
    if len(pieces) != 1:
        return None
    rows = pieces[0].rows
    if rows is None:
        return range(linear.shape[0])
    first, last = int(rows[0]), int(rows[0]) + len(rows)
    return range(first, last) if torch.equal(rows, torch.arange(first, last)) else None


def _layer_pair_samples(own: NamedContents) -> tuple[list[LayerPairSample], Contents]:
    """Pairs of layers of which the second, in 4 bits, reads what the first writes; the cheapest to read.

    Contents name those with a scale that is no usable number, which are passed over.
    """
    try:
        modules = own.linears
    except MezzotintError:
        return [], own.contents
    pairs = [
        (writer, reader)
        for reader in modules
        for writer in own.family.producers_of(reader)
        if own.scheme(reader) is NVFP4
    ]
    pairs = [pair for pair in pairs if all(_is_readable(own, module) for module in pair)]
    pairs.sort(key=lambda pair: math.prod(_first_stored(own, pair[1]).shape))
    links, faults = [], dict(own.contents.problems)
    for writer, reader in pairs[:MAX_LAYER_PAIRS]:
        try:
            links.append(_layer_pair_sample(own, writer, reader))
        except BadScale as error:
            faults[reader] = error.message
    return links, replace(own.contents, problems=faults)


def _is_readable(own: NamedContents, module: str) -> bool:
    """Whether the module is there, quantized and sound or as a plain matrix."""
    if module in own.linears:
        return all(
            own.stored_linear(piece.source).is_complete(own.header) for piece in own.linears[module]
        )
    return f"{module}.weight" in own.plain and len(own.shape(f"{module}.weight")) == 2


def _layer_pair_sample(own: NamedContents, writer: str, reader: str) -> LayerPairSample:
    linear = _first_stored(own, reader)
    outputs = _row_sizes(own, writer, min(linear.shape[1], SAMPLE_COLUMNS))
    read = linear.read_rows(own.header, 0, min(linear.shape[0], READER_ROWS))
    inputs = _log_sizes(read.scheme.dequantize(read.parts), 0)
    return LayerPairSample(linear.layout.codes, outputs, inputs[: len(outputs)])


def _row_sizes(own: NamedContents, module: str, count: int) -> Tensor:
    """Of the first rows of a layer's weight, quantized or not; an even number of them."""
    if module in own.linears:
        linear = _first_stored(own, module)
        rows = _row_range(own.linears[module][:1], linear) or range(0)
        read = linear.read_rows(own.header, rows.start, rows.start + min(len(rows), count))
        read = read.first_columns(min(read.shape[1], SAMPLE_COLUMNS))
        weight = read.scheme.dequantize(read.parts)
    else:
        weight = own.tensor(f"{module}.weight")[:count, :SAMPLE_COLUMNS].float()
    return _log_sizes(weight[: len(weight) // 2 * 2], 1)


def _log_sizes(weight: Tensor, along: int) -> Tensor:
    """Logarithms of the sizes of columns (summed along 0) or of rows (along 1)."""
    return weight.square().sum(along).clamp(min=1e-12).log()


def _first_stored(own: NamedContents, module: str) -> StoredLinear:
    return own.stored_linear(own.linears[module][0].source)
