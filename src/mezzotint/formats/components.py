"""Reduce a file that holds a whole pipeline to its transformer, before any format sees it.

An all-in-one file may quantize its text encoder in one way and its transformer in another. Formats
see neither the tensors of other components nor the metadata about them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from mezzotint.families.naming_scheme import transformer_prefix
from mezzotint.formats.header import Header

COMFY_METADATA = "_quantization_metadata"
OTHER_COMPONENTS = re.compile(
    r"(vae|audio_vae|vocoder|first_stage_model|cond_stage_model|conditioner|model_ema|"
    r"text_encoders?(_\d+)?|text_model|te\d*|clip(_[a-z0-9]+)?|t5(xxl)?|umt5(xxl)?|"
    r"image_encoder|vision_model|tokenizer(_\d+)?)\."
)
"""Names of other components, in files where the transformer's names have no prefix."""
REASON = "belongs to another component"


def transformer_alone(header: Header) -> Header:
    """Move the tensors of other components to `skipped`, each with its reason."""
    prefix = transformer_prefix(header.tensors)
    skipped = dict.fromkeys(
        (name for name in header.tensors if _is_other(header, name, prefix)), REASON
    )
    if not skipped or len(skipped) == len(header.tensors):
        return header
    tensors = {name: info for name, info in header.tensors.items() if name not in skipped}
    modules = {name.rpartition(".")[0] for name in skipped}
    metadata = with_renamed_layers(
        header.metadata, lambda module: None if module in modules else module
    )
    return replace(
        header, tensors=tensors, metadata=metadata, skipped={**header.skipped, **skipped}
    )


def _is_other(header: Header, name: str, prefix: str) -> bool:
    """Return whether a tensor belongs to another component.

    Under a prefix, some files leave it out of the names of scales; these belong to a layer with it.
    """
    if not prefix:
        return OTHER_COMPONENTS.match(name) is not None
    module = name.rpartition(".")[0]
    return (
        bool(module)
        and not name.startswith(prefix)
        and f"{prefix}{module}.weight" not in header.tensors
    )


def with_renamed_layers(
    metadata: Mapping[str, str], rename: Callable[[str], str | None]
) -> Mapping[str, str]:
    """Rename the layers in ComfyUI's metadata; layers that `rename` maps to None are dropped.

    Metadata that is not JSON is returned unchanged: the reader refuses it later.
    """
    try:
        declared = json.loads(metadata.get(COMFY_METADATA, "null"))
    except (ValueError, RecursionError):
        return metadata
    layers = declared.get("layers") if isinstance(declared, dict) else None
    if not isinstance(layers, dict):
        return metadata
    named = {rename(module): config for module, config in layers.items()}
    named.pop(None, None)
    rest = {key: value for key, value in metadata.items() if key != COMFY_METADATA}
    return rest | (
        {COMFY_METADATA: json.dumps(declared | {"layers": named})} if named or not layers else {}
    )
