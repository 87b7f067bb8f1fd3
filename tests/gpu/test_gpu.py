"""Tests that need a CUDA device: `pytest -m gpu tests/gpu/test_gpu.py`."""

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from mezzotint.errors import BadRequest
from mezzotint.fast import speed_up
from mezzotint.fast.fused_layers import SplitQuantizedInputLinear
from mezzotint.fast.passes.attention import ATTENTION_BACKENDS
from mezzotint.fast.runtime.cuda_graphs import CudaGraphRunner
from mezzotint.fast.runtime.readback import read_back
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import load, recommended_sampling
from mezzotint.generation.schedule import StepSchedule
from mezzotint.kernels import Target, best_device
from mezzotint.kernels.backends.dequant_fp8 import BACKEND as DEQUANT_FP8
from mezzotint.kernels.fp8_weight import dequant_fp8
from mezzotint.kernels.ops.dequant_fp8.reference import dequant_fp8_reference, low_rank_factors
from mezzotint.kernels.ops.gemm_act.op import gemm_act, unavailable_reason
from mezzotint.kernels.ops.gemm_act.reference import gemm_act_reference
from mezzotint.kernels.ops.joint_fp8_gemm.op import joint_fp8_gemm
from mezzotint.kernels.ops.norm_rope.reference import norm_rope_reference
from mezzotint.kernels.ops.quantize_activation.reference import activation_quantize_reference
from mezzotint.nn import QuantLinear, quant_linears, unquantized_activations, use_backend
from mezzotint.schemes import AWQ_W4A16
from mezzotint.schemes.awq import encode_awq
from mezzotint.schemes.minifloats import round_e4m3
from mezzotint.tensor import PLAIN, QuantTensor
from support import four_bit_weights as four_bits
from support.deferred_residual_models import cast, four, with_ip_adapter
from support.errors_of import relative_error
from support.fused_activation_models import NUNCHAKU, published
from support.modulation_models import SCHEDULE, arguments, result
from support.quant_tensors import dynamic, fp8_tensor, with_bias

pytestmark = pytest.mark.gpu
STEPS = 20
PROMPTS = (
    "a large red circle on a blue background",
    "a small green triangle on a yellow background",
)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360)])
def test_scaled_mm_agrees_with_reference_on_flux_sizes(
    shape: tuple[int, int], compiled: bool
) -> None:
    """5e-3: the output is rounded to BF16 (1.7e-3), and tensor cores accumulate with fewer bits."""
    layer = QuantLinear(with_bias(fp8_tensor(*shape), torch.randn(shape[0]))).to("cuda")
    assert layer.selection.backend.name == "scaled_mm"
    x = torch.randn(4608, shape[1], device="cuda").bfloat16()
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    with use_backend(layer, "reference"):
        expected = layer(x)
    error = relative_error(y, expected)
    print(f"scaled_mm {shape} compiled={compiled}: relative error {error:.2e}")
    assert error <= 5e-3


def record_calls(pipe: Any) -> list[dict[str, Any]]:
    """The arguments of every call of the transformer while one image is generated."""
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _module, _arguments, given: calls.append(dict(given)), with_kwargs=True
    )
    generate(pipe, PROMPTS[:1], sampling=recommended_sampling("demo").replace(steps=STEPS))
    handle.remove()
    return calls


def steps_from(pipe: Any, calls: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The latents after each step, every step started from the recorded latents."""
    lengths = pipe.scheduler.sigmas.diff()
    with torch.no_grad():
        velocities = [pipe.transformer(**call)[0] for call in calls]
    pairs = zip(calls, velocities, lengths, strict=True)
    return [call["hidden_states"] + velocity * length for call, velocity, length in pairs]


@pytest.mark.parametrize("compiled", [False, True])
def test_scaled_mm_finds_the_scale_of_each_row_of_its_input(compiled: bool) -> None:
    """5e-3: as above."""
    layer = QuantLinear(dynamic(with_bias(fp8_tensor(3072, 3072), torch.randn(3072)))).to("cuda")
    assert layer.selection.backend.name == "scaled_mm"
    x = (
        torch.randn(4608, 3072, device="cuda") * torch.logspace(-3, 3, 4608, device="cuda")[:, None]
    ).bfloat16()
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    with use_backend(layer, "reference"):
        expected = layer(x)
    assert relative_error(y, expected) <= 5e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_demo_agrees_with_reference_at_every_step(compiled: bool, dtype: torch.dtype) -> None:
    """Each step from the same latents. A free run is no test of a kernel: see docs/numerics.md."""
    pipe = load("demo", transformer="demo-fp8", device="cuda", dtype=dtype)
    assert {layer.selection.backend.name for layer in quant_linears(pipe.transformer).values()} == {
        "scaled_mm"
    }
    with use_backend(pipe.transformer, "reference"):
        calls = record_calls(pipe)
        expected = steps_from(pipe, calls)
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    errors = [relative_error(a, b) for a, b in zip(steps_from(pipe, calls), expected, strict=True)]
    print(
        f"demo-fp8 on scaled_mm, {dtype}, compiled={compiled}: "
        f"relative error of the latents {max(errors):.2e}"
    )
    assert max(errors) <= 1e-2


@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4"])
def test_reference_compiles_whole_blocks(name: str) -> None:
    pipe = load("demo", transformer=name, device="cuda", dtype=torch.float32, backend="reference")
    calls = record_calls(pipe)
    expected = steps_from(pipe, calls)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    errors = [relative_error(a, b) for a, b in zip(steps_from(pipe, calls), expected, strict=True)]
    print(f"{name} on reference, compiled: relative error of the latents {max(errors):.2e}")
    assert max(errors) <= 1e-2


def test_a_free_run_stays_at_the_noise_floor_of_the_reference() -> None:
    """The floor is the error of the reference when its first latents change by 1e-6."""
    pipe = load("demo", transformer="demo-fp8", device="cuda", dtype=torch.float32)
    with use_backend(pipe.transformer, "reference"):
        expected = generate(pipe, PROMPTS).latents
        handle = pipe.transformer.x_embedder.register_forward_hook(
            lambda _m, _i, out: out * (1 + 1e-6)
        )
        floor = relative_error(generate(pipe, PROMPTS).latents, expected)
        handle.remove()
    error = relative_error(generate(pipe, PROMPTS).latents, expected)
    print(
        f"demo-fp8, free run of 8 steps: scaled_mm {error:.2e}, "
        f"reference against itself {floor:.2e}"
    )
    assert error <= 2 * floor


@pytest.mark.parametrize("shape", [(3072, 3072), (9216, 3072), (3072, 15360), (48, 128)])
@pytest.mark.parametrize("name", four_bits.all_of(16, 64))
def test_dequant_fp8_kernel_equals_its_reference(name: str, shape: tuple[int, int]) -> None:
    """Bit for bit, except with a low-rank branch, whose sums are in another order.

    Then one number in a thousand may differ by one step of FP8.
    """
    weight = four_bits.all_of(*shape)[name].to(torch.device("cuda"))
    weight = replace(weight, prepared=DEQUANT_FP8.prepare(weight))
    kernel, definition = (
        dequant_fp8(weight).view(torch.uint8).int(),
        dequant_fp8_reference(weight).view(torch.uint8).int(),
    )
    differs = kernel != definition
    print(f"dequant_fp8 {name} {shape}: {differs.float().mean():.1e} of the codes differ")
    if low_rank_factors(weight.parts) is None:
        assert not differs.any()
    assert differs.float().mean() <= 1e-3
    assert int((kernel - definition).abs().max()) <= 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", four_bits.all_of(16, 64))
def test_four_bits_on_hopper_are_closer_to_bf16_than_four_bit_inputs(
    name: str, compiled: bool
) -> None:
    """The backend quantizes inputs to FP8; the checkpoint specifies 4 bits, as in `reference`."""
    weight = four_bits.all_of(3072, 3072)[name]
    layer = QuantLinear(weight).to("cuda")
    assert layer.selection.backend.name == "dequant_fp8"
    x = torch.randn(4608, 3072, device="cuda").clamp(-4, 4)
    x[:, ::512] *= (
        0.1 if "input_scale" in weight.parts else 20
    )  # columns of outliers, or what a static scale allows
    x = (x * (0.4 if "pre_quant_scale" in weight.parts else 1)).bfloat16()
    real = layer.dequantize()
    exact = x.float() @ real.T + weight.scheme.dequantize_bias(weight.parts).cuda()
    with use_backend(layer, "reference"):
        native = relative_error(layer(x), exact)
    fast = relative_error((torch.compile(layer, fullgraph=True) if compiled else layer)(x), exact)
    print(
        f"{name} compiled={compiled}: error against BF16 inputs {fast:.2e}, "
        f"with 4-bit inputs {native:.2e}"
    )
    assert fast <= native


@pytest.mark.parametrize("batch", [1, 2])
def test_gemv_equals_the_dequantized_gemm(batch: int) -> None:
    """2e-3: the result is rounded to BF16."""
    for weight in (four_bits.nvfp4(9216, 3072), awq(9216, 3072)):
        layer = QuantLinear(weight).to("cuda")
        x = torch.randn(batch, 3072, device="cuda").bfloat16()
        exact = x.float() @ layer.dequantize().T + (0 if layer.bias is None else layer.bias.float())
        assert relative_error(layer(x), exact) <= 2e-3
        assert relative_error(torch.compile(layer, fullgraph=True)(x), exact) <= 2e-3


def awq(out: int, in_: int) -> QuantTensor:
    return QuantTensor(AWQ_W4A16, PLAIN, (out, in_), encode_awq(four_bits.random(out, in_, seed=0)))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("with_text", [False, True])
def test_norm_rope_kernel_equals_its_reference(fp8: bool, with_text: bool) -> None:
    heads, before = 30, 64 * with_text
    x = torch.randn(2, 256 + before, 3 * heads, 128, device="cuda").bfloat16()[:, :, : 2 * heads]
    weights = [torch.rand(128, device="cuda").bfloat16() + 0.5 for _ in range(4)]
    angles = torch.randn(1, 256 + before, 64, device="cuda")
    text_weights = weights[2:] if with_text else (None, None)
    arguments = (x, *weights[:2], *text_weights, before, angles.cos(), angles.sin(), 1e-6, fp8)
    importlib.import_module("mezzotint.kernels.ops.norm_rope.op")
    expected = norm_rope_reference(*arguments).float()
    got = torch.ops.mezzotint.norm_rope(*arguments).float()
    assert relative_error(got, expected) <= 1e-3
    assert float((got != expected).float().mean()) <= 1e-3


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "none"])
@pytest.mark.parametrize(
    ("rows", "depth", "plain", "active", "reserved"),
    [
        (4608, 3072, 9216, 12288, 3072),
        (4096, 3840, 0, 10240, 0),
        (512, 6144, 0, 18432, 0),
        (77, 208, 144, 272, 64),
        (1, 16, 16, 16, 0),
        (257, 128, 512, 256, 0),
        (4608, 3072, 3072, 0, 0),
    ],
)
@pytest.mark.parametrize("by_row", ["neither", "codes", "input", "both"])
@pytest.mark.parametrize("biased", [False, True])
def test_gemm_act_kernel_equals_its_reference(
    activation: str,
    rows: int,
    depth: int,
    plain: int,
    active: int,
    reserved: int,
    by_row: str,
    biased: bool,
) -> None:
    """Tensor cores add with fewer bits than float32, which changes some FP8 codes by one step."""
    if isinstance(reason := unavailable_reason(Target.of(best_device())), str):
        pytest.skip(reason)
    if (activation == "none") != (active == 0):
        pytest.skip("all columns are plain if and only if there is no activation")
    torch.manual_seed(0)
    out = plain + active * (2 if activation == "swiglu" else 1)
    x, codes = (round_e4m3(torch.randn(side, depth, device="cuda") * 8) for side in (rows, out))
    bias = torch.randn(out, device="cuda").bfloat16() if biased else None
    unit = 1 / (8 * 8 * depth**0.5)
    input_scale = torch.rand(rows if by_row in ("input", "both") else 1, 1, device="cuda") + 0.5
    weight_scale = (
        torch.rand(out if by_row in ("codes", "both") else 1, device="cuda") + 0.5
    ) * unit
    inverse = None if activation == "none" else torch.tensor([50.0], device="cuda")
    given = (x, codes, bias, input_scale, weight_scale, inverse, activation, plain, reserved)
    (got, quantized), (expected, codes_expected) = (
        run(*given) for run in (gemm_act, gemm_act_reference)
    )
    errors = {"plain": relative_error(got.float(), expected.float())} if plain else {}
    if active:
        errors["quantized"] = relative_error(
            quantized[:, reserved:].float(), codes_expected[:, reserved:].float()
        )
    print(
        f"{activation}, {rows} x {depth}, {plain} + {active}, "
        f"by row {by_row}, bias {biased}: {errors}"
    )
    assert errors.get("plain", 0) < 4e-3
    assert errors.get("quantized", 0) < 1.5e-2


@pytest.mark.parametrize("by_row", [False, True])
def test_joint_fp8_gemm_equals_two_gemms(by_row: bool) -> None:
    torch.manual_seed(0)
    sides = []
    for tokens in (77, 256):
        x, codes = (
            round_e4m3(torch.randn(*shape, device="cuda") * 8)
            for shape in ((2, tokens, 256), (768, 256))
        )
        scale = torch.rand(2 * tokens if by_row else 1, 1, device="cuda") + 0.5
        weight_scale = (torch.rand(768 if by_row else 1, device="cuda") + 0.5) / 1000
        sides.append((x, scale, codes, weight_scale, torch.randn(768, device="cuda").bfloat16()))
    got = joint_fp8_gemm(*sides[0], *sides[1])
    for (x, scale, codes, weight_scale, bias), output in zip(
        sides, (got[:, :77], got[:, 77:]), strict=True
    ):
        exact = (x.float().flatten(0, 1) * scale) @ (
            codes.float() * weight_scale.reshape(-1, 1)
        ).t() + bias.float()
        assert relative_error(output.flatten(0, 1).float(), exact) < 4e-3


def test_quantize_into_writes_the_prefix_only() -> None:
    importlib.import_module("mezzotint.kernels.ops.quantize_activation.op")
    x, inverse = (
        torch.randn(77, 208, device="cuda").bfloat16()[:, :64] * 20,
        torch.tensor([50.0], device="cuda"),
    )
    wide = round_e4m3(torch.randn(77, 192, device="cuda"))
    after = wide[:, 64:].float()
    torch.ops.mezzotint.quantize_into(x, inverse, wide)
    assert torch.equal(wide[:, :64].float(), round_e4m3(x.float() * inverse).float())
    assert torch.equal(wide[:, 64:].float(), after)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("rows", "prefix_columns"), [(4608, 3072), (4096, 0), (77, 64), (1, 0)])
def test_activation_quantize_kernel_equals_its_reference(
    rows: int, prefix_columns: int, activation: str
) -> None:
    """One number in a thousand may differ by one step of FP8, if its activation differs by one bit.

    The result of SwiGLU is rounded to BF16, so the largest value of a row may differ by 2^-8.
    """
    importlib.import_module("mezzotint.kernels.ops.quantize_activation.op")
    torch.manual_seed(0)
    x = torch.randn(rows, 21504, device="cuda").bfloat16()[:, :20480] * 3
    prefix = torch.randn(rows, prefix_columns, device="cuda").bfloat16() if prefix_columns else None
    (codes, scale), (expected, expected_scale) = (
        run(x, prefix, activation)
        for run in (torch.ops.mezzotint.activation_quantize, activation_quantize_reference)
    )
    torch.testing.assert_close(
        scale, expected_scale, rtol=2**-7 if activation == "swiglu" else 1e-5, atol=0
    )
    distance = (codes.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    assert int(distance[expected.float() != 0].max()) <= 1
    assert (distance != 0).float().mean() <= 1e-3


@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4"])
@pytest.mark.parametrize("resident", ["stored", "fp8"])
def test_a_fast_demo_agrees_with_the_same_layers_one_by_one_at_every_step(
    name: str, resident: str
) -> None:
    """2e-2: fused GEMMs, single-pass attention and FlashAttention 3 each round differently.

    Inputs are quantized to FP8 after that; see docs/numerics.md.
    """
    pipe = load("demo", transformer=name, device="cuda", resident=resident)
    calls = record_calls(pipe)
    expected = steps_from(pipe, calls)
    report = speed_up(pipe.transformer).report
    assert (report.fused_groups, report.fused_activations) == (2 * 2, 2 * 2 + 3)
    assert report.uses_cuda_graphs
    errors = [relative_error(a, b) for a, b in zip(steps_from(pipe, calls), expected, strict=True)]
    print(
        f"{name} resident {resident}, fast ({report.attention}): "
        f"relative error of the latents {max(errors):.2e}"
    )
    assert max(errors) <= 2e-2


@torch.no_grad()
@NUNCHAKU
@pytest.mark.parametrize("resident", ["stored", "fp8"])
def test_a_fast_layer_in_two_pieces_agrees_with_the_pieces_one_by_one(
    data: Path, name: str, resident: str
) -> None:
    """The error is that of separate layers, over several images.

    One image has 1024 latent values, and its error varies by 15 % with the rounding. proj_mlp is
    fused with q, k and v once it has no smoothing left, in FP8.
    """
    model, inputs = published(data, name, resident, "cuda")
    calls = [
        inputs | {"hidden_states": torch.randn_like(inputs["hidden_states"])} for _ in range(16)
    ]
    expected = [model(**call)[0] for call in calls]
    with unquantized_activations(model):
        exact = torch.cat([model(**call)[0] for call in calls])
    report = speed_up(model).report
    assert (report.fused_groups, report.fused_activations) == (2 + 1, 2 + 1)
    assert isinstance(model.single_transformer_blocks[0].proj_out, SplitQuantizedInputLinear)
    fast = [model(**call)[0] for call in calls]
    error, separate = (relative_error(torch.cat(results), exact) for results in (fast, expected))
    print(
        f"{name} resident {resident}, fast ({report.attention}): "
        f"{error:.2e} from exact inputs, one by one {separate:.2e}"
    )
    assert error < 1.1 * separate


def test_a_norm_is_one_kernel_that_keeps_its_rows_and_may_come_from_the_cache() -> None:
    from mezzotint.fast.inductor import inductor_backend

    def norm(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return round_e4m3((torch.nn.functional.layer_norm(x, x.shape[-1:]) * gate.tanh()).float())

    x, gate = (
        torch.randn(512, 3072, device="cuda").bfloat16(),
        torch.randn(3072, device="cuda").bfloat16(),
    )
    compiled = torch.compile(norm, fullgraph=True, backend=inductor_backend)
    got, (code,) = run_and_get_code(compiled, x, gate)
    assert "triton_per_" in code
    assert "triton_red_" not in code
    assert (
        relative_error(got.float(), norm(x, gate).float()) < 3e-2
    )  # rounded to BF16 in between, to FP8 after that
    torch._dynamo.reset()
    assert torch.equal(compiled(x, gate).view(torch.uint8), got.view(torch.uint8))


@pytest.mark.parametrize("name", ["demo-fp8", "demo-nvfp4"])
def test_modulation_worked_out_ahead_is_that_of_each_step(name: str) -> None:
    """The tables of all steps and of one step are equal, because their GEMMs have as many rows.

    2e-2: against layers in the call, where the compiler does not round the result of SiLU before
    it is quantized to FP8.
    """
    pipe, in_the_call = (
        load("demo", transformer=name, device="cuda", resident="stored") for _ in range(2)
    )
    calls = record_calls(pipe)
    fast = speed_up(pipe.transformer, scheduler=pipe.scheduler)
    assert fast.report.precomputed_layers == 2 * 2 + 3
    assert speed_up(in_the_call.transformer).report.precomputed_layers == 0
    modulation: Any = pipe.transformer.forward.function
    with torch.no_grad():
        together = [pipe.transformer(**call)[0] for call in calls]
        assert [len(table.timesteps) for table in modulation.tables.values()] == [STEPS]
        alone = []
        for call in calls:
            fast.reset_caches()
            alone.append(pipe.transformer(**call)[0])
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    in_the_call.scheduler = pipe.scheduler
    compared = zip(steps_from(pipe, calls), steps_from(in_the_call, calls), strict=True)
    errors = [relative_error(a, b) for a, b in compared]
    print(
        f"{name}, precomputed modulation: "
        f"relative error of the latents against layers in the call {max(errors):.2e}"
    )
    assert max(errors) <= 2e-2


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["flux1", "flux1 with an IP-adapter", "flux2", "qwenimage", "zimage"]
)
def test_a_fast_model_in_bf16_computes_what_diffusers_does(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch with one time step, and one in inference mode, of a model and of its copy."""
    family = name.split()[0]
    plain = four(family)
    given = arguments(family, plain, 2) | (with_ip_adapter(plain) if name != family else {})
    plain, given = plain.to("cuda", torch.bfloat16), cast(given, torch.bfloat16, "cuda")
    fast = copy.deepcopy(plain)
    report = speed_up(fast, "sdpa", scheduler=SCHEDULE).report
    assert report.deferred_residuals >= 3
    other = copy.deepcopy(fast)
    expected = result(plain, given)
    step = "t" if "t" in given else "timestep"
    for _ in range(3):  # the first one is not replayed
        assert relative_error(result(fast, given), expected) <= 3e-2
        assert relative_error(result(fast, given | {step: given[step][:1]}), expected) <= 3e-2
        with torch.inference_mode():
            assert relative_error(result(other, given), expected) <= 3e-2
    assert not [record for record in caplog.records if "recorded again" in record.message]


def test_a_recorded_transformer_follows_another_backend() -> None:
    pipe = load("demo", transformer="demo-fp8", device="cuda")
    speed_up(pipe.transformer)
    (call, *_) = record_calls(pipe)
    with torch.no_grad():
        fast = pipe.transformer(**call)[0]
        with use_backend(pipe.transformer, "reference"):
            slow = pipe.transformer(**call)[0]
        again = pipe.transformer(**call)[0]
    assert torch.equal(fast, again)
    assert not torch.equal(fast, slow)
    error = relative_error(fast, slow)
    print(f"demo-fp8, one call, fast against reference: relative error {error:.2e}")
    assert error <= 3e-2


def test_a_schedule_of_bf16_steps_holds_in_a_fast_model() -> None:
    pipe = load("demo", transformer="demo-fp8", device="cuda")
    speed_up(pipe.transformer)
    none, some, all_steps = (
        generate(pipe, PROMPTS, check_output=False, bf16_steps=StepSchedule(first, last)).latents
        for first, last in ((0, 0), (2, 2), (8, 0))
    )
    with unquantized_activations(pipe.transformer):
        exact = generate(pipe, PROMPTS, check_output=False).latents
    assert torch.equal(all_steps, exact)
    assert torch.equal(none, generate(pipe, PROMPTS, check_output=False).latents)
    assert not torch.equal(some, none)
    assert not torch.equal(some, exact)


def test_recordings_share_their_memory_and_keep_out_of_each_others_way() -> None:
    weight = torch.randn(4096, 4096, device="cuda") / 64
    graphs = CudaGraphRunner(
        lambda x: (x @ weight).relu() @ weight, lambda: None, torch.nn.Module()
    )
    inputs = [torch.randn(rows, 4096, device="cuda") for rows in (16384, 8192, 12288, 4096)]
    expected = [(x @ weight).relu() @ weight for x in inputs]
    graphs(inputs[0])
    before = torch.cuda.memory_reserved()
    for x in inputs[1:]:
        graphs(x)
    assert torch.cuda.memory_reserved() - before < 2 * inputs[0].nbytes + sum(
        x.nbytes for x in inputs
    )
    for place in (1, 2, 3, 0, 2, 0, 1, 3):
        torch.testing.assert_close(graphs(inputs[place]), expected[place])


@torch.no_grad()
def test_a_recording_is_made_anew_when_weights_were_moved(caplog: pytest.LogCaptureFixture) -> None:
    model = (
        torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.BatchNorm1d(1024)).eval().cuda()
    )
    graphs = CudaGraphRunner(model, lambda: None, model)
    x = torch.randn(64, 1024, device="cuda")
    expected = model(x)
    for _ in range(2):
        torch.testing.assert_close(graphs(x), expected)
    model.cpu()
    elsewhere = torch.full((4 * 1024, 1024), torch.nan, device="cuda")
    model.cuda()
    assert model[0].weight.data_ptr() not in graphs.watcher.last_snapshot, (
        "or nothing is tried here"
    )
    for _ in range(2):
        torch.testing.assert_close(graphs(x), expected)
    model[0] = torch.nn.Sequential(model[0], torch.nn.Linear(1024, 1024, device="cuda"))
    for _ in range(2):
        torch.testing.assert_close(graphs(x), model(x))
    assert [record.message for record in caplog.records] == [
        "the model's weights were replaced or moved since its calls were recorded: "
        "they are recorded again"
    ] * 2
    assert elsewhere.isnan().all()
    with pytest.raises(BadRequest, match="called with a tensor on cpu"):
        graphs(x.cpu())


def test_a_flag_is_read_before_what_follows_it_is_done() -> None:
    a = torch.randn(8192, 8192, device="cuda")
    early = []
    for value in (True, False, True):
        flag = torch.tensor(value, device="cuda")
        wait = read_back(flag)
        for _ in range(20):
            a @ a
        flag.logical_not_()
        assert wait() == value
        early.append(not torch.cuda.current_stream().query())
    assert all(early[1:]), (
        "waits for the GEMMs too; the first time, while kernels are loaded, it may"
    )


def test_fp8_attention_costs_what_is_written_of_it() -> None:
    pytest.importorskip("fa3_fwd_interface")
    q, k, v = (torch.randn(1, 4608, 24, 128, device="cuda").bfloat16() for _ in range(3))
    exact, bf16, fp8 = (
        ATTENTION_BACKENDS[name].run(q, k, v) for name in ("cudnn", "fa3", "fa3_fp8")
    )
    errors = relative_error(bf16, exact), relative_error(fp8, exact)
    print("relative error on Gaussian inputs: fa3 {:.2e}, fa3_fp8 {:.2e}".format(*errors))
    assert errors[0] <= 5e-3
    assert errors[1] <= 6e-2
