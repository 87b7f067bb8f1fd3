"""Other files that complete a checkpoint's header.

A second file of the same weights supplies input scales that the first one lacks. ModelOpt's
backbone.pt supplies the ranges of weights that are still unquantized.
"""

from dataclasses import replace

from mezzotint.containers import read_container
from mezzotint.errors import BadRequest
from mezzotint.formats.calibration_files import with_calibration
from mezzotint.formats.header import Header, read_header
from mezzotint.formats.renaming import Renames, renamed
from mezzotint.formats.weight_files import list_weight_files
from mezzotint.hub import AnyPath

INPUT_SCALE = ".input_scale"
WEIGHT_SCALE_SUFFIXES = ".weight_scale_2", ".weight_scale"
"""Scales that must be equal in both files, where they are single numbers."""
HF_FOLDERS = "hf", "hf/transformer"
BACKBONE = "ckpt/backbone.pt"


def open_header(
    path: AnyPath, scales_from: AnyPath | None = None, rename: Renames | None = None
) -> Header:
    """Read the header at `path`: a file, a component's folder, or ModelOpt's folder of hf and ckpt.

    scales_from   a file with the input scales that `path` lacks, or ModelOpt's backbone.pt
    rename        {regular expression: replacement} for names of the tensors at `path`
    Raises        CheckpointError, BadRequest
    """
    weights = hf_folder(path)
    header = renamed(read_header(weights), rename or {})
    if weights != path and scales_from is None and (path / BACKBONE).is_file():
        scales_from = path / BACKBONE
    return header if scales_from is None else _with_companion(header, scales_from)


def hf_folder(path: AnyPath) -> AnyPath:
    """Return the hf folder that ModelOpt's quantize.py writes next to ckpt, or `path` itself."""
    return next((path / folder for folder in HF_FOLDERS if list_weight_files(path / folder)), path)


def _with_companion(header: Header, path: AnyPath) -> Header:
    """Add the ranges of a torch.save file, or the input scales of any other file."""
    companion = read_container(path) if path.is_file() else None
    if companion is not None and companion.content is not None:
        return with_calibration(header, path, companion)
    return with_input_scales(header, read_header(path))


def with_input_scales(header: Header, companion: Header) -> Header:
    """Add the input scales that only `companion` has, for layers of equal dtype and shape.

    Raises  BadRequest if there are none to add, or if the weights of the two files differ
    """
    added = {
        key: info
        for key, info in companion.tensors.items()
        if key.endswith(INPUT_SCALE)
        and key not in header.tensors
        and _same_weight(header, companion, key)
    }
    if not added:
        raise BadRequest(
            f"{companion.path}: has no input scale that {header.path} lacks "
            "for a layer that both files quantize in one format",
            "name the complete file of the same model, "
            "such as flux2-dev-nvfp4.safetensors for its -mixed version.",
        )
    for key in added:
        _check_same_weights(header, companion, key.removesuffix(INPUT_SCALE))
    note = f"{len(added)} input scales are taken from {companion.path}"
    return replace(header, tensors={**header.tensors, **added}, notes=(*header.notes, note))


def _same_weight(header: Header, companion: Header, key: str) -> bool:
    """Return whether both files store the layer's weight in one dtype and shape."""
    name = key.removesuffix(INPUT_SCALE) + ".weight"
    first, second = header.tensors.get(name), companion.tensors.get(name)
    return (
        first is not None
        and second is not None
        and (first.dtype, first.shape) == (second.dtype, second.shape)
    )


def _check_same_weights(header: Header, companion: Header, module: str) -> None:
    """Raise BadRequest where a weight's scales differ: an input scale belongs to its weight."""
    for suffix in WEIGHT_SCALE_SUFFIXES:
        first = _number(header, module + suffix)
        second = _number(companion, module + suffix)
        if first is not None and second is not None and first != second:
            raise BadRequest(
                f"{module}{suffix} is {first:g} in {header.path} and {second:g} in "
                f"{companion.path}",
                "the two files hold different weights; their input scales cannot be exchanged.",
            )


def _number(header: Header, key: str) -> float | None:
    """Return the value of a tensor of one number, None for any other."""
    info = header.tensors.get(key)
    return info.read().item() if info is not None and info.shape in ((), (1,)) else None
