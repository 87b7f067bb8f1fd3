"""torch.ops.mezzotint.gemm_act: GEMM of 8-bit codes on Hopper, with a fused activation for FP8."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.library import custom_op

from mezzotint.errors import ShapeMismatch
from mezzotint.kernels.fp8_gemm import GEMM_ALIGNMENT
from mezzotint.kernels.ops import nvrtc
from mezzotint.kernels.ops.gemm_act.reference import allocate_outputs
from mezzotint.kernels.ops.gemm_act.source import (
    ARCHITECTURE,
    CLUSTER_SIZE,
    INSTRUCTIONS,
    NAME,
    SHARED_BYTES,
    THREADS,
    TILE_M,
    TILE_N,
    kernel_source,
)
from mezzotint.kernels.target import Target

MAX_TILE_ROWS_PER_GROUP = 9
"""Maximum tile rows per group. 6, 9 and 18 were within 2 % of the best for every shape tried."""


def unavailable_reason(target: Target) -> str | None:
    """Return why the kernel cannot run on `target`, or None."""
    if target.device_type == "cuda" and target.capability is not None and not target.is_hopper:
        return f"is written for Hopper (sm_90), this is {target}"
    return nvrtc.unavailable_reason(target)


@custom_op("mezzotint::gemm_act", mutates_args=(), device_types="cuda")
def gemm_act(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    inverse_scale: Tensor | None,
    activation: str,
    plain_columns: int,
    reserved: int,
) -> tuple[Tensor, Tensor]:
    """Compute `gemm_act_reference`, which describes the operands."""
    scales = input_scale, weight_scale, inverse_scale
    _check_shapes(x, codes, activation, plain_columns, reserved)
    _check_dtypes(x, codes, activation, bias, scales)
    out, quantized = allocate_outputs(x, codes, activation, plain_columns, reserved)
    m, k = x.shape
    if not m:  # a grid of no blocks is a launch error
        return out, quantized
    active = quantized[:, reserved:]
    tile_rows, num_tiles = _tiles(m, plain_columns, active.shape[1], activation)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        by_row = input_scale.numel() > 1, weight_scale.numel() > 1
        kernel = _kernel(x.dtype, activation, *by_row, bias is not None, x.device.index)
        kernel.launch(
            # Each block fills a multiprocessor and takes tile after tile, so more would only wait.
            min(_num_blocks(x.device), CLUSTER_SIZE * num_tiles),
            x.device,
            *_tensor_maps(x, codes, out, active),
            *(input_scale, weight_scale, bias, inverse_scale),
            *(m, k, codes.shape[0], plain_columns, _tile_rows_per_group(tile_rows)),
        )
    return out, quantized


def _fake(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    inverse_scale: Tensor | None,
    activation: str,
    plain_columns: int,
    reserved: int,
) -> tuple[Tensor, Tensor]:
    return allocate_outputs(x, codes, activation, plain_columns, reserved)


gemm_act.register_fake(_fake)


def _check_shapes(
    x: Tensor, codes: Tensor, activation: str, plain_columns: int, reserved: int
) -> None:
    """Raise ShapeMismatch for sizes that TMA cannot load: rows start at multiples of 16 bytes."""
    sizes = {
        "input features": x.shape[1],
        "output features": codes.shape[0],
        "plain columns": plain_columns,
        "reserved columns": reserved,
    }
    for name, size in sizes.items():
        if size % GEMM_ALIGNMENT:
            raise ShapeMismatch(
                f"GEMM of 8-bit codes with {size} {name}, expected a multiple of {GEMM_ALIGNMENT}"
            )
    if (activation == "none") != (plain_columns == codes.shape[0]):
        raise ShapeMismatch(
            f"GEMM of 8-bit codes with activation {activation} and {plain_columns} plain columns "
            f"of {codes.shape[0]}"
        )


def _check_dtypes(
    x: Tensor,
    codes: Tensor,
    activation: str,
    bias: Tensor | None,
    scales: Sequence[Tensor | None],
) -> None:
    """Raise ShapeMismatch for dtypes that the kernel would misread."""
    found = f"GEMM of {x.dtype} and {codes.dtype}"
    if x.dtype != codes.dtype or x.dtype not in INSTRUCTIONS:
        raise ShapeMismatch(f"{found}, expected float8_e4m3fn or int8 twice")
    if x.dtype == torch.int8 and activation != "none":
        raise ShapeMismatch(f"{found} with {activation}, expected no activation")
    if bias is not None and bias.dtype != torch.bfloat16:
        raise ShapeMismatch(f"{found} with a bias in {bias.dtype}, expected {torch.bfloat16}")
    for scale in scales:
        if scale is not None and scale.dtype != torch.float32:
            raise ShapeMismatch(f"{found} with a scale in {scale.dtype}, expected {torch.float32}")


def _tensor_maps(x: Tensor, codes: Tensor, out: Tensor, active: Tensor) -> list[object]:
    """Return the TMA descriptors of both inputs and both outputs.

    A box is 128 bytes wide, as far as 128-byte swizzling reaches. Where there is no output of one
    kind, the kernel needs some valid descriptor but never uses it.
    """
    # 128 bytes are 128 codes, or 64 BF16 numbers.
    plain = (out, (64, 64)) if out.shape[1] else (codes, (64, 128))
    return [
        nvrtc.make_tensor_map(matrix, box)
        for matrix, box in (
            (x, (128, 128)),
            (codes, (128, 128)),
            plain,
            (active if active.shape[1] else codes, (64, 128)),
        )
    ]


def _tiles(m: int, plain_columns: int, active_columns: int, activation: str) -> tuple[int, int]:
    """Return how many rows of tiles there are, and how many tiles."""
    tile_rows = _ceil_div(m, TILE_M * CLUSTER_SIZE)
    tile_columns = _ceil_div(plain_columns, TILE_N)
    tile_columns += _ceil_div(active_columns, _active_columns_per_tile(activation))
    return tile_rows, tile_rows * tile_columns


def _active_columns_per_tile(activation: str) -> int:
    """Return the active output columns per tile: SwiGLU combines two GEMM columns into one."""
    return TILE_N // 2 if activation == "swiglu" else TILE_N


def _tile_rows_per_group(tile_rows: int) -> int:
    """Return the tile rows per group, chosen so that groups are nearly equal."""
    return _ceil_div(tile_rows, _ceil_div(tile_rows, MAX_TILE_ROWS_PER_GROUP))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@cache
def _num_blocks(device: torch.device) -> int:
    """Return how many blocks run at once: one per multiprocessor, in whole clusters."""
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return count // CLUSTER_SIZE * CLUSTER_SIZE


# Cached, because NVRTC takes half a second per variant.
@cache
def _kernel(
    dtype: torch.dtype,
    activation: str,
    x_by_row: bool,
    codes_by_row: bool,
    biased: bool,
    device: int,
) -> nvrtc.Kernel:
    source = kernel_source(dtype, activation, x_by_row, codes_by_row, biased)
    return nvrtc.compile_kernel(source, NAME, ARCHITECTURE, THREADS, SHARED_BYTES, device)
