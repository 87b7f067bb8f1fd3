"""What needs a CUDA device: `pytest -m gpu tests/test_gpu.py`."""

from typing import Any

import pytest
import torch

from mezzotint.nn import QuantLinear, quant_linears, use_backend
from mezzotint.pipelines import load, paint, sampling_of
from test_kernels import dynamic, fp8_tensor, with_bias

pytestmark = pytest.mark.gpu
STEPS = 20
PROMPTS = ("a large red circle on a blue background", "a small green triangle on a yellow background")


def relative_error(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    return float(torch.linalg.norm((candidate - reference).float()) / torch.linalg.norm(reference.float()))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360)])
def test_scaled_mm_agrees_with_reference_on_flux_sizes(shape: tuple[int, int], compiled: bool) -> None:
    """5e-3: the output is rounded to BF16 (1.7e-3), and the tensor cores accumulate with fewer bits than float32."""
    layer = QuantLinear(with_bias(fp8_tensor(*shape), torch.randn(shape[0]))).to("cuda")
    assert layer.selection.backend.name == "scaled_mm"
    x = torch.randn(4608, shape[1], device="cuda").bfloat16()
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    with use_backend("reference"):
        expected = layer(x)
    error = relative_error(y, expected)
    print(f"scaled_mm {shape} compiled={compiled}: relative error {error:.2e}")
    assert error <= 5e-3


def record_calls(pipe: Any) -> list[dict[str, Any]]:
    """The arguments of every call of the transformer while one picture is painted."""
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _module, _arguments, given: calls.append(dict(given)), with_kwargs=True
    )
    paint(pipe, PROMPTS[:1], sampling=sampling_of("demo").but(steps=STEPS))
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
    x = (torch.randn(4608, 3072, device="cuda") * torch.logspace(-3, 3, 4608, device="cuda")[:, None]).bfloat16()
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    with use_backend("reference"):
        expected = layer(x)
    assert relative_error(y, expected) <= 5e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_demo_agrees_with_reference_at_every_step(compiled: bool, dtype: torch.dtype) -> None:
    """Each step from the same latents. A free run is no test of a kernel: see docs/numerics.md."""
    pipe = load("demo", transformer="demo-fp8", device="cuda", dtype=dtype)
    assert {layer.selection.backend.name for layer in quant_linears(pipe.transformer).values()} == {"scaled_mm"}
    with use_backend("reference"):
        calls = record_calls(pipe)
        expected = steps_from(pipe, calls)
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    errors = [relative_error(a, b) for a, b in zip(steps_from(pipe, calls), expected, strict=True)]
    print(f"demo-fp8 on scaled_mm, {dtype}, compiled={compiled}: relative error of the latents {max(errors):.2e}")
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
    """The floor: the reference against itself, its first latents changed by one part in a million."""
    pipe = load("demo", transformer="demo-fp8", device="cuda", dtype=torch.float32)
    with use_backend("reference"):
        expected = paint(pipe, PROMPTS).latents
        handle = pipe.transformer.x_embedder.register_forward_hook(lambda _m, _i, out: out * (1 + 1e-6))
        floor = relative_error(paint(pipe, PROMPTS).latents, expected)
        handle.remove()
    error = relative_error(paint(pipe, PROMPTS).latents, expected)
    print(f"demo-fp8, free run of 8 steps: scaled_mm {error:.2e}, reference against itself {floor:.2e}")
    assert error <= 2 * floor
