"""A small round-to-nearest writer of ModelOpt's HF export, for tests that need a quantized copy."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.checkpoint_edits import WEIGHTS

E4M3_MAX, E2M1_MAX, INT8_MAX, GROUP = 448.0, 6.0, 127.0, 16
RANK = 16
MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Between the neighboring magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 of E2M1."""

Quantizer = Callable[[Tensor, float], dict[str, Tensor]]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def calibration(model: nn.Module) -> Iterator[dict[str, float]]:
    """Yield {linear: largest magnitude of its inputs} of calls of `model` inside the context."""
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), inputs[0].abs().max().item())

        return look

    handles = [
        module.register_forward_pre_hook(watch(name)) for name, module in linears(model).items()
    ]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def fp8(weight: Tensor, largest_input: float) -> dict[str, Tensor]:
    scale = weight.abs().max() / E4M3_MAX
    return {
        "weight": (weight / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn),
        "weight_scale": scale,
        "input_scale": torch.tensor(largest_input / E4M3_MAX),
    }


def nvfp4(weight: Tensor, largest_input: float) -> dict[str, Tensor]:
    unit = weight.abs().max() / (E2M1_MAX * E4M3_MAX)
    groups = weight.unflatten(1, (-1, GROUP))
    scales = (
        (groups.abs().amax(dim=2) / E2M1_MAX / unit).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    )
    values = (groups / (scales.float() * unit).unsqueeze(2)).flatten(1)
    codes = torch.bucketize(values.abs(), MIDPOINTS) + 8 * (values < 0)
    return {
        "weight": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8),
        "weight_scale": scales,
        "weight_scale_2": unit,
        "input_scale": torch.tensor(largest_input / (E2M1_MAX * E4M3_MAX)),
    }


def smoothing(weight: Tensor) -> Tensor:
    """A pre_quant_scale, the same for all layers with an input so wide."""
    return (
        torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1])) + 0.5
    ).bfloat16()


def nvfp4_awq(weight: Tensor, largest_input: float) -> dict[str, Tensor]:
    scale = smoothing(weight)
    return nvfp4(weight / scale.float(), 1.5 * largest_input) | {"pre_quant_scale": scale}


def nvfp4_svd(weight: Tensor, largest_input: float) -> dict[str, Tensor]:
    scale = smoothing(weight)
    u, sizes, v = torch.linalg.svd(weight / scale.float(), full_matrices=False)
    up, down = (u[:, :RANK] * sizes[:RANK]).bfloat16(), v[:RANK].bfloat16()
    rest = nvfp4(weight / scale.float() - up.float() @ down.float(), 1.5 * largest_input)
    return rest | {
        "pre_quant_scale": scale,
        "svdquant_lora_a": down.contiguous(),
        "svdquant_lora_b": up.contiguous(),
    }


def w4a16_nvfp4(weight: Tensor, largest_input: float) -> dict[str, Tensor]:
    parts = nvfp4(weight, largest_input)
    del parts["input_scale"]
    return parts


def w8a8_sq_per_channel(weight: Tensor, largest_input: float) -> dict[str, Tensor]:
    smooth = smoothing(weight)
    scaled = weight / smooth.float()
    scale = scaled.abs().amax(1) / INT8_MAX
    return {
        "weight": (scaled / scale[:, None]).round().to(torch.int8),
        "weight_scale": scale,
        "input_scale": torch.tensor(1.5 * largest_input / INT8_MAX),
        "pre_quant_scale": smooth,
    }


QUANTIZERS: dict[str, Quantizer] = {
    quantize.__name__: quantize
    for quantize in (fp8, nvfp4, nvfp4_awq, nvfp4_svd, w4a16_nvfp4, w8a8_sq_per_channel)
}


def export(model: nn.Module, largest: dict[str, float], method: str, folder: Path) -> Path:
    """Export `model`, with each linear of `largest` quantized; `largest` is from `calibration`."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    for name in linears(model).keys() & largest.keys():
        parts = QUANTIZERS[method](tensors[f"{name}.weight"].float(), largest[name])
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    producer = {"name": "modelopt", "version": "0.47.0"}
    quantization = {"quant_method": "modelopt", "quant_algo": method.upper(), "producer": producer}
    config = json.loads(model.to_json_string())  # type: ignore[operator]
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def in_original_names(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Return a transformer's tensors in original form: renamed, QKV fused, shift before scale."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        original = name
        for pattern, replacement in rules:
            original = re.sub(pattern, replacement, original)
        part = re.search(r"(?<=to_)[qkv]|(?<=add_)[qkv](?=_proj)|proj_mlp", name)
        halves = (
            tensor.chunk(2)
            if original.startswith("final_layer.adaLN") and "norm_out" in name
            else (tensor,)
        )
        groups.setdefault(original, {})["qkvproj_mlp".index(part[0]) if part else 0] = torch.cat(
            halves[::-1]
        )
    return {name: torch.cat([parts[i] for i in sorted(parts)]) for name, parts in groups.items()}
