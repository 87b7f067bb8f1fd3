"""Plain SVDQuant weights to the tensors of a Nunchaku or row-major file: one stored linear at a time.

Names of stored linears, and which of the model's linears each holds, come from `families.nunchaku_names`, by way of
`writing.Model`; `fuse` makes one weight of those, and one of two functions gives its tensors.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mezzotint import layouts
from mezzotint.errors import ShapeMismatch, Unsupported
from mezzotint.formats.detection.svdquant_order import ROW_LAYOUT
from mezzotint.formats.readers.svdquant import (
    GELU_SHIFT,
    NUNCHAKU_LAYOUT,
    SHIFTED_LAYER,
    SPLITS,
    V1,
    V2,
    fold_modulation,
)
from mezzotint.formats.writers.writer import CannotStore, ModelInfo, Pieces, StoredTensors
from mezzotint.layouts.nunchaku import WARP
from mezzotint.layouts.part_layouts import pad, round_up_shape
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.tensor import PLAIN, QuantTensor, concat_rows

PADDED_WITH_ONES = ("block_scale", "bias", "channel_scale")
"""Parts whose padding is 1; that of the others is 0."""


class FusedLayerWriter:
    """Half of the two writers: the layers of a model that a file stores as one are written together.

    row_major   by row-major files' names, not by Nunchaku's
    tensors     (name, weight) of a stored linear -> its tensors
    """

    needs_values: Collection[str] = (
        "shift",
        "smooth",
        "proj_down",
        "global_scale",
        "channel_scale",
    )

    def __init__(
        self,
        model: ModelInfo,
        row_major: bool,
        tensors: Callable[[str, QuantTensor], Mapping[str, Tensor]],
    ) -> None:
        self.model, self.row_major, self.tensors = model, row_major, tensors

    def groups(self, modules: Collection[str]) -> Iterable[Sequence[str]]:
        layers = self.model.family.nunchaku.stored_layers(modules, self.row_major)
        return list(
            dict.fromkeys(
                tuple(dict.fromkeys(module for module, _ in held)) for held in layers.values()
            )
        )

    def plain(self, name: str) -> str:
        return self.model.family.nunchaku.stored_tensor(name, self.row_major)

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        tensors: dict[str, Tensor] = {}
        try:
            for stored, weight in self._fused(group).items():
                tensors |= self.tensors(stored, weight)
        except (Unsupported, ShapeMismatch) as error:
            return CannotStore(error.message)
        return StoredTensors(tensors)

    def _fused(self, group: Mapping[str, Pieces]) -> dict[str, QuantTensor]:
        """{stored layer: its weight}

        Raises   Unsupported, ShapeMismatch where the modules cannot be stored as one, or not at all
        """
        foreign = [
            p.scheme
            for pieces in group.values()
            for p in pieces
            if p.scheme.name not in NUNCHAKU_LAYOUT
        ]
        if foreign:
            raise Unsupported(f"is {foreign[0].title}, and not SVDQuant")
        if not all(self.model.family.nunchaku.quantizes(module) for module in group):
            raise Unsupported(
                f"Nunchaku quantizes no such layer of a {self.model.family.transformer_class}"
            )
        layers = self.model.family.nunchaku.stored_layers(group, self.row_major)
        wanted = Counter(module for held in layers.values() for module, _ in held)
        for module, pieces in group.items():
            if len(pieces) != wanted[module]:
                raise Unsupported(
                    f"is in {len(pieces)} pieces side by side, and would be stored in {wanted[module]}"
                )
        return {
            stored: fuse_stored_linear([group[module][piece] for module, piece in held])
            for stored, held in layers.items()
        }


def common_scheme_and_rank(
    layers: Mapping[str, Pieces], title: str
) -> tuple[Scheme, int] | CannotStore:
    """Scheme and rank that all W4A4 layers of a file have, the rank as it is stored."""
    pieces = [piece for many in layers.values() for piece in many if piece.scheme is not AWQ_W4A16]
    schemes = {piece.scheme.name: piece.scheme for piece in pieces}
    ranks = sorted({piece.parts["proj_down"].shape[0] for piece in pieces})
    if len(schemes) != 1:
        listed = " and ".join(scheme.title for scheme in schemes.values()) or "unquantized"
        return CannotStore(f"the layers are {listed}, and {title} has SVDQuant in one precision")
    if len(ranks) != 1:
        return CannotStore(
            f"the low-rank branches have the ranks {', '.join(map(str, ranks))}, and {title} has one rank"
        )
    return next(iter(schemes.values())), ranks[0]


def fuse_stored_linear(tensors: Sequence[QuantTensor]) -> QuantTensor:
    """One weight of several that multiply the same input, each padded to whole fragments of rows; plain parts.

    Raises   ShapeMismatch where they differ in what the fused weight has only once (smooth, proj_down)
    """
    return (
        tensors[0]
        if len(tensors) == 1
        else concat_rows([_padded_rows(tensor) for tensor in tensors])
    )


def nunchaku_tensors(module: str, tensor: QuantTensor, v1: bool) -> dict[str, Tensor]:
    """The stored tensors {name: value} of one linear of a Nunchaku file.

    module   name of the stored linear
    tensor   as `fuse` gives it: plain, rows in the model's order
    v1       FLUX.1's older names; the others are for Qwen-Image and Z-Image
    Raises   Unsupported where Nunchaku has no place for the weight
    """
    if tensor.scheme is AWQ_W4A16:
        return _named(
            module, layouts.convert(_modulation(tensor), NUNCHAKU_LAYOUT[AWQ_W4A16.name]), V2
        )
    _check_branch(tensor)
    shift = SHIFTED_LAYER.fullmatch(module) is not None and tensor.scheme is SVDQUANT_INT4
    if _shift_of(tensor) != (GELU_SHIFT if shift else None):
        raise Unsupported(
            f"has shift {_shift_of(tensor)}, and Nunchaku computes it with {GELU_SHIFT if shift else None}"
        )
    names = V1 if v1 else V2
    stored = _named(
        module,
        layouts.convert(_drop_redundant_parts(tensor), NUNCHAKU_LAYOUT[tensor.scheme.name]),
        names,
    )
    smooth = module + names["smooth"]
    return stored | {f"{smooth}_orig": stored[smooth].clone()}


def row_major_tensors(module: str, tensor: QuantTensor) -> dict[str, Tensor]:
    """The stored tensors {name: value} of one linear of a row-major file that declares its order.

    Raises   Unsupported for AWQ and for a shifted input, which the format's reader has no way to compute
    """
    if tensor.scheme is AWQ_W4A16:
        raise Unsupported(f"is {tensor.scheme.title}, and row-major files hold SVDQuant")
    if "shift" in tensor.parts:
        raise Unsupported(
            f"follows a GELU and expects its input shifted by {_shift_of(tensor)}, which row-major SVDQuant cannot"
        )
    _check_branch(tensor)
    return _named(module, layouts.convert(_with_both_scales(tensor), ROW_LAYOUT["plain"]), V2)


def _named(module: str, tensor: QuantTensor, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {module + names[part]: value for part, value in tensor.parts.items()}


def _check_branch(tensor: QuantTensor) -> None:
    needed = {"smooth", "proj_down", "proj_up"}
    if not needed <= tensor.parts.keys():
        absent = ", ".join(sorted(needed - tensor.parts.keys()))
        raise Unsupported(f"has no {absent}, which every layer of an SVDQuant file needs")
    extra = tensor.parts.keys() - V2.keys() - {"shift"}
    if extra:
        raise Unsupported(
            f"has {', '.join(sorted(extra))}, for which SVDQuant files have no tensor"
        )


def _modulation(tensor: QuantTensor) -> QuantTensor:
    if tensor.shape[0] not in [splits * tensor.shape[1] for splits in SPLITS]:
        raise Unsupported(
            f"is AWQ of {tensor.shape[0]} x {tensor.shape[1]}, and no modulation layer"
        )
    return fold_modulation(tensor)


def _padded_rows(tensor: QuantTensor) -> QuantTensor:
    (rows,) = round_up_shape(tensor.shape[:1], (WARP,))
    parts = {
        name: pad(part, (WARP, *(1,) * (part.ndim - 1)), float(name in PADDED_WITH_ONES))
        if tensor.scheme.part(name).rows and part.shape[:1] == tensor.shape[:1]
        else part
        for name, part in tensor.parts.items()
    }
    return QuantTensor(tensor.scheme, PLAIN, (rows, tensor.shape[1]), parts)


def _drop_redundant_parts(tensor: QuantTensor) -> QuantTensor:
    """Without the shift, which Nunchaku does not write, and without an outer scale of 1 beside another."""
    kept = {name: part for name, part in tensor.parts.items() if name != "shift"}
    for name, other in (("channel_scale", "global_scale"), ("global_scale", "channel_scale")):
        if name in kept and other in kept and bool((kept[name] == 1).all()):
            del kept[name]
    return tensor.with_parts(kept, PLAIN)


def _with_both_scales(tensor: QuantTensor) -> QuantTensor:
    """With both outer scales of NVFP4, an absent one being 1: readers of row-major files expect them."""
    if tensor.scheme is not SVDQUANT_NVFP4:
        return tensor
    dtype = tensor.parts["smooth"].dtype
    ones = {
        "channel_scale": torch.ones(tensor.shape[0], dtype=dtype),
        "global_scale": torch.ones(1, dtype=dtype),
    }
    return tensor.with_parts({**ones, **tensor.parts}, PLAIN)


def _shift_of(tensor: QuantTensor) -> float | None:
    shift = tensor.parts.get("shift")
    return None if shift is None else float(shift.to(torch.float32))
