"""Time the kernels that dequantize FLUX.1's matrices to BF16, and check them bit for bit.

Prints microseconds and TB/s of the packed weight read and the matrix written. `fill` only writes
the matrix, which bounds every kernel from below. `gemm` is the GEMM with 4,608 tokens.

Needs a GPU: `python benchmarks/dequantize.py [scheme ...]`
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.nn import functional as F
from triton.testing import do_bench_cudagraph

from mezzotint.bench.random_parts import random_parts
from mezzotint.kernels.backends.dequantize import BACKEND
from mezzotint.kernels.dequantize import dequantize
from mezzotint.schemes import CODEBOOK4, INT_GROUPS, Scheme, schemes
from mezzotint.tensor import PLAIN, QuantTensor

SHAPES = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360), (21504, 3072))
TOKENS = 4608
GPU = torch.device("cuda")


def timed_schemes() -> Iterator[Scheme]:
    """Return the schemes that the command names; without names, GGUF's and some with groups."""
    gguf = [name for name in schemes() if name.startswith("gguf_")]
    groups = [scheme.name for scheme in (CODEBOOK4, INT_GROUPS[4], INT_GROUPS[8])]
    return (schemes()[name] for name in sys.argv[1:] or gguf + groups)


def random_weight(scheme: Scheme, shape: tuple[int, int]) -> QuantTensor:
    weight = QuantTensor(scheme, PLAIN, shape, random_parts(scheme, shape, GPU))
    return replace(weight, prepared=BACKEND.prepare(weight))


def microseconds(call: Callable[[], object]) -> float:
    return 1e3 * float(do_bench_cudagraph(call, rep=20, return_mode="median"))


def time_scheme(scheme: Scheme, shape: tuple[int, int]) -> str:
    weight = random_weight(scheme, shape)
    exact = scheme.decode(weight.parts).bfloat16()
    wrong = int((dequantize(weight, torch.bfloat16) != exact).sum())
    time = microseconds(lambda: dequantize(weight, torch.bfloat16))
    speed = (weight.nbytes() + exact.nbytes) / time / 1e6
    return f"{scheme.name:12} {shape!s:14} {time:7.1f} us {speed:5.2f} TB/s {wrong} wrong"


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape in SHAPES:
        matrix = torch.randn(shape, dtype=torch.bfloat16, device=GPU)
        x = torch.randn(TOKENS, shape[1], dtype=torch.bfloat16, device=GPU)
        for name, call in (
            ("fill", lambda matrix=matrix: matrix.fill_(1)),
            ("gemm", lambda x=x, matrix=matrix: F.linear(x, matrix)),
        ):
            time = microseconds(call)
            print(f"{name:12} {shape!s:14} {time:7.1f} us {matrix.nbytes / time / 1e6:5.2f} TB/s")
        for scheme in timed_schemes():
            print(time_scheme(scheme, shape), flush=True)


if __name__ == "__main__":
    main()
