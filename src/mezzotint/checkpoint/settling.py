"""How a file's bytes are arranged, where its headers do not prove it: a few of its layers are read."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mezzotint.checkpoint.names import NamedContents
from mezzotint.errors import BadScale, MezzotintError, UnknownFormat
from mezzotint.families.links import writers_of
from mezzotint.families.naming import Piece
from mezzotint.formats import Contents, StoredLinear
from mezzotint.formats.layout_evidence import sample_of
from mezzotint.formats.layout_inferred import Link, infer_codes, infer_scales
from mezzotint.formats.layout_measured import Sample, measure
from mezzotint.formats.svdquant_measured import in_rows, measure_vectors
from mezzotint.formats.svdquant_order import smallest
from mezzotint.schemes import NVFP4

SAMPLE_ROWS = 256
SAMPLE_COLUMNS = 2048
LINKS = 6
READER_ROWS = 512


def measured(own: NamedContents, base: NamedContents) -> Contents:
    """The contents with the layout under which a few layers' numbers agree with the base's.

    Raises  UnknownFormat if no layout agrees, or the base has other layers
    """
    header, where = own.header, str(base.header.path)
    sound, contents = sample_of(header, own.contents)
    if samples := _samples(own, sound, base):
        contents = measure(header, contents, samples, where)
    elif sound:
        raise UnknownFormat(
            f"{header.path}: {where} has no unquantized layer that matches {sound[0].module} or its like in shape",
            "is the base the unquantized form of the same model?",
        )
    if samples := _samples(own, smallest(header, in_rows(contents)), base):
        contents = measure_vectors(header, contents, samples, where)
    return contents


def inferred(own: NamedContents) -> Contents:
    """The contents with what was only assumed of their layout settled by statistics, where they can tell.

    Reads a few rows of a few layers; of files on the Hub none, whose weights only loading asks for.
    """
    if own.header.local and "scales" in own.contents.assumed:
        own = replace(own, contents=infer_scales(own.header, own.contents))
    if own.header.local and "codes" in own.contents.assumed:
        links, contents = _links(own)
        return infer_codes(contents, links)
    return own.contents


def _samples(own: NamedContents, linears: Iterable[StoredLinear], base: NamedContents) -> list[Sample]:
    """Some output features of those stored linears that the base holds unquantized."""
    return [sample for linear in linears for sample in _sample(own, linear, base)]


def _sample(own: NamedContents, linear: StoredLinear, base: NamedContents) -> Iterator[Sample]:
    for module, pieces in own.linears.items():
        name = f"{module}.weight"
        rows = _span(pieces, linear) if pieces[0].source == linear.module else None
        if rows is None or name not in base.plain:
            continue
        shape, wanted = (len(rows), linear.shape[1]), base.shape(name)
        if shape == wanted or replace(linear, shape=shape).may_be_padded_from(wanted):
            weight = base.tensor(name)[:SAMPLE_ROWS]
            yield Sample(linear, rows[0], rows[0] + len(weight), weight)
            return


def _span(pieces: Sequence[Piece], linear: StoredLinear) -> range | None:
    """The rows of `linear` that a module is made of, where it is one piece and they follow one another."""
    if len(pieces) != 1:
        return None
    rows = pieces[0].rows
    if rows is None:
        return range(linear.shape[0])
    first, last = int(rows[0]), int(rows[0]) + len(rows)
    return range(first, last) if torch.equal(rows, torch.arange(first, last)) else None


def _links(own: NamedContents) -> tuple[list[Link], Contents]:
    """Pairs of layers of which the second, in 4 bits, reads what the first writes; the cheapest to read.

    Contents name those with a scale that is no usable number, which are passed over.
    """
    try:
        modules = own.linears
    except MezzotintError:
        return [], own.contents
    pairs = [(writer, reader) for reader in modules for writer in writers_of(reader) if own.scheme(reader) is NVFP4]
    pairs = [pair for pair in pairs if all(_is_readable(own, module) for module in pair)]
    pairs.sort(key=lambda pair: math.prod(_first(own, pair[1]).shape))
    links, faults = [], dict(own.contents.faults)
    for writer, reader in pairs[:LINKS]:
        try:
            links.append(_link(own, writer, reader))
        except BadScale as error:
            faults[reader] = error.message
    return links, replace(own.contents, faults=faults)


def _is_readable(own: NamedContents, module: str) -> bool:
    """Whether the module is there, quantized and sound or as a plain matrix."""
    if module in own.linears:
        return all(own.stored(piece.source).is_sound(own.header) for piece in own.linears[module])
    return f"{module}.weight" in own.plain and len(own.shape(f"{module}.weight")) == 2


def _link(own: NamedContents, writer: str, reader: str) -> Link:
    linear = _first(own, reader)
    outputs = _row_sizes(own, writer, min(linear.shape[1], SAMPLE_COLUMNS))
    read = linear.read_rows(own.header, 0, min(linear.shape[0], READER_ROWS))
    inputs = _log_sizes(read.scheme.dequantize(read.parts), 0)
    return Link(linear.layout.codes, outputs, inputs[: len(outputs)])


def _row_sizes(own: NamedContents, module: str, count: int) -> Tensor:
    """Of the first rows of a layer's weight, quantized or not; an even number of them."""
    if module in own.linears:
        linear = _first(own, module)
        rows = _span(own.linears[module][:1], linear) or range(0)
        read = linear.read_rows(own.header, rows.start, rows.start + min(len(rows), count))
        read = read.columns(min(read.shape[1], SAMPLE_COLUMNS))
        weight = read.scheme.dequantize(read.parts)
    else:
        weight = own.tensor(f"{module}.weight")[:count, :SAMPLE_COLUMNS].float()
    return _log_sizes(weight[: len(weight) // 2 * 2], 1)


def _log_sizes(weight: Tensor, along: int) -> Tensor:
    """Logarithms of the sizes of columns (summed along 0) or of rows (along 1)."""
    return weight.square().sum(along).clamp(min=1e-12).log()


def _first(own: NamedContents, module: str) -> StoredLinear:
    return own.stored(own.linears[module][0].source)
