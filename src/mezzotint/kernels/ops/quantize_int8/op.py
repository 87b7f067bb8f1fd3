"""torch.ops.mezzotint.quantize_int8: activation, rotation and INT8 quantization of an input."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from mezzotint.errors import ShapeMismatch
from mezzotint.kernels.ops import nvrtc
from mezzotint.kernels.ops.quantize_int8.reference import ACTIVATIONS

NAME = "quantize_int8"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Their index is the value of X_TYPE in kernel.cu."""
DIGITS = {16: 2, 64: 3, 256: 4}
"""{columns that are rotated together: their digits in base 4}"""
SPAN, SIDE, WARP = 256, 16, 32
MAX_THREADS = 512
SPAN_BYTES = 4 * (SPAN + SIDE)
"""Constants of kernel.cu, and the shared memory of a span of columns."""


@custom_op("mezzotint::quantize_int8", mutates_args=(), device_types="cuda")
def quantize_int8(
    x: Tensor,
    prefix: Tensor | None,
    signs: Tensor | None,
    input_scale: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Compute `quantize_int8_reference`, which describes the operands."""
    codes, scale = _fake(x, prefix, signs, input_scale, activation)
    rows, columns = codes.shape
    prefix_columns = 0 if prefix is None else prefix.shape[1]
    if columns % SIDE or prefix_columns % SIDE or x.stride(1) != 1:
        raise ShapeMismatch(
            f"INT8 quantization of {prefix_columns} and {columns - prefix_columns} columns, "
            f"expected multiples of {SIDE}"
        )
    if not rows:  # a grid of no blocks is a launch error
        return codes, scale
    chunks, threads = _threads(columns)
    variant = Variant(
        DTYPES.index(x.dtype),
        ACTIVATIONS.index(activation),
        0 if signs is None else DIGITS[len(signs)],
        prefix is not None,
        columns % SPAN == 0,
        input_scale is not None,
        chunks,
    )
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel = _kernel(variant, threads, x.device.index)
        kernel.launch(
            rows,
            x.device,
            *(x, prefix, signs, input_scale, codes, scale),
            *(columns, prefix_columns, x.stride(0), 0 if prefix is None else prefix.stride(0)),
        )
    return codes, scale


def _fake(
    x: Tensor,
    prefix: Tensor | None,
    signs: Tensor | None,
    input_scale: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    columns = x.shape[1] // (2 if activation == "swiglu" else 1)
    columns += 0 if prefix is None else prefix.shape[1]
    codes = x.new_empty(x.shape[0], columns, dtype=torch.int8)
    return codes, x.new_empty(x.shape[0], 1, dtype=torch.float32)


quantize_int8.register_fake(_fake)


def _threads(columns: int) -> tuple[int, int]:
    """Return how many chunks of columns a thread takes, and how many threads a row needs."""
    spans = -(-columns // SPAN)
    chunks = -(-spans * SIDE // MAX_THREADS)
    threads = -(-spans // chunks) * SIDE
    return chunks, -(-threads // WARP) * WARP


class Variant(NamedTuple):
    """The compile-time definitions of kernel.cu, which describes them."""

    x_type: int
    activation: int
    digits: int
    prefix: bool
    whole_spans: bool
    static: bool
    chunks: int

    def source(self) -> str:
        """Return the CUDA source of this variant."""
        definitions = [
            f"#define {name.upper()} {int(value)}\n" for name, value in self._asdict().items()
        ]
        return "".join(definitions) + Path(__file__).with_name("kernel.cu").read_text()


# Cached, because NVRTC takes a moment per variant.
@cache
def _kernel(variant: Variant, threads: int, device: int) -> nvrtc.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    shared = threads // SIDE * SPAN_BYTES
    return nvrtc.compile_kernel(
        variant.source(), NAME, f"sm_{major}{minor}", threads, shared, device
    )
