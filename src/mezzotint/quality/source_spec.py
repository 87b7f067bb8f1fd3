"""Parsing of `[NAME=]SOURCE[,OPTION=VALUE...]`, the sources of `compare` and `diagnose`.

This module does not import PyTorch, so that the CLI can check arguments quickly.
"""

import re

from mezzotint.errors import BadRequest, did_you_mean

OPTIONS = ("transformer_2", "activations", "backend", "resident", "bf16_steps")
GENERIC_NAMES = ("transformer", "diffusion_pytorch_model", "hf")
"""Parts of a path that do not identify a model, and so are not used as its name."""
NAMED_SOURCE = re.compile(r"(?P<name>[^/=]+)=(?P<rest>.+)", re.DOTALL)


def split_source(text: str) -> tuple[str, str, dict[str, str]]:
    """Return the name for the report, the source and its options.

    Raises BadRequest for an unknown option.
    """
    source, *rest = text.split(",")
    options: dict[str, str] = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key not in OPTIONS or not value:
            guess = did_you_mean(key, OPTIONS) if key not in OPTIONS else ""
            supported = ", ".join(f"{option}=..." for option in OPTIONS)
            raise BadRequest(
                f"{text!r}: {part!r} is not an option", f"{guess}the options are: {supported}."
            )
        options[key] = value
    named = NAMED_SOURCE.fullmatch(source)
    if named is not None:
        return named["name"], named["rest"], options
    parts = [
        part.removesuffix(".safetensors")
        for part in source.split("/")
        if part not in (".", "..", "")
    ]
    stem = next((part for part in reversed(parts) if part not in GENERIC_NAMES), source)
    return " ".join((stem, *(f"{key}={value}" for key, value in options.items()))), source, options
