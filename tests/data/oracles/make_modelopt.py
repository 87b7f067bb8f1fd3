#!/usr/bin/env python3
"""Write the golden outputs of NVIDIA ModelOpt for the tests: tests/data/oracles/modelopt_*.

This development tool needs nvidia-modelopt 0.47 and diffusers, and runs on the CPU.

    modelopt_int8, modelopt_w4a16, modelopt_awq/
        the output of export_hf_checkpoint for a tiny FLUX.1 with random weights
    modelopt_int8_samples.safetensors, ...
        for one layer, its BF16 weights before quantization, an input x, and for INT8 the output
        of ModelOpt's own simulation
    modelopt_nvfp4.safetensors
        difficult matrices with ModelOpt's codes, block scales, global scale and decoded values
"""

import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from diffusers import FluxTransformer2DModel
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import save_file

ORACLES = Path(__file__).resolve().parent
CONFIG = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": False,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "pooled_projection_dim": 16,
}
LAYER = "transformer_blocks.0.ff.net.0.proj"
EMBEDDERS = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")


def nvfp4_on_cpu(
    matrix: torch.Tensor, block_size: int, amax: torch.Tensor, *_: int
) -> torch.Tensor:
    """Simulate ModelOpt's NVFP4 with its PyTorch class, because its kernel needs CUDA."""
    double_scale = amax.amax().float() / (6 * 448)
    quantized, scale, double_scale = NVFP4QTensor.quantize(
        matrix, block_size, weights_scaling_factor_2=double_scale
    )
    kwargs = {"scale": scale, "double_scale": double_scale, "block_sizes": {-1: block_size}}
    return quantized.dequantize(matrix.dtype, **kwargs)


tensor_quant.dynamic_block_quantize_op = nvfp4_on_cpu


def inputs(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=random).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=random).bfloat16(),
        "pooled_projections": torch.randn(1, 16, generator=random).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def export(name: str, preset: dict, simulate: bool) -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**CONFIG).bfloat16().eval()
    base = model.get_submodule(LAYER).weight.detach().clone()
    mtq.quantize(model, preset, lambda m: [m(**inputs(seed)) for seed in range(2)])
    mtq.disable_quantizer(model, lambda quantizer: quantizer.startswith(EMBEDDERS))
    x = torch.randn(4, base.shape[1], generator=torch.Generator().manual_seed(7))
    samples = {"base": base, "x": x}
    if simulate:
        samples["y"] = model.get_submodule(LAYER).float()(x).detach()
        model.get_submodule(LAYER).bfloat16()
    export_hf_checkpoint(model, export_dir=ORACLES / name)
    config = ORACLES / name / "config.json"
    config.write_text(
        json.dumps(
            {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        )
    )
    save_file(samples, ORACLES / f"{name}_samples.safetensors")


def matrices() -> dict[str, torch.Tensor]:
    """Matrices that are hard to quantize, float32."""
    random = torch.Generator().manual_seed(11)
    plain = torch.randn(32, 64, generator=random)
    outlier = torch.randn(32, 64, generator=random) * 1e-4
    outlier[3, 5] = 1e4
    rows = torch.logspace(-8, 2, 32)[:, None] * torch.randn(32, 64, generator=random)
    zeros = torch.randn(32, 64, generator=random)
    zeros[4] = 0
    zeros[:, 16:32] = 0
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(32, 8)
    midpoints[:, ::2] *= -1
    small = {
        "random": plain,
        "outlier": outlier,
        "wide": rows,
        "zeros": zeros,
        "midpoints": midpoints,
    }
    sizes = {"one_row": (1, 32), "odd_rows": (7, 96), "odd_tiles": (131, 32)}
    odd = {name: torch.randn(size, generator=random) for name, size in sizes.items()}
    below = torch.where(midpoints.abs() < 6, midpoints * (1 - 2**-20), midpoints)
    return small | odd | {"tiny": plain * 1e-30, "huge": plain * 1e30, "below_midpoints": below}


def nvfp4() -> None:
    tensors = {}
    for name, matrix in matrices().items():
        quantized, scale, double_scale = NVFP4QTensor.quantize(matrix, 16)
        decoded = quantized.dequantize(
            torch.float32, scale=scale, double_scale=double_scale, block_sizes={-1: 16}
        )
        tensors |= {
            f"{name}.matrix": matrix,
            f"{name}.codes": quantized._quantized_data,
            f"{name}.block_scale": scale,
            f"{name}.global_scale": double_scale.float().reshape(()),
            f"{name}.decoded": decoded.float(),
        }
    save_file(tensors, ORACLES / "modelopt_nvfp4.safetensors")


if __name__ == "__main__":
    ORACLES.mkdir(parents=True, exist_ok=True)
    nvfp4()
    export("modelopt_int8", mtq.INT8_SMOOTHQUANT_CFG, simulate=True)
    export("modelopt_w4a16", mtq.W4A16_NVFP4_CFG, simulate=False)
    export("modelopt_awq", mtq.NVFP4_AWQ_LITE_CFG, simulate=False)
