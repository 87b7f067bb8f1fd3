"""The INT8 backend on the CPU: PyTorch's INT8 GEMM, and our Triton kernels in the interpreter."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.kernels import (
    BF16_ACTIVATIONS,
    QUANTIZED_ACTIVATIONS,
    Can,
    Cannot,
    Target,
    WeightSpec,
    get_backend,
)
from mezzotint.kernels.backends.int8_mm import input_scale
from mezzotint.kernels.ops.rotate_quantize.reference import rotate_quantize_reference
from mezzotint.kernels.ops.unpack_int8.reference import unpack_int8_reference
from mezzotint.nn import QuantLinear
from mezzotint.schemes.rotation import regular_hadamard, sylvester_hadamard
from mezzotint.tensor import QuantTensor
from support.errors_of import relative_error
from support.four_bit_weights import random
from support.int8_weights import int4_input_form, int8_forms, random_bytes, random_scale

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu/test_int8.py runs the kernels themselves"
)
FORMS = int8_forms(48, 128)
LAYERS = [
    *((name, torch.float32) for name in FORMS),
    # Triton's interpreter cannot multiply BF16 matrices, so a GPU test rotates BF16 inputs.
    *((name, torch.bfloat16) for name in FORMS if "rotated" not in name),
]
TURING, AMPERE = Target("cuda", (7, 5)), Target("cuda", (8, 0))


@pytest.fixture(autouse=True, scope="module")
def _register_ops() -> None:
    for name in ("rotate_quantize", "unpack_int8"):
        importlib.import_module(f"mezzotint.kernels.ops.{name}.op")


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    size=st.sampled_from([16, 64]),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotate_quantize_equals_its_reference(
    rows: int, groups: int, size: int, static: bool, seed: int
) -> None:
    """Integer inputs, whose sums are exact in any order: every code must be equal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 10, (rows, groups * size), generator=generator).float()
    scale = torch.tensor(0.25) if static else None
    arguments = x, regular_hadamard(size), scale
    got, expected = (
        torch.ops.mezzotint.rotate_quantize(*arguments),
        rotate_quantize_reference(*arguments),
    )
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_a_row_of_zeros_stays_zero_and_a_damaged_one_shows() -> None:
    x = torch.ones(4, 64)
    x[1], x[2, 3], x[3, 5] = 0.0, float("nan"), float("inf")
    codes, scale = torch.ops.mezzotint.rotate_quantize(x, regular_hadamard(64), None)
    assert torch.isnan(scale.flatten()).tolist() == [False, False, True, True]
    assert not codes[1].any()


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
@pytest.mark.parametrize(("name", "dtype"), LAYERS)
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
    # Sums of a rotation in another order move a few inputs to the next code.
    bound = 1e-3 if "rotation" in weight.parts else 1e-5
    assert relative_error(got.float(), expected) < (bound if dtype == torch.float32 else 4e-3)


def test_inputs_of_four_bits_keep_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """More precise than the file asks for: the output is closer to the unquantized layer's."""
    weight, x = int4_input_form(48, 128), random(37, 128, seed=9)
    exact = x @ weight.scheme.dequantize(weight.parts).t()
    reference = QuantLinear(weight, torch.float32, backend_name="reference")(x)
    got = layer_on_cpu(weight, torch.float32, monkeypatch)(x)
    assert relative_error(got, exact) < 0.2 * relative_error(reference, exact)
    static = {**weight.parts, "input_scale": torch.tensor(127.0)}
    assert input_scale(replace(weight, parts=static)) == torch.tensor(7.0)


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
            "rotates groups of 16 to 256 columns, this layer has 512",
        ),
    ],
)
def test_backend_that_cannot_gives_the_reason(
    target: Target, activations: str, weight: QuantTensor, reason: str
) -> None:
    answer = get_backend("int8_mm").can(WeightSpec.of(weight), target, activations)
    assert isinstance(answer, Cannot)
    assert reason in answer.reason
