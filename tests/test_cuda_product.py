"""Our product in CUDA C++, as far as a machine without a GPU can tell: that it compiles, and how it is called.

tests/test_gpu.py has what it computes.
"""

import re
from itertools import product as combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.errors import ShapeMismatch, Unsupported
from mezzotint.kernels.cuda import compiler
from mezzotint.kernels.cuda import product as own
from mezzotint.schemes.rounding import round_e4m3

SOURCE = Path(own.__file__).with_name("product.cu").read_text()


@pytest.mark.parametrize("activation", own.ACTIVATIONS)
@pytest.mark.parametrize(("x_by_row", "codes_by_row"), list(combinations((False, True), repeat=2)))
def test_every_kind_compiles_for_hopper(activation: str, x_by_row: bool, codes_by_row: bool) -> None:
    pytest.importorskip("cuda.bindings", reason="NVRTC is for Linux")
    for biased in (False, True):
        source = own.source_of(activation, x_by_row, codes_by_row, biased)
        assert compiler.machine_code(source, "product", own.ARCHITECTURE).startswith(b"\x7fELF")


def test_what_does_not_compile_is_said_in_the_compilers_words() -> None:
    pytest.importorskip("cuda.bindings", reason="NVRTC is for Linux")
    with pytest.raises(
        Unsupported, match=r"NVRTC cannot compile broken for sm_90a: (?s:.*)identifier \"nothing\" is undefined"
    ):
        compiler.machine_code('extern "C" __global__ void broken() { nothing(); }', "broken", "sm_90a")


def test_an_error_of_the_driver_has_its_name() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    assert compiler.checked((driver.CUresult.CUDA_SUCCESS, 7)) == 7
    with pytest.raises(Unsupported, match="CUDA answers CUDA_ERROR_INVALID_VALUE"):
        compiler.checked((driver.CUresult.CUDA_ERROR_INVALID_VALUE,))


def constant(name: str) -> int:
    """As product.cu has it, in numbers or in constants that come before it."""
    (value,) = re.findall(rf"\b{name} = ([^,;]+)[,;]", SOURCE)
    terms = re.sub(r"[A-Z_]{2,}", lambda word: str(constant(word[0])), value)
    return int(eval(terms.replace("/", "//"), {"__builtins__": {}}))  # noqa: S307


def test_python_and_cpp_agree_on_the_sizes() -> None:
    assert constant("CLUSTER") == own.CLUSTER
    assert (constant("ROWS"), constant("COLUMNS"), constant("DEPTH")) == (own.ROWS, own.COLUMNS, own.DEPTH)
    assert (constant("WORKERS") + 1) * constant("GROUP_THREADS") == own.THREADS
    stages = constant("STAGES") * constant("STAGE_BYTES")
    slabs = constant("WORKERS") * constant("SLABS") * constant("SLAB_BYTES")
    assert constant("ALIGNMENT") + stages + slabs + 2 * 8 * constant("STAGES") == own.SHARED_BYTES
    assert own.SHARED_BYTES <= 227 * 1024


@pytest.mark.parametrize(
    ("activation", "rows", "plain", "others", "blocks", "together"),
    [
        ("gelu", 4608, 9216, 12288, 132, 9),
        ("swiglu", 4096, 0, 2 * 18432, 132, 8),
        ("none", 512, 768, 0, 2 * 2 * 3, 2),
        ("swiglu", 300, 16, 2 * 144, 2 * 2 * (1 + 2), 2),
        ("gelu", 1, 0, 16, 2, 1),
    ],
)
def test_what_the_kernel_is_launched_with(
    monkeypatch: pytest.MonkeyPatch, activation: str, rows: int, plain: int, others: int, blocks: int, together: int
) -> None:
    calls: list[Any] = []
    maps: list[Any] = []

    class Recorder:
        def launch(self, *arguments: Any) -> None:
            calls.append(arguments)

    def tensor_map(matrix: torch.Tensor, box: Any) -> str:
        maps.append((tuple(matrix.shape), matrix.dtype, tuple(box)))
        return "map"

    monkeypatch.setattr(own, "_kernel", lambda *_kind: Recorder())
    monkeypatch.setattr(own, "_blocks", lambda _device: 132)
    monkeypatch.setattr(compiler, "tensor_map", tensor_map)
    x, codes = (round_e4m3(torch.zeros(side, 32)) for side in (rows, plain + others))
    scale = torch.ones(1)
    out, rounded = own.product._init_fn(x, codes, None, scale, scale, scale, activation, plain, 48)
    active = others // 2 if activation == "swiglu" else others
    assert (out.shape, out.dtype) == ((rows, plain), torch.bfloat16)
    assert rounded.shape == (rows, 48 + active if active else 0)
    ((grid, _device, *given),) = calls
    parameters = SOURCE[SOURCE.index(" product(\n") :].partition(") {")[0].count(",") + 1
    assert len(given) == parameters
    assert grid == blocks
    assert given[-5:] == [rows, 32, plain + others, plain, together]
    e4m3 = torch.float8_e4m3fn
    assert maps[:2] == [((rows, 32), e4m3, (128, 128)), ((plain + others, 32), e4m3, (128, 128))]
    assert not plain or maps[2] == ((rows, plain), torch.bfloat16, (64, 64))
    assert not active or maps[3] == ((rows, active), e4m3, (64, 128))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plain": 24}, "24 plain columns, expected a multiple of 16"),
        ({"room": 8}, "8 room, expected a multiple of 16"),
        ({"plain": 64}, "activation gelu and 64 of 64 columns plain"),
        ({"bias": torch.zeros(64)}, "bias in torch.float32, expected torch.bfloat16"),
        ({"inverse": torch.ones(1).bfloat16()}, "scale in torch.bfloat16, expected torch.float32"),
    ],
)
def test_what_the_kernel_could_not_read_is_refused(change: dict[str, Any], said: str) -> None:
    x, codes = (round_e4m3(torch.zeros(side, 32)) for side in (5, 64))
    one = torch.ones(1)
    given = {"bias": None, "input_scale": one, "weight_scale": one, "inverse": one}
    given |= {"activation": "gelu", "plain": 16, "room": 0} | change
    with pytest.raises(ShapeMismatch, match=said):
        own.product._init_fn(x, codes, **given)


def test_no_rows_are_no_work() -> None:
    x, codes, one = round_e4m3(torch.zeros(0, 32)), round_e4m3(torch.zeros(64, 32)), torch.ones(1)
    out, rounded = own.product._init_fn(x, codes, None, one, one, one, "gelu", 16, 0)
    assert (out.shape, rounded.shape) == ((0, 16), (0, 48))
