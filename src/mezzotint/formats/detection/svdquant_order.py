"""Detect the order of codes and vectors in an SVDQuant file: declared, implied or inferred.

Codes     Round-to-nearest gives the largest weight of each group the largest code. In the right
          order, every group contains that code. In the wrong order, groups mix rows, and many
          do not.
Vectors   Smoothing follows the sizes of a layer's columns. In the right order, smooth correlates
          with the column sizes of the residual within each run of 16, with either sign. In the
          wrong order, it hardly does.

Values of files on the Hub are not read for detection. The usual order is then assumed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import BrokenFile
from mezzotint.formats.contents import StoredLinear
from mezzotint.formats.header import Header
from mezzotint.formats.readers.svdquant import QWEIGHT, quantized_modules, scheme_of, stored_linear
from mezzotint.formats.weight_files import NUNCHAKU_FOLDER
from mezzotint.layouts.nunchaku import WARP, from_code_fragments, from_vector_fragments
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, Scheme
from mezzotint.schemes.groups import to_groups
from mezzotint.schemes.minifloats import unpack_nibbles
from mezzotint.tensor import Layout
from mezzotint.untrusted.json import parse_object

FRAGMENTS, ROWS, PLAIN_VECTORS = "fragments", "row_major", "plain"
SAMPLED_COLUMNS, SAMPLED_ROWS = 4096, 256
TINY = 1e-30
FRAGMENT_RUN = 16
"""Fragment order permutes a vector within runs of 16."""
MIN_Z_SCORE = 3.0
"""Standard deviations between the two orders at which the better one is believed."""
ROW_LAYOUT = {
    order: Layout("low_first_int8", "by_group", order, "down_by_column")
    for order in (PLAIN_VECTORS, FRAGMENTS)
}
"""{order of the vectors: layout of a row-major file}"""


@dataclass(frozen=True)
class DetectedOrder:
    """The order of a file's codes or vectors.

    evidence   how the order was detected, for the report
    assumed    only values would prove the order, and they were not read
    """

    order: str
    evidence: str
    assumed: bool = False


def codes_order(header: Header) -> DetectedOrder:
    """Return the order of the 4-bit codes, FRAGMENTS or ROWS.

    Reads rows of one layer if nothing declares the order. INT4 codes that are declared row-major
    are read, too: some converters left them in fragment order.
    """
    conversion = _metadata_object(header.metadata.get("conversion"))
    if conversion.get("layout") == ROWS or _is_svdquant_config(header.config):
        source = (
            "conversion in the header" if conversion else "quant_method svdquant in config.json"
        )
        if any(scheme_of(header, module) is SVDQUANT_INT4 for module in quantized_modules(header)):
            return _infer_codes_order(header, f"{source} declares row-major", ROWS)
        return DetectedOrder(ROWS, f"declared by {source}")
    config = _metadata_object(header.metadata.get("quantization_config"))
    if config.get("method") == "svdquant":
        return DetectedOrder(
            FRAGMENTS, "declared by quantization_config in the header (method svdquant)"
        )
    if {file.name for file in header.files} == set(NUNCHAKU_FOLDER):
        return DetectedOrder(FRAGMENTS, f"implied by the folder ({' and '.join(NUNCHAKU_FOLDER)})")
    return _infer_codes_order(header, "nothing declares it", FRAGMENTS)


def share_of_full_groups(codes: Tensor, scheme: Scheme) -> float:
    """Return the share of groups that contain the largest code.

    codes   plain, uint8 [out, in/2]
    """
    # The bit patterns of 7, -8 and -7 in two's complement, or of 6.0 and -6.0 in E2M1.
    largest = (7, 8, 9) if scheme is SVDQUANT_INT4 else (7, 15)
    full = torch.isin(unpack_nibbles(codes), torch.tensor(largest, dtype=torch.uint8))
    return float(to_groups(full, scheme.group).any(-1).float().mean())


def _infer_codes_order(header: Header, declared: str, usual: str) -> DetectedOrder:
    """Return the order in which more groups are full; `usual` for a file on the Hub."""
    module = next(
        (m for m in quantized_modules(header) if scheme_of(header, m) is not AWQ_W4A16), None
    )
    if module is None:
        return DetectedOrder(
            FRAGMENTS, f"{declared}; only AWQ layers are quantized, which have one order"
        )
    info, scheme = header.tensors[module + QWEIGHT], scheme_of(header, module)
    if not _is_whole_fragments(info.shape):
        return DetectedOrder(
            ROWS,
            f"{declared}; {list(info.shape)} is no multiple of {WARP}, which fragments require",
        )
    if not header.local:
        return DetectedOrder(
            usual, f"{declared}; {_not_read('codes', usual.replace('_', '-'))}", assumed=True
        )
    stored = info.slice_rows(0, min(info.shape[0], SAMPLED_ROWS)).read()
    fragments = share_of_full_groups(from_code_fragments(stored), scheme)
    rows = share_of_full_groups(stored.view(torch.uint8), scheme)
    return DetectedOrder(
        FRAGMENTS if fragments > rows else ROWS,
        f"{declared}; inferred from {module}: {fragments:.0%} of its groups contain the largest "
        f"code if read as fragments, {rows:.0%} if read by rows",
    )


def _is_whole_fragments(shape: tuple[int, ...]) -> bool:
    """Return whether stored codes [out, in/2] have the shape of whole fragments."""
    return len(shape) == 2 and all(shape) and not (shape[0] % WARP or shape[1] * 2 % WARP)


def _not_read(what: str, order: str) -> str:
    return f"values on the Hub are not read for detection: {what} assumed {order}"


def vectors_order(header: Header) -> DetectedOrder:
    """Return the order of smooth, bias and channel_scale in a row-major file.

    The order is PLAIN_VECTORS or FRAGMENTS. Reads a few layers if nothing declares it. If they
    do not decide, the order is PLAIN_VECTORS, and the evidence says so.
    """
    if _metadata_object(header.metadata.get("conversion")).get("vectors") == ROWS:
        return DetectedOrder(
            PLAIN_VECTORS, "vectors row-major, declared by conversion in the header"
        )
    if not header.local:
        evidence = f"order of vectors not declared; {_not_read('vectors', 'row-major')}"
        return DetectedOrder(PLAIN_VECTORS, evidence, assumed=True)
    linears = [
        stored_linear(header, module, ROW_LAYOUT[PLAIN_VECTORS])
        for module in quantized_modules(header)
    ]
    for linear in linears:
        if linear.scheme is not AWQ_W4A16 and not has_whole_fragments(linear):
            shape = " x ".join(str(side) for side in linear.shape)
            return DetectedOrder(
                PLAIN_VECTORS,
                f"vectors row-major, implied by {linear.module} ({shape}, no multiple of {WARP})",
            )
    return _infer_vectors_order(header, linears)


def _infer_vectors_order(header: Header, linears: Iterable[StoredLinear]) -> DetectedOrder:
    """Return the order in which smooth correlates better with the columns of the residual."""
    samples = [_smooth_and_columns(header, linear) for linear in smallest_linears(header, linears)]
    plain = _z_score(samples)
    fragments = _z_score([(_unpack(smooth), columns) for smooth, columns in samples])
    measured = (
        f"smooth follows the columns of the residual by {plain:.1f} standard deviations if read "
        f"row-major, by {fragments:.1f} if read as fragments, in {len(samples)} layers"
    )
    if abs(plain - fragments) < MIN_Z_SCORE:
        return DetectedOrder(
            PLAIN_VECTORS,
            f"vectors assumed row-major: their order is not declared, and values cannot tell "
            f"({measured})",
        )
    if fragments > plain:
        return DetectedOrder(FRAGMENTS, f"vectors in fragment order, inferred: {measured}")
    return DetectedOrder(PLAIN_VECTORS, f"vectors row-major, inferred: {measured}")


def has_whole_fragments(linear: StoredLinear) -> bool:
    """Return whether the vectors consist of whole fragments; only these can be in that order."""
    return all(side % WARP == 0 for side in linear.shape)


def assumed_fields(header: Header, vectors: bool) -> frozenset[str]:
    """Return the fields of Layout that are assumed because values on the Hub are not read.

    vectors   whether the format leaves the order of vectors open
    """
    if header.local:
        return frozenset()
    orders = {"codes": codes_order(header)} | (
        {"vectors": vectors_order(header)} if vectors else {}
    )
    return frozenset(field for field, found in orders.items() if found.assumed)


def smallest_linears(header: Header, linears: Iterable[StoredLinear]) -> list[StoredLinear]:
    """Return the smallest complete W4A4 layers, with SAMPLED_COLUMNS or more columns in total.

    Layers with unusable scales are left out.
    """
    smallest: list[StoredLinear] = []
    for linear in sorted(linears, key=lambda linear: math.prod(linear.shape)):
        if sum(chosen.shape[1] for chosen in smallest) >= SAMPLED_COLUMNS:
            break
        if linear.scheme is not AWQ_W4A16 and _is_measurable(linear, header):
            smallest.append(linear)
    return [linear for linear in smallest if not linear.scale_problem(header)]


def _is_measurable(linear: StoredLinear, header: Header) -> bool:
    """Return whether a layer is complete, not empty, and of whole runs; planning reports others."""
    return linear.is_complete(header) and all(linear.shape) and linear.shape[1] % FRAGMENT_RUN == 0


def _smooth_and_columns(header: Header, linear: StoredLinear) -> tuple[Tensor, Tensor]:
    """Return log(smooth) as stored [in], and the log RMS of the residual's columns [in].

    The columns are relative to the mean of their run of 16.
    """
    infos = {part: header.tensors[linear.keys[part]] for part in ("codes", "block_scale", "smooth")}
    infos["codes"] = infos["codes"].slice_rows(0, min(linear.shape[0], SAMPLED_ROWS))
    parts = {part: info.read() for part, info in infos.items()}
    codes = parts["codes"].view(torch.uint8)
    residual = linear.scheme.decode(
        {"codes": codes, "block_scale": parts["block_scale"].t()[:SAMPLED_ROWS]}
    )
    columns = residual.square().mean(0).clamp(min=TINY).sqrt().log()
    return parts["smooth"].float().clamp(min=TINY).log(), _within_runs(columns)


def _unpack(vector: Tensor) -> Tensor:
    return from_vector_fragments(vector.unsqueeze(0)).squeeze(1)


def _within_runs(values: Tensor) -> Tensor:
    """Subtract from values [in] the mean of their run of 16, which both orders share."""
    runs = to_groups(values, FRAGMENT_RUN)
    return (runs - runs.mean(1, keepdim=True)).flatten()


def _z_score(samples: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return how strongly smooth and columns correlate, in standard deviations of chance.

    The sign of the correlation may differ between layers, so the squares are summed.
    """
    return math.sqrt(
        sum(
            len(smooth) * _correlation(_within_runs(smooth), columns) ** 2
            for smooth, columns in samples
        )
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    size = torch.linalg.norm(a) * torch.linalg.norm(b)
    return float(a @ b / size) if size > 0 else 0.0


def _is_svdquant_config(config: Mapping[str, Any]) -> bool:
    """Return whether vLLM-Omni wrote the configuration: flat, or one entry per component."""
    entry = config.get("quantization_config")
    entries = [entry, *entry.values()] if isinstance(entry, dict) else []
    return any(
        isinstance(item, dict) and item.get("quant_method") == "svdquant" for item in entries
    )


def _metadata_object(text: str | None) -> Mapping[str, Any]:
    """Parse an object in the metadata; {} for anything else, which then declares nothing."""
    try:
        return parse_object(text or "{}", "metadata")
    except BrokenFile:
        return {}
