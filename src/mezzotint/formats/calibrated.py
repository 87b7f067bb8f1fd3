"""ModelOpt's calibration beside unquantized weights: FP8 weights are made of the two as they are read.

X.weight                      BF16 [out, in]
X.weight_quantizer._amax      largest absolute weight,  weight_scale = amax / 448
X.input_quantizer._amax       largest absolute input,   input_scale = amax / 448

The ranges come from ckpt/backbone.pt, which ModelOpt's quantize.py writes beside its hf folder, or from the safetensors
file itself. A layer is quantized if it has both, unless ModelOpt's list of ignored layers or the family's profile keeps
it in BF16: ranges are recorded for ignored layers too, so here alone the list is consulted.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from mezzotint.errors import ShapeMismatch
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, sort_out
from mezzotint.formats.header import Header
from mezzotint.formats.modelopt import quantization
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.schemes import FP8
from mezzotint.schemes.rounding import E4M3_MAX, round_e4m3
from mezzotint.schemes.scheme import FLOATS
from mezzotint.tensor import PLAIN, QuantTensor

RANGES = {"weight_scale": ".weight_quantizer._amax", "input_scale": ".input_quantizer._amax"}
KEEP_BF16: Mapping[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": (
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "transformer_blocks.*.ff.net.*",
        "transformer_blocks.*.ff_context.net.*",
        "single_transformer_blocks.*.norm.linear",
    ),
    "Flux2Transformer2DModel": (
        "time_guidance_embed.*",
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
        "x_embedder",
        "context_embedder",
        "norm_out.linear",
    ),
    "QwenImageTransformer2DModel": (
        "img_in",
        "txt_in",
        "time_text_embed.*",
        "norm_out.linear",
        "proj_out",
        "transformer_blocks.*.img_mlp.net.2",
        "transformer_blocks.*.img_mod.*",
        "transformer_blocks.*.txt_mod.*",
    ),
    "WanTransformer3DModel": ("condition_embedder.*",),
    "ZImageTransformer2DModel": ("t_embedder.*", "cap_embedder.*"),
}
"""{transformer class: layers that lose too much in FP8}.

FLUX's and Qwen-Image's were found by others by leaving out one kind of layer at a time; Wan's and Z-Image's are those
that diffusers never casts to FP8 (`_skip_layerwise_casting_patterns`).
"""


@dataclass(frozen=True)
class CalibratedLinear(StoredLinear):
    """An unquantized weight with the ranges of its FP8 form; `keys` name the weight and the two ranges."""

    def keeps(self, part: str) -> bool:
        return part == "bias"

    def check(self, header: Header) -> None:
        """Raise ShapeMismatch unless the weight is a matrix of floats and the ranges are numbers."""
        weight = header.tensors[self.keys["codes"]]
        if weight.dtype not in FLOATS or len(weight.shape) != 2:
            raise ShapeMismatch(f"{weight.file.name}: {weight.name} is {weight.dtype} {list(weight.shape)}")
        for part in self.keys.keys() - {"codes"}:
            info = header.tensors[self.keys[part]]
            self.scheme.check_part(part, info.shape, torch.float32, self.shape, f"{info.file.name}: {info.name}")

    def outline(self, header: Header, values_of: Collection[str] = ()) -> QuantTensor:
        if not self.keys.keys().isdisjoint(values_of):
            return self.read(header)
        stored = super().outline(header)
        made = {part: stored.parts[part].to(self.scheme.part(part).dtypes[0]) for part in ("codes", *RANGES)}
        return replace(stored, parts={**stored.parts, **made})

    def read(self, header: Header) -> QuantTensor:
        """The FP8 weight that ModelOpt itself would export."""
        parts = {}
        for part in RANGES:
            info = header.tensors[self.keys[part]]
            parts[part] = info.read().float() / E4M3_MAX
            self.scheme.check_values(part, parts[part], f"{info.file}: {info.name}")
        codes = quantized(header.tensors[self.keys["codes"]].read(), parts["weight_scale"])
        bias = {"bias": header.tensors[self.keys["bias"]].read()} if "bias" in self.keys else {}
        return QuantTensor(FP8, PLAIN, self.shape, {"codes": codes, **parts, **bias})


def quantized(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The e4m3 codes of a weight: e4m3(bf16(weight / weight_scale)), the rounding to BF16 included.

    Source   ModelOpt's export_hf_checkpoint, which divides in the weight's own BF16
    """
    return round_e4m3((weight.float() / weight_scale.reshape(())).bfloat16())


class Calibrated:
    name = "calibrated"
    title = "unquantized weights with ModelOpt's FP8 calibration"

    def detect(self, header: Header) -> Match | NoMatch:
        layers = calibrated_layers(header)
        if not layers:
            return NoMatch(f"no unquantized weight with its {RANGES['weight_scale'][1:]}")
        files = sorted({header.tensors[layer + RANGES["weight_scale"]].file.name for layer in layers})
        return Match(f"{len(layers)} unquantized weights have ranges of FP8 in {', '.join(files)}")

    def contents(self, header: Header) -> Contents:
        reasons = {layer: _why_kept(header, layer) for layer in calibrated_layers(header)}
        linears = {layer: _linear(header, layer) for layer, reason in reasons.items() if not reason}
        claimed = {key for linear in linears.values() for key in linear.keys.values()}
        state = [key for key in header.tensors if "_quantizer." in key and key not in claimed]
        ignored = {key: reasons.get(key.rpartition("_quantizer.")[0].rpartition(".")[0], "") for key in state}
        ignored = {key: reason or "state of a calibration quantizer" for key, reason in ignored.items()}
        kept = sum(1 for reason in reasons.values() if reason)
        said = f"{len(linears)} layers are quantized as they are read, {kept} with ranges stay as they are"
        return replace(sort_out(header, linears, ignored), evidence=(said,))


FORMAT = Calibrated()


def calibrated_layers(header: Header) -> list[str]:
    """Layers with both ranges and a weight that is not quantized."""
    layers = (
        key.removesuffix(RANGES["weight_scale"]) for key in header.tensors if key.endswith(RANGES["weight_scale"])
    )
    return [layer for layer in layers if layer + RANGES["input_scale"] in header.tensors and _is_float(header, layer)]


def _is_float(header: Header, layer: str) -> bool:
    weight: TensorInfo | None = header.tensors.get(f"{layer}.weight")
    return weight is not None and weight.dtype in FLOATS


def _why_kept(header: Header, layer: str) -> str:
    """Why a layer with ranges stays in BF16, or empty."""
    declared = quantization(header)
    ignored = [*declared.get("ignore", ()), *declared.get("exclude_modules", ())]
    if any(fnmatchcase(layer, str(pattern)) for pattern in ignored):
        return "the configuration lists its layer under those to ignore"
    model = str(header.config.get("_class_name"))
    if any(fnmatchcase(layer, pattern) for pattern in KEEP_BF16.get(model, ())):
        return f"layers of its kind stay BF16 in a {model}"
    return ""


def _linear(header: Header, layer: str) -> StoredLinear:
    keys = {"codes": f"{layer}.weight"} | {part: layer + suffix for part, suffix in RANGES.items()}
    if f"{layer}.bias" in header.tensors:
        keys["bias"] = f"{layer}.bias"
    rows, columns = (*header.tensors[keys["codes"]].shape, 0, 0)[:2]
    return CalibratedLinear(layer, FP8, PLAIN, (rows, columns), keys)
