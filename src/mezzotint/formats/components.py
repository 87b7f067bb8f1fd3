"""The transformer's tensors of a file that holds a whole pipeline; other components are set aside before any format.

An all-in-one file quantizes its text encoder in one way and its transformer in another. No format is asked about
tensors that are not the transformer's, and no note about them counts.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from mezzotint.formats.header import Header

COMFY_NOTE = "_quantization_metadata"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""What single files, and state dicts of whole pipelines, put before every name of the transformer."""
OTHER_COMPONENTS = re.compile(
    r"(vae|audio_vae|vocoder|first_stage_model|cond_stage_model|conditioner|model_ema|text_encoders?(_\d+)?|"
    r"text_model|te\d*|clip(_[a-z0-9]+)?|t5(xxl)?|umt5(xxl)?|image_encoder|vision_model|tokenizer(_\d+)?)\."
)
"""How the names of other components begin, where the transformer's have no prefix."""
REASON = "belongs to another component"


def transformer_alone(header: Header) -> Header:
    """The header with the tensors of other components set aside, each with its reason."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in header.tensors)), "")
    aside = dict.fromkeys((name for name in header.tensors if _is_other(header, name, prefix)), REASON)
    if not aside or len(aside) == len(header.tensors):
        return header
    tensors = {name: info for name, info in header.tensors.items() if name not in aside}
    others = {name.rpartition(".")[0] for name in aside}
    metadata = with_noted_layers(header.metadata, lambda module: None if module in others else module)
    return replace(header, tensors=tensors, metadata=metadata, aside={**header.aside, **aside})


def _is_other(header: Header, name: str, prefix: str) -> bool:
    """Whether a tensor is of another component: beside a prefix, everything that is no part of a layer under it."""
    if not prefix:
        return OTHER_COMPONENTS.match(name) is not None
    module = name.rpartition(".")[0]
    return bool(module) and not name.startswith(prefix) and f"{prefix}{module}.weight" not in header.tensors


def with_noted_layers(metadata: Mapping[str, str], rename: Callable[[str], str | None]) -> Mapping[str, str]:
    """The metadata with the layers of ComfyUI's note called as `rename` says, those that it gives None left out.

    A note that is no JSON stays as it is, to be refused later.
    """
    try:
        note = json.loads(metadata.get(COMFY_NOTE, "null"))
    except (ValueError, RecursionError):
        return metadata
    layers = note.get("layers") if isinstance(note, dict) else None
    if not isinstance(layers, dict):
        return metadata
    named = {rename(module): said for module, said in layers.items()}
    named.pop(None, None)
    rest = {key: value for key, value in metadata.items() if key != COMFY_NOTE}
    return rest | ({COMFY_NOTE: json.dumps(note | {"layers": named})} if named or not layers else {})
