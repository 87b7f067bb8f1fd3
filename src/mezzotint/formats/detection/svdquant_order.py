"""In which order an SVDQuant file keeps its codes and its vectors: declared, implied, or measured.

Codes   Rounding to nearest gives the largest weight of every group the largest code. Read in the right order, every
        group of a row reaches that code; read in the wrong one, a group is a mixture of rows, and many do not.
Vectors Smoothing is made from the sizes of a layer's columns. In the right order, smooth is correlated with the sizes
        of the residual's columns within each run of 16, with either sign; in the wrong order hardly.

Of a file on the Hub no numbers are read: what they would tell is assumed, and said to be.
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

FRAGMENTS, ROWS = "fragments", "row_major"
SAMPLED_COLUMNS, SAMPLED_ROWS = 4096, 256
TINY = 1e-30
FRAGMENT_RUN = 16
"""Fragment order moves a vector's numbers within runs of 16."""
MIN_Z_SCORE = 3.0
"""Standard deviations that a measured difference must have to be believed."""
_NOT_READ = "and numbers on the Hub are read only to load: {} assumed {}"
ROW_LAYOUT = {
    order: Layout("low_first_int8", "by_group", order, "down_by_column")
    for order in ("plain", FRAGMENTS)
}
"""{order of the vectors: layout of a row-major file}"""


@dataclass(frozen=True)
class Order:
    """An order that a file has, and on what evidence; `assumed` if only numbers would tell, and they are not here."""

    order: str
    evidence: str
    assumed: bool = False

    def __str__(self) -> str:
        return self.evidence


def codes_order(header: Header) -> Order:
    """The order of the 4-bit codes; reads rows of one layer where nothing is declared, or what converters get wrong."""
    conversion = _json(header.metadata.get("conversion"))
    if conversion.get("layout") == ROWS or _is_svdquant_config(header.config):
        by = "conversion in the header" if conversion else "quant_method svdquant in config.json"
        if any(scheme_of(header, module) is SVDQUANT_INT4 for module in quantized_modules(header)):
            return _infer_codes_order(header, f"{by} declares row-major", ROWS)
        return Order(ROWS, f"declared by {by}")
    if _json(header.metadata.get("quantization_config")).get("method") == "svdquant":
        return Order(FRAGMENTS, "declared by quantization_config in the header (method svdquant)")
    if {file.name for file in header.files} == set(NUNCHAKU_FOLDER):
        return Order(FRAGMENTS, f"implied by the folder ({' and '.join(NUNCHAKU_FOLDER)})")
    return _infer_codes_order(header, "nothing declares it", FRAGMENTS)


def share_of_full_groups(codes: Tensor, scheme: Scheme) -> float:
    """Share of the groups that reach the largest code: plain codes uint8 [out, in/2]."""
    largest = (
        (7, 8, 9) if scheme is SVDQUANT_INT4 else (7, 15)
    )  # 7, -8, -7 in two's complement; 6.0 and -6.0
    full = torch.isin(unpack_nibbles(codes), torch.tensor(largest, dtype=torch.uint8))
    return float(to_groups(full, scheme.group).any(-1).float().mean())


def _infer_codes_order(header: Header, said: str, usual: str) -> Order:
    """The order in which more groups are full; `usual` where the file is not here."""
    module = next(
        (m for m in quantized_modules(header) if scheme_of(header, m) is not AWQ_W4A16), None
    )
    if module is None:
        return Order(
            FRAGMENTS, f"{said}, and only AWQ layers are quantized, which have but one order"
        )
    info, scheme = header.tensors[module + QWEIGHT], scheme_of(header, module)
    if (
        len(info.shape) != 2
        or not all(info.shape)
        or info.shape[0] % WARP
        or info.shape[1] * 2 % WARP
    ):
        return Order(
            ROWS, f"{said}, and {list(info.shape)} is no multiple of {WARP} as fragments are"
        )
    if not header.local:
        return Order(
            usual, f"{said}, {_NOT_READ.format('codes', usual.replace('_', '-'))}", assumed=True
        )
    stored = info.slice_rows(0, min(info.shape[0], SAMPLED_ROWS)).read()
    fragments = share_of_full_groups(from_code_fragments(stored), scheme)
    rows = share_of_full_groups(stored.view(torch.uint8), scheme)
    order = FRAGMENTS if fragments > rows else ROWS
    return Order(
        order,
        f"{said}, inferred from {module}: {fragments:.0%} of its groups reach the largest code read as fragments, "
        f"{rows:.0%} read row by row",
    )


def vectors_order(header: Header) -> Order:
    """The order of smooth, bias and channel_scale in a row-major file: "plain" or "fragments".

    Reads a few layers where the file does not declare it. What cannot be told is taken to be plain, and said so.
    """
    if _json(header.metadata.get("conversion")).get("vectors") == ROWS:
        return Order("plain", "vectors row-major, declared by conversion in the header")
    if not header.local:
        return Order(
            "plain",
            f"order of vectors not declared, {_NOT_READ.format('vectors', 'row-major')}",
            assumed=True,
        )
    linears = [
        stored_linear(header, module, ROW_LAYOUT["plain"]) for module in quantized_modules(header)
    ]
    for linear in linears:
        if linear.scheme is not AWQ_W4A16 and not has_whole_fragments(linear):
            shape = " x ".join(str(side) for side in linear.shape)
            return Order(
                "plain",
                f"vectors row-major, implied by {linear.module} ({shape}, no multiple of {WARP})",
            )
    samples = [_smooth_and_columns(header, linear) for linear in smallest_linears(header, linears)]
    plain = _agreement(samples)
    fragments = _agreement([(_unpack(smooth), columns) for smooth, columns in samples])
    said = (
        f"smooth follows the residual's columns by {plain:.1f} standard deviations read row-major and by "
        f"{fragments:.1f} read as fragments, in {len(samples)} layers"
    )
    if abs(plain - fragments) < MIN_Z_SCORE:
        return Order(
            "plain",
            f"order of vectors not declared and not to be told ({said}); taken to be row-major",
        )
    order = FRAGMENTS if fragments > plain else "plain"
    return Order(
        order,
        f"vectors {'in fragment order' if order == FRAGMENTS else 'row-major'}, inferred: {said}",
    )


def has_whole_fragments(linear: StoredLinear) -> bool:
    """Whether its vectors are whole fragments; only such a layer's can have been left in fragment order."""
    return all(side % WARP == 0 for side in linear.shape)


def assumed_fields(header: Header, vectors: bool) -> frozenset[str]:
    """Fields of Layout that only numbers would prove, and numbers are not read: some of a file's on the Hub."""
    if header.local:
        return frozenset()
    orders = {"codes": codes_order(header)} | (
        {"vectors": vectors_order(header)} if vectors else {}
    )
    return frozenset(field for field, order in orders.items() if order.assumed)


def smallest_linears(header: Header, linears: Iterable[StoredLinear]) -> list[StoredLinear]:
    """The smallest W4A4 layers whose tensors are all there, enough of them to tell the order of vectors by.

    Those with scales that are no usable numbers are left out.
    """
    looked_at: list[StoredLinear] = []
    for linear in sorted(linears, key=lambda linear: math.prod(linear.shape)):
        if sum(own.shape[1] for own in looked_at) >= SAMPLED_COLUMNS:
            break
        if linear.scheme is not AWQ_W4A16 and _can_be_measured(linear, header):
            looked_at.append(linear)
    return [linear for linear in looked_at if not linear.scale_problem(header)]


def _can_be_measured(linear: StoredLinear, header: Header) -> bool:
    """What is wrong with a layer that cannot is said when the file is planned."""
    return linear.is_complete(header) and all(linear.shape) and linear.shape[1] % FRAGMENT_RUN == 0


def _smooth_and_columns(header: Header, linear: StoredLinear) -> tuple[Tensor, Tensor]:
    """log smooth as stored [in], and log RMS of the residual's columns within each run of 16 [in]."""
    infos = {part: header.tensors[linear.keys[part]] for part in ("codes", "block_scale", "smooth")}
    infos["codes"] = infos["codes"].slice_rows(0, min(linear.shape[0], SAMPLED_ROWS))
    parts = {part: info.read() for part, info in infos.items()}
    codes = parts["codes"].view(torch.uint8)
    residual = linear.scheme.decode(
        {"codes": codes, "block_scale": parts["block_scale"].t()[:SAMPLED_ROWS]}
    )
    columns = residual.square().mean(0).clamp(min=TINY).sqrt().log()
    return parts["smooth"].float().clamp(min=TINY).log(), _by_run(columns)


def _unpack(vector: Tensor) -> Tensor:
    return from_vector_fragments(vector.unsqueeze(0)).squeeze(1)


def _by_run(values: Tensor) -> Tensor:
    """values [in] less the mean of their run of 16, inside which the two orders differ."""
    runs = to_groups(values, FRAGMENT_RUN)
    return (runs - runs.mean(1, keepdim=True)).flatten()


def _agreement(samples: Sequence[tuple[Tensor, Tensor]]) -> float:
    """How far smooth and columns are from being unrelated, in standard deviations; either sign counts in each layer."""
    return math.sqrt(
        sum(
            len(smooth) * _correlation(_by_run(smooth), columns) ** 2 for smooth, columns in samples
        )
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    size = torch.linalg.norm(a) * torch.linalg.norm(b)
    return float(a @ b / size) if size > 0 else 0.0


def _is_svdquant_config(config: Mapping[str, Any]) -> bool:
    """vLLM-Omni's own configuration, flat or with one entry for each component."""
    entry = config.get("quantization_config")
    entries = [entry, *entry.values()] if isinstance(entry, dict) else []
    return any(
        isinstance(item, dict) and item.get("quant_method") == "svdquant" for item in entries
    )


def _json(text: str | None) -> Mapping[str, Any]:
    """An object in the metadata; what is no object says nothing."""
    try:
        return parse_object(text or "{}", "metadata")
    except BrokenFile:
        return {}
