"""Read GGUF files of diffusion transformers: the makers' names, weights in blocks.

Matrices `X.weight` in a block type stay packed: one scheme for each type. F32, F16 and BF16 tensors
are plain, as the converters leave biases, norms and embedders. Blocks of anything else, such as a
convolution, are decoded to float32. llama.cpp and stable-diffusion.cpp drop leading axes of length
1 and know four axes; the model's shapes and the bias give the lost axes back.

Source: https://github.com/city96/ComfyUI-GGUF/tree/795e4515/tools (convert.py, lcpp.patch)
and https://github.com/leejet/stable-diffusion.cpp (wan.hpp: axes of 3-D convolutions are joined)
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mezzotint.containers import BlockType, TensorInfo
from mezzotint.containers.gguf import VERSION_KEY
from mezzotint.errors import UnknownFormat, UnreadFormat
from mezzotint.families import families
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.schemes import Scheme, Shape, schemes
from mezzotint.tensor import PLAIN

ARCHITECTURE = "general.architecture"
FAMILIES = {
    "flux": ("flux1", "flux2"),
    "flux2": ("flux2",),
    "wan": ("wan",),
    "qwen_image": ("qwenimage",),
    "lumina2": ("zimage",),
    "z_image": ("zimage",),
    "zimage": ("zimage",),
}
"""{architecture that a converter writes: families whose tensors may be in the file}.

ComfyUI-GGUF writes "flux" for FLUX.2 and "lumina2" for Z-Image, whose names look the same to it.
"""
UNREAD_MODELS = {
    "aura": "AuraFlow",
    "cosmos": "Cosmos",
    "hidream": "HiDream",
    "hyvid": "HunyuanVideo",
    "ltxv": "LTX-Video",
    "sd1": "Stable Diffusion 1",
    "sd3": "Stable Diffusion 3",
    "sdxl": "Stable Diffusion XL",
}
TEXT_ENCODERS = ("t5", "t5encoder", "clip", "gemma", "llama", "mistral", "qwen2", "qwen3")
"""Beginnings of the architectures of text encoders in GGUF."""
SPLIT_COUNT, SPLIT_NUMBER = "split.count", "split.no"
CONVOLUTION_RANK = 4


class GGUF:
    name = "gguf"
    title = "GGUF"

    def detect(self, header: Header) -> Match | NoMatch:
        if VERSION_KEY not in header.metadata:
            return NoMatch("is not a GGUF file")
        version, named = header.metadata[VERSION_KEY], architecture(header)
        says = f"architecture {named}" if named else "no architecture"
        return Match(f"GGUF version {version} with {says}")

    def contents(self, header: Header) -> Contents:
        _check_complete(header)
        named = architecture(header)
        _check_is_read(header, named)
        linears, packed = {}, {}
        for info, scheme in _blocks(header):
            if _is_matrix(info, scheme):
                linear = _linear(header, info, scheme)
                linears[linear.module] = linear
            else:
                packed[info.name] = scheme
        found = classify_tensors(header, linears, {})
        reshaped = dict(_split_axes(header, found.plain))
        contents = replace(found, packed=packed, reshaped=reshaped, drops_unit_axes=True)
        _check_family(header, named, contents)
        return contents


FORMAT = GGUF()


def value(header: Header, key: str) -> Any:
    """Return a value of the metadata, None if there is none; its text is JSON."""
    return json.loads(header.metadata.get(key, "null"))


def architecture(header: Header) -> str:
    """Return what the file says about its model, or an empty string."""
    named = value(header, ARCHITECTURE)
    return named if isinstance(named, str) else ""


def scheme_of(block_type: BlockType) -> Scheme | None:
    """Return the scheme that decodes a block type, None if there is none."""
    return schemes().get(f"gguf_{block_type.name.lower()}")


def _blocks(header: Header) -> Iterator[tuple[TensorInfo, Scheme]]:
    """Yield the tensors in blocks. Raises UnreadFormat for a type that is not read."""
    for info in header.tensors.values():
        if not isinstance(info.dtype, BlockType):
            continue
        scheme = scheme_of(info.dtype)
        if scheme is None:
            known = ", ".join(s.title.removeprefix("GGUF ") for s in _schemes())
            raise UnreadFormat(
                f"{header.path}: {info.name} is {info.dtype}, a type of GGUF that is not read",
                f"use a version of the model in one of these types: {known}.",
            )
        yield info, scheme


def _schemes() -> list[Scheme]:
    return [scheme for name, scheme in schemes().items() if name.startswith("gguf_")]


def _is_matrix(info: TensorInfo, scheme: Scheme) -> bool:
    """Return whether rows of whole blocks are the weight of what may be a linear layer."""
    return (
        info.name.endswith(".weight") and len(info.shape) == 2 and info.shape[1] % scheme.group == 0
    )


def _linear(header: Header, info: TensorInfo, scheme: Scheme) -> StoredLinear:
    module = info.name.removesuffix(".weight")
    bias = header.tensors.get(f"{module}.bias")
    keys = {"codes": info.name}
    # A bias in blocks is decoded by itself, as every tensor that is no matrix.
    if bias is not None and not isinstance(bias.dtype, BlockType):
        keys["bias"] = bias.name
    out_features, in_features = info.shape
    return StoredLinear(module, scheme, PLAIN, (out_features, in_features), keys)


def _split_axes(header: Header, names: tuple[str, ...]) -> Iterator[tuple[str, Shape]]:
    """Yield the true shapes of convolutions whose first axis is output times input channels."""
    for name in names:
        shape = header.tensors[name].shape
        bias = header.tensors.get(name.removesuffix(".weight") + ".bias")
        if bias is None or len(shape) != CONVOLUTION_RANK or len(bias.shape) != 1:
            continue
        out_channels = bias.shape[0]
        if 0 < out_channels < shape[0] and shape[0] % out_channels == 0:
            yield name, (out_channels, shape[0] // out_channels, *shape[1:])


def _check_complete(header: Header) -> None:
    count, number = value(header, SPLIT_COUNT), value(header, SPLIT_NUMBER)
    if isinstance(count, int) and count > 1:
        part = f"part {number + 1} of {count}" if isinstance(number, int) else f"one of {count}"
        raise UnreadFormat(
            f"{header.path}: is {part} of a split GGUF file",
            "join the parts: `llama-gguf-split --merge FIRST-PART OUTPUT`.",
        )


def _check_is_read(header: Header, named: str) -> None:
    """Raise UnreadFormat if the architecture is that of another kind of model."""
    if named in UNREAD_MODELS:
        raise UnreadFormat(
            f"{header.path}: {ARCHITECTURE} is {named}, of {UNREAD_MODELS[named]}, "
            "which is not read",
            f"models that are read: {', '.join(family.title for family in families().values())}.",
        )
    if named.startswith(TEXT_ENCODERS):
        raise UnreadFormat(
            f"{header.path}: {ARCHITECTURE} is {named}, a text encoder, "
            "and only transformers of diffusion models are read here",
            "name the file of the transformer.",
        )


def _check_family(header: Header, named: str, contents: Contents) -> None:
    """Raise UnknownFormat if the architecture contradicts the names of the tensors."""
    shapes: Mapping[str, Shape] = {
        **{key: header.tensors[key].shape for key in contents.plain},
        **{f"{name}.weight": linear.shape for name, linear in contents.linears.items()},
    }
    found = [family for family in families().values() if family.matches(shapes)]
    if named in FAMILIES and len(found) == 1 and found[0].name not in FAMILIES[named]:
        raise UnknownFormat(
            f"{header.path}: {ARCHITECTURE} is {named}, and its tensors are those of "
            f"{found[0].title}",
            "the metadata are from another model; convert the model again.",
        )
