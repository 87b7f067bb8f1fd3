"""A tiny pipeline's transformer as a file of every format that its family's users have."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.checkpoint import Checkpoint
from mezzotint.families import families
from mezzotint.formats.comfy_metadata import MARKER
from mezzotint.formats.readers.bitsandbytes import NF4
from mezzotint.formats.readers.svdquant import GELU_SHIFT, SHIFTED_LAYER
from mezzotint.formats.writers import mezzotint as mezzotint_format
from mezzotint.layouts import swap_nibbles, to_tiles
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.schemes.awq import encode_awq
from mezzotint.tensor import PLAIN, QuantTensor
from support import gguf_files
from support.comfy_files import stored_layer
from support.modelopt_exporter import (
    E4M3_MAX,
    QUANTIZERS,
    RANK,
    export,
    fp8,
    in_original_names,
    nvfp4,
)
from support.nunchaku_files import as_nunchaku, as_rows
from support.original_names import TO_ORIGINAL
from support.pipeline_cases import Case

ORIGINAL = {
    "flux1": "flux1",
    "flux2": "flux2",
    "wan_ti2v": "wan2.2",
    "zimage": "z",
    "qwenimage": "qwen",
}
"""{pipeline: whose spelling its makers' single file has}"""
FILE = "model.safetensors"
ARCHITECTURES = {
    "flux1": "flux",
    "flux2": "flux",
    "wan_ti2v": "wan",
    "zimage": "lumina2",
    "qwenimage": "qwen_image",
}
"""{pipeline: the architecture that ComfyUI-GGUF's converter states}"""
GROUPS_OF_64 = ("awq", "w4a4")
"""Forms that need a multiple of 64 input features; the tiny Wan is 32 wide, and Z-Image 96."""
Maker = Callable[[Case, Path], Path]


def original(case: Case) -> dict[str, Tensor]:
    return in_original_names(
        case.reference.transformer.state_dict(), TO_ORIGINAL[ORIGINAL[case.name]]
    )


def saved(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> Path:
    """A single file, without a configuration: the pipeline has one."""
    folder.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / FILE, metadata
    )
    return folder / FILE


def diffusers_names(case: Case, _folder: Path) -> Path:
    return case.folder / "transformer"


def makers_names(case: Case, folder: Path) -> Path:
    return saved(original(case), folder)


def modelopt(method: str) -> Maker:
    return lambda case, folder: export(
        case.reference.transformer, case.largest["transformer"], method, folder
    )


def calibrated(case: Case, folder: Path) -> Path:
    """ModelOpt's folder of hf and ckpt/backbone.pt, its weights still BF16."""
    model, largest = case.reference.transformer, case.largest["transformer"]
    model.save_pretrained(folder / "hf")
    weights = model.state_dict()
    ranges = {f"{name}.input_quantizer._amax": torch.tensor(size) for name, size in largest.items()}
    ranges |= {
        f"{name}.weight_quantizer._amax": weights[f"{name}.weight"].float().abs().max()
        for name in largest
    }
    (folder / "ckpt").mkdir()
    torch.save({"model_state_dict": ranges}, folder / "ckpt/backbone.pt")
    return folder


def kitchen_nvfp4(weight: Tensor, largest_input: float) -> dict[str, Tensor]:
    parts = nvfp4(weight, largest_input)
    arranged = {
        "weight": swap_nibbles(parts["weight"]),
        "weight_scale": to_tiles(parts["weight_scale"]),
    }
    return parts | arranged


def kitchen_mxfp8(weight: Tensor, _largest_input: float) -> dict[str, Tensor]:
    groups = weight.unflatten(1, (-1, 32))
    scale = (groups.abs().amax(2) / E4M3_MAX).log2().ceil().exp2()
    codes = (groups / scale.unsqueeze(2)).flatten(1).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": to_tiles(scale.to(torch.float8_e8m0fnu))}


def fp8_rows(weight: Tensor, _largest_input: float) -> dict[str, Tensor]:
    """Return the `fp8r` of FLUX.3."""
    scale = weight.abs().amax(1) / E4M3_MAX
    return {"weight": (weight / scale[:, None]).to(torch.float8_e4m3fn), "weight_scale": scale}


KITCHEN = {"fp8": fp8, "nvfp4": kitchen_nvfp4, "mxfp8": kitchen_mxfp8}
"""{method: quantizer of comfy-kitchen}"""
FLUX3 = {"fp8r": fp8_rows, "nvfp4 rows": nvfp4}
"""{method: quantizer of FLUX.3's forms}"""
NOTES = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}


def kitchen(case: Case, method: str) -> dict[str, Tensor]:
    """Return original names, with each matrix of a block as a quantizer writes it."""
    tensors = original(case)
    for name, weight in list(tensors.items()):
        module = name.removesuffix(".weight")
        if (
            module == name
            or weight.ndim != 2
            or ".0." not in name
            or any(side % 32 for side in weight.shape)
        ):
            continue
        parts = (KITCHEN | FLUX3)[method](weight.float(), 1.0)
        parts.pop("input_scale", None)
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    return tensors


def comfy(method: str) -> Maker:
    def make(case: Case, folder: Path) -> Path:
        tensors = kitchen(case, method)
        marker = torch.tensor(
            list(json.dumps({"format": NOTES[method]}).encode()), dtype=torch.uint8
        )
        layers = [
            key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")
        ]
        return saved(tensors | {layer + MARKER: marker.clone() for layer in layers}, folder)

    return make


def comfy_form(form: str) -> Maker:
    """Return a maker of files whose blocks are in a form of `comfy_files`, in makers' names."""

    def make(case: Case, folder: Path) -> Path:
        tensors = original(case)
        for name, weight in list(tensors.items()):
            module = name.removesuffix(".weight")
            multiple = 64 if form in GROUPS_OF_64 else 16
            fits = weight.ndim == 2 and weight.shape[1] % multiple == 0
            if module != name and ".0." in name and fits:
                tensors |= stored_layer(module, weight, form)[0]
        return saved(tensors, folder)

    return make


def legacy(case: Case, folder: Path) -> Path:
    """ComfyUI's scaled_fp8."""
    tensors = {
        key.replace(".weight_scale", ".scale_weight"): value
        for key, value in kitchen(case, "fp8").items()
    }
    prefix = "model.diffusion_model." if any(key.startswith("model.") for key in tensors) else ""
    return saved(
        tensors | {f"{prefix}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, folder
    )


def bfl(method: str) -> Maker:
    return lambda case, folder: saved(kitchen(case, method), folder)


def nf4(weight: Tensor) -> dict[str, Tensor]:
    """Return bitsandbytes' NF4 of a matrix, in blocks of 64 of the flattened matrix."""
    flat = weight.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % 64)).reshape(-1, 64)
    absmax, levels = blocks.abs().amax(1), torch.tensor(NF4)
    distances = (blocks / absmax.clamp(min=1e-30)[:, None])[..., None] - levels
    index = distances.abs().argmin(-1).reshape(-1)[: flat.numel()].to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
    text = json.dumps(state | {"shape": list(weight.shape)}).encode()
    return {
        "weight": (index[::2] << 4 | index[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": levels,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }


def in_blocks(weight: Tensor) -> dict[str, Tensor]:
    """Return FP8 in blocks of 32 x 32, as DeepSeek names the scales."""
    rows, columns = (-(-side // 32) for side in weight.shape)
    more = (0, columns * 32 - weight.shape[1], 0, rows * 32 - weight.shape[0])
    padded = torch.nn.functional.pad(weight.float(), more)
    scale = padded.view(rows, 32, columns, 32).abs().amax((1, 3)).clamp(min=1e-12) / E4M3_MAX
    spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    codes = (padded / spread)[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}


def quanto(weight: Tensor) -> dict[str, Tensor]:
    """Return optimum-quanto's qint8, as WanGP's files have it."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    ones = {"input_scale": torch.ones(()), "output_scale": torch.ones(())}
    return {"weight._data": codes, "weight._scale": scale} | ones


def first_blocks(quantize: Callable[[Tensor], dict[str, Tensor]]) -> Maker:
    """Return a maker that quantizes the first blocks' matrices, under the makers' names."""

    def make(case: Case, folder: Path) -> Path:
        tensors = original(case)
        for name, weight in list(tensors.items()):
            if name.endswith(".weight") and weight.ndim == 2 and ".0." in name:
                module = name.removesuffix(".weight")
                del tensors[name]
                parts = quantize(weight)
                tensors |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
        return saved(tensors, folder)

    return make


def svdquant(case: Case, scheme: Scheme, folder: Path, modulation: bool = False) -> Checkpoint:
    """Write the blocks' linears as SVDQuant layers that Nunchaku supports, in Mezzotint's format.

    modulation   write the modulation layers in AWQ
    """
    model, config = (
        case.reference.transformer,
        json.loads(case.reference.transformer.to_json_string()),
    )
    names = families()[case.name].nunchaku
    targets = {
        target
        for table in names.blocks
        for holds in table.layers.values()
        if holds.rows
        for target in holds.targets
    }
    weights = model.state_dict()
    layers: dict[str, list[QuantTensor]] = {}
    for module in case.largest["transformer"]:
        block, _, leaf = module.partition(".0.")
        if leaf in targets and any(table.block.fullmatch(f"{block}.0") for table in names.blocks):
            layers[module] = _pieces(
                module, weights[f"{module}.weight"].float(), weights.get(f"{module}.bias"), scheme
            )
        elif modulation and leaf in names.awq:
            layers[module] = [_awq(weights[f"{module}.weight"])]
    writer = mezzotint_format.TARGET
    stored = {
        name: value
        for name, value in weights.items()
        if name.removesuffix(".weight").removesuffix(".bias") not in layers
    }
    for module, pieces in layers.items():
        stored |= writer.layer({module: pieces}).tensors
    saved(stored, folder)
    quantization = writer.declare(layers, ()).quantization
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return Checkpoint.open(folder)


def _pieces(module: str, weight: Tensor, bias: Tensor | None, scheme: Scheme) -> list[QuantTensor]:
    """The layer, or FLUX.1's last one of a single block in the two pieces that its input has."""
    if module.startswith("single") and module.endswith("proj_out"):
        width = len(weight)
        return [
            _svdquant(module.replace("proj_out", "out_proj"), weight[:, :width], bias, scheme),
            _svdquant(module.replace("proj_out", "mlp_fc2"), weight[:, width:], None, scheme),
        ]
    return [_svdquant(module, weight, bias, scheme)]


def _awq(weight: Tensor) -> QuantTensor:
    """The bias is zero, because not every number less 1 is a BF16 number."""
    return QuantTensor(
        AWQ_W4A16,
        PLAIN,
        tuple(weight.shape),
        encode_awq(weight) | {"bias": torch.zeros(len(weight))},
    )


def _svdquant(stored: str, weight: Tensor, bias: Tensor | None, scheme: Scheme) -> QuantTensor:
    """Round to nearest, with a low-rank branch; layers with the same input share proj_down."""
    out, in_ = weight.shape
    chance = torch.Generator().manual_seed(in_)
    smooth = (torch.rand(in_, generator=chance) + 0.5).bfloat16()
    down = torch.linalg.qr(torch.randn(in_, RANK, generator=chance))[0].t().bfloat16().contiguous()
    up = (weight @ down.float().t()).bfloat16()
    residual = (weight - up.float() @ down.float()) * smooth.float()
    parts = {"smooth": smooth, "proj_down": down, "proj_up": up}
    if scheme is SVDQUANT_INT4:
        groups = residual.unflatten(1, (-1, 64))
        scale = (groups.abs().amax(2) / 7).bfloat16()
        codes = (groups / scale.float().unsqueeze(2)).round().clamp(-8, 7).flatten(1).to(
            torch.int64
        ) % 16
        parts |= {
            "codes": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8),
            "block_scale": scale,
        }
    else:
        written = nvfp4(residual, 1.0)
        parts |= {"codes": written["weight"], "block_scale": written["weight_scale"]}
        parts["channel_scale"] = written["weight_scale_2"].expand(out).bfloat16().contiguous()
    if bias is not None or SHIFTED_LAYER.fullmatch(stored):
        parts["bias"] = torch.zeros(out).bfloat16() if bias is None else bias.bfloat16()
    if scheme is SVDQUANT_INT4 and SHIFTED_LAYER.fullmatch(stored):
        parts["shift"] = torch.tensor(GELU_SHIFT)
        moved = scheme.dequantize_bias({**parts, "bias": torch.zeros(out)})
        parts["bias"] = (parts["bias"].float() - moved).bfloat16()
    return QuantTensor(scheme, PLAIN, (out, in_), parts)


def nunchaku(scheme: Scheme) -> Maker:
    def make(case: Case, folder: Path) -> Path:
        checkpoint = svdquant(case, scheme, folder / "plain")
        metadata = {
            "config": json.dumps(bare(checkpoint)),
            "quantization_config": '{"method": "svdquant"}',
        }
        return saved(as_nunchaku(checkpoint), folder / "nunchaku", metadata)

    return make


def row_major(case: Case, folder: Path) -> Path:
    checkpoint = svdquant(case, SVDQUANT_NVFP4, folder / "plain")
    declared = replace(checkpoint, header=replace(checkpoint.header, config=bare(checkpoint)))
    return as_rows(declared, folder / FILE, False, {"layout": "row_major"})


def bare(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's configuration without a word on quantization."""
    return {
        key: value
        for key, value in checkpoint.header.config.items()
        if key != "quantization_config"
    }


def cast(case: Case, folder: Path) -> Path:
    """Everything in e4m3, as ComfyUI saves a model in that dtype."""
    return saved(
        {name: value.to(torch.float8_e4m3fn) for name, value in original(case).items()}, folder
    )


def gguf(case: Case, folder: Path) -> Path:
    """Blocks of Q8_0 as llama-quantize leaves them: it drops leading axes of length 1."""
    said = {"general.architecture": ARCHITECTURES[case.name], "general.quantization_version": 2}
    tensors = {name: value.squeeze(0) for name, value in original(case).items()}
    return gguf_files.write(folder / "model.gguf", gguf_files.as_converted(tensors), said)


ALL_FAMILIES = {
    "diffusers": diffusers_names,
    "makers": makers_names,
    **{f"modelopt {method}": modelopt(method) for method in QUANTIZERS},
    "backbone": calibrated,
    **{f"comfy {method}": comfy(method) for method in KITCHEN},
    **{f"comfy {form}": comfy_form(form) for form in ("convrot", "e5m2", "w4a8")},
    "scaled_fp8": legacy,
    "cast": cast,
    "gguf": gguf,
    "bitsandbytes nf4": first_blocks(nf4),
    "blocks": first_blocks(in_blocks),
    "quanto": first_blocks(quanto),
}
BFL_FAMILIES = {f"bfl {method}": bfl(method) for method in ("fp8", "nvfp4", *FLUX3)}
SVDQUANT = {"nunchaku nvfp4": nunchaku(SVDQUANT_NVFP4), "row-major": row_major}
WIDE_FAMILIES = {f"comfy {form}": comfy_form(form) for form in GROUPS_OF_64}
INT4_FAMILIES = {"nunchaku int4": nunchaku(SVDQUANT_INT4)}
MAKERS: dict[str, dict[str, Maker]] = {
    "flux1": ALL_FAMILIES | WIDE_FAMILIES | BFL_FAMILIES | SVDQUANT | INT4_FAMILIES,
    "flux2": ALL_FAMILIES | WIDE_FAMILIES | BFL_FAMILIES,
    "wan_ti2v": ALL_FAMILIES,
    "zimage": ALL_FAMILIES | SVDQUANT,
    "qwenimage": ALL_FAMILIES | WIDE_FAMILIES | SVDQUANT | INT4_FAMILIES,
}
"""{pipeline: {format: maker}}; Z-Image is 96 wide, but a group of SVDQuant INT4 has 64 columns."""
