"""Decode the output of other tools, and count the values that differ from Mezzotint's.

This development tool runs on the CPU. It needs nvidia-modelopt 0.47 and torchao 0.18, in addition
to comfy-kitchen and diffusers. The matrices have random sizes and ranges, and difficult values:
zero rows and blocks, outliers, midpoints between values, and values near the limits of float32.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator

import comfy_kitchen
import torch
from diffusers.quantizers.bfl import utils as bfl
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor
from torch import Tensor
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize

from mezzotint.layouts import from_tiles
from mezzotint.schemes import FP8, MXFP8, NVFP4
from support import results_log

Pair = tuple[str, Tensor, Tensor]
"""Tool and scheme, what the tool decodes, what Mezzotint decodes."""
MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])


def zeros(matrix: Tensor, random: torch.Generator) -> Tensor:
    matrix[torch.randint(len(matrix), (1,), generator=random)] = 0
    matrix[:, :16] = 0
    return matrix


def outliers(matrix: Tensor, random: torch.Generator) -> Tensor:
    matrix[
        torch.randint(len(matrix), (3,), generator=random),
        torch.randint(16, (3,), generator=random),
    ] *= 1e6
    return matrix


def midpoints(matrix: Tensor, _random: torch.Generator) -> Tensor:
    return MIDPOINTS.repeat(matrix.numel() // len(MIDPOINTS)).reshape(matrix.shape) * matrix.sign()


def spread(matrix: Tensor, _random: torch.Generator) -> Tensor:
    return matrix * torch.logspace(-9, 3, len(matrix))[:, None]


def as_drawn(matrix: Tensor, _random: torch.Generator) -> Tensor:
    return matrix


KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    kind.__name__: kind for kind in (as_drawn, zeros, outliers, midpoints, spread)
}


def matrices(number: int, seed: int) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(seed)
    for i in range(number):
        rows = int(torch.randint(1, 300, (1,), generator=random))
        columns = 32 * int(torch.randint(1, 9, (1,), generator=random))
        exponent = float(torch.randint(-28, 29, (1,), generator=random)) if i % 2 else 0.0
        matrix = torch.randn(rows, columns, generator=random)
        if i % 3 == 0:
            matrix = matrix.bfloat16().float()
        yield list(KINDS.values())[i % len(KINDS)](matrix, random) * 10**exponent


def nvfp4(codes: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    return NVFP4.dequantize(
        {"codes": codes, "block_scale": block_scale, "global_scale": global_scale}
    )


def mxfp8(codes: Tensor, block_scale: Tensor) -> Tensor:
    return MXFP8.dequantize({"codes": codes, "block_scale": block_scale.view(torch.float8_e8m0fnu)})


def by_modelopt(matrix: Tensor) -> Iterator[Pair]:
    quantized, scale, double = NVFP4QTensor.quantize(matrix, 16)
    theirs = quantized.dequantize(
        torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16}
    )
    yield (
        "modelopt nvfp4",
        theirs.float(),
        nvfp4(quantized._quantized_data, scale, double.float().reshape(())),
    )
    quantized, scale = MXFP8QTensor.quantize(matrix)
    theirs = quantized.dequantize(torch.float32, scale=scale)
    yield "modelopt mxfp8", theirs, mxfp8(quantized._quantized_data, scale)


def by_torchao(matrix: Tensor, global_scale: Tensor) -> Iterator[Pair]:
    scale, codes = nvfp4_quantize(matrix, 16, global_scale)
    theirs = NVFP4Tensor(codes, scale, 16, torch.float32, global_scale).dequantize()
    yield "torchao nvfp4", theirs, nvfp4(codes.view(torch.uint8), scale, global_scale)
    scale, codes = to_mx(matrix, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    theirs = to_dtype(codes, scale, torch.float8_e4m3fn, 32, torch.float32)
    yield "torchao mxfp8", theirs, mxfp8(codes, scale)


def by_comfy_kitchen(matrix: Tensor, global_scale: Tensor) -> Iterator[Pair]:
    rows, columns = matrix.shape
    codes, tiles = comfy_kitchen.quantize_nvfp4(matrix, global_scale, pad_16x=True, hi_first=False)
    theirs = comfy_kitchen.dequantize_nvfp4(
        codes, global_scale, tiles, torch.float32, hi_first=False
    )[:rows]
    scale = from_tiles(tiles, rows, columns // 16)
    yield "comfy-kitchen nvfp4", theirs, nvfp4(codes[:rows], scale, global_scale)
    codes, tiles = comfy_kitchen.quantize_mxfp8(matrix, pad_32x=True)
    theirs = comfy_kitchen.dequantize_mxfp8(codes, tiles, torch.float32)[:rows]
    yield "comfy-kitchen mxfp8", theirs, mxfp8(codes[:rows], from_tiles(tiles, rows, columns // 32))
    scale = matrix.abs().amax() / 448
    codes = comfy_kitchen.quantize_per_tensor_fp8(matrix, scale, torch.float8_e4m3fn)
    theirs = comfy_kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)
    yield "comfy-kitchen fp8", theirs, FP8.dequantize({"codes": codes, "weight_scale": scale})


def by_diffusers(matrix: Tensor) -> Iterator[Pair]:
    codes, block_scale, global_scale = bfl.quantize_nvfp4(matrix)
    theirs = bfl.dequantize_nvfp4(codes, block_scale, global_scale)
    yield "diffusers nvfp4", theirs, nvfp4(codes, block_scale, global_scale)
    codes, scale = bfl.quantize_fp8r(matrix)
    yield (
        "diffusers fp8 rows",
        bfl.dequantize_fp8r(codes, scale),
        FP8.dequantize({"codes": codes, "weight_scale": scale}),
    )


def compare(number: int, seed: int) -> dict[str, object]:
    """The numbers of compared and of different values, by tool and scheme."""
    values: Counter[str] = Counter()
    differ: Counter[str] = Counter()
    for matrix in matrices(number, seed):
        global_scale = matrix.abs().amax() / 2688
        pairs = [
            *by_modelopt(matrix),
            *by_torchao(matrix, global_scale),
            *by_comfy_kitchen(matrix, global_scale),
        ]
        for tool, theirs, ours in [*pairs, *by_diffusers(matrix)]:
            values[tool] += theirs.numel()
            differ[tool] += int((theirs != ours).sum())
    return {"matrices": number, "values": dict(values), "differ": dict(differ)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record", action="store_true", help="add a row to benchmarks/results/agreement.jsonl"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = compare(arguments.number, arguments.seed)
    print(json.dumps(figures))
    if arguments.record:
        results_log.append("agreement", "decoded values, bit for bit", figures)


if __name__ == "__main__":
    main()
