#!/usr/bin/env python3
"""Write a tiny Qwen-Image in all of ComfyUI's integer formats and e5m2, and its values.

A development tool; it needs comfy-kitchen 0.2.40, which quantizes and dequantizes every layer:
PYTHONPATH=src:tests python tests/data/comfy_qwenimage_formats/make.py
"""

import json
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from support.comfy_files import FORMS, stored_layer
from support.golden_cases import SMALL_QWEN

FOLDER = Path(__file__).resolve().parent
ROWS, TOKENS = 4, 4
SEED = 16


def main() -> None:
    torch.manual_seed(SEED)
    sizes = {key: value for key, value in SMALL_QWEN.items() if not key.startswith("_")}
    model = diffusers.QwenImageTransformer2DModel(**sizes).bfloat16()
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [n for n, v in stored.items() if "blocks" in n and v.ndim == 2]
    expected, forms = {}, {}
    for number, name in enumerate(layers):
        module = name.removesuffix(".weight")
        forms[module] = list(FORMS)[number % len(FORMS)]
        tensors, weights = stored_layer(module, stored[name], forms[module])
        rows = torch.randperm(len(weights))[:ROWS].sort().values
        x = torch.randn(TOKENS, weights.shape[1]).bfloat16()
        product = x.double() @ weights.double().t() + stored[f"{module}.bias"].double()
        expected |= {f"{module}.dequantized": weights[rows], f"{module}.rows": rows}
        expected |= {f"{module}.x": x, f"{module}.y": product.float()}
        stored |= tensors
    save_file(stored, FOLDER / "checkpoint/qwen-image-formats.safetensors")
    save_file({n: v.contiguous() for n, v in expected.items()}, FOLDER / "expected.safetensors")
    about = {"tool": "comfy-kitchen (eager)", "tool_version": "comfy-kitchen 0.2.40"}
    about |= {"family": "qwenimage", "seeds": [SEED], "formats": forms}
    (FOLDER / "README.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
