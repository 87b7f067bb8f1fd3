"""4-bit weights as FP8: the definition that the GPU's kernel is held to, and weights that become FP8 at load."""

from dataclasses import replace

import pytest
import torch

import four_bits
from mezzotint.errors import BadRequest
from mezzotint.kernels import AS_STORED, BF16, Can, Cannot, Target, WeightSpec, refusals, select
from mezzotint.kernels.expand import as_fp8, can_expand, expand_by_definition, full_bias, prepared, scaled_input
from mezzotint.nn import QuantLinear, quant_linears
from mezzotint.pipelines import load
from mezzotint.residency import settle
from mezzotint.schemes import AWQ_W4A16, FP8, NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4
from mezzotint.schemes.awq import encode_awq
from mezzotint.schemes.fp8 import encode_fp8
from mezzotint.schemes.nvfp4 import encode_nvfp4
from mezzotint.schemes.svdquant_int4 import encode_svdquant_int4
from mezzotint.tensor import PLAIN, QuantTensor, join_rows

FORMS = four_bits.all_of(48, 128)
E4M3_ERROR = 2**-4
"""Half of the distance between two e4m3 numbers, of the smaller one."""


def relative_error(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    return float(torch.linalg.norm((candidate - reference).float()) / torch.linalg.norm(reference.float()))


@pytest.mark.parametrize("name", FORMS)
def test_every_expanded_weight_is_the_nearest_fp8_number_in_its_rows_scale(name: str) -> None:
    weight = FORMS[name]
    ready = replace(weight, prepared=prepared(weight))
    expanded = expand_by_definition(ready).float() * ready.prepared["scale"][:, None]
    real = weight.scheme.dequantize(weight.parts)
    if "input_scale" in weight.parts and "pre_quant_scale" in weight.parts:
        real = real / weight.parts["pre_quant_scale"]
    smallest = ready.prepared["scale"][:, None] * 2**-10
    branch = 2**-8 * real.abs().amax()  # the low-rank branch is rounded to BF16 first
    assert bool(((expanded - real).abs() <= E4M3_ERROR * real.abs() + smallest + branch).all())
    assert relative_error(expanded, real) < 0.03


def test_a_small_matrix_expands_to_bytes_known_beforehand() -> None:
    """Row amax 6 * 2 = 12 and 3 * 0.5 = 1.5, so 448 stands for each; e4m3(448) is 0x7E, half of it 0x76."""
    codes = torch.tensor([[0x57, 0x00] + [0] * 6, [0x35, 0x0D] + [0] * 6], dtype=torch.uint8)
    scales = torch.tensor([[2.0], [0.5]]).to(torch.float8_e4m3fn)
    parts = {"codes": codes, "block_scale": scales, "global_scale": torch.tensor(1.0)}
    weight = QuantTensor(NVFP4, PLAIN, (2, 16), parts, dynamic_input=True)
    ready = replace(weight, prepared=prepared(weight))
    assert ready.prepared["scale"].tolist() == pytest.approx([12 / 448, 1.5 / 448])
    assert expand_by_definition(ready).view(torch.uint8)[:, :4].tolist() == [
        [0x7E, 0x76, 0x00, 0x00],
        [0x7E, 0x76, 0xFE, 0x00],
    ]


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_that_became_fp8_multiplies_as_before_but_for_rounding(name: str) -> None:
    """6e-2: FP8 in the weights and in the inputs, each about 2.6e-2, against neither rounded a second time."""
    weight = FORMS[name]
    turned = as_fp8(weight)
    x = four_bits.random(64, 128, seed=9).clamp(-4, 4) / 2.5  # within what the static scales hold, smoothed or not
    x = x.bfloat16().float()
    exact = x @ weight.scheme.dequantize(weight.parts).T + weight.scheme.real_bias(weight.parts)
    y = QuantLinear(turned, torch.float32)(x)
    assert turned.scheme is FP8
    assert relative_error(y, exact) < 6e-2
    rounded = relative_error(QuantLinear(weight, torch.float32)(x), exact)
    assert relative_error(y, exact) < rounded, "FP8 is to be closer to the checkpoint's weights than 4-bit inputs are"


def test_a_shifted_layer_without_a_bias_has_what_the_shift_adds() -> None:
    whole = FORMS["svdquant_int4, shifted"]
    weight = whole.with_parts({name: part for name, part in whole.parts.items() if name != "bias"}, PLAIN)
    ready = replace(weight, prepared=prepared(weight))
    of_shift = weight.scheme.real_bias(weight.parts)
    assert of_shift.abs().max() > 0
    torch.testing.assert_close(full_bias(ready, None), of_shift)
    torch.testing.assert_close(as_fp8(weight).parts["bias"], of_shift)


def test_a_static_scale_keeps_its_range_and_what_it_was_measured_on() -> None:
    turned = as_fp8(FORMS["nvfp4_svd"])
    assert float(turned.parts["input_scale"]) == pytest.approx(4 / 448)
    x = torch.ones(1, 128)
    assert torch.equal(scaled_input(x, turned.parts)[0], turned.parts["pre_quant_scale"])


def test_matrices_with_scales_of_their_own_are_joined_by_rows_and_keep_them() -> None:
    one, two = FORMS["nvfp4, static"], four_bits.nvfp4(48, 128)
    two = two.with_parts({**two.parts, "global_scale": two.parts["global_scale"] * 3}, PLAIN)
    joined = join_rows([one, two])
    assert joined.parts["global_scale"].shape == (96,)
    real = joined.scheme.dequantize(joined.parts)
    assert torch.equal(real, torch.cat([t.scheme.dequantize(t.parts) for t in (one, two)]))


@pytest.mark.parametrize(
    ("scheme", "encode", "error"),
    [
        (FP8, encode_fp8, 0.03),
        (FP8, lambda w: encode_fp8(w, by_row=True), 0.03),
        (NVFP4, encode_nvfp4, 0.1),
        (SVDQUANT_NVFP4, encode_nvfp4, 0.1),
        (SVDQUANT_INT4, encode_svdquant_int4, 0.11),
        (AWQ_W4A16, encode_awq, 0.09),
    ],
)
def test_rounding_to_a_scheme_costs_what_it_costs_on_gaussian_weights(scheme, encode, error) -> None:  # type: ignore[no-untyped-def]
    weights = four_bits.random(256, 512, seed=5)
    assert relative_error(scheme.decode(encode(weights)), weights) < error
    assert torch.equal(scheme.decode(encode(torch.zeros(16, 64))), torch.zeros(16, 64))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (four_bits.nvfp4(48, 128).with_parts(encode_nvfp4(torch.randn(48, 128)), PLAIN), None),
        (FORMS["svdquant_int4"], None),
        (four_bits.nvfp4(40, 128), "sides that are multiples of 16 and 16"),
        (
            QuantTensor(FP8, PLAIN, (16, 16), encode_fp8(torch.randn(16, 16))),
            "multiplies NVFP4 and SVDQuant INT4 and SVDQuant NVFP4 only",
        ),
    ],
)
def test_what_can_be_expanded(weight: QuantTensor, reason: str | None) -> None:
    answer = can_expand(WeightSpec.of(weight), AS_STORED)
    if reason is None and weight.quantizes_input:
        assert isinstance(answer, Can)
    elif reason is not None:
        assert isinstance(answer, Cannot)
        assert reason in answer.reason
    assert isinstance(can_expand(WeightSpec.of(weight), BF16), Cannot), "an input that is left alone is not rounded"


def test_four_bits_become_fp8_on_request_and_the_report_says_so() -> None:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu", resident="fp8")
    layers = quant_linears(pipe.transformer)
    assert {layer.products[0].scheme.name for layer in layers.values()} == {"fp8"}
    (event,) = [event for event in pipe.load_report.events if "became FP8" in event]
    assert event.startswith(f"{len(layers)} layers")


def test_a_cpu_keeps_what_is_stored_unless_asked() -> None:
    spec = WeightSpec.of(FORMS["nvfp4, static"])
    assert settle(None, [spec], 0, torch.device("cpu"), AS_STORED) == "stored"
    assert settle("fp8", [spec], 0, torch.device("cpu"), AS_STORED) == "fp8"
    with pytest.raises(BadRequest, match="resident is 'both'"):
        settle("both", [spec], 0, torch.device("cpu"), AS_STORED)


def test_a_backend_may_be_named_for_one_scheme() -> None:
    pipe = load("demo", transformer="demo-fp8", device="cpu", backend={"fp8": "reference"})
    assert {use.backend for use in pipe.load_report.backends} == {"reference"}
    assert (
        select(WeightSpec.of(FORMS["nvfp4, static"]), Target("cpu")).declined["expand"].startswith("needs a CUDA GPU")
    )


def test_weights_stay_stored_where_another_backend_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else `--backend reference` on a GPU would compute with other numbers than the checkpoint's."""
    monkeypatch.setattr(refusals, "find_spec", lambda name: name)
    monkeypatch.setattr(Target, "of", lambda _device: Target("cuda", (9, 0)))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _device: (10**9, 10**9))
    spec, gpu = WeightSpec.of(FORMS["nvfp4, static"]), torch.device("meta")
    assert settle(None, [spec], 0, gpu, AS_STORED) == "fp8"
    assert settle(None, [spec], 10**9, gpu, AS_STORED) == "stored"
    assert settle(None, [spec], 0, gpu, AS_STORED, "reference") == "stored"
    assert settle(None, [spec], 0, gpu, AS_STORED, {"nvfp4": "reference"}) == "stored"
    assert settle(None, [spec], 0, gpu, AS_STORED, {"fp8": "reference"}) == "fp8"
