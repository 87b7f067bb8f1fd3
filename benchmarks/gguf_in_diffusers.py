"""Time FLUX.1 in diffusers' own GGUF layers: the blocks and inputs of `mezzotint bench flux1-dev`.

Needs a GPU and `pip install gguf`:
`python benchmarks/gguf_in_diffusers.py [--scheme gguf_q4_k] [--compile]`
"""

import argparse
from itertools import pairwise
from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from gguf import GGMLQuantizationType
from torch import nn

from mezzotint.bench import BenchCase, published_model
from mezzotint.bench.random_model import build, example
from mezzotint.costs import Percentiles
from mezzotint.kernels.ops.dequant_gguf.types import TYPES
from mezzotint.nn import QuantLinear, quant_linears

MODEL = "flux1-dev"
WARM_UP, CALLS = 3, 10


def diffusers_layer(layer: QuantLinear) -> nn.Module:
    """Return diffusers' layer with the same blocks."""
    made = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=torch.bfloat16)
    number = GGMLQuantizationType(TYPES[layer.scheme.name])
    made.weight = GGUFParameter(layer.quant_weight.parts["codes"], quant_type=number)
    made.bias = layer.bias
    return made


def call_ms(model: nn.Module, inputs: dict[str, Any]) -> Percentiles:
    for _ in range(WARM_UP):
        model(**inputs)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    events[0].record()
    for event in events[1:]:
        model(**inputs)
        event.record()
    torch.cuda.synchronize()
    return Percentiles.of([start.elapsed_time(end) for start, end in pairwise(events)])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", action="append", choices=TYPES)
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    for scheme in arguments.scheme or ["gguf_q8_0", "gguf_q4_k"]:
        case = BenchCase(MODEL, scheme, published_model(MODEL).sampling)
        model, inputs = build(case, device), example(case, device)
        for name, layer in quant_linears(model).items():
            model.set_submodule(name, diffusers_layer(layer))
        if arguments.compile:
            model.compile_repeated_blocks(fullgraph=True)
        times = call_ms(model, inputs)
        print(f"diffusers, {scheme}, compiled={arguments.compile}: {times.median:.1f} ms a call")
        del model
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
