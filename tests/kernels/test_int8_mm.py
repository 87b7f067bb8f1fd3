"""The INT8 backend on the CPU: PyTorch's INT8 GEMM, and our Triton kernels in the interpreter."""

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.errors import ShapeMismatch, Unsupported
from mezzotint.kernels import (
    BF16_ACTIVATIONS,
    QUANTIZED_ACTIVATIONS,
    Can,
    Cannot,
    Target,
    WeightSpec,
    get_backend,
)
from mezzotint.kernels.int8_weight import static_int8_scale
from mezzotint.kernels.ops import nvrtc
from mezzotint.kernels.ops.quantize_int8 import op
from mezzotint.kernels.ops.quantize_int8.reference import ACTIVATIONS, quantize_int8_reference
from mezzotint.kernels.ops.unpack_int8.reference import unpack_int8_reference
from mezzotint.nn import QuantLinear
from mezzotint.schemes.rotation import regular_hadamard, rotate, sylvester_hadamard
from mezzotint.tensor import QuantTensor
from support.errors_of import relative_error
from support.four_bit_weights import random
from support.int8_weights import int4_input_form, int8_forms, random_bytes, random_scale

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu/test_int8.py runs the kernels themselves"
)
FORMS = int8_forms(48, 128)
TURING, AMPERE = Target("cuda", (7, 5)), Target("cuda", (8, 0))


@pytest.fixture(autouse=True, scope="module")
def _register_ops() -> None:
    importlib.import_module("mezzotint.kernels.ops.unpack_int8.op")
    op.quantize_int8.register_kernel("cpu", quantize_int8_reference)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("digits", [0, 2, 3, 4])
def test_variants_compile_for_turing_and_hopper(activation: int, digits: int) -> None:
    """Each definition takes all its values, but not in all combinations."""
    pytest.importorskip("cuda.bindings", reason="NVRTC is for Linux")
    number = activation + digits
    flags = number % 2 == 0, activation > 0, digits > 2
    variant = op.Variant(number % len(op.DTYPES), activation, digits, *flags, 1 + number % 3)
    architecture = "sm_75" if flags[0] else "sm_90"
    cubin = nvrtc.compile_to_cubin(variant.source(), op.NAME, architecture)
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("columns", "chunks", "threads"),
    [(16, 1, 32), (3072, 1, 192), (8192, 1, 512), (8448, 2, 288), (15360, 2, 480), (18432, 3, 384)],
)
def test_threads_cover_a_row(columns: int, chunks: int, threads: int) -> None:
    assert op._threads(columns) == (chunks, threads)
    assert chunks * threads * op.SIDE >= columns


@pytest.mark.parametrize("matrix", [regular_hadamard, sylvester_hadamard])
@pytest.mark.parametrize("size", [16, 64, 256])
def test_the_kernels_rotation_in_steps_is_the_matrix(
    matrix: Callable[[int], Tensor], size: int
) -> None:
    """The kernel's order of digits, in PyTorch: one step of four columns for each digit."""
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    signs = matrix(size)
    digits = x.reshape(3, *[4] * (size.bit_length() // 2))
    for axis in range(1, digits.ndim):
        moved = digits.movedim(axis, -1) @ signs[:4, :4].float().t()
        digits = moved.movedim(-1, axis)
    torch.testing.assert_close(digits.reshape(3, size) / size**0.5, rotate(x, signs))


def test_operands_that_the_kernel_cannot_read_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="expected multiples of 16"):
        op.quantize_int8._init_fn(torch.ones(2, 40), None, None, None, "none")


def test_a_matrix_that_the_kernel_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = regular_hadamard(64).clone()
    signs[5] *= -1
    parts = {**FORMS["int8, rotated"].parts, "rotation": signs}
    with pytest.raises(Unsupported, match="not a regular or Sylvester Hadamard matrix"):
        layer_on_cpu(replace(FORMS["int8"], parts=parts), torch.float32, monkeypatch)


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 40),
    group=st.sampled_from([16, 64, 4]),
    form=st.sampled_from(["rows", "blocks", "codebook"]),
    in_e4m3=st.booleans(),
)
def test_unpack_int8_equals_its_reference(
    rows: int, groups: int, group: int, form: str, in_e4m3: bool
) -> None:
    codes = random_bytes(rows, groups * group // 2)
    scale = random_scale(rows, groups) * 14
    block_scale = scale.to(torch.float8_e4m3fn) if in_e4m3 else scale
    arguments = (
        codes,
        None if form == "rows" else block_scale,
        torch.linspace(-1, 1, 16) ** 3 * 9 if form == "codebook" else None,
    )
    got = torch.ops.mezzotint.unpack_int8(*arguments)
    assert torch.equal(got, unpack_int8_reference(*arguments))


@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_layer_equals_reference(
    name: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = random(48, seed=6)
    weight = FORMS[name].with_parts({**FORMS[name].parts, "bias": bias}, FORMS[name].layout)
    # pre_quant_scale holds powers of two, so that both layers round the same smoothed input.
    x = random(2, rows, 128, seed=9).clamp(-3, 3).to(dtype)
    expected = QuantLinear(weight, torch.float32, backend_name="reference")(x.float())
    got = layer_on_cpu(weight, dtype, monkeypatch)(x)
    assert got.dtype == dtype
    assert relative_error(got.float(), expected) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_inputs_of_four_bits_keep_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """More precise than the file asks for: the output is closer to the unquantized layer's."""
    weight, x = int4_input_form(48, 128), random(37, 128, seed=9)
    exact = x @ weight.scheme.dequantize(weight.parts).t()
    reference = QuantLinear(weight, torch.float32, backend_name="reference")(x)
    got = layer_on_cpu(weight, torch.float32, monkeypatch)(x)
    assert relative_error(got, exact) < 0.2 * relative_error(reference, exact)
    static = {**weight.parts, "input_scale": torch.tensor(127.0)}
    assert static_int8_scale(replace(weight, parts=static)) == torch.tensor(7.0)


def layer_on_cpu(
    weight: QuantTensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> QuantLinear:
    """Return a layer of the backend, which is let run here."""
    monkeypatch.setattr(type(get_backend("int8_mm")), "can", lambda *_: Can())
    return QuantLinear(weight, dtype, backend_name="int8_mm")


def test_every_form_runs_on_turing_and_newer() -> None:
    for weight in FORMS.values():
        spec = WeightSpec.of(weight)
        for target in (TURING, AMPERE):
            assert get_backend("int8_mm").can(spec, target, QUANTIZED_ACTIVATIONS) == Can()


@pytest.mark.parametrize(
    ("target", "activations", "weight", "reason"),
    [
        (Target("cuda", (7, 0)), QUANTIZED_ACTIVATIONS, FORMS["int8"], "INT8 tensor cores"),
        (AMPERE, BF16_ACTIVATIONS, FORMS["int8"], "the inputs of this layer are not quantized"),
        (AMPERE, QUANTIZED_ACTIVATIONS, int8_forms(40, 128)["int8"], "multiples of 16"),
        (
            AMPERE,
            QUANTIZED_ACTIVATIONS,
            replace(
                FORMS["int8"],
                parts={**FORMS["int8"].parts, "rotation": sylvester_hadamard(512)},
            ),
            "rotates groups of 16, 64 or 256 columns, this layer has 512",
        ),
    ],
)
def test_backend_that_cannot_gives_the_reason(
    target: Target, activations: str, weight: QuantTensor, reason: str
) -> None:
    answer = get_backend("int8_mm").can(WeightSpec.of(weight), target, activations)
    assert isinstance(answer, Cannot)
    assert reason in answer.reason
