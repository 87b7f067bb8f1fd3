"""Model families, one file each."""

import sys
from collections.abc import Mapping
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import UnknownFormat, UnreadFormat
from mezzotint.families.family import Family, Sampling
from mezzotint.families.spelling import Shapes, Spelling

__all__ = ["Family", "Sampling", "Spelling", "families", "family_of", "family_with"]

OTHERS = {
    "a LoRA's": (".lora_", "lora_unet_", ".alpha", ".lokr_", ".hada_"),
    "a VAE's": ("decoder.conv_in.", "decoder.conv1.", "decoder.middle.", "first_stage_model."),
    "a text encoder's": ("SelfAttention.", "text_model.", "embed_tokens.", "shared.weight", "token_embedding."),
}
"""{what is often taken for a transformer: parts of its tensors' names}"""


@cache
def families() -> Mapping[str, Family]:
    """{name: family}, discovered from the modules of this package."""
    return collect(sys.modules[__name__], "FAMILY")


def family_of(shapes: Shapes, where: str) -> Family:
    """The family whose tensors these are, {name: logical shape}; UnreadFormat if it is none, or more than one."""
    found = [family for family in families().values() if family.owns(shapes)]
    if len(found) == 1:
        return found[0]
    if not shapes:
        raise UnknownFormat(f"{where}: holds no tensors of a model", "download it again.")
    guess = next((what for what, words in OTHERS.items() if any(word in name for name in shapes for word in words)), "")
    looks = f"; they look like {guess}, and what is read here are whole transformers" if guess else ""
    raise UnreadFormat(
        f"{where}: its tensors are those of no model family known here ({', '.join(families())}){looks}",
        f"its first tensors are {', '.join(list(shapes)[:3])}.",
    )


def family_with(transformer: str, where: str) -> Family:
    """The family whose transformer is this diffusers class; UnreadFormat if there is none."""
    found = next((family for family in families().values() if family.transformer == transformer), None)
    if found is None:
        known = ", ".join(family.transformer for family in families().values())
        raise UnreadFormat(f"{where}: has a transformer of class {transformer}", f"known here are {known}.")
    return found
