"""The INT8 kernels on a GPU: `pytest -m gpu -s FILE`."""

from functools import cache

import pytest
import torch
from torch import Tensor

from mezzotint.kernels import BF16_ACTIVATIONS, Target, best_device
from mezzotint.kernels.int8_gemm import int8_gemm
from mezzotint.kernels.ops.gemm_act.op import gemm_act, unavailable_reason
from mezzotint.kernels.ops.gemm_act.reference import gemm_act_reference
from mezzotint.kernels.ops.rotate_quantize.op import rotate_quantize
from mezzotint.kernels.ops.rotate_quantize.reference import rotate_quantize_reference
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


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("rows", "groups"), [(4608, 12), (77, 3), (1, 12)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotate_quantize_kernel_equals_its_reference(
    group: int, rows: int, groups: int, static: bool, dtype: torch.dtype
) -> None:
    """Sums in another order move an input that lies between two codes."""
    torch.manual_seed(0)
    x = torch.randn(rows, groups * group, device="cuda").to(dtype)
    signs = (regular_hadamard if group in (16, 64, 256) else sylvester_hadamard)(group).cuda()
    scale = torch.tensor([4 / 127], device="cuda") if static else None
    got, expected = rotate_quantize(x, signs, scale), rotate_quantize_reference(x, signs, scale)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=0)
    difference = (got[0].int() - expected[0].int()).abs()
    assert int(difference.max()) <= 1
    assert float(difference.float().mean()) <= 1e-3


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
