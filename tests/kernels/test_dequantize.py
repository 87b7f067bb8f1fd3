"""The backend `dequantize`, in Triton's interpreter on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mezzotint.kernels import QUANTIZED_ACTIVATIONS, Can, Cannot, Target, WeightSpec, select
from mezzotint.kernels.backends.dequantize import BACKEND
from mezzotint.kernels.dequantize import SCHEMES, dequantize
from mezzotint.nn import QuantLinear
from mezzotint.schemes import CODEBOOK4, INT_GROUPS, MXFP8, Scheme, schemes
from mezzotint.tensor import PLAIN, QuantTensor
from support.packed_weights import (
    LAYERS,
    described,
    expected,
    packed_weights,
    random_weight,
    same_numbers,
)

pytest.importorskip("triton", reason="Triton is for Linux")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu/test_gpu_dequantize.py runs the kernels themselves"
)
HOPPER = Target("cuda", (9, 0))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns of numbers that are infinite
@pytest.mark.parametrize("rows", [1, 7])  # one program, and two
def test_dequantized_weights_are_the_decoded_ones_bit_for_bit(rows: int) -> None:
    """In float32 and float16: the interpreter cuts numbers off where a GPU rounds them to BF16."""
    for weight in packed_weights(rows, 768, rows):
        for dtype in (torch.float32, torch.float16):
            got = dequantize(weight, dtype)
            assert same_numbers(got, expected(weight, dtype)), described(weight)


@interpreted
def test_every_scheme_with_a_kernel_is_tried() -> None:
    tried = {weight.scheme.name for weight in packed_weights(1, 768)}
    assert tried == {scheme.name for scheme in SCHEMES}


@interpreted
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_by_the_decoded_weight(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(BACKEND), "can", lambda *_: Can())
    weight = random_weight(name, torch.device("cpu"))
    layer = QuantLinear(weight, torch.float32, backend_name="dequantize")
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert layer.selection.backend.name == "dequantize"
    assert torch.equal(layer(x), F.linear(x, weight.scheme.decode(weight.parts)))


@interpreted
def test_fake_results_have_the_shape_and_dtype_of_real_ones() -> None:
    for weight in packed_weights(2, 768):
        meta = replace(
            weight.to(torch.device("meta")),
            prepared={name: part.to("meta") for name, part in weight.prepared.items()},
        )
        fake = dequantize(meta, torch.bfloat16)
        assert (fake.shape, fake.dtype, fake.device.type) == ((2, 768), torch.bfloat16, "meta")


@pytest.mark.parametrize(
    ("scheme", "columns", "groups"),
    [(INT_GROUPS[4], 64, 16), (CODEBOOK4, 36, 3), (MXFP8, 48, 2), (INT_GROUPS[8], 12, 1)],
)
def test_groups_that_eight_weights_do_not_share_are_declined(
    scheme: Scheme, columns: int, groups: int
) -> None:
    parts = {"codes": (4, columns), "block_scale": (4, groups)}
    answer = BACKEND.can(WeightSpec(scheme, (4, columns), parts), HOPPER, QUANTIZED_ACTIVATIONS)
    assert isinstance(answer, Cannot)
    assert "needs whole groups of a multiple of 8 input features" in answer.reason


def test_packed_weights_are_dequantized_by_a_kernel_where_there_is_triton() -> None:
    parts = {"codes": torch.zeros(4, 34, dtype=torch.uint8)}
    weight = QuantTensor(schemes()["gguf_q8_0"], PLAIN, (4, 32), parts)
    selection = select(WeightSpec.of(weight), HOPPER, presumed=("triton",))
    assert selection.backend.name == "dequantize"
    assert selection.declined["weight_only"] == "dequantize is preferred"


def test_a_scale_that_divides_is_declined() -> None:
    """Multiplying by its rounded reciprocal would not give the decoded weights."""
    weight = random_weight("nvfp4", torch.device("cpu"))
    parts = {**weight.parts, "global_divisor": torch.tensor(3.0)}
    spec = WeightSpec.of(weight.with_parts(parts, PLAIN))
    answer = BACKEND.can(spec, HOPPER, QUANTIZED_ACTIVATIONS)
    assert isinstance(answer, Cannot)
    assert "are divided by one" in answer.reason
