"""Read Nunchaku's SVDQuant checkpoints: INT4 or NVFP4 with a low-rank branch.

All bytes are in the order of Nunchaku's GPU kernels. A checkpoint is one file, with the model's
configuration in its metadata, or an older folder of two files. Scheme and rank come from the
tensors: the metadata of published files states a wrong rank.
"""

from collections import Counter
from dataclasses import replace

from mezzotint.formats.contents import Contents, Match, NoMatch, classify_tensors
from mezzotint.formats.detection.svdquant_order import FRAGMENTS, assumed_fields, codes_order
from mezzotint.formats.header import Header
from mezzotint.formats.readers.svdquant import (
    NUNCHAKU_LAYOUT,
    is_v1,
    quantized_modules,
    ranks,
    scheme_of,
    stored_linear,
    unused_tensors,
)

UNFUSED = (".to_q", ".add_q_proj")


class Nunchaku:
    name = "nunchaku"
    title = "Nunchaku SVDQuant"

    def detect(self, header: Header) -> Match | NoMatch:
        modules = quantized_modules(header)
        if not modules:
            return NoMatch("no layer has .qweight and .wscales")
        unfused = next((module for module in modules if module.endswith(UNFUSED)), None)
        if unfused is not None:
            return NoMatch(f"{unfused} is not fused with keys and values, as in Nunchaku Lite")
        order = codes_order(header)
        if order.order != FRAGMENTS:
            return NoMatch(f"its codes are row-major: {order.evidence}")
        counts = Counter(scheme_of(header, module).title for module in modules)
        listed = " and ".join(f"{count} {title}" for title, count in counts.items())
        version = "v1" if any(is_v1(header, module) for module in modules) else "v2"
        return Match(
            f"{listed} layers under Nunchaku's {version} names, {ranks(header)}; "
            f"codes in fragment order: {order.evidence}"
        )

    def contents(self, header: Header) -> Contents:
        linears = {
            module: stored_linear(header, module, NUNCHAKU_LAYOUT[scheme_of(header, module).name])
            for module in quantized_modules(header)
        }
        found = classify_tensors(header, linears, unused_tensors(header))
        return replace(found, assumed=assumed_fields(header, vectors=False))


FORMAT = Nunchaku()
