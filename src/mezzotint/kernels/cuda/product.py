"""torch.ops.mezzotint.product: FP8 times FP8 with an activation and the next layer's rounding behind it, on Hopper."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from mezzotint.errors import ShapeMismatch
from mezzotint.kernels.backend import Target
from mezzotint.kernels.cuda import compiler
from mezzotint.kernels.products import MULTIPLE
from mezzotint.schemes.rounding import round_e4m3

ACTIVATIONS = ("none", "gelu", "swiglu")
ARCHITECTURE = "sm_90a"
CLUSTER, ROWS, COLUMNS, DEPTH = 2, 128, 256, 128
"""Blocks of a cluster; what a block computes at a time, and how far along the input a step goes. As in product.cu."""
THREADS = 384
SHARED_BYTES = 1024 + 4 * (ROWS + COLUMNS) * DEPTH + 4 * 64 * 128 + 8 * 8
"""Alignment, four stages, four slabs and eight barriers."""
TOGETHER = 9
"""Rows of tiles that are computed side by side, at most; of 6, 9 and 18 within 2 % of the best for each shape tried."""


def missing(target: Target) -> str | None:
    """Why it cannot run on `target`, or None."""
    if target.kind == "cuda" and target.capability is not None and not target.is_hopper:
        return f"is written for Hopper (sm_90), this is {target}"
    return compiler.missing(target)


@custom_op("mezzotint::product", mutates_args=(), device_types="cuda")
def product(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    inverse: Tensor | None,
    activation: str,
    plain: int,
    room: int,
) -> tuple[Tensor, Tensor]:
    """See `product_by_definition`, which says what is computed."""
    _check(x, codes, bias, (input_scale, weight_scale, inverse), activation, plain, room)
    out, rounded = _places(x, codes, activation, plain, room)
    rows, depth = x.shape
    if not rows:
        return out, rounded
    active = rounded[:, room:]
    tiles = -(-rows // (ROWS * CLUSTER)), -(-plain // COLUMNS) - (-active.shape[1] // _columns(activation))
    maps = [compiler.tensor_map(matrix, (128, 128)) for matrix in (x, codes)]
    maps += [
        compiler.tensor_map(out if plain else codes, (64, 64 if plain else 128)),
        compiler.tensor_map(active if active.shape[1] else codes, (64, 128)),
    ]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        by_row = input_scale.numel() > 1, weight_scale.numel() > 1
        kernel = _kernel(activation, *by_row, bias is not None, x.device.index)
        kernel.launch(
            min(_blocks(x.device), CLUSTER * tiles[0] * tiles[1]),
            x.device,
            *maps,
            *(input_scale, weight_scale, bias, inverse),
            *(rows, depth, codes.shape[0], plain, _together(tiles[0])),
        )
    return out, rounded


def product_by_definition(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    inverse: Tensor | None,
    activation: str,
    plain: int,
    room: int,
) -> tuple[Tensor, Tensor]:
    """y = x codes^T * input_scale * weight_scale + bias: its first columns, and e4m3(activation(the others) * inverse).

    x, codes       e4m3 [rows, in], [out, in]
    bias           bf16 [out] or None
    input_scale    float32 of one number, or [rows, 1]
    weight_scale   float32 of one number, or [out]
    inverse        float32 of one number, 1 / input_scale of the layer that reads the result; None if activation is none
    activation     "none", where all columns are plain; "gelu"; or "swiglu", silu(a) * b of [a, b] side by side
    plain          how many columns go through none
    room           columns that are left free in front of the rounded ones, for what is to stand beside them
    Returns        bf16 [rows, plain]; e4m3 [rows, room + others, or half of them]
    """
    y = x.float() @ codes.float().t() * (input_scale.reshape(-1, 1) * weight_scale.reshape(1, -1))
    y = y if bias is None else y + bias.float()
    out, rounded = _places(x, codes, activation, plain, room)
    out.copy_(y[:, :plain])
    if inverse is not None:
        rounded[:, room:] = round_e4m3(activated(y[:, plain:], activation) * inverse)
    return out, rounded


def _check(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    scales: Sequence[Tensor | None],
    activation: str,
    plain: int,
    room: int,
) -> None:
    """Raises ShapeMismatch where the copy engine or the kernel's own loads would find something else."""
    sides = {"input features": x.shape[1], "output features": codes.shape[0], "plain columns": plain, "room": room}
    for name, side in sides.items():
        if side % MULTIPLE:
            raise ShapeMismatch(f"a product with {side} {name}, expected a multiple of {MULTIPLE}")
    if (activation == "none") != (plain == codes.shape[0]):
        raise ShapeMismatch(f"a product with activation {activation} and {plain} of {codes.shape[0]} columns plain")
    if bias is not None and bias.dtype != torch.bfloat16:
        raise ShapeMismatch(f"a product with a bias in {bias.dtype}, expected {torch.bfloat16}")
    for scale in scales:
        if scale is not None and scale.dtype != torch.float32:
            raise ShapeMismatch(f"a product with a scale in {scale.dtype}, expected {torch.float32}")


def activated(x: Tensor, activation: str) -> Tensor:
    """gelu(x) by tanh, or silu(a) * b of x = [a, b] side by side; in float32."""
    if activation == "gelu":
        return F.gelu(x.float(), approximate="tanh")
    gate, up = x.float().chunk(2, -1)
    return F.silu(gate) * up


def _places(x: Tensor, codes: Tensor, activation: str, plain: int, room: int) -> tuple[Tensor, Tensor]:
    """Memory for the results."""
    active = (codes.shape[0] - plain) // (2 if activation == "swiglu" else 1)
    wide = 0 if activation == "none" else room + active
    return x.new_empty(x.shape[0], plain, dtype=torch.bfloat16), x.new_empty(x.shape[0], wide)


product.register_fake(lambda x, codes, bias, input_scale, weight_scale, inverse, *kind: _places(x, codes, *kind))


def _columns(activation: str) -> int:
    """Columns of the rounded result that a block computes at a time: SwiGLU makes one of two."""
    return COLUMNS // 2 if activation == "swiglu" else COLUMNS


def _together(rows: int) -> int:
    """So many of `rows` rows of tiles that all groups but the last have the same, and that one hardly less."""
    return -(-rows // -(-rows // TOGETHER))


@cache
def _blocks(device: torch.device) -> int:
    """As many as run at once: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count // CLUSTER * CLUSTER


@cache
def _kernel(activation: str, x_by_row: bool, codes_by_row: bool, biased: bool, device: int) -> compiler.Kernel:
    source = source_of(activation, x_by_row, codes_by_row, biased)
    return compiler.compiled(source, "product", ARCHITECTURE, THREADS, SHARED_BYTES, device)


def source_of(activation: str, x_by_row: bool, codes_by_row: bool, biased: bool) -> str:
    """The kernel for one kind of product: what product.cu leaves open, filled in."""
    sums = range(ROWS * COLUMNS // 256)
    source = Path(__file__).with_name("product.cu").read_text()
    source = source.replace("@PLACES@", ", ".join(f"%{number}" for number in sums))
    source = source.replace("@SUMS@", ", ".join(f'"+f"(sum[{number}])' for number in sums))
    definitions = {
        "ACTIVATION": ACTIVATIONS.index(activation),
        "X_BY_ROW": int(x_by_row),
        "CODES_BY_ROW": int(codes_by_row),
        "BIAS": int(biased),
    }
    return "".join(f"#define {name} {value}\n" for name, value in definitions.items()) + source
