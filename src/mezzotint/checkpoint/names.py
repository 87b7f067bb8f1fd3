"""Name a checkpoint's contents as the diffusers model does."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.families import Family, family_of
from mezzotint.families.naming import Naming, Piece
from mezzotint.formats import Contents, Header, StoredLinear
from mezzotint.schemes import Scheme, Shape
from mezzotint.schemes.scheme import FP8_DTYPES
from mezzotint.tensor import unquantized_dtype


@dataclass(frozen=True)
class NamedContents:
    """A header and its contents, under diffusers' names."""

    header: Header
    contents: Contents

    @cached_property
    def family(self) -> Family:
        return family_of(self.shapes, str(self.header.path))

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """{name in the file: logical shape} of plain tensors and quantized linears' weights."""
        plain = {key: self._plain_shape(key) for key in self.contents.plain}
        shapes = {name: linear.shape for name, linear in self.contents.linears.items()}
        for module, pieces in self.contents.split_linears.items():
            parts = [shapes.pop(piece) for piece in pieces]
            shapes[module] = (parts[0][0], sum(columns for _, columns in parts))
        return plain | {f"{name}.weight": shape for name, shape in shapes.items()}

    @cached_property
    def _naming(self) -> Naming:
        family = self.family
        try:
            return family.naming(self.shapes)
        except MezzotintError as error:
            raise error.with_location(str(self.header.path)) from error

    @property
    def model_tensors(self) -> Collection[str]:
        """Names of the model's tensors that the checkpoint stores."""
        return self._naming.keys()

    @cached_property
    def ignored(self) -> Mapping[str, str]:
        """{stored tensor: reason} of all tensors that the format or the family ignores."""
        ignored = {**self.header.skipped, **self.contents.ignored}
        for name, reason in self.family.unused_tensors(self.shapes).items():
            linear = self.contents.linears.get(name.removesuffix(".weight"))
            ignored |= dict.fromkeys([name] if linear is None else linear.keys.values(), reason)
        return ignored

    @cached_property
    def flags(self) -> Mapping[str, str]:
        """{flag tensor: the entry of config.json that its presence sets}"""
        return self.family.flags_of(self.shapes)

    @property
    def unknown_tensors(self) -> list[str]:
        """Stored tensors that are neither ignored nor used by the diffusers model."""
        used = {piece.source for pieces in self._naming.values() for piece in pieces}
        return [name for name in self.shapes if name not in used and name not in self.ignored]

    @cached_property
    def linears(self) -> Mapping[str, Sequence[Piece]]:
        """{diffusers module: pieces of stored quantized linears that it consists of}"""
        quantized: dict[str, tuple[str, ...]] = {
            f"{name}.weight": (name,) for name in self.contents.linears
        }
        quantized |= {
            f"{module}.weight": pieces for module, pieces in self.contents.split_linears.items()
        }
        return {
            name.removesuffix(".weight"): [
                replace(piece, source=source)
                for piece in pieces
                for source in quantized[piece.source]
            ]
            for name, pieces in self._naming.items()
            if pieces[0].source in quantized
        }

    @cached_property
    def plain(self) -> Mapping[str, Piece]:
        """{diffusers tensor name: piece of a stored tensor}"""
        stored = set(self.contents.plain)
        return {
            name: pieces[0] for name, pieces in self._naming.items() if pieces[0].source in stored
        }

    @cached_property
    def sources(self) -> Mapping[str, Shape]:
        """{diffusers tensor name: logical shape} of all tensors that the checkpoint stores."""
        sources = {name: self.shape(name) for name in self.plain}
        for module in self.linears:
            sources |= {
                f"{module}.{name}": shape for name, shape in self.linear_shapes(module).items()
            }
        return sources

    @property
    def modules(self) -> list[str]:
        """Diffusers names of the quantized linears."""
        return sorted(self.linears)

    def stored_linear(self, module: str) -> StoredLinear:
        """Return a stored linear by its name in the file, such as a piece's source."""
        return self.contents.linears[module]

    def scheme(self, module: str) -> Scheme:
        """Return the scheme of a quantized linear."""
        return self.stored_linear(self.linears[module][0].source).scheme

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a plain tensor, by its diffusers name."""
        piece = self.plain[name]
        stored = self._plain_shape(piece.source)
        return stored if piece.rows is None else (len(piece.rows), *stored[1:])

    def tensor(self, name: str) -> Tensor:
        """Return a plain tensor, by its diffusers name, in the dtype of `self.dtype(name)`."""
        piece = self.plain[name]
        values = self.header.tensors[piece.source].read()
        if (scheme := self.contents.packed.get(piece.source)) is not None:
            where = f"{self.header.path}: {piece.source}"
            scheme.check_values("codes", values.reshape(1, -1), where)
            values = scheme.decode({"codes": values.reshape(1, -1)})
        stored = values.to(self.dtype(name)).reshape(self._plain_shape(piece.source))
        return stored if piece.rows is None else stored[piece.rows]

    def _plain_shape(self, key: str) -> Shape:
        """Return the shape of a plain tensor, by its name in the file."""
        return self.contents.reshaped.get(key, self.header.tensors[key].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a plain tensor is loaded; see `unquantized_dtype`."""
        source = self.plain[name].source
        if source in self.contents.packed:
            return torch.float32
        return unquantized_dtype(self.header.tensors[source].storage_dtype)

    def is_fp8_cast(self, name: str) -> bool:
        """Return whether a plain tensor, or a quantized layer's bias, is stored as FP8."""
        if name in self.plain:
            source = self.plain[name].source
        else:
            piece, *_ = self.linears[name.removesuffix(".bias")]
            source = self.stored_linear(piece.source).keys["bias"]
        return self.header.tensors[source].dtype in FP8_DTYPES

    def linear_shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a quantized linear's weight and, if it has one, bias."""
        pieces = self.linears[module]
        stored = [self.stored_linear(piece.source) for piece in pieces]
        rows = len(pieces[0].rows) if pieces[0].rows is not None else stored[0].shape[0]
        columns = [
            piece.columns if piece.columns is not None else linear.shape[1]
            for piece, linear in zip(pieces, stored, strict=True)
        ]
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows, sum(columns))}
        if any("bias" in linear.keys for linear in stored):
            shapes["bias"] = (rows,)
        return shapes
