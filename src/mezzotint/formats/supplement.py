"""A checkpoint's header with what another file has for it: input scales of a sister file, ranges of a backbone.pt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mezzotint.errors import BadRequest, BrokenFile, Unsupported
from mezzotint.escaping import cut, shown
from mezzotint.formats.calibrated import RANGES
from mezzotint.formats.header import Header, read_header
from mezzotint.formats.pickled import is_counts
from mezzotint.formats.renaming import Renames, renamed
from mezzotint.formats.torch_file import TorchFile, read_torch_file
from mezzotint.hub import AnyPath
from mezzotint.schemes.scheme import FLOATS

INPUT_SCALE = ".input_scale"
LARGEST_SCALE = ".weight_scale_2", ".weight_scale"
"""Of these, those that are one number must be the same in both files."""
HF_FOLDERS = "hf", "hf/transformer"
BACKBONE = "ckpt/backbone.pt"
E4M3_BITS = (4, 3)


def open_header(path: AnyPath, scales_from: AnyPath | None = None, rename: Renames | None = None) -> Header:
    """Header of a file, a component's folder, or ModelOpt's folder of hf and ckpt/backbone.pt.

    scales_from   a sister file with the input scales that `path` lacks, or a backbone.pt with ranges for its weights
    rename        {regular expression: replacement} for names of the tensors at `path`
    Raises        CheckpointError, BadRequest
    """
    home = hf_folder(path)
    header = renamed(read_header(home), rename or {})
    if home != path and scales_from is None and (path / BACKBONE).is_file():
        scales_from = path / BACKBONE
    if scales_from is None:
        return header
    if scales_from.name.endswith(".pt"):
        if not isinstance(scales_from, Path):
            raise BadRequest(f"{scales_from}: a .pt file is read from disk only", "download it, and name the file.")
        return with_ranges_from(header, read_torch_file(scales_from))
    return with_scales_from(header, read_header(scales_from))


def hf_folder(path: AnyPath) -> AnyPath:
    """Where the weights are: the hf folder that ModelOpt's quantize.py writes beside ckpt, or `path` itself."""
    return next((path / folder for folder in HF_FOLDERS if any((path / folder).glob("*.safetensors"))), path)


def with_ranges_from(header: Header, backbone: TorchFile) -> Header:
    """The header with the ranges that ModelOpt calibrated for its unquantized weights.

    Raises  BrokenFile if the file is not ModelOpt's, Unsupported if it is calibrated for anything but FP8
    """
    state = _at(backbone.content, "model_state_dict")
    if not isinstance(state, dict):
        raise BrokenFile(f"{backbone.path}: has no model_state_dict", "expected the backbone.pt of ModelOpt.")
    disabled = set(_disabled(backbone))
    taken = {
        key: backbone.tensor(key, value)
        for key, value in state.items()
        if isinstance(key, str) and _is_range_of_float(header, key) and key.removesuffix("._amax") not in disabled
    }
    note = f"{len(taken)} ranges are taken from {backbone.path}"
    if not taken:
        note = f"nothing is taken from {backbone.path}: no weight that it has ranges for is unquantized"
    return replace(header, tensors={**header.tensors, **taken}, notes=(*header.notes, note))


def _is_range_of_float(header: Header, key: str) -> bool:
    layer = next((key.removesuffix(suffix) for suffix in RANGES.values() if key.endswith(suffix)), "")
    weight = header.tensors.get(f"{layer}.weight")
    return weight is not None and weight.dtype in FLOATS


def _disabled(backbone: TorchFile) -> Iterator[str]:
    """Names of the quantizers that ModelOpt switched off after it had calibrated them."""
    for name, quantizer in _quantizers(backbone.content).items():
        if quantizer.get("_disabled"):
            yield name
        elif name.endswith("weight_quantizer") and quantizer.get("_num_bits") != E4M3_BITS:
            bits = quantizer.get("_num_bits")
            raise Unsupported(
                f"{backbone.path}: {cut(name)} is not calibrated for FP8, its num_bits is "
                f"{shown(bits) if isinstance(bits, int) or is_counts(bits) else 'unknown'}",
                "name the folder that ModelOpt exported (hf) instead: its weights are quantized.",
            )


def _quantizers(content: Any) -> dict[str, dict[str, Any]]:
    """{quantizer: its settings}, of the last step that ModelOpt records."""
    steps = _at(_at(content, "modelopt_state"), "modelopt_state_dict")
    states = [_at(_at(step[1], "metadata"), "quantizer_state") for step in _pairs(steps)]
    last = next((state for state in reversed(states) if isinstance(state, dict)), {})
    return {name: state for name, state in last.items() if isinstance(name, str) and isinstance(state, dict)}


def _at(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _pairs(value: Any) -> list[Any]:
    steps = value if isinstance(value, list) else []
    return [step for step in steps if isinstance(step, tuple | list) and len(step) == 2]


def with_scales_from(header: Header, sister: Header) -> Header:
    """The header with the input scales that only `sister` has, for the layers that both hold quantized alike.

    Raises  BadRequest if there is none to take, or if the two files' weights are not the same
    """
    taken = {
        key: info
        for key, info in sister.tensors.items()
        if key.endswith(INPUT_SCALE) and key not in header.tensors and _alike(header, sister, key)
    }
    if not taken:
        raise BadRequest(
            f"{sister.path}: has no input scale that {header.path} lacks for a layer quantized alike",
            "name the complete file of the same model, such as flux2-dev-nvfp4.safetensors beside its -mixed form.",
        )
    for key in taken:
        _check_same_weights(header, sister, key.removesuffix(INPUT_SCALE))
    note = f"{len(taken)} input scales are taken from {sister.path}"
    return replace(header, tensors={**header.tensors, **taken}, notes=(*header.notes, note))


def _alike(header: Header, sister: Header, key: str) -> bool:
    name = key.removesuffix(INPUT_SCALE) + ".weight"
    ours, theirs = header.tensors.get(name), sister.tensors.get(name)
    return ours is not None and theirs is not None and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


def _check_same_weights(header: Header, sister: Header, module: str) -> None:
    for suffix in LARGEST_SCALE:
        ours, theirs = _number(header, module + suffix), _number(sister, module + suffix)
        if ours is not None and theirs is not None and ours != theirs:
            raise BadRequest(
                f"{module}{suffix} is {ours:g} in {header.path} and {theirs:g} in {sister.path}",
                "the two files hold different weights; their input scales cannot be exchanged.",
            )


def _number(header: Header, key: str) -> float | None:
    info = header.tensors.get(key)
    return info.read().item() if info is not None and info.shape in ((), (1,)) else None
