"""Read unquantized weights with ModelOpt's FP8 calibration, and quantize them on the way.

X.weight                      BF16 [out, in]
X.weight_quantizer._amax      largest absolute weight,  weight_scale = amax / 448
X.input_quantizer._amax       largest absolute input,   input_scale = amax / 448

The ranges come from ckpt/backbone.pt, which ModelOpt's quantize.py writes next to its hf folder, or
from the file of the weights. A layer with both ranges is quantized, unless ModelOpt's list of
ignored layers or the family keeps it in BF16. Only this format reads that list, because ModelOpt
records ranges for ignored layers, too.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from mezzotint.containers import TensorInfo
from mezzotint.errors import ShapeMismatch
from mezzotint.families import find_family
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.modelopt import declared_quantization
from mezzotint.schemes import FP8
from mezzotint.schemes.minifloats import E4M3_MAX, round_e4m3
from mezzotint.schemes.scheme import FLOAT_DTYPES
from mezzotint.tensor import PLAIN, QuantTensor

AMAX_SUFFIXES = {"weight_scale": ".weight_quantizer._amax", "input_scale": ".input_quantizer._amax"}


@dataclass(frozen=True)
class CalibratedLinear(StoredLinear):
    """An unquantized weight and the two ranges that its FP8 scales come from."""

    def is_read_unchanged(self, part: str) -> bool:
        return part == "bias"

    def check(self, header: Header) -> None:
        """Raise ShapeMismatch unless the weight is a float matrix and the ranges are numbers."""
        weight = header.tensors[self.keys["codes"]]
        if weight.dtype not in FLOAT_DTYPES or len(weight.shape) != 2:
            raise ShapeMismatch(
                f"{weight.file.name}: {weight.name} is {weight.dtype} {list(weight.shape)}"
            )
        for part in self.keys.keys() - {"codes"}:
            info = header.tensors[self.keys[part]]
            self.scheme.check_part(
                part, info.shape, torch.float32, self.shape, f"{info.file.name}: {info.name}"
            )

    def outline(self, header: Header, read_parts: Collection[str] = ()) -> QuantTensor:
        if not self.keys.keys().isdisjoint(read_parts):
            return self.read(header)
        stored = super().outline(header)
        computed = {
            part: stored.parts[part].to(self.scheme.part(part).dtypes[0])
            for part in ("codes", *AMAX_SUFFIXES)
        }
        return replace(stored, parts={**stored.parts, **computed})

    def read(self, header: Header) -> QuantTensor:
        """Return the FP8 weight that ModelOpt itself would export."""
        parts = {}
        for part in AMAX_SUFFIXES:
            info = header.tensors[self.keys[part]]
            parts[part] = info.read().float() / E4M3_MAX
            self.scheme.check_values(part, parts[part], f"{info.file}: {info.name}")
        codes = quantize_weight(header.tensors[self.keys["codes"]].read(), parts["weight_scale"])
        bias = {"bias": header.tensors[self.keys["bias"]].read()} if "bias" in self.keys else {}
        return QuantTensor(FP8, PLAIN, self.shape, {"codes": codes, **parts, **bias})


def quantize_weight(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the e4m3 codes of a weight: e4m3(bf16(weight / weight_scale)).

    Without rounding to BF16 in between, about one code in a hundred differs from ModelOpt's.

    Source   ModelOpt's export_hf_checkpoint, which divides in the weight's own BF16
    """
    return round_e4m3((weight.float() / weight_scale.reshape(())).bfloat16())


class ModelOptCalibration:
    name = "modelopt_calibration"
    title = "unquantized weights with ModelOpt's FP8 calibration"

    def detect(self, header: Header) -> Match | NoMatch:
        layers = calibrated_layers(header)
        if not layers:
            return NoMatch(f"no unquantized weight with its {AMAX_SUFFIXES['weight_scale'][1:]}")
        files = sorted(
            {header.tensors[layer + AMAX_SUFFIXES["weight_scale"]].file.name for layer in layers}
        )
        return Match(f"{len(layers)} unquantized weights have FP8 ranges in {', '.join(files)}")

    def contents(self, header: Header) -> Contents:
        reasons = {layer: _reason_to_keep(header, layer) for layer in calibrated_layers(header)}
        linears = {layer: _linear(header, layer) for layer, reason in reasons.items() if not reason}
        claimed = {key for linear in linears.values() for key in linear.keys.values()}
        state = [key for key in header.tensors if "_quantizer." in key and key not in claimed]
        ignored = {
            key: reasons.get(key.rpartition("_quantizer.")[0].rpartition(".")[0], "")
            for key in state
        }
        ignored = {
            key: reason or "state of a calibration quantizer" for key, reason in ignored.items()
        }
        kept = sum(1 for reason in reasons.values() if reason)
        evidence = (
            f"{len(linears)} layers are quantized as they are read, "
            f"{kept} with ranges stay unquantized"
        )
        return replace(classify_tensors(header, linears, ignored), evidence=(evidence,))


FORMAT = ModelOptCalibration()


def calibrated_layers(header: Header) -> list[str]:
    """Return the layers with both ranges and an unquantized weight."""
    layers = (
        key.removesuffix(AMAX_SUFFIXES["weight_scale"])
        for key in header.tensors
        if key.endswith(AMAX_SUFFIXES["weight_scale"])
    )
    return [
        layer
        for layer in layers
        if layer + AMAX_SUFFIXES["input_scale"] in header.tensors and _is_float(header, layer)
    ]


def _is_float(header: Header, layer: str) -> bool:
    weight: TensorInfo | None = header.tensors.get(f"{layer}.weight")
    return weight is not None and weight.dtype in FLOAT_DTYPES


def _reason_to_keep(header: Header, layer: str) -> str:
    """Return why a layer with ranges stays in BF16, or an empty string."""
    declared = declared_quantization(header)
    ignored = [*declared.get("ignore", ()), *declared.get("exclude_modules", ())]
    if any(fnmatchcase(layer, str(pattern)) for pattern in ignored):
        return "the configuration ignores its layer"
    model = str(header.config.get("_class_name"))
    family = find_family(model)
    if family and any(fnmatchcase(layer, pattern) for pattern in family.keep_bf16):
        return f"layers of its kind stay BF16 in a {model}"
    return ""


def _linear(header: Header, layer: str) -> StoredLinear:
    keys = {"codes": f"{layer}.weight"} | {
        part: layer + suffix for part, suffix in AMAX_SUFFIXES.items()
    }
    if f"{layer}.bias" in header.tensors:
        keys["bias"] = f"{layer}.bias"
    rows, columns = (*header.tensors[keys["codes"]].shape, 0, 0)[:2]
    return CalibratedLinear(layer, FP8, PLAIN, (rows, columns), keys)
