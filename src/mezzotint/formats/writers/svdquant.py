"""Convert plain SVDQuant weights to the tensors of a Nunchaku or row-major file.

`families.nunchaku_names` has the names of stored linears, and the model's linears that each
contains. `fuse_stored_linear` joins these, and `nunchaku_tensors` or `row_major_tensors` returns
the tensors.
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
"""Parts padded with 1, as DeepCompressor pads them; others are padded with 0."""


class FusedLayerWriter:
    """Base of both writers: write the layers of a model together that the file stores as one.

    row_major   use the names of row-major files, not Nunchaku's
    tensors     (name, weight) of a stored linear -> its tensors
    """

    needs_values: Collection[str] = (
        "shift",
        "smooth",
        "proj_down",
        "global_scale",
        "channel_scale",
    )
    constants: tuple[str, ...] = ()

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
                tuple(dict.fromkeys(module for module, _ in fused)) for fused in layers.values()
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
        """Return {stored layer: its weight}.

        Raises   Unsupported, ShapeMismatch if the modules cannot be fused or stored
        """
        unsupported = [
            p.scheme
            for pieces in group.values()
            for p in pieces
            if p.scheme.name not in NUNCHAKU_LAYOUT
        ]
        if unsupported:
            raise Unsupported(f"is {unsupported[0].title}, not SVDQuant")
        if not all(self.model.family.nunchaku.quantizes(module) for module in group):
            raise Unsupported(
                f"Nunchaku does not quantize this layer of a {self.model.family.transformer_class}"
            )
        # Outlines have values for `needs_values` only in layers that have a low-rank branch.
        for piece in (piece for pieces in group.values() for piece in pieces):
            if piece.scheme is not AWQ_W4A16:
                _check_branch(piece)
        layers = self.model.family.nunchaku.stored_layers(group, self.row_major)
        expected = Counter(module for fused in layers.values() for module, _ in fused)
        for module, pieces in group.items():
            if len(pieces) != expected[module]:
                raise Unsupported(
                    f"has {len(pieces)} pieces along its input features, and the file stores it in "
                    f"{expected[module]}"
                )
        return {
            stored: fuse_stored_linear([group[module][piece] for module, piece in fused])
            for stored, fused in layers.items()
        }


def common_scheme_and_rank(
    layers: Mapping[str, Pieces], title: str
) -> tuple[Scheme, int] | CannotStore:
    """Return the scheme and the stored rank of all W4A4 layers, or CannotStore if they differ."""
    every = (piece for pieces in layers.values() for piece in pieces)
    pieces = [piece for piece in every if piece.scheme is not AWQ_W4A16]
    schemes = {piece.scheme.name: piece.scheme for piece in pieces}
    ranks = sorted({piece.parts["proj_down"].shape[0] for piece in pieces})
    if len(schemes) != 1:
        listed = " and ".join(scheme.title for scheme in schemes.values()) or "unquantized"
        return CannotStore(f"the layers are {listed}, and {title} stores SVDQuant in one precision")
    if len(ranks) != 1:
        return CannotStore(
            f"the low-rank branches have ranks {', '.join(map(str, ranks))}, "
            f"and {title} stores one rank"
        )
    return next(iter(schemes.values())), ranks[0]


def fuse_stored_linear(tensors: Sequence[QuantTensor]) -> QuantTensor:
    """Join weights with the same input along their rows, each padded to whole fragments.

    tensors   plain
    Raises    ShapeMismatch if they differ in smooth or proj_down, which the fused weight has once
    """
    return (
        tensors[0]
        if len(tensors) == 1
        else concat_rows([_padded_rows(tensor) for tensor in tensors])
    )


def nunchaku_tensors(module: str, tensor: QuantTensor, v1: bool) -> dict[str, Tensor]:
    """Return the tensors {name: value} of one linear of a Nunchaku file.

    module   name of the stored linear
    tensor   result of `fuse_stored_linear`: plain, rows in the model's order
    v1       use FLUX.1's older names, not those of Qwen-Image and Z-Image
    Raises   Unsupported if Nunchaku cannot store the weight
    """
    if tensor.scheme is AWQ_W4A16:
        return _named(
            module, layouts.convert(_modulation(tensor), NUNCHAKU_LAYOUT[AWQ_W4A16.name]), V2
        )
    shifted = SHIFTED_LAYER.fullmatch(module) is not None and tensor.scheme is SVDQUANT_INT4
    expected = GELU_SHIFT if shifted else None
    if _shift_of(tensor) != expected:
        raise Unsupported(
            f"has shift {_shift_of(tensor)}, and Nunchaku computes the layer with {expected}"
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
    """Return the tensors {name: value} of one linear of a row-major file.

    Raises   Unsupported for AWQ and for a shifted input, which vLLM-Omni cannot compute
    """
    if tensor.scheme is AWQ_W4A16:
        raise Unsupported(f"is {tensor.scheme.title}, and row-major files store SVDQuant")
    if "shift" in tensor.parts:
        raise Unsupported(
            f"follows a GELU and needs its input shifted by {_shift_of(tensor)}, "
            "which row-major files cannot declare"
        )
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
        raise Unsupported(f"has {', '.join(sorted(extra))}, which SVDQuant files cannot store")


def _modulation(tensor: QuantTensor) -> QuantTensor:
    if tensor.shape[0] not in [splits * tensor.shape[1] for splits in SPLITS]:
        raise Unsupported(
            f"is AWQ of {tensor.shape[0]} x {tensor.shape[1]}, not a modulation layer"
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
    """Drop the shift, which Nunchaku's files imply, and one of two outer scales if it is 1."""
    kept = {name: part for name, part in tensor.parts.items() if name != "shift"}
    for name in ("channel_scale", "global_scale"):
        if {"channel_scale", "global_scale"} <= kept.keys() and bool((kept[name] == 1).all()):
            del kept[name]
    return tensor.with_parts(kept, PLAIN)


def _with_both_scales(tensor: QuantTensor) -> QuantTensor:
    """Add absent outer scales of NVFP4 as 1, because readers of row-major files expect both."""
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
