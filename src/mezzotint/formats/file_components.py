"""The components of an all-in-one file besides its transformer, found by their names' prefixes.

ComfyUI's checkpoints put a text encoder under `text_encoders.NAME.transformer.` and the VAE under
`vae.`; older ones use `cond_stage_model.` and `first_stage_model.`. What follows such a prefix are
transformers' names of a text encoder, and the makers' names of a VAE.
Source: https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/supported_models.py
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from mezzotint.errors import BadRequest, UnexpectedTensor
from mezzotint.families.naming_scheme import transformer_prefix
from mezzotint.formats.components import with_renamed_layers
from mezzotint.formats.header import Header

TEXT_ENCODER, VAE = "text_encoder", "vae"
PREFIXES = {
    TEXT_ENCODER: (
        r"text_encoders\.(?P<name>[^.]+)\.(?:transformer\.)?",
        r"(?P<name>text_encoder(?:_\d+)?)\.(?:transformer\.)?",
        r"(?P<name>cond_stage_model|conditioner\.embedders\.\d+)\.(?:transformer\.|model\.)?",
        r"(?P<name>te\d*|clip(?:_[a-z0-9]+)?|t5(?:xxl)?|umt5(?:xxl)?)\.(?:transformer\.)?",
    ),
    VAE: (r"(?P<name>vae|first_stage_model)\.",),
    "other": (r"(?P<name>audio_vae|vocoder|image_encoder|vision_model|model_ema)\.",),
}
"""{kind of component: regular expressions of what its tensors' names begin with}"""
PATTERNS = [(kind, re.compile(one)) for kind, several in PREFIXES.items() for one in several]


@dataclass(frozen=True)
class FileComponent:
    """One component of a file.

    name   its name in the file, such as "qwen25_7b" or "vae"
    kind   "text_encoder", "vae" or "other"
    keys   {tensor of the file: the name without the component's prefix}
    """

    name: str
    kind: str
    keys: Mapping[str, str]


def file_components(keys: Collection[str]) -> dict[str, FileComponent]:
    """Return {name: component} of the components besides the transformer.

    keys   names of a file's tensors
    """
    prefix = transformer_prefix(keys)
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for key in keys:
        if prefix and key.startswith(prefix):
            continue
        for kind, pattern in PATTERNS:
            if match := pattern.match(key):
                found.setdefault(match["name"], (kind, {}))[1][key] = key[match.end() :]
                break
    return {name: FileComponent(name, kind, keys) for name, (kind, keys) in found.items()}


def find_component(header: Header, component: str) -> FileComponent:
    """Return a component by its name in the file, or by its kind if it is the only one.

    Raises   BadRequest if there is no such component, or if there are several
    """
    found = file_components(header.tensors)
    if component in found:
        return found[component]
    of_kind = [known for known in found.values() if known.kind == component]
    if len(of_kind) == 1:
        return of_kind[0]
    if of_kind:
        names = ", ".join(known.name for known in of_kind)
        raise BadRequest(
            f"{header.path}: holds {len(of_kind)} components of kind {component}: {names}",
            f"name one of them: --component {of_kind[0].name}",
        )
    known = ", ".join(["transformer", *found])
    raise BadRequest(f"{header.path}: has no component {component}", f"it has: {known}.")


def component_alone(header: Header, component: FileComponent) -> Header:
    """Return a header with the tensors of one component, and the metadata about its layers.

    Raises   UnexpectedTensor if two tensors get one name
    """
    tensors = {
        name: replace(header.tensors[key], name=name) for key, name in component.keys.items()
    }
    if len(tensors) != len(component.keys):
        raise UnexpectedTensor(
            f"{header.path}: two tensors of {component.name} differ only in their prefix",
            "rename one of them with --rename.",
        )
    modules = {_module(key): _module(name) for key, name in component.keys.items()}
    metadata = with_renamed_layers(header.metadata, modules.get)
    return Header(header.path, header.files, tensors, metadata, notes=header.notes)


def _module(key: str) -> str:
    return key.rpartition(".")[0]
