"""Time FLUX.1 in GGUF with diffusers' own layers, for comparison with `mezzotint bench`.

    python benchmarks/compare_diffusers_gguf.py gguf_q8_0 gguf_q4_k   # one JSON line for each

The shapes, the random blocks and the inputs are those of `bench`. diffusers dequantizes in PyTorch
operations; its repeated blocks are compiled, and cuDNN computes attention, as for BF16 in `bench`.
Needs a GPU and the package gguf.
"""

import json
import sys
from statistics import median

import gguf
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import nn

from mezzotint.bench.random_model import BenchCase, build, example
from mezzotint.families import Sampling
from mezzotint.fast.transformer import speed_up
from mezzotint.nn import QuantLinear, quant_linears

CALLS, SIZE = 20, 1024


def as_diffusers(layer: QuantLinear) -> nn.Module:
    """Return diffusers' layer with the same blocks and bias."""
    name = layer.scheme.name.removeprefix("gguf_").upper()
    codes = layer.quant_weight.parts["codes"]
    shape = layer.in_features, layer.out_features
    linear = GGUFLinear(*shape, layer.bias is not None, torch.bfloat16, device="meta")
    linear.weight = GGUFParameter(codes, quant_type=gguf.GGMLQuantizationType[name])
    linear.bias = layer.bias
    return linear


@torch.no_grad()
def milliseconds(scheme: str, compiled: bool) -> float:
    """Return the median time of a call of FLUX.1's transformer."""
    device = torch.device("cuda")
    case = BenchCase("flux1-dev", scheme, Sampling(SIZE, CALLS, 1.0))
    model, inputs = build(case, device), example(case, device)
    for name, layer in quant_linears(model).items():
        model.set_submodule(name, as_diffusers(layer))
    if compiled:
        speed_up(model, "cudnn", compile_only=True)
    times = []
    for _ in range(CALLS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(**inputs)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[3:])


def main() -> None:
    for scheme in sys.argv[1:]:
        for compiled in (False, True):
            row = {"model": "flux1-dev", "scheme": scheme, "by": "diffusers", "compiled": compiled}
            time = {"ms": milliseconds(scheme, compiled), "device": torch.cuda.get_device_name()}
            print(json.dumps(row | time), flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
