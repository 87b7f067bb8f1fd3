"""Selection of a backend, the reference backend, and layers that are moved or compiled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mezzotint
from mezzotint.cli.backend_options import parse_backend_choice
from mezzotint.errors import BadRequest, Unsupported
from mezzotint.kernels import (
    BF16_ACTIVATIONS,
    GPU_GENERATIONS,
    QUANTIZED_ACTIVATIONS,
    BackendUse,
    Cannot,
    Target,
    WeightSpec,
    all_backends,
    fp8_gemm,
    select,
    selection,
    takes,
)
from mezzotint.kernels.ops.joint_fp8_gemm.op import joint_fp8_gemm
from mezzotint.kernels.verified import VERIFIED
from mezzotint.nn import QuantLinear, use_backend
from mezzotint.schemes import FP8, schemes
from mezzotint.schemes.minifloats import round_e4m3
from mezzotint.tensor import PLAIN, Layout, QuantTensor
from support.quant_tensors import dynamic, fp8_tensor, nvfp4_tensor, with_bias

HOPPER, ADA, AMPERE, CPU = (
    Target("cuda", (9, 0)),
    Target("cuda", (8, 9)),
    Target("cuda", (8, 0)),
    Target("cpu"),
)


def spec(tensor: QuantTensor) -> WeightSpec:
    return WeightSpec.of(tensor)


@pytest.mark.parametrize(
    ("tensor", "target", "activations", "chosen", "reason"),
    [
        (fp8_tensor(), HOPPER, QUANTIZED_ACTIVATIONS, "scaled_mm", "scaled_mm is preferred"),
        (fp8_tensor(), ADA, QUANTIZED_ACTIVATIONS, "scaled_mm", "scaled_mm is preferred"),
        (
            fp8_tensor(),
            AMPERE,
            QUANTIZED_ACTIVATIONS,
            "dequantize",
            "needs FP8 tensor cores (sm_89 or newer), this is sm_80",
        ),
        (fp8_tensor(), CPU, QUANTIZED_ACTIVATIONS, "reference", "needs a CUDA GPU, this is cpu"),
        (
            dynamic(fp8_tensor()),
            HOPPER,
            QUANTIZED_ACTIVATIONS,
            "scaled_mm",
            "scaled_mm is preferred",
        ),
        (
            dynamic(fp8_tensor()),
            HOPPER,
            BF16_ACTIVATIONS,
            "dequantize",
            "the inputs of this layer are not quantized",
        ),
        (
            fp8_tensor(),
            HOPPER,
            BF16_ACTIVATIONS,
            "dequantize",
            "the inputs of this layer are not quantized",
        ),
        (
            fp8_tensor(out=40),
            HOPPER,
            QUANTIZED_ACTIVATIONS,
            "dequantize",
            "multiples of 16 and 16, this is 40 x 64",
        ),
        (
            nvfp4_tensor(out=40),
            HOPPER,
            QUANTIZED_ACTIVATIONS,
            "dequantize",
            "needs dimensions that are multiples of",
        ),
    ],
)
def test_selection_and_reasons(
    tensor: QuantTensor, target: Target, activations: str, chosen: str, reason: str
) -> None:
    selected = select(spec(tensor), target, activations)
    assert selected.backend.name == chosen
    assert any(reason in text for text in selected.declined.values())
    candidates = {name for name, backend in all_backends().items() if takes(backend, tensor.scheme)}
    assert {chosen, *selected.declined} == candidates


def test_amd_gpu_is_not_a_cuda_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    target = Target.of(torch.device("cuda"))
    assert (
        select(spec(nvfp4_tensor()), target).declined["torch_nvfp4"]
        == "needs a CUDA GPU, this is rocm"
    )


def test_requested_backend_that_cannot_run_is_an_error_with_the_reason() -> None:
    with pytest.raises(Unsupported, match="scaled_mm: needs a CUDA GPU"):
        select(spec(fp8_tensor()), CPU, backend_name="scaled_mm")


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(BadRequest, match="reference, scaled_mm"):
        select(spec(fp8_tensor()), CPU, backend_name="magic")


def test_reference_fp8_equals_modelopts_own_simulation(data: Path) -> None:
    golden = load_file(data / "modelopt_linear_fp8.safetensors")
    weight_scale, input_scale = golden["weight_amax"] / 448, golden["x_amax"] / 448
    codes = round_e4m3(golden["weight"] / weight_scale)
    parts = {"codes": codes, "weight_scale": weight_scale, "input_scale": input_scale}
    layer = QuantLinear(
        QuantTensor(FP8, PLAIN, (48, 64), parts | {"bias": golden["bias"]}), torch.float32
    )
    assert torch.equal(FP8.quantize_activation(golden["x"], parts), golden["x_quantized"])
    torch.testing.assert_close(layer(golden["x"]), golden["y"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tensor", [fp8_tensor(), nvfp4_tensor()], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("activations", [QUANTIZED_ACTIVATIONS, BF16_ACTIVATIONS])
def test_reference_equals_its_definition(tensor: QuantTensor, activations: str) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2))
    assert tensor.scheme.quantize_activation is not None
    quantized = (
        tensor.scheme.quantize_activation(x, tensor.parts)
        if activations == QUANTIZED_ACTIVATIONS
        else x
    )
    expected = quantized.double() @ tensor.scheme.dequantize(tensor.parts).double().T + bias
    y = QuantLinear(with_bias(tensor, bias), torch.float32, activations)(x)
    assert y.shape == (2, 5, 48)
    assert torch.linalg.norm(y - expected) <= 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("tensor", [fp8_tensor(), nvfp4_tensor()], ids=["fp8", "nvfp4"])
def test_dynamic_scale_is_per_row_for_fp8_and_per_tensor_for_nvfp4(
    tensor: QuantTensor,
) -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1.0], [100.0]]
    )
    rows = [x[:1], x[1:]] if tensor.scheme is FP8 else [x]
    largest = 448 if tensor.scheme is FP8 else 2688
    static = [
        replace(tensor, parts={**tensor.parts, "input_scale": row.abs().max() / largest})
        for row in rows
    ]
    expected = torch.cat(
        [QuantLinear(weight, torch.float32)(row) for weight, row in zip(static, rows, strict=True)]
    )
    y = QuantLinear(dynamic(tensor), torch.float32)(x)
    assert torch.linalg.norm(y - expected) <= 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("tensor", [fp8_tensor(), nvfp4_tensor()], ids=["fp8", "nvfp4"])
def test_an_input_of_zeros_gives_zeros(tensor: QuantTensor) -> None:
    assert QuantLinear(dynamic(tensor))(torch.zeros(3, 64)).abs().max() == 0


@pytest.mark.parametrize("tensor", [fp8_tensor(), nvfp4_tensor()], ids=["fp8", "nvfp4"])
def test_a_layer_compiles_without_a_graph_break(tensor: QuantTensor) -> None:
    layer = QuantLinear(tensor)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_casting_a_layer_leaves_its_scales_alone() -> None:
    layer = QuantLinear(with_bias(fp8_tensor(), torch.zeros(48)))
    before = {name: part.clone() for name, part in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    for name, part in layer.named_buffers():
        assert part.dtype == before[name].dtype
        assert torch.equal(part.float(), before[name].float())


def test_a_layer_stored_in_another_layout_decodes_the_same() -> None:
    tensor = nvfp4_tensor(130, 64)
    from mezzotint.layouts import convert

    moved = convert(tensor, Layout("high_first", "tiles_128x4"))
    assert torch.equal(QuantLinear(moved).dequantize(), QuantLinear(tensor).dequantize())


def test_backend_override_lasts_as_long_as_its_block() -> None:
    layer = QuantLinear(fp8_tensor())
    x = torch.randn(3, 64)
    with use_backend(layer, "reference"):
        forced = layer(x)
    assert torch.equal(forced, layer(x))
    with pytest.raises(BadRequest), use_backend(layer, "magic"):
        pass


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("magic", "there is no backend 'magic'"),
        ({"nvfp4": "magic"}, "there is no backend 'magic'"),
        ({"nvfp": "reference"}, "there is no scheme 'nvfp'"),
    ],
)
def test_choice_of_an_unknown_backend_or_scheme_is_an_error(
    choice: str | dict[str, str], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        mezzotint.load("demo", transformer="demo-nvfp4", device="cpu", backend=choice)


def test_scheme_may_be_written_with_hyphens() -> None:
    assert parse_backend_choice(["svdquant-int4=dequant_fp8", "fp8=scaled_mm"]) == {
        "svdquant_int4": "dequant_fp8",
        "fp8": "scaled_mm",
    }


def test_shared_reasons_are_listed_once() -> None:
    use = BackendUse(
        "nvfp4",
        "reference",
        3,
        {"a": "supports FP8 only", "b": "needs a GPU", "c": "needs a GPU"},
    )
    assert use.reasons == "b, c: needs a GPU; a: supports FP8 only"


@pytest.mark.parametrize("biased", [False, True])
def test_row_scales_may_follow_the_gemm(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    """On GPUs newer than Hopper; the output is rounded to BF16 once more."""
    torch.manual_seed(0)
    x, codes = torch.randn(7, 64).bfloat16(), (torch.randn(48, 64) * 30).to(torch.float8_e4m3fn)
    operands = (x, codes, torch.rand(48) / 30, torch.randn(48).bfloat16() if biased else None, None)
    expected = fp8_gemm.fp8_linear(*operands)
    monkeypatch.setattr(fp8_gemm, "supports_row_scales", lambda _device: False)
    got = fp8_gemm.fp8_linear(*operands)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("by_row", [False, True])
def test_joint_fp8_gemm_equals_two_gemms(by_row: bool) -> None:
    torch.manual_seed(0)
    operands = []
    for tokens in (3, 5):
        x, codes = round_e4m3(torch.randn(2, tokens, 32) * 8), round_e4m3(torch.randn(48, 32) * 8)
        scale = torch.rand(2 * tokens, 1) + 0.5 if by_row else torch.rand(1, 1) + 0.5
        weight_scale = (torch.rand(48) + 0.5 if by_row else torch.ones(1)) / 500
        operands.append((x, scale, codes, weight_scale, torch.randn(48).bfloat16()))
    got = joint_fp8_gemm(*operands[0], *operands[1])
    assert got.shape == (2, 8, 48)
    for (x, scale, codes, weight_scale, bias), out in zip(
        operands, (got[:, :3], got[:, 3:]), strict=True
    ):
        exact = (x.float().flatten(0, 1) * scale) @ (
            codes.float() * weight_scale.reshape(-1, 1)
        ).t() + bias.float()
        torch.testing.assert_close(out.flatten(0, 1).float(), exact, rtol=8e-3, atol=8e-3)


def test_backend_for_another_scheme_is_not_listed() -> None:
    """`generate` on a CPU once listed nine backends that support the scheme on no device."""
    tensor = fp8_tensor()
    layer = QuantLinear(tensor)
    assert set(layer.selection.declined) == {"scaled_mm", "dequantize", "weight_only"}
    others = {name for name, backend in all_backends().items() if not takes(backend, FP8)}
    assert len(others) > 5
    assert not others & set(select(spec(tensor), HOPPER).declined)
    with pytest.raises(Unsupported, match="humming: supports NVFP4 only"):
        select(spec(tensor), HOPPER, backend_name="humming")


def test_every_backend_declines_schemes_that_it_does_not_list() -> None:
    """`schemes` and `can` must agree."""
    for backend in all_backends().values():
        for tensor in (fp8_tensor(), nvfp4_tensor()):
            answer = backend.can(spec(tensor), Target("cuda", (10, 0)), QUANTIZED_ACTIVATIONS)
            other = isinstance(answer, Cannot) and answer.reason.startswith("supports ")
            assert takes(backend, tensor.scheme) is not other, backend.name


@pytest.mark.parametrize(
    ("target", "verified"),
    [(HOPPER, True), (CPU, True), (ADA, False), (AMPERE, False), (Target("rocm"), False)],
)
def test_selection_says_whether_it_was_verified_on_hardware(target: Target, verified: bool) -> None:
    selected = select(spec(fp8_tensor()), target)
    assert selected.verified is verified
    assert BackendUse.of(FP8, selected).verified is verified


def test_verified_entries_name_existing_backends_and_schemes() -> None:
    for scheme, target, backend in VERIFIED:
        assert scheme in schemes()
        assert takes(all_backends()[backend], schemes()[scheme])
        assert target in map(str, GPU_GENERATIONS.values())


def test_load_report_notes_unverified_hardware(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "is_verified", lambda *_: False)
    report = str(mezzotint.load("demo", transformer="demo-fp8", device="cpu").load_report)
    assert "46 fp8 layers on reference, not verified on hardware" in report
    assert "note: 46 fp8 layers run on reference, not verified on hardware" in report
