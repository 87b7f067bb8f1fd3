"""A checkpoint opened but not loaded: its headers, its format, its family, and its layers under diffusers' names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mezzotint import layouts
from mezzotint.builtin import resolve
from mezzotint.errors import BadRequest, MezzotintError
from mezzotint.families import Family, family_of
from mezzotint.families.naming import Naming, Piece
from mezzotint.formats import Contents, Header, Recognised, StoredLinear, read_header, recognise
from mezzotint.hub import AnyPath
from mezzotint.schemes import Shape
from mezzotint.tensor import PLAIN, QuantTensor


@dataclass(frozen=True)
class Checkpoint:
    """One component's weights on disk.

    >>> checkpoint = Checkpoint.open("demo-nvfp4")
    >>> checkpoint.weight("transformer_blocks.0.attn.to_q").shape
    torch.Size([256, 256])
    """

    header: Header
    recognised: Recognised
    contents: Contents

    @classmethod
    def open(cls, path: str | AnyPath) -> "Checkpoint":
        """Read the headers at `path`, which may be a Hub id, and recognise them; raises CheckpointError."""
        return cls.of(read_header(resolve(path)))

    @classmethod
    def of(cls, header: Header) -> "Checkpoint":
        recognised = recognise(header)
        return cls(header, recognised, recognised.format.contents(header))

    @cached_property
    def family(self) -> Family:
        return family_of(self.shapes, str(self.header.path))

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """{name as the file spells it: logical shape} of every plain tensor and of every quantized linear's weight."""
        plain = {key: self.header.tensors[key].shape for key in self.contents.plain}
        return plain | {f"{name}.weight": linear.shape for name, linear in self.contents.linears.items()}

    @cached_property
    def _naming(self) -> Naming:
        try:
            return self.family.naming(self.shapes)
        except MezzotintError as error:
            raise error.at(str(self.header.path)) from error

    @cached_property
    def ignored(self) -> Mapping[str, str]:
        """{stored tensor: reason} of all that is left aside, by the format or by the family."""
        ignored = dict(self.contents.ignored)
        for name, reason in self.family.dropped(self.shapes).items():
            linear = self.contents.linears.get(name.removesuffix(".weight"))
            ignored |= dict.fromkeys([name] if linear is None else linear.keys.values(), reason)
        return ignored

    @property
    def unplaced(self) -> list[str]:
        """Stored tensors that are neither ignored nor part of any tensor of the diffusers model."""
        used = {piece.source for pieces in self._naming.values() for piece in pieces}
        return [name for name in self.shapes if name not in used and name not in self.ignored]

    @cached_property
    def linears(self) -> Mapping[str, Sequence[Piece]]:
        """{diffusers module: its pieces, each of a stored quantized linear}"""
        quantized = {f"{name}.weight": name for name in self.contents.linears}
        return {
            name.removesuffix(".weight"): [replace(piece, source=quantized[piece.source]) for piece in pieces]
            for name, pieces in self._naming.items()
            if pieces[0].source in quantized
        }

    @cached_property
    def plain(self) -> Mapping[str, Piece]:
        """{diffusers tensor name: the stored tensor that it is}"""
        stored = set(self.contents.plain)
        return {name: pieces[0] for name, pieces in self._naming.items() if pieces[0].source in stored}

    @property
    def modules(self) -> list[str]:
        """diffusers names of the quantized linears."""
        return sorted(self.linears)

    def stored(self, module: str) -> StoredLinear:
        """The stored linear that a piece names."""
        return self.contents.linears[module]

    def without_input_scales(self) -> "Checkpoint":
        """The same checkpoint with its static input scales left aside, whether they are there or not."""
        ignored = dict(self.contents.ignored)
        linears = {}
        for name, linear in self.contents.linears.items():
            keys = {part: key for part, key in linear.keys.items() if part != linear.scheme.static_input}
            dropped = linear.keys.items() - keys.items()
            ignored |= {key: "inputs stay unquantized on request" for _, key in dropped if key in self.header.tensors}
            linears[name] = replace(linear, keys=keys)
        return replace(self, contents=replace(self.contents, linears=linears, ignored=ignored))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a plain tensor, by its diffusers name."""
        piece = self.plain[name]
        stored = self.header.tensors[piece.source].shape
        return stored if piece.rows is None else (len(piece.rows), *stored[1:])

    def tensor(self, name: str) -> Tensor:
        """A plain tensor's values, by its diffusers name."""
        piece = self.plain[name]
        stored = self.header.tensors[piece.source].read()
        return stored if piece.rows is None else stored[piece.rows]

    def linear_shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a quantized linear's weight and, if it has one, bias."""
        pieces = self.linears[module]
        rows = [len(p.rows) if p.rows is not None else self.stored(p.source).shape[0] for p in pieces]
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows[0], sum(self.stored(p.source).shape[1] for p in pieces))}
        if any("bias" in self.stored(p.source).keys for p in pieces):
            shapes["bias"] = (rows[0],)
        return shapes

    def read(self, module: str) -> list[QuantTensor]:
        """The module's pieces, plain, in the order of its input features."""
        if module not in self.linears:
            raise BadRequest(f"{self.header.path}: holds no quantized layer {module}", "see .modules for those it has.")
        return [self._read_piece(piece) for piece in self.linears[module]]

    def weight(self, module: str) -> Tensor:
        """The real weights that the file stands for, float32 [out, in]."""
        return torch.cat([piece.scheme.dequantize(piece.parts) for piece in self.read(module)], dim=1)

    def bias(self, module: str) -> Tensor | None:
        """The bias that belongs to `weight`, float32 [out], or None."""
        biases = [piece.scheme.real_bias(piece.parts) for piece in self.read(module)]
        present = [bias for bias in biases if bias is not None]
        return sum(present[1:], start=present[0]) if present else None

    def parts(self, module: str) -> dict[str, Tensor]:
        """The row-major parts by name; those of a layer in several pieces are called 0.codes, 1.codes, ..."""
        pieces = self.read(module)
        if len(pieces) == 1:
            return dict(pieces[0].parts)
        return {f"{i}.{name}": part for i, piece in enumerate(pieces) for name, part in piece.parts.items()}

    def _read_piece(self, piece: Piece) -> QuantTensor:
        plain = layouts.convert(self.stored(piece.source).read(self.header), PLAIN)
        return plain if piece.rows is None else plain.rows(piece.rows)
