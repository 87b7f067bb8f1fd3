#!/usr/bin/env python3
"""Write three quantized copies of the demo's transformer with the original tools of each format.

This is a development tool: Mezzotint never imports NVIDIA ModelOpt or comfy-kitchen. It needs
the packages in requirements.txt. Given a FluxPipeline in the directory `demo`, it writes

    demo-fp8/                      ModelOpt FP8, written by its export_hf_checkpoint
    demo-nvfp4/                    ModelOpt NVFP4, written by its export_hf_checkpoint
    demo-nvfp4-comfy.safetensors   comfy-kitchen NVFP4 in one file, with ComfyUI's metadata

Every nn.Linear of the double and single blocks is quantized; embedders, norm_out and proj_out stay
BF16. The ranges of the activations are the largest values while the pipeline generates a batch of
training captions in float32. The tool then decodes the three copies with its own code, compares
them with the BF16 weights, and only then replaces older copies.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from comfy_kitchen.tensor import QuantizedTensor
from diffusers import FluxPipeline, FluxTransformer2DModel
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.opt.config_loader import load_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo_model.shapes import IMAGE_SIZE, split_captions

EXAMPLES = """\
examples:
  python -m demo_model.quantize
  python -m demo_model.quantize --prompts 4 --steps 2 --out /tmp/quick-look
  python -m demo_model.quantize --pipeline /tmp/another-pipeline
"""
DEMO = Path(__file__).resolve().parents[1] / "src/mezzotint_demo/pipeline"
WEIGHTS = "diffusion_pytorch_model.safetensors"
GUIDANCE = 3.5
SEED = 0

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
QUANTIZERS = ("weight_quantizer", "input_quantizer")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX = 448.0
NVFP4_MAX = E4M3_MAX * E2M1[-1]

Tensors = dict[str, Tensor]


# --------------------------------------------------------------------------------------- quantizing


def block_weights(transformer: FluxTransformer2DModel) -> dict[str, Tensor]:
    """Names and weights [N, K] of the layers to quantize."""
    return {
        name: module.weight.detach()
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(BLOCKS)
    }


def generate(pipeline: FluxPipeline, prompts: list[str], steps: int) -> Tensor:
    """Run `prompts` as one batch; returns packed latents [B, tokens, in_channels]."""
    return pipeline(
        prompt=prompts,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images


def calibrate(pipeline: FluxPipeline, preset: str, prompts: list[str], steps: int) -> None:
    """Insert the quantizers of a ModelOpt preset for diffusers, and calibrate their ranges.

    The preset also quantizes LayerNorms and layers outside the blocks; those are disabled.
    """
    transformer = pipeline.transformer
    wanted = {
        f"{layer}.{quantizer}" for layer in block_weights(transformer) for quantizer in QUANTIZERS
    }
    config = load_config(f"configs/ptq/presets/diffusers/{preset}")
    mtq.quantize(transformer, config, lambda _: generate(pipeline, prompts, steps))
    mtq.disable_quantizer(transformer, lambda name: name not in wanted)


def write_modelopt(source: Path, preset: str, target: Path, prompts: list[str], steps: int) -> None:
    """Quantize the transformer of the pipeline in `source` and export it to the folder `target`."""
    pipeline = FluxPipeline.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    calibrate(pipeline, preset, prompts, steps)
    pipeline.transformer.register_to_config(_name_or_path="demo")  # not the path on this machine
    export_hf_checkpoint(pipeline.transformer.to(torch.bfloat16), export_dir=target)


def write_comfy(transformer: FluxTransformer2DModel, calibrated: Tensors, target: Path) -> None:
    """Quantize the BF16 `transformer` with comfy-kitchen, with the input scales of an NVFP4 export.

    ComfyUI reads two kinds of metadata, and both are written: the header entry of its published
    files, and a marker tensor per layer of files that it saves. Names are those of diffusers.
    """
    tensors = dict(transformer.state_dict())
    label = {"format": "nvfp4"}
    for layer, weight in block_weights(transformer).items():
        scale = weight.abs().max().float() / NVFP4_MAX
        quantized = QuantizedTensor.from_float(weight, "TensorCoreNVFP4Layout", scale=scale)
        tensors.update(quantized.state_dict(f"{layer}.weight"))
        tensors[f"{layer}.input_scale"] = calibrated[f"{layer}.input_scale"]
        tensors[f"{layer}.comfy_quant"] = torch.tensor(
            list(json.dumps(label).encode()), dtype=torch.uint8
        )
    labels = {"format_version": "1.0", "layers": dict.fromkeys(block_weights(transformer), label)}
    save_file(tensors, target, {"format": "pt", "_quantization_metadata": json.dumps(labels)})


# ------------------------------------------------------------------------------------- reading back


def unpack_e2m1(packed: Tensor, high_first: bool) -> Tensor:
    """Return the values [N, K] of two 4-bit codes per byte [N, K / 2]."""
    low, high = packed & 15, packed >> 4
    codes = torch.stack((high, low) if high_first else (low, high), dim=-1).flatten(1).long()
    return torch.tensor([*E2M1, *(-value for value in E2M1)])[codes]


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return block scales [rows, columns] from tiles of 128 x 4; rows 32 apart are adjacent."""
    high, wide = scales.shape[0] // 128, scales.shape[1] // 4
    tiles = scales.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4)[:rows, :columns]


def dequantize(tensors: Tensors, layer: str) -> Tensor:
    """Return the float32 weight [N, K] of `layer`; marker tensors indicate ComfyUI's packing."""
    weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"].float()
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale
    comfy = f"{layer}.comfy_quant" in tensors
    values = unpack_e2m1(weight, high_first=comfy)
    rows, columns = values.shape
    if comfy:
        scale = unswizzle(scale, rows, columns // 16)
    blocks = values.view(rows, -1, 16) * scale[:, :, None]
    return blocks.view(rows, columns) * tensors[f"{layer}.weight_scale_2"]


@dataclass(frozen=True)
class Summary:
    """The content of one quantized file, compared with the BF16 weights."""

    size: int  # bytes
    layers: int
    error: float  # of all quantized weights together, relative
    worst_error: float  # of one layer
    worst_layer: str
    smallest_amax: float  # of the layers' inputs
    largest_amax: float


def summarize(file: Path, originals: dict[str, Tensor]) -> Summary:
    """Compare `file` with the original weights.

    originals   {layer: weight [N, K]}
    Raises      ValueError unless exactly these layers are quantized
    """
    tensors = load_file(file)
    found = {
        name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")
    }
    if found != set(originals):
        raise ValueError(f"{file}: wrongly quantized or left out: {sorted(found ^ set(originals))}")
    wrong = {
        layer: (dequantize(tensors, layer) - weight).norm() for layer, weight in originals.items()
    }
    right = {layer: weight.float().norm() for layer, weight in originals.items()}
    errors = {layer: float(wrong[layer] / right[layer]) for layer in originals}
    total = torch.stack([*wrong.values()]).norm() / torch.stack([*right.values()]).norm()
    fp8 = f"{min(found)}.weight_scale_2" not in tensors
    amax = [
        float(tensors[f"{layer}.input_scale"]) * (E4M3_MAX if fp8 else NVFP4_MAX)
        for layer in originals
    ]
    worst = max(errors, key=errors.__getitem__)
    return Summary(
        file.stat().st_size, len(found), float(total), errors[worst], worst, min(amax), max(amax)
    )


def table(summaries: dict[str, Summary]) -> str:
    """One line per copy, under a headline."""
    line = "{:30}{:>10}{:>8}{:>9}{:>9}  {:18}{}".format
    lines = [line("copy", "bytes", "layers", "error", "worst", "amax of inputs", "worst layer")]
    for name, row in summaries.items():
        amax = f"{row.smallest_amax:.3g} to {row.largest_amax:.3g}"
        errors = f"{row.error:.5f}", f"{row.worst_error:.5f}"
        lines.append(line(name, row.size, row.layers, *errors, amax, row.worst_layer))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ running


def replace(new: Path, target: Path) -> None:
    """Move the file or directory `new` to `target`, in place of what is there."""
    if target.is_dir():
        shutil.rmtree(target)
    new.replace(target)


def quantize(source: Path, out: Path, prompts: list[str], steps: int) -> dict[str, Summary]:
    """Write three copies of the pipeline in `source` to the folder `out`; return summaries."""
    transformer = FluxTransformer2DModel.from_pretrained(
        source, subfolder="transformer", dtype=torch.bfloat16, local_files_only=True
    )
    name = "demo"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as temporary:
        stage = Path(temporary)
        fp8, nvfp4, comfy = (
            stage / f"{name}-{copy}" for copy in ("fp8", "nvfp4", "nvfp4-comfy.safetensors")
        )
        write_modelopt(source, "fp8", fp8, prompts, steps)
        write_modelopt(source, "nvfp4", nvfp4, prompts, steps)
        write_comfy(transformer, load_file(nvfp4 / WEIGHTS), comfy)
        files = {fp8: fp8 / WEIGHTS, nvfp4: nvfp4 / WEIGHTS, comfy: comfy}
        originals = block_weights(transformer)
        summaries = {copy.name: summarize(file, originals) for copy, file in files.items()}
        for copy in files:
            replace(copy, out / copy.name)
    return summaries


def main() -> None:
    """Parse the command line, quantize, and print the table."""
    parser = argparse.ArgumentParser(
        description="Write FP8, NVFP4 and ComfyUI-style NVFP4 copies of the demo's transformer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pipeline", type=Path, default=DEMO, help="FluxPipeline (default: the demo)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-copies"), help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=int, default=32, help="training captions (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="denoising steps (default: %(default)s)"
    )
    options = parser.parse_args()
    source = options.pipeline.resolve()
    prompts = split_captions()[0][: options.prompts]
    print(table(quantize(source, options.out, prompts, options.steps)))


if __name__ == "__main__":
    main()
