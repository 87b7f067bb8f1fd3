"""Drop what training scripts and torch.save put before a model's names, before any format looks.

Examples are `state_dict.` of Lightning, `module.` of DistributedDataParallel, `_orig_mod.` of
torch.compile, and a single file's prefix that was written twice.
"""

from collections.abc import Iterable
from dataclasses import replace

from mezzotint.errors import BadRequest, join_names
from mezzotint.families.naming_scheme import PREFIXES, transformer_prefix
from mezzotint.formats.components import with_renamed_layers
from mezzotint.formats.header import Header

WRAPPERS = (
    *("state_dict.", "model_state_dict.", "model.", "module.", "_orig_mod."),
    *("generator.", "generator_ema.", "ema.", "ema_model.", "net.", "dit."),
)
"""First parts of names that say who holds the model; no family's names begin with one."""
OUTSIDE = "is stored outside the model's weights"


def unwrapped(header: Header) -> Header:
    """Drop the wrappers from all names, outermost first.

    Tensors outside a wrapper, such as an optimizer's, move to `skipped`.

    Raises   BadRequest if the file holds several sets of weights, such as a model and its EMA
    """
    wrapper = ""
    names = list(header.tensors)
    while dropped := _outermost(names, header):
        names = [name.removeprefix(dropped) for name in names if name.startswith(dropped)]
        wrapper += dropped
    return _without(header, wrapper) if wrapper else header


def _outermost(names: Iterable[str], header: Header) -> str:
    """Return the wrapper that the names begin with, or "" for names that a family may know."""
    names = tuple(names)
    prefix = transformer_prefix(names)
    if prefix:
        inner = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return prefix if all(name.startswith(PREFIXES) for name in inner) else ""
    found = [wrapper for wrapper in WRAPPERS if any(name.startswith(wrapper) for name in names)]
    if len(found) > 1:
        raise BadRequest(
            f"{header.path}: holds {len(found)} sets of weights: names begin with "
            f"{join_names(found)}",
            f"choose one, for example: --rename '^{found[0][:-1]}\\.={PREFIXES[-1]}'",
        )
    return found[0] if found else ""


def _without(header: Header, wrapper: str) -> Header:
    tensors = {
        name.removeprefix(wrapper): replace(info, name=name.removeprefix(wrapper))
        for name, info in header.tensors.items()
        if name.startswith(wrapper)
    }
    outside = [name for name in header.tensors if not name.startswith(wrapper)]
    metadata = with_renamed_layers(header.metadata, lambda module: module.removeprefix(wrapper))
    return replace(
        header,
        tensors=tensors,
        metadata=metadata,
        skipped={**header.skipped, **dict.fromkeys(outside, OUTSIDE)},
        notes=(*header.notes, f"names are read without {wrapper!r} at their beginning"),
    )
