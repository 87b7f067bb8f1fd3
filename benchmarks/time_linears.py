"""Time one linear layer of FLUX.1 in BF16, FP8 and INT8, and comfy-kitchen's INT8 layer.

    python benchmarks/time_linears.py            # one JSON line per layer and shape

Each layer is compiled and recorded as a CUDA graph with its activation quantization. Inputs are
BF16 of 4,608 tokens (1024 x 1024 pixels and 512 tokens of text). Needs a GPU.
"""

import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.nn import QuantLinear
from mezzotint.schemes import FP8, INT8
from mezzotint.schemes.fp8 import encode_fp8
from mezzotint.schemes.int8 import encode_int8
from mezzotint.schemes.rotation import regular_hadamard
from mezzotint.tensor import PLAIN, QuantTensor

TOKENS = 4608
SHAPES = ((3072, 3072), (9216, 3072), (12288, 3072), (21504, 3072), (3072, 12288), (3072, 15360))
GROUP = 256
CALLS, ROUNDS = 20, 7


def layers(out: int, in_: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield (name, function of x) of the layers to compare, with the same weight and bias."""
    weight = torch.randn(out, in_, device="cuda") * 0.02
    bias = torch.randn(out, device="cuda").bfloat16()
    rotation = {"rotation": regular_hadamard(GROUP).cuda()}
    matrix = weight.bfloat16()
    int8 = encode_int8(weight)
    yield "bf16", torch.compile(lambda x: F.linear(x, matrix, bias))
    for name, scheme, parts in (
        ("fp8", FP8, encode_fp8(weight, per_row=True)),
        ("int8", INT8, int8),
        ("int8 rotated", INT8, int8 | rotation),
    ):
        tensor = QuantTensor(scheme, PLAIN, (out, in_), parts | {"bias": bias}, True)
        yield name, torch.compile(QuantLinear(tensor))
    yield from comfy_layers(int8, bias)


def comfy_layers(
    int8: dict[str, Tensor], bias: Tensor
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield comfy-kitchen's layers, if it is installed."""
    try:
        import comfy_kitchen
    except ImportError:
        return
    codes, scale = int8["codes"], int8["weight_scale"]
    for rotated in (False, True):

        def linear(x: Tensor, rotated: bool = rotated) -> Tensor:
            y: Tensor = comfy_kitchen.int8_linear(
                x, codes, scale, bias, torch.bfloat16, rotated, GROUP
            )
            return y

        yield f"comfy-kitchen int8{' rotated' * rotated}", linear


def microseconds(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the median time of a call inside a CUDA graph."""
    for _ in range(3):
        function(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function(x)
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / CALLS * 1000)
    return sorted(times)[ROUNDS // 2]


def main() -> None:
    device = torch.cuda.get_device_name()
    for out, in_ in SHAPES:
        x = torch.randn(TOKENS, in_, device="cuda").bfloat16()
        for name, layer in layers(out, in_):
            with torch.no_grad():
                time = microseconds(layer, x)
            tflops = 2 * TOKENS * out * in_ / time / 1e6
            row = {"layer": name, "shape": [out, in_], "us": round(time, 1)}
            print(json.dumps(row | {"tflops": round(tflops), "device": device}), flush=True)
            torch.compiler.reset()


if __name__ == "__main__":
    main()
