"""The choice of a backend, the reference, and what moving and compiling do to a layer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mezzotint
from mezzotint import kernels
from mezzotint.cli.kernels import choice as kernel_choice
from mezzotint.errors import BadRequest, Unsupported
from mezzotint.kernels import (
    AS_STORED,
    BF16,
    GENERATIONS,
    BackendUse,
    Cannot,
    Target,
    WeightSpec,
    backends,
    products,
    select,
    takes,
)
from mezzotint.kernels.joint_product import joint_product
from mezzotint.kernels.verified import VERIFIED
from mezzotint.nn import QuantLinear, use_backend
from mezzotint.schemes import FP8, NVFP4, SCHEMES
from mezzotint.schemes.rounding import round_e4m3
from mezzotint.tensor import PLAIN, Layout, QuantTensor

HOPPER, ADA, AMPERE, CPU = Target("cuda", (9, 0)), Target("cuda", (8, 9)), Target("cuda", (8, 0)), Target("cpu")


def fp8_tensor(out: int = 48, in_: int = 64, seed: int = 0) -> QuantTensor:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))
    scale = weight.abs().amax() / 448
    parts = {"codes": round_e4m3(weight / scale), "weight_scale": scale, "input_scale": torch.tensor(4 / 448)}
    return QuantTensor(FP8, PLAIN, (out, in_), parts)


def nvfp4_tensor(out: int = 48, in_: int = 64, seed: int = 0) -> QuantTensor:
    random = torch.Generator().manual_seed(seed)
    parts = {
        "codes": torch.randint(0, 256, (out, in_ // 2), generator=random, dtype=torch.uint8),
        "block_scale": torch.rand(out, in_ // 16, generator=random).to(torch.float8_e4m3fn),
        "global_scale": torch.tensor(0.02),
        "input_scale": torch.tensor(4 / 2688),
    }
    return QuantTensor(NVFP4, PLAIN, (out, in_), parts)


def with_bias(tensor: QuantTensor, bias: torch.Tensor) -> QuantTensor:
    return tensor.with_parts(dict(tensor.parts) | {"bias": bias}, tensor.layout)


def dynamic(tensor: QuantTensor) -> QuantTensor:
    """The same weight without its static input scale, its inputs to be rounded with one found at each call."""
    parts = {name: part for name, part in tensor.parts.items() if name != "input_scale"}
    return replace(tensor, parts=parts, dynamic_input=True)


def spec(tensor: QuantTensor) -> WeightSpec:
    return WeightSpec.of(tensor)


@pytest.mark.parametrize(
    ("tensor", "target", "activations", "chosen", "reason"),
    [
        (fp8_tensor(), HOPPER, AS_STORED, "scaled_mm", "scaled_mm is preferred"),
        (fp8_tensor(), ADA, AS_STORED, "scaled_mm", "scaled_mm is preferred"),
        (fp8_tensor(), AMPERE, AS_STORED, "weight_only", "needs FP8 tensor cores (sm_89 or newer), this is sm_80"),
        (fp8_tensor(), CPU, AS_STORED, "reference", "needs a CUDA GPU, this is cpu"),
        (dynamic(fp8_tensor()), HOPPER, AS_STORED, "scaled_mm", "scaled_mm is preferred"),
        (dynamic(fp8_tensor()), HOPPER, BF16, "weight_only", "the inputs of this layer are not quantized"),
        (fp8_tensor(), HOPPER, BF16, "weight_only", "the inputs of this layer are not quantized"),
        (fp8_tensor(out=40), HOPPER, AS_STORED, "weight_only", "multiples of 16 and 16, this is 40 x 64"),
        (nvfp4_tensor(out=40), HOPPER, AS_STORED, "weight_only", "needs sides that are multiples of"),
    ],
)
def test_choice_and_reasons(tensor: QuantTensor, target: Target, activations: str, chosen: str, reason: str) -> None:
    selection = select(spec(tensor), target, activations)
    assert selection.backend.name == chosen
    assert any(reason in said for said in selection.declined.values())
    own = {name for name, backend in backends().items() if takes(backend, tensor.scheme)}
    assert {chosen, *selection.declined} == own


def test_an_amd_gpu_is_no_cuda_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    target = Target.of(torch.device("cuda"))
    assert select(spec(nvfp4_tensor()), target).declined["torch_nvfp4"] == "needs a CUDA GPU, this is rocm"


def test_a_backend_that_was_asked_for_and_cannot_says_why() -> None:
    with pytest.raises(Unsupported, match="scaled_mm: needs a CUDA GPU"):
        select(spec(fp8_tensor()), CPU, only="scaled_mm")


def test_a_backend_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(BadRequest, match="reference, scaled_mm"):
        select(spec(fp8_tensor()), CPU, only="magic")


def test_reference_fp8_equals_modelopts_own_simulation(data: Path) -> None:
    golden = load_file(data / "modelopt_linear_fp8.safetensors")
    weight_scale, input_scale = golden["weight_amax"] / 448, golden["x_amax"] / 448
    codes = round_e4m3(golden["weight"] / weight_scale)
    parts = {"codes": codes, "weight_scale": weight_scale, "input_scale": input_scale}
    layer = QuantLinear(QuantTensor(FP8, PLAIN, (48, 64), parts | {"bias": golden["bias"]}), torch.float32)
    assert torch.equal(FP8.quantize_input(golden["x"], parts), golden["x_quantized"])
    torch.testing.assert_close(layer(golden["x"]), golden["y"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tensor", [fp8_tensor(), nvfp4_tensor()], ids=["fp8", "nvfp4"])
@pytest.mark.parametrize("activations", [AS_STORED, BF16])
def test_reference_equals_its_definition(tensor: QuantTensor, activations: str) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2))
    assert tensor.scheme.quantize_input is not None
    seen = tensor.scheme.quantize_input(x, tensor.parts) if activations == AS_STORED else x
    expected = seen.double() @ tensor.scheme.dequantize(tensor.parts).double().T + bias
    y = QuantLinear(with_bias(tensor, bias), torch.float32, activations)(x)
    assert y.shape == (2, 5, 48)
    assert torch.linalg.norm(y - expected) <= 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("tensor", [fp8_tensor(), nvfp4_tensor()], ids=["fp8", "nvfp4"])
def test_a_scale_found_at_each_call_is_that_of_each_row_or_of_the_whole_input(tensor: QuantTensor) -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [100.0]])
    rows = [x[:1], x[1:]] if tensor.scheme is FP8 else [x]
    largest = 448 if tensor.scheme is FP8 else 2688
    static = [replace(tensor, parts={**tensor.parts, "input_scale": row.abs().max() / largest}) for row in rows]
    expected = torch.cat([QuantLinear(weight, torch.float32)(row) for weight, row in zip(static, rows, strict=True)])
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


def test_another_backend_may_be_forced_for_a_while() -> None:
    layer = QuantLinear(fp8_tensor())
    x = torch.randn(3, 64)
    with use_backend("reference"):
        forced = layer(x)
    assert torch.equal(forced, layer(x))
    with pytest.raises(BadRequest), use_backend("magic"):
        pass


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("magic", "no backend is called 'magic'"),
        ({"nvfp4": "magic"}, "no backend is called 'magic'"),
        ({"nvfp": "reference"}, "no scheme is called 'nvfp'"),
    ],
)
def test_a_choice_of_what_does_not_exist_is_refused(choice: str | dict[str, str], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        mezzotint.load("demo", transformer="demo-nvfp4", device="cpu", backend=choice)


def test_a_scheme_may_be_written_as_bench_writes_it() -> None:
    assert kernel_choice(["svdquant-int4=expand", "fp8=scaled_mm"]) == {"svdquant_int4": "expand", "fp8": "scaled_mm"}


def test_reasons_that_several_backends_share_are_said_once() -> None:
    use = BackendUse("nvfp4", "reference", 3, {"a": "multiplies FP8 only", "b": "needs a GPU", "c": "needs a GPU"})
    assert use.why == "b, c: needs a GPU; a: multiplies FP8 only"


@pytest.mark.parametrize("biased", [False, True])
def test_scales_by_row_may_stand_behind_the_product(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    """On GPUs newer than Hopper; the product is rounded to BF16 once more."""
    torch.manual_seed(0)
    x, codes = torch.randn(7, 64).bfloat16(), (torch.randn(48, 64) * 30).to(torch.float8_e4m3fn)
    given = (x, codes, torch.rand(48) / 30, torch.randn(48).bfloat16() if biased else None, None)
    expected = products.fp8_product(*given)
    monkeypatch.setattr(products, "scales_by_row", lambda _device: False)
    got = products.fp8_product(*given)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("by_row", [False, True])
def test_a_joint_product_is_two_products_side_by_side(by_row: bool) -> None:
    torch.manual_seed(0)
    sides = []
    for tokens in (3, 5):
        x, codes = round_e4m3(torch.randn(2, tokens, 32) * 8), round_e4m3(torch.randn(48, 32) * 8)
        scale = torch.rand(2 * tokens, 1) + 0.5 if by_row else torch.rand(1, 1) + 0.5
        weight_scale = (torch.rand(48) + 0.5 if by_row else torch.ones(1)) / 500
        sides.append((x, scale, codes, weight_scale, torch.randn(48).bfloat16()))
    got = joint_product(*sides[0], *sides[1])
    assert got.shape == (2, 8, 48)
    for (x, scale, codes, weight_scale, bias), own in zip(sides, (got[:, :3], got[:, 3:]), strict=True):
        exact = (x.float().flatten(0, 1) * scale) @ (codes.float() * weight_scale.reshape(-1, 1)).t() + bias.float()
        torch.testing.assert_close(own.flatten(0, 1).float(), exact, rtol=8e-3, atol=8e-3)


def test_a_backend_for_another_scheme_is_no_reason() -> None:
    """`generate` on a CPU named nine backends that could not have multiplied by such a layer anywhere."""
    tensor = fp8_tensor()
    layer = QuantLinear(tensor)
    assert set(layer.selection.declined) == {"scaled_mm", "weight_only"}
    others = {name for name, backend in backends().items() if not takes(backend, FP8)}
    assert len(others) > 5
    assert not others & set(select(spec(tensor), HOPPER).declined)
    with pytest.raises(Unsupported, match="humming: multiplies NVFP4 only"):
        select(spec(tensor), HOPPER, only="humming")


def test_every_backend_refuses_the_schemes_that_it_does_not_list() -> None:
    """`schemes` and `can` are two ways of saying one thing."""
    for backend in backends().values():
        for tensor in (fp8_tensor(), nvfp4_tensor()):
            answer = backend.can(spec(tensor), Target("cuda", (10, 0)), AS_STORED)
            other = isinstance(answer, Cannot) and answer.reason.startswith("multiplies ")
            assert takes(backend, tensor.scheme) is not other, backend.name


@pytest.mark.parametrize(
    ("target", "verified"), [(HOPPER, True), (CPU, True), (ADA, False), (AMPERE, False), (Target("rocm"), False)]
)
def test_a_choice_says_whether_it_has_run_on_such_hardware(target: Target, verified: bool) -> None:
    selection = select(spec(fp8_tensor()), target)
    assert selection.verified is verified
    assert BackendUse.of(FP8, selection).verified is verified


def test_every_entry_of_what_is_verified_names_what_exists() -> None:
    for scheme, target, backend in VERIFIED:
        assert scheme in SCHEMES
        assert takes(backends()[backend], SCHEMES[scheme])
        assert target in map(str, GENERATIONS.values())


def test_a_load_report_says_what_was_never_run_on_such_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_verified", lambda *_: False)
    report = str(mezzotint.load("demo", transformer="demo-fp8", device="cpu").load_report)
    assert "46 fp8 layers on reference, not verified on hardware" in report
    assert "note: 46 fp8 layers run on reference, not verified on hardware" in report
