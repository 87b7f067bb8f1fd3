"""The CUDA C++ kernel of gemm_act without a GPU: that it compiles, and how it is launched.

The GPU tests check what it computes.
"""

import re
from itertools import product as combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.errors import ShapeMismatch, Unsupported
from mezzotint.kernels.ops import nvrtc
from mezzotint.kernels.ops.gemm_act import op
from mezzotint.kernels.ops.gemm_act import source as cuda_source
from mezzotint.kernels.ops.gemm_act.reference import (
    FUSED_ACTIVATIONS,
    gemm_act_reference,
)
from mezzotint.schemes.minifloats import round_e4m3

SOURCE = Path(op.__file__).with_name("kernel.cu").read_text()


@pytest.mark.parametrize("activation", FUSED_ACTIVATIONS)
@pytest.mark.parametrize(("x_by_row", "codes_by_row"), list(combinations((False, True), repeat=2)))
def test_every_variant_compiles_for_hopper(
    activation: str, x_by_row: bool, codes_by_row: bool
) -> None:
    """A bias is added independently of scales: both kinds of each are compiled, not all pairs."""
    pytest.importorskip("cuda.bindings", reason="NVRTC is for Linux")
    biased = x_by_row == codes_by_row
    variant = activation, x_by_row, codes_by_row, biased
    source = cuda_source.kernel_source(torch.float8_e4m3fn, *variant)
    cubin = nvrtc.compile_to_cubin(source, cuda_source.NAME, cuda_source.ARCHITECTURE)
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("by_row", [False, True])
def test_int8_compiles_for_hopper(by_row: bool) -> None:
    pytest.importorskip("cuda.bindings", reason="NVRTC is for Linux")
    source = cuda_source.kernel_source(torch.int8, "none", by_row, by_row, biased=by_row)
    assert "s32.s8.s8" in source
    cubin = nvrtc.compile_to_cubin(source, cuda_source.NAME, cuda_source.ARCHITECTURE)
    assert cubin.startswith(b"\x7fELF")


def test_compile_error_has_the_compilers_message() -> None:
    pytest.importorskip("cuda.bindings", reason="NVRTC is for Linux")
    with pytest.raises(
        Unsupported,
        match=r"NVRTC cannot compile broken for sm_90a: (?s:.*)identifier \"nothing\" is undefined",
    ):
        nvrtc.compile_to_cubin(
            'extern "C" __global__ void broken() { nothing(); }', "broken", "sm_90a"
        )


def test_driver_error_has_its_name() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    assert nvrtc.check_status((driver.CUresult.CUDA_SUCCESS, 7)) == 7
    with pytest.raises(Unsupported, match="CUDA error: CUDA_ERROR_INVALID_VALUE"):
        nvrtc.check_status((driver.CUresult.CUDA_ERROR_INVALID_VALUE,))


def constant(name: str) -> int:
    """Return a constant of kernel.cu, which may refer to constants before it."""
    (value,) = re.findall(rf"\b{name} = ([^,;]+)[,;]", SOURCE)
    terms = re.sub(r"[A-Z_]{2,}", lambda word: str(constant(word[0])), value)
    return int(eval(terms.replace("/", "//"), {"__builtins__": {}}))  # noqa: S307


def test_python_and_cpp_agree_on_the_sizes() -> None:
    assert constant("CLUSTER") == cuda_source.CLUSTER_SIZE
    for name in ("TILE_M", "TILE_N", "TILE_K"):
        assert constant(name) == getattr(cuda_source, name)
    assert constant("MMA_WARPGROUPS") * constant("WARPGROUP_THREADS") == cuda_source.MMA_THREADS
    assert constant("WARPGROUP_THREADS") == cuda_source.LOAD_THREADS
    stages = constant("STAGES") * constant("STAGE_BYTES")
    out_tiles = constant("MMA_WARPGROUPS") * constant("OUT_TILES") * constant("OUT_TILE_BYTES")
    barriers = 2 * 8 * constant("STAGES")
    assert constant("ALIGNMENT") + stages + out_tiles + barriers == cuda_source.SHARED_BYTES
    assert cuda_source.SHARED_BYTES <= 227 * 1024


@pytest.mark.parametrize(
    ("activation", "m", "plain_columns", "other_columns", "blocks", "rows_per_group"),
    [
        ("gelu", 4608, 9216, 12288, 132, 9),
        ("swiglu", 4096, 0, 2 * 18432, 132, 8),
        ("none", 512, 768, 0, 2 * 2 * 3, 2),
        ("swiglu", 300, 16, 2 * 144, 2 * 2 * (1 + 2), 2),
        ("gelu", 1, 0, 16, 2, 1),
    ],
)
def test_launch_arguments(
    monkeypatch: pytest.MonkeyPatch,
    activation: str,
    m: int,
    plain_columns: int,
    other_columns: int,
    blocks: int,
    rows_per_group: int,
) -> None:
    calls: list[Any] = []
    maps: list[Any] = []

    class Recorder:
        def launch(self, *arguments: Any) -> None:
            calls.append(arguments)

    def tensor_map(matrix: torch.Tensor, box: Any) -> str:
        maps.append((tuple(matrix.shape), matrix.dtype, tuple(box)))
        return "map"

    monkeypatch.setattr(op, "_kernel", lambda *_variant: Recorder())
    monkeypatch.setattr(op, "_num_blocks", lambda _device: 132)
    monkeypatch.setattr(nvrtc, "make_tensor_map", tensor_map)
    n = plain_columns + other_columns
    x, codes = (round_e4m3(torch.zeros(rows, 32)) for rows in (m, n))
    scale = torch.ones(1)
    out, quantized = op.gemm_act._init_fn(
        x, codes, None, scale, scale, scale, activation, plain_columns, 48
    )
    active = other_columns // 2 if activation == "swiglu" else other_columns
    assert (out.shape, out.dtype) == ((m, plain_columns), torch.bfloat16)
    assert quantized.shape == (m, 48 + active if active else 0)
    ((grid, _device, *arguments),) = calls
    signature = SOURCE[SOURCE.index(f" {cuda_source.NAME}(\n") :].partition(") {")[0]
    assert len(arguments) == signature.count(",") + 1
    assert grid == blocks
    assert arguments[-5:] == [m, 32, n, plain_columns, rows_per_group]
    e4m3 = torch.float8_e4m3fn
    assert maps[:2] == [((m, 32), e4m3, (128, 128)), ((n, 32), e4m3, (128, 128))]
    assert not plain_columns or maps[2] == ((m, plain_columns), torch.bfloat16, (64, 64))
    assert not active or maps[3] == ((m, active), e4m3, (64, 128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plain_columns": 24}, "24 plain columns, expected a multiple of 16"),
        ({"reserved": 8}, "8 reserved columns, expected a multiple of 16"),
        ({"plain_columns": 64}, "activation gelu and 64 plain columns of 64"),
        ({"bias": torch.zeros(64)}, "bias in torch.float32, expected torch.bfloat16"),
        (
            {"inverse_scale": torch.ones(1).bfloat16()},
            "scale in torch.bfloat16, expected torch.float32",
        ),
    ],
)
def test_operands_that_the_kernel_cannot_read_are_an_error(
    change: dict[str, Any], message: str
) -> None:
    x, codes = (round_e4m3(torch.zeros(rows, 32)) for rows in (5, 64))
    one = torch.ones(1)
    arguments = {"bias": None, "input_scale": one, "weight_scale": one, "inverse_scale": one}
    arguments |= {"activation": "gelu", "plain_columns": 16, "reserved": 0} | change
    with pytest.raises(ShapeMismatch, match=message):
        op.gemm_act._init_fn(x, codes, **arguments)


def test_an_empty_input_launches_nothing() -> None:
    x, codes, one = round_e4m3(torch.zeros(0, 32)), round_e4m3(torch.zeros(64, 32)), torch.ones(1)
    out, quantized = op.gemm_act._init_fn(x, codes, None, one, one, one, "gelu", 16, 0)
    assert (out.shape, quantized.shape) == ((0, 16), (0, 48))


def test_fake_kernel_returns_the_shapes_of_the_reference() -> None:
    x, codes, one = round_e4m3(torch.zeros(5, 32)), round_e4m3(torch.zeros(64, 32)), torch.ones(1)
    arguments = (x, codes, None, one, one, one, "swiglu", 16, 32)
    fake, real = op._fake(*arguments), gemm_act_reference(*arguments)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
