"""Model families, one file each; plugins add more (see `mezzotint.discover`)."""

from collections.abc import Mapping
from functools import cache

from mezzotint.discover import collect
from mezzotint.errors import UnknownFormat, UnreadFormat
from mezzotint.families.family import Family
from mezzotint.families.naming_scheme import NamingScheme, Shapes
from mezzotint.families.sampling import Sampling

__all__ = [
    "Family",
    "Sampling",
    "NamingScheme",
    "families",
    "family_of",
    "family_by_transformer",
    "find_family",
]

LOOKALIKES = {
    "a LoRA's": (".lora_", "lora_unet_", ".alpha", ".lokr_", ".hada_"),
    "a VAE's": ("decoder.conv_in.", "decoder.conv1.", "decoder.middle.", "first_stage_model."),
    "a text encoder's": (
        "SelfAttention.",
        "text_model.",
        "embed_tokens.",
        "shared.weight",
        "token_embedding.",
    ),
}
"""{what a file may hold instead of a transformer: parts of its tensors' names}"""


@cache
def families() -> Mapping[str, Family]:
    """Return {name: family} of the modules of this package and of plugins."""
    return collect(__name__, "FAMILY")


def family_of(shapes: Shapes, where: str) -> Family:
    """Return the family of a checkpoint with these tensors, {name: logical shape}.

    where    the checkpoint, for messages
    Raises   UnknownFormat without tensors, UnreadFormat if no family or more than one matches
    """
    matches = [family for family in families().values() if family.matches(shapes)]
    if len(matches) == 1:
        return matches[0]
    if not shapes:
        raise UnknownFormat(f"{where}: holds no tensors of a model", "download it again.")
    raise UnreadFormat(
        f"{where}: its tensors are those of no model family known here "
        f"({', '.join(families())}){_lookalike(shapes)}",
        f"its first tensors are {', '.join(list(shapes)[:3])}.",
    )


def _lookalike(shapes: Shapes) -> str:
    for what, words in LOOKALIKES.items():
        if any(word in name for name in shapes for word in words):
            return f"; they look like {what}, and only whole transformers are read here"
    return ""


def find_family(transformer: str) -> Family | None:
    """Return the family whose transformer is this diffusers class, or None."""
    matches = (f for f in families().values() if f.transformer_class == transformer)
    return next(matches, None)


def family_by_transformer(transformer: str, where: str) -> Family:
    """Return the family whose transformer is this diffusers class.

    where    the model, for messages
    Raises   UnreadFormat if there is none
    """
    family = find_family(transformer)
    if family is None:
        known = ", ".join(family.transformer_class for family in families().values())
        raise UnreadFormat(
            f"{where}: has a transformer of class {transformer}", f"known here are {known}."
        )
    return family
