"""Layers of a checkpoint in another scheme: dequantized in float32, and rounded to nearest."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzotint.checkpoint import Checkpoint, LayerOutline
from mezzotint.containers import TensorInfo
from mezzotint.errors import BrokenFile
from mezzotint.schemes import BF16, Scheme
from mezzotint.tensor import (
    PLAIN,
    QuantTensor,
    dequantize_bias,
    dequantize_pieces,
    relative_error,
    unchanged_bias,
    unquantized_dtype,
)

INPUT_TRANSFORMS = {"pre_quant_scale", "smooth", "shift", "rotation"}
"""Parts that change what a static input scale refers to. They become part of the weight."""


@dataclass(frozen=True)
class EncodedLayers:
    """The layers of a checkpoint, some of which are encoded in another scheme when they are read.

    schemes   {module: the scheme to encode it in}; other layers are read as they are stored
    errors    {module: |W - source| / |source|} of the encoded layers that were read so far
    """

    checkpoint: Checkpoint
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    _outlines: dict[tuple[str, tuple[int, int]], dict[str, Tensor]] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """Return the quantized and the encoded modules."""
        return list(dict.fromkeys((*self.checkpoint.linears, *self.schemes)))

    @property
    def encoded_tensors(self) -> set[str]:
        """Return the unquantized tensors of the checkpoint that belong to encoded modules."""
        names = {f"{module}.{tensor}" for module in self.schemes for tensor in ("weight", "bias")}
        return names & self.checkpoint.plain.keys()

    def stored_outline(self, module: str, values_of: Collection[str] = ()) -> LayerOutline:
        """Return the outline of a module before it is encoded; an unquantized one is BF16."""
        if module in self.checkpoint.linears:
            return self.checkpoint.outline(module, values_of)
        parts: dict[str, Tensor] = {}
        stored: list[tuple[Tensor, TensorInfo]] = []
        for part, name in _plain_parts(self.checkpoint, module).items():
            piece = self.checkpoint.plain[name]
            info, dtype = self.checkpoint.header.tensors[piece.source], self.checkpoint.dtype(name)
            parts[part] = torch.empty(self.checkpoint.shape(name), dtype=dtype, device="meta")
            as_stored = piece.rows is None and dtype == info.dtype
            stored.append((parts[part] if as_stored else info.to_meta(), info))
        return LayerOutline([_bf16(parts)], stored)

    def outline(self, module: str, values_of: Collection[str] = ()) -> LayerOutline:
        """Return what `read` returns, on the meta device except for stored parts `values_of`."""
        outline = self.stored_outline(module, values_of)
        if module not in self.schemes:
            return outline
        parts = self._outline_parts(self.schemes[module], _shape(outline.pieces))
        return LayerOutline([self._encoded(module, outline.pieces, parts)], outline.stored)

    def read(self, module: str) -> list[QuantTensor]:
        """Return a module's pieces; an encoded module has one, and its error is added to `errors`.

        Raises   BrokenFile if a weight is not finite; BadScale if a scale overflows its dtype
        """
        if module not in self.schemes:
            return self.checkpoint.read(module)
        pieces = self._read_stored(module)
        weight = dequantize_pieces(pieces)
        where = f"{self.checkpoint.header.path}: {module}"
        if not bool(weight.isfinite().all()):
            raise BrokenFile(f"{where}.weight holds a value that is not finite")
        encoded = self._encoded(module, pieces, _encode(self.schemes[module], weight))
        for part, values in encoded.parts.items():
            encoded.scheme.check_values(part, values, f"{where}, {part} in {encoded.scheme.title}")
        self.errors[module] = relative_error(encoded.scheme.decode(encoded.parts), weight)
        return [encoded]

    def drops_input_scale(self, module: str) -> bool:
        """Return whether a module has a static input scale that its new scheme cannot use."""
        pieces = self.stored_outline(module).pieces
        static = any(piece.scheme.static_scale_part in piece.parts for piece in pieces)
        return static and _input_scale(pieces, self.schemes[module]) is None

    def _read_stored(self, module: str) -> list[QuantTensor]:
        if module in self.checkpoint.linears:
            return self.checkpoint.read(module)
        names = _plain_parts(self.checkpoint, module)
        return [_bf16({part: self.checkpoint.tensor(name) for part, name in names.items()})]

    def _outline_parts(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Return the encoded parts of a weight of this shape, on the meta device."""
        # Encoding on the meta device takes 20 ms, and most layers of a model have equal shapes.
        key = (scheme.name, shape)
        if key not in self._outlines:
            self._outlines[key] = _encode(scheme, torch.empty(shape, device="meta"))
        return {part: torch.empty_like(value) for part, value in self._outlines[key].items()}

    def _encoded(
        self, module: str, pieces: Sequence[QuantTensor], parts: Mapping[str, Tensor]
    ) -> QuantTensor:
        """Return encoded parts with the bias and the static input scale of their pieces.

        Inputs get a scale at each call, unless the source has a static one for the same purpose.
        """
        scheme = self.schemes[module]
        others = {"bias": _bias(pieces), "input_scale": _input_scale(pieces, scheme)}
        present = {name: part for name, part in others.items() if part is not None}
        return QuantTensor(scheme, PLAIN, _shape(pieces), {**parts, **present}, dynamic_input=True)


def _encode(scheme: Scheme, weight: Tensor) -> dict[str, Tensor]:
    assert scheme.encode is not None  # noqa: S101
    return scheme.encode(weight)


def _plain_parts(checkpoint: Checkpoint, module: str) -> dict[str, str]:
    """Return {part: unquantized tensor of the checkpoint} of an unquantized module."""
    names = {"codes": f"{module}.weight", "bias": f"{module}.bias"}
    return {part: name for part, name in names.items() if name in checkpoint.plain}


def _bf16(parts: Mapping[str, Tensor]) -> QuantTensor:
    rows, columns = parts["codes"].shape
    return QuantTensor(BF16, PLAIN, (rows, columns), parts)


def _shape(pieces: Sequence[QuantTensor]) -> tuple[int, int]:
    """Return the shape of all pieces together: (out, in)."""
    return pieces[0].shape[0], sum(piece.shape[1] for piece in pieces)


def _bias(pieces: Sequence[QuantTensor]) -> Tensor | None:
    """Return the bias that belongs to the dequantized weight: the stored one, unless it changes."""
    stored = next((piece.parts["bias"] for piece in pieces if "bias" in piece.parts), None)
    if stored is None or (kept := unchanged_bias(pieces)) is not None:
        return None if stored is None else kept
    dtype = unquantized_dtype(stored.dtype)
    if stored.is_meta:
        return torch.empty_like(stored, dtype=dtype)
    bias = dequantize_bias(pieces)
    return None if bias is None else bias.to(dtype)


def _input_scale(pieces: Sequence[QuantTensor], scheme: Scheme) -> Tensor | None:
    """Return the static input scale if both schemes quantize the same input in the same way."""
    first, part = pieces[0], scheme.static_scale_part
    same = (
        len(pieces) == 1
        and part is not None
        and first.scheme.quantize_activation is scheme.quantize_activation
        and not INPUT_TRANSFORMS & first.parts.keys()
    )
    return first.parts.get(part) if same and part is not None else None
