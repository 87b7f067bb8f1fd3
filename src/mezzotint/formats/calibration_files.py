"""ModelOpt's backbone.pt: the ranges that its calibration found for unquantized weights.

Source: `save_checkpoint` of ModelOpt's examples/diffusers/quantization/quantize.py
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mezzotint.containers import ContainerHeader, TensorInfo
from mezzotint.errors import BrokenFile, Unsupported
from mezzotint.formats.header import Header
from mezzotint.formats.readers.modelopt_calibration import AMAX_SUFFIXES
from mezzotint.hub import AnyPath
from mezzotint.schemes.scheme import FLOAT_DTYPES
from mezzotint.untrusted.escaping import cut, shown

STATE_DICT = "model_state_dict"
E4M3_BITS = (4, 3)
"""ModelOpt's `num_bits` of FP8: exponent and mantissa."""


def with_calibration(header: Header, path: AnyPath, backbone: ContainerHeader) -> Header:
    """Add the ranges that ModelOpt calibrated for the header's unquantized weights.

    Raises  BrokenFile if the file is not ModelOpt's, Unsupported if its format is not FP8
    """
    if not isinstance(_get(backbone.content, STATE_DICT), dict):
        raise BrokenFile(f"{path}: has no {STATE_DICT}", "expected the backbone.pt of ModelOpt.")
    disabled = set(_disabled_quantizers(path, backbone))
    names = (name.removeprefix(f"{STATE_DICT}.") for name in backbone.tensors)
    added: Mapping[str, TensorInfo] = {
        name: replace(backbone.tensors[f"{STATE_DICT}.{name}"], name=name)
        for name in names
        if _is_range_of_float(header, name) and name.removesuffix("._amax") not in disabled
    }
    note = f"{len(added)} ranges are taken from {path}"
    if not added:
        note = f"nothing is taken from {path}: every weight that it has ranges for is quantized"
    return replace(header, tensors={**header.tensors, **added}, notes=(*header.notes, note))


def _is_range_of_float(header: Header, name: str) -> bool:
    """Return whether a tensor is the range of a weight that the header holds unquantized."""
    suffix = next((suffix for suffix in AMAX_SUFFIXES.values() if name.endswith(suffix)), None)
    if suffix is None:
        return False
    weight = header.tensors.get(f"{name.removesuffix(suffix)}.weight")
    return weight is not None and weight.dtype in FLOAT_DTYPES


def _disabled_quantizers(path: AnyPath, backbone: ContainerHeader) -> Iterator[str]:
    """Yield the quantizers that ModelOpt disabled after calibration; their ranges remain stored."""
    for name, quantizer in _quantizers(backbone.content).items():
        if quantizer.get("_disabled"):
            yield name
        elif name.endswith("weight_quantizer") and quantizer.get("_num_bits") != E4M3_BITS:
            bits = quantizer.get("_num_bits")
            known = isinstance(bits, int) or (
                isinstance(bits, tuple) and all(isinstance(number, int) for number in bits)
            )
            raise Unsupported(
                f"{path}: {cut(name)} is not calibrated for FP8, its num_bits is "
                f"{shown(bits) if known else 'unknown'}",
                "name the folder that ModelOpt exported (hf) instead: its weights are quantized.",
            )


def _quantizers(content: object) -> dict[str, dict[str, Any]]:
    """Return {quantizer: settings} of the last step in ModelOpt's state."""
    steps = _get(_get(content, "modelopt_state"), "modelopt_state_dict")
    states = [_get(_get(step[1], "metadata"), "quantizer_state") for step in _pairs(steps)]
    last = next((state for state in reversed(states) if isinstance(state, dict)), {})
    return {
        name: state
        for name, state in last.items()
        if isinstance(name, str) and isinstance(state, dict)
    }


def _get(value: object, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _pairs(value: object) -> list[Any]:
    steps = value if isinstance(value, list) else []
    return [step for step in steps if isinstance(step, tuple | list) and len(step) == 2]
