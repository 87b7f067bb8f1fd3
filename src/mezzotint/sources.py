"""Sources as `compare` and `diagnose` are given them: `[NAME=]SOURCE[,OPTION=VALUE...]`. Needs no PyTorch."""

import re

from mezzotint.errors import BadRequest, did_you_mean

OPTIONS = ("transformer_2", "activations", "backend", "resident", "bf16_steps")
PLAIN_NAMES = ("transformer", "diffusion_pytorch_model", "hf")
"""Parts of a path that many models share, and none is called after."""
NAMED = re.compile(r"(?P<name>[^/=]+)=(?P<rest>.+)", re.DOTALL)


def split_source(text: str) -> tuple[str, str, dict[str, str]]:
    """The name for the report, the source, and its options. Raises BadRequest for an option that does not exist."""
    source, *rest = text.split(",")
    options: dict[str, str] = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key not in OPTIONS or not value:
            known = ", ".join(f"{option}=..." for option in OPTIONS)
            hint = f"{did_you_mean(key, OPTIONS) if key not in OPTIONS else ''}after a comma comes {known}."
            raise BadRequest(f"{text!r}: {part!r} is no option", hint)
        options[key] = value
    named = NAMED.fullmatch(source)
    if named is not None:
        return named["name"], named["rest"], options
    parts = [part.removesuffix(".safetensors") for part in source.split("/") if part not in (".", "..", "")]
    stem = next((part for part in reversed(parts) if part not in PLAIN_NAMES), source)
    return " ".join((stem, *(f"{key}={value}" for key, value in options.items()))), source, options
