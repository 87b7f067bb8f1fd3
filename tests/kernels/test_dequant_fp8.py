"""The FP8 form of 4-bit weights: the reference of the kernel, and weights converted at load."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mezzotint.errors import BadRequest
from mezzotint.generation.pipeline import load
from mezzotint.kernels import (
    BF16_ACTIVATIONS,
    QUANTIZED_ACTIVATIONS,
    Can,
    Cannot,
    Target,
    WeightSpec,
    requirements,
    select,
)
from mezzotint.kernels.backends.dequant_fp8 import can_dequant_fp8
from mezzotint.kernels.fp8_gemm import apply_pre_quant_scale
from mezzotint.kernels.fp8_weight import bias_with_shift, to_fp8
from mezzotint.kernels.ops.dequant_fp8.reference import dequant_fp8_reference, prepare_scales
from mezzotint.loading import Placement
from mezzotint.loading.residency import choose_residency
from mezzotint.nn import QuantLinear, quant_linears
from mezzotint.schemes import AWQ_W4A16, FP8, NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.schemes.awq import encode_awq
from mezzotint.schemes.fp8 import encode_fp8
from mezzotint.schemes.nvfp4 import encode_nvfp4
from mezzotint.schemes.scheme import Parts
from mezzotint.schemes.svdquant_int4 import encode_svdquant_int4
from mezzotint.tensor import PLAIN, QuantTensor, concat_rows
from support import four_bit_weights as four_bits
from support.errors_of import relative_error

FORMS = four_bits.all_of(48, 128)
E4M3_ERROR = 2**-4
"""Half the distance between adjacent e4m3 numbers, relative to the smaller one."""


@pytest.mark.parametrize("name", FORMS)
def test_fp8_codes_are_the_nearest_to_the_dequantized_weight(name: str) -> None:
    weight = FORMS[name]
    prepared = replace(weight, prepared=prepare_scales(weight))
    fp8 = dequant_fp8_reference(prepared).float() * prepared.prepared["scale"][:, None]
    real = weight.scheme.dequantize(weight.parts)
    if "input_scale" in weight.parts and "pre_quant_scale" in weight.parts:
        real = real / weight.parts["pre_quant_scale"]
    smallest = prepared.prepared["scale"][:, None] * 2**-10
    branch = 2**-8 * real.abs().amax()  # the low-rank branch is rounded to BF16 first
    assert bool(((fp8 - real).abs() <= E4M3_ERROR * real.abs() + smallest + branch).all())
    assert relative_error(fp8, real) < 0.03


def test_small_matrix_dequantizes_to_known_bytes() -> None:
    """The row maxima 6 * 2 = 12 and 3 * 0.5 = 1.5 become 448: e4m3 0x7E. 224 is 0x76."""
    codes = torch.tensor([[0x57, 0x00] + [0] * 6, [0x35, 0x0D] + [0] * 6], dtype=torch.uint8)
    scales = torch.tensor([[2.0], [0.5]]).to(torch.float8_e4m3fn)
    parts = {"codes": codes, "block_scale": scales, "global_scale": torch.tensor(1.0)}
    weight = QuantTensor(NVFP4, PLAIN, (2, 16), parts, dynamic_input=True)
    prepared = replace(weight, prepared=prepare_scales(weight))
    assert prepared.prepared["scale"].tolist() == pytest.approx([12 / 448, 1.5 / 448])
    assert dequant_fp8_reference(prepared).view(torch.uint8)[:, :4].tolist() == [
        [0x7E, 0x76, 0x00, 0x00],
        [0x7E, 0x76, 0xFE, 0x00],
    ]


@pytest.mark.parametrize("name", FORMS)
def test_layer_converted_to_fp8_is_within_quantization_error(name: str) -> None:
    """6e-2: weights and inputs in FP8 each add about 2.6e-2, and both are quantized again."""
    weight = FORMS[name]
    converted = to_fp8(weight)
    x = (
        four_bits.random(64, 128, seed=9).clamp(-4, 4) / 2.5
    )  # within the range of the static scales, smoothed or not
    x = x.bfloat16().float()
    exact = x @ weight.scheme.dequantize(weight.parts).T + weight.scheme.dequantize_bias(
        weight.parts
    )
    y = QuantLinear(converted, torch.float32)(x)
    assert converted.scheme is FP8
    assert relative_error(y, exact) < 6e-2
    four_bit_error = relative_error(QuantLinear(weight, torch.float32)(x), exact)
    assert relative_error(y, exact) < four_bit_error, (
        "FP8 must be closer to the checkpoint's weights than 4-bit inputs are"
    )


def test_shifted_layer_without_bias_gets_the_bias_of_the_shift() -> None:
    biased = FORMS["svdquant_int4, shifted"]
    weight = biased.with_parts(
        {name: part for name, part in biased.parts.items() if name != "bias"}, PLAIN
    )
    prepared = replace(weight, prepared=prepare_scales(weight))
    shift_bias = weight.scheme.dequantize_bias(weight.parts)
    assert shift_bias.abs().max() > 0
    torch.testing.assert_close(bias_with_shift(prepared, None), shift_bias)
    torch.testing.assert_close(to_fp8(weight).parts["bias"], shift_bias)


def test_static_scale_keeps_its_range_and_pre_quant_scale() -> None:
    converted = to_fp8(FORMS["nvfp4_svd"])
    assert float(converted.parts["input_scale"]) == pytest.approx(4 / 448)
    x = torch.ones(1, 128)
    assert torch.equal(
        apply_pre_quant_scale(x, converted.parts)[0], converted.parts["pre_quant_scale"]
    )


def test_concatenated_weights_keep_their_global_scales_per_row() -> None:
    one, two = FORMS["nvfp4, static"], four_bits.nvfp4(48, 128)
    two = two.with_parts({**two.parts, "global_scale": two.parts["global_scale"] * 3}, PLAIN)
    joined = concat_rows([one, two])
    assert joined.parts["global_scale"].shape == (96,)
    real = joined.scheme.dequantize(joined.parts)
    assert torch.equal(real, torch.cat([t.scheme.dequantize(t.parts) for t in (one, two)]))


@pytest.mark.parametrize(
    ("scheme", "encode", "error"),
    [
        (FP8, encode_fp8, 0.03),
        (FP8, lambda w: encode_fp8(w, per_row=True), 0.03),
        (NVFP4, encode_nvfp4, 0.1),
        (SVDQUANT_NVFP4, encode_nvfp4, 0.1),
        (SVDQUANT_INT4, encode_svdquant_int4, 0.11),
        (AWQ_W4A16, encode_awq, 0.09),
    ],
)
def test_encoding_error_of_gaussian_weights(
    scheme: Scheme, encode: Callable[[torch.Tensor], Parts], error: float
) -> None:
    weights = four_bits.random(256, 512, seed=5)
    assert relative_error(scheme.decode(encode(weights)), weights) < error
    assert torch.equal(scheme.decode(encode(torch.zeros(16, 64))), torch.zeros(16, 64))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (four_bits.nvfp4(48, 128).with_parts(encode_nvfp4(torch.randn(48, 128)), PLAIN), None),
        (FORMS["svdquant_int4"], None),
        (four_bits.nvfp4(40, 128), "dimensions that are multiples of 16 and 16"),
        (
            QuantTensor(FP8, PLAIN, (16, 16), encode_fp8(torch.randn(16, 16))),
            "supports NVFP4 and SVDQuant INT4 and SVDQuant NVFP4 only",
        ),
    ],
)
def test_what_can_be_dequantized(weight: QuantTensor, reason: str | None) -> None:
    answer = can_dequant_fp8(WeightSpec.of(weight), QUANTIZED_ACTIVATIONS)
    if reason is None and weight.quantizes_activation:
        assert isinstance(answer, Can)
    elif reason is not None:
        assert isinstance(answer, Cannot)
        assert reason in answer.reason
    assert isinstance(can_dequant_fp8(WeightSpec.of(weight), BF16_ACTIVATIONS), Cannot), (
        "an unquantized input must not be quantized"
    )


def test_residency_fp8_converts_and_is_reported() -> None:
    pipe = load("demo", transformer="demo-nvfp4", device="cpu", resident="fp8")
    layers = quant_linears(pipe.transformer)
    assert {layer.sublayers[0].scheme.name for layer in layers.values()} == {"fp8"}
    (event,) = [event for event in pipe.load_report.events if "became FP8" in event]
    assert event.startswith(f"{len(layers)} 4-bit layers")


def test_cpu_keeps_stored_bits_unless_requested() -> None:
    spec = WeightSpec.of(FORMS["nvfp4, static"])
    assert (
        choose_residency(Placement(torch.device("cpu")), [spec], 0, QUANTIZED_ACTIVATIONS)
        == "stored"
    )
    assert (
        choose_residency(Placement(torch.device("cpu"), "fp8"), [spec], 0, QUANTIZED_ACTIVATIONS)
        == "fp8"
    )
    with pytest.raises(BadRequest, match="there is no residency mode 'both'"):
        choose_residency(Placement(torch.device("cpu"), "both"), [spec], 0, QUANTIZED_ACTIVATIONS)


def test_backend_may_be_chosen_per_scheme() -> None:
    pipe = load("demo", transformer="demo-fp8", device="cpu", backend={"fp8": "reference"})
    assert {use.backend for use in pipe.load_report.backends} == {"reference"}
    assert (
        select(WeightSpec.of(FORMS["nvfp4, static"]), Target("cpu"))
        .declined["dequant_fp8"]
        .startswith("needs a CUDA GPU")
    )


def test_weights_stay_stored_if_another_backend_is_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise `--backend reference` on a GPU would not compute with the checkpoint's numbers."""
    monkeypatch.setattr(requirements, "find_spec", lambda name: name)
    monkeypatch.setattr(Target, "of", lambda _device: Target("cuda", (9, 0)))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _device: (10**9, 10**9))
    spec, gpu = WeightSpec.of(FORMS["nvfp4, static"]), torch.device("meta")
    assert choose_residency(Placement(gpu), [spec], 0, QUANTIZED_ACTIVATIONS) == "fp8"
    assert choose_residency(Placement(gpu), [spec], 10**9, QUANTIZED_ACTIVATIONS) == "stored"
    assert (
        choose_residency(Placement(gpu), [spec], 0, QUANTIZED_ACTIVATIONS, "reference") == "stored"
    )
    assert (
        choose_residency(Placement(gpu), [spec], 0, QUANTIZED_ACTIVATIONS, {"nvfp4": "reference"})
        == "stored"
    )
    assert (
        choose_residency(Placement(gpu), [spec], 0, QUANTIZED_ACTIVATIONS, {"fp8": "reference"})
        == "fp8"
    )
