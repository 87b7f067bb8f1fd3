"""The INT8 kernels on a GPU: `pytest -m gpu -s FILE`."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from mezzotint.kernels import BF16_ACTIVATIONS, Target, best_device
from mezzotint.kernels.int8_gemm import int8_gemm
from mezzotint.kernels.ops.gemm_act.op import gemm_act, unavailable_reason
from mezzotint.kernels.ops.gemm_act.reference import gemm_act_reference
from mezzotint.kernels.ops.quantize_int8.op import quantize_int8
from mezzotint.kernels.ops.quantize_int8.reference import quantize_int8_reference
from mezzotint.kernels.ops.unpack_int8.op import unpack_int8
from mezzotint.kernels.ops.unpack_int8.reference import unpack_int8_reference
from mezzotint.nn import QuantLinear
from mezzotint.schemes.rotation import regular_hadamard, sylvester_hadamard
from support.errors_of import relative_error
from support.int8_weights import int8_forms, random_bytes, random_scale

pytestmark = pytest.mark.gpu
forms = cache(int8_forms)


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")


@pytest.mark.parametrize(
    ("rows", "depth", "out"),
    [(4608, 3072, 9216), (4608, 15360, 3072), (77, 208, 144), (1, 3072, 18432), (257, 16, 16)],
)
@pytest.mark.parametrize("by_row", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_gemm_kernel_equals_its_reference(
    rows: int, depth: int, out: int, by_row: tuple[bool, bool], biased: bool
) -> None:
    """Sums of integers are exact, so only the output's rounding to BF16 may differ."""
    if isinstance(reason := unavailable_reason(Target.of(best_device())), str):
        pytest.skip(reason)
    torch.manual_seed(0)
    x, codes = random_codes(rows, depth), random_codes(out, depth)
    bias = torch.randn(out, device="cuda").bfloat16() if biased else None
    unit = 1 / (75 * 75 * depth**0.5)
    input_scale = torch.rand(rows if by_row[0] else 1, 1, device="cuda") + 0.5
    weight_scale = (torch.rand(out if by_row[1] else 1, device="cuda") + 0.5) * unit
    given = (x, codes, bias, input_scale, weight_scale, None, "none", out, 0)
    (got, _), (expected, _) = gemm_act(*given), gemm_act_reference(*given)
    assert relative_error(got.float(), expected.float()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 4608])
def test_pytorchs_int8_gemm_is_exact(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, codes = random_codes(rows, 3072), random_codes(256, 3072)
    scale = torch.rand(256, device="cuda") / 1e5
    got = int8_gemm(x, torch.ones(1, 1, device="cuda"), codes, scale, None, dtype)
    expected = (x.double() @ codes.double().t()).float() * scale
    assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("group", [None, 16, 64, 256])
@pytest.mark.parametrize(
    ("rows", "columns", "prefix"),
    [(4608, 3072, 0), (77, 768, 256), (4608, 15360, 3072), (1, 18432, 0), (3, 320, 64)],
)
@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("static", [False, True])
def test_quantize_int8_kernel_equals_its_reference(
    group: int | None, rows: int, columns: int, prefix: int, activation: str, static: bool
) -> None:
    """Sums in another order, and `tanh`, move an input that lies between two codes."""
    if columns % (group or 1) or prefix % (group or 1):
        columns, prefix = columns // 256 * 256 + 256, prefix // 256 * 256
    given = operands(rows, columns, prefix, group, activation, torch.bfloat16)
    scale = torch.tensor([4 / 127], device="cuda") if static else None
    check_codes(given, scale, activation)


@pytest.mark.parametrize("matrix", [regular_hadamard, sylvester_hadamard])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_int8_kernel_reads_every_dtype_and_matrix(
    matrix: Callable[[int], Tensor], dtype: torch.dtype
) -> None:
    x, prefix, _ = operands(37, 512, 0, None, "none", dtype)
    check_codes((x[:, 128:384], prefix, matrix(256).cuda()), None, "none")


@pytest.mark.parametrize("static", [False, True])
def test_a_damaged_row_shows_in_its_scale(static: bool) -> None:
    x = torch.ones(4, 512, device="cuda").bfloat16()
    x[1], x[2, 3], x[3, 300] = 0.0, float("nan"), float("inf")
    scale = torch.tensor([4 / 127], device="cuda") if static else None
    codes, scales = quantize_int8(x, None, regular_hadamard(256).cuda(), scale, "none")
    assert torch.isfinite(scales.flatten()).tolist() == [True, True, False, False]
    assert not codes[1].any()


def operands(
    rows: int, columns: int, prefix: int, group: int | None, activation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(0)
    width = (columns - prefix) * (2 if activation == "swiglu" else 1)
    return (
        torch.randn(rows, width, device="cuda").to(dtype),
        torch.randn(rows, prefix, device="cuda").to(dtype) if prefix else None,
        None if group is None else regular_hadamard(group).cuda(),
    )


def check_codes(
    given: tuple[Tensor, Tensor | None, Tensor | None], scale: Tensor | None, activation: str
) -> None:
    got = quantize_int8(*given, scale, activation)
    expected = quantize_int8_reference(*given, scale, activation)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=0)
    difference = (got[0].int() - expected[0].int()).abs()
    assert int(difference.max()) <= 1
    assert float(difference.float().mean()) <= (2e-3 if activation == "none" else 2e-2)


@pytest.mark.parametrize("form", ["rows", "blocks", "codebook"])
@pytest.mark.parametrize("shape", [(3072, 3072), (12288, 3072), (48, 128)])
def test_unpack_int8_kernel_equals_its_reference(form: str, shape: tuple[int, int]) -> None:
    out, in_ = shape
    scale = (random_scale(out, in_ // 16) * 14).to(torch.float8_e4m3fn)
    codebook = torch.linspace(-1, 1, 16) ** 3 * 9
    arguments = (
        random_bytes(out, in_ // 2),
        None if form == "rows" else scale,
        codebook if form == "codebook" else None,
    )
    on_gpu = [None if one is None else one.cuda() for one in arguments]
    assert torch.equal(unpack_int8(*on_gpu).cpu(), unpack_int8_reference(*arguments))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("shape", "rows"), [((3072, 3072), 4608), ((9216, 3072), 1)])
@pytest.mark.parametrize("name", int8_forms(16, 64))
def test_int8_mm_agrees_with_reference(
    name: str, shape: tuple[int, int], rows: int, compiled: bool
) -> None:
    weight = forms(*shape, 256)[name].to(best_device())
    torch.compiler.reset()
    layer = QuantLinear(weight)
    assert layer.selection.backend.name == "int8_mm"
    torch.manual_seed(0)
    x = torch.randn(1, rows, shape[1], device="cuda").clamp(-4, 4).bfloat16() / 3
    reference = QuantLinear(weight, torch.float32, backend_name="reference")
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    error = relative_error(y.float(), reference(x.float()))
    unquantized = QuantLinear(weight, torch.float32, BF16_ACTIVATIONS, backend_name="reference")
    total = relative_error(y.float(), unquantized(x.float()))
    print(f"{name} {shape}, {rows} rows, compiled={compiled}: {error:.1e} of {total:.1e}")
    assert error < 5e-3
