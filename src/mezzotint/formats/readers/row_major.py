"""Read row-major SVDQuant, as vLLM-Omni stores it: Nunchaku's tensors in plain order.

X.qweight int8 [N, K/2] low nibble first,  X.wscales [K/16, N] e4m3 or [K/64, N] bf16,
X.proj_down [K, R],  X.proj_up [N, R]

Some converters left smooth_factor, wcscales and bias in fragment order. The file does not say so;
`detection.svdquant_order` infers it from the values.
"""

from dataclasses import replace

from mezzotint.formats.contents import Contents, Match, NoMatch, classify_tensors
from mezzotint.formats.detection.svdquant_order import (
    ROW_LAYOUT,
    ROWS,
    assumed_fields,
    codes_order,
    vectors_order,
)
from mezzotint.formats.header import Header
from mezzotint.formats.readers.svdquant import (
    quantized_modules,
    ranks,
    stored_linear,
    unused_tensors,
)


class RowMajor:
    name = "row_major"
    title = "row-major SVDQuant (vLLM-Omni)"

    def detect(self, header: Header) -> Match | NoMatch:
        if not quantized_modules(header):
            return NoMatch("no layer has .qweight and .wscales")
        order = codes_order(header)
        if order.order != ROWS:
            return NoMatch(f"its codes are in Nunchaku's fragment order: {order.evidence}")
        vectors = vectors_order(header).evidence
        return Match(f"{ranks(header)}; codes row-major: {order.evidence}; {vectors}")

    def contents(self, header: Header) -> Contents:
        layout = ROW_LAYOUT[vectors_order(header).order]
        linears = {
            module: stored_linear(header, module, layout) for module in quantized_modules(header)
        }
        found = classify_tensors(header, linears, unused_tensors(header))
        return replace(found, assumed=assumed_fields(header, vectors=True))


FORMAT = RowMajor()
