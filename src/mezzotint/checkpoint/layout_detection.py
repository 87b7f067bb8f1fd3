"""Detect a file's layout from the values of a few layers, where its headers leave it open."""

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
CONSUMER_ROWS = 512


def detect_from_base(checkpoint: NamedContents, base: NamedContents) -> Contents:
    """Return the contents with the layout in which a few layers agree with the base's weights.

    Raises   UnknownFormat if no layout agrees, or the base has other layers
    """
    header, where = checkpoint.header, str(base.header.path)
    intact, contents = sample_linears(header, checkpoint.contents)
    if samples := _samples(checkpoint, intact, base):
        contents = detect_from_samples(header, contents, samples, where)
    elif intact:
        raise UnknownFormat(
            f"{header.path}: {where} has no unquantized layer with the shape of "
            f"{intact[0].module} or of another sampled layer",
            "is the base the unquantized form of the same model?",
        )
    if samples := _samples(checkpoint, smallest_linears(header, row_major_linears(contents)), base):
        contents = detect_vector_order(header, contents, samples, where)
    return contents


def detect_from_statistics(checkpoint: NamedContents) -> Contents:
    """Return the contents, with assumptions about their layout replaced by statistics if possible.

    Reads a few rows of a few layers. Files on the Hub are not read, because only loading downloads
    weights.
    """
    if checkpoint.header.local and "scales" in checkpoint.contents.assumed:
        contents = infer_scales(checkpoint.header, checkpoint.contents)
        checkpoint = replace(checkpoint, contents=contents)
    if checkpoint.header.local and "codes" in checkpoint.contents.assumed:
        samples, contents = _layer_pair_samples(checkpoint)
        return infer_codes(contents, samples)
    return checkpoint.contents


def _samples(
    checkpoint: NamedContents, linears: Iterable[StoredLinear], base: NamedContents
) -> list[Sample]:
    """Return some output features of the stored linears that the base has unquantized."""
    return [sample for linear in linears for sample in _sample(checkpoint, linear, base)]


def _sample(
    checkpoint: NamedContents, linear: StoredLinear, base: NamedContents
) -> Iterator[Sample]:
    for module, pieces in checkpoint.linears.items():
        name = f"{module}.weight"
        rows = _row_range(pieces, linear) if pieces[0].source == linear.module else None
        if rows is None or name not in base.plain:
            continue
        shape, expected = (len(rows), linear.shape[1]), base.shape(name)
        if shape == expected or replace(linear, shape=shape).may_be_padded_from(expected):
            weight = base.tensor(name)[:SAMPLE_ROWS]
            yield Sample(linear, rows[0], rows[0] + len(weight), weight)
            return


def _row_range(pieces: Sequence[Piece], linear: StoredLinear) -> range | None:
    """Return the rows of `linear` in a module, or None unless they are one contiguous piece."""
    if len(pieces) != 1:
        return None
    rows = pieces[0].rows
    if rows is None:
        return range(linear.shape[0])
    first, last = int(rows[0]), int(rows[0]) + len(rows)
    return range(first, last) if torch.equal(rows, torch.arange(first, last)) else None


def _layer_pair_samples(
    checkpoint: NamedContents,
) -> tuple[list[LayerPairSample], Contents]:
    """Return samples of the smallest pairs (producer, NVFP4 consumer of its outputs).

    Pairs with an invalid scale are skipped, and named in the problems of the returned contents.
    """
    try:
        modules = checkpoint.linears
    except MezzotintError:
        return [], checkpoint.contents
    pairs = [
        (producer, consumer)
        for consumer in modules
        for producer in checkpoint.family.producers_of(consumer)
        if checkpoint.scheme(consumer) is NVFP4
    ]
    pairs = [pair for pair in pairs if all(_is_readable(checkpoint, module) for module in pair)]
    pairs.sort(key=lambda pair: math.prod(_first_stored(checkpoint, pair[1]).shape))
    samples, problems = [], dict(checkpoint.contents.problems)
    for producer, consumer in pairs[:MAX_LAYER_PAIRS]:
        try:
            samples.append(_layer_pair_sample(checkpoint, producer, consumer))
        except BadScale as error:
            problems[consumer] = error.message
    return samples, replace(checkpoint.contents, problems=problems)


def _is_readable(checkpoint: NamedContents, module: str) -> bool:
    """Return whether the module is stored: quantized and complete, or as a plain matrix."""
    if module in checkpoint.linears:
        return all(
            checkpoint.stored_linear(piece.source).is_complete(checkpoint.header)
            for piece in checkpoint.linears[module]
        )
    name = f"{module}.weight"
    return name in checkpoint.plain and len(checkpoint.shape(name)) == 2


def _layer_pair_sample(checkpoint: NamedContents, producer: str, consumer: str) -> LayerPairSample:
    linear = _first_stored(checkpoint, consumer)
    outputs = _log_row_norms(checkpoint, producer, min(linear.shape[1], SAMPLE_COLUMNS))
    sample = linear.read_rows(checkpoint.header, 0, min(linear.shape[0], CONSUMER_ROWS))
    inputs = _log_norms(sample.scheme.dequantize(sample.parts), 0)
    return LayerPairSample(linear.layout.codes, outputs, inputs[: len(outputs)])


def _log_row_norms(checkpoint: NamedContents, module: str, count: int) -> Tensor:
    """Return `_log_norms` of the first rows of a layer's weight: an even number up to `count`."""
    if module in checkpoint.linears:
        linear = _first_stored(checkpoint, module)
        rows = _row_range(checkpoint.linears[module][:1], linear) or range(0)
        end = rows.start + min(len(rows), count)
        sample = linear.read_rows(checkpoint.header, rows.start, end)
        sample = sample.first_columns(min(sample.shape[1], SAMPLE_COLUMNS))
        weight = sample.scheme.dequantize(sample.parts)
    else:
        weight = checkpoint.tensor(f"{module}.weight")[:count, :SAMPLE_COLUMNS].float()
    return _log_norms(weight[: len(weight) // 2 * 2], 1)


def _log_norms(weight: Tensor, dim: int) -> Tensor:
    """Return the log of the squared norms of columns (dim 0) or rows (dim 1)."""
    return weight.square().sum(dim).clamp(min=1e-12).log()


def _first_stored(checkpoint: NamedContents, module: str) -> StoredLinear:
    return checkpoint.stored_linear(checkpoint.linears[module][0].source)
