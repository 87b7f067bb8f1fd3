"""How Nunchaku's files, and row-major SVDQuant files, name and fuse the linears of a family.

A block table lists the linears of the model that a stored linear contains, one after another along
the output features. If several entries of a block contain the same linear, they are alternative
names for it: Nunchaku's own comes first, that of row-major files last. Entries with different
`columns` instead hold the linear's input features side by side.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.errors import Unsupported
from mezzotint.families.naming import Naming, Piece
from mezzotint.schemes import Shape

PADDING_MULTIPLE = 128
"""Nunchaku's kernels compute tiles of 128 x 128, and its files pad weights to whole tiles."""
WIDTH, HIDDEN = "width", "hidden"
MODULE = re.compile(r"([a-z_]+\.\d+)\.(.+)")
"""A block's name and the name of a layer in it."""


@dataclass(frozen=True)
class FusedTargets:
    """The model's linears in a stored one; each has `rows` x `columns` features, None for any."""

    targets: tuple[str, ...]
    rows: str | None = WIDTH
    columns: str | None = WIDTH


def same_name(name: str, rows: str = WIDTH, columns: str = WIDTH) -> dict[str, FusedTargets]:
    """Return the table entry of a linear that files store alone, under the model's name."""
    return {name: FusedTargets((name,), rows, columns)}


def norm(name: str, target: str) -> dict[str, FusedTargets]:
    """Return the table entry of an unquantized norm."""
    return {name: FusedTargets((target,), None, None)}


@dataclass(frozen=True)
class BlockTable:
    """The stored names of one kind of block.

    block    pattern of the block's own name
    layers   {stored layer: what it contains}
    width    a tensor whose rows are the model's width
    hidden   width -> features inside the feed-forward
    """

    block: re.Pattern[str]
    layers: Mapping[str, FusedTargets]
    width: str
    hidden: Callable[[int], int]

    def sizes(self, shapes: Mapping[str, Shape]) -> Mapping[str | None, int]:
        """Return {WIDTH: ..., HIDDEN: ...} of the model, or {} without a tensor for the width."""
        if not shapes.get(self.width):
            return {}
        width = shapes[self.width][0]
        return {WIDTH: width, HIDDEN: self.hidden(width)}


@dataclass(frozen=True)
class _StoredLayer:
    """A stored linear found in a table.

    index   its position in the table
    sizes   the model's sizes
    """

    block: str
    index: int
    targets: FusedTargets
    sizes: Mapping[str | None, int]

    def rows(self, shape: Shape, i: int) -> Tensor | None:
        """Return the rows of the i-th linear without padding, None for all rows of the shape."""
        count = len(self.targets.targets)
        size = self.sizes.get(self.targets.rows, shape[0] // count)
        if shape[0] == count * _padded(size):  # every linear is padded
            step = _padded(size)
        elif shape[0] == _padded(count * size):  # the fused linear is padded at its end
            step = size
        else:  # not the model's size: split evenly here, and let the loading plan report it
            size = step = shape[0] // count
        return None if size == shape[0] else torch.arange(i * step, i * step + size)

    def columns(self, shape: Shape) -> int | None:
        """Return the number of input features without padding, None for all."""
        size = self.sizes.get(self.targets.columns)
        return size if size is not None and size < shape[-1] == _padded(size) else None


def _padded(size: int) -> int:
    return -(-size // PADDING_MULTIPLE) * PADDING_MULTIPLE


NamesOfPiece = list[tuple[str, FusedTargets]]
"""The alternative stored layers that contain a piece of a module, Nunchaku's own first."""


@dataclass(frozen=True)
class NunchakuNames:
    """A family's names in Nunchaku's files; without arguments, those of an unsupported family.

    blocks        one table for each kind of block
    awq           modulation layers of a block that are AWQ W4A16, by the model's names
    model_class   Nunchaku's class, as its files name it
    v1            whether tensors have the suffixes of Nunchaku's first releases
    skippable     part of the names of blocks that may all stay unquantized; files declare it
    """

    blocks: tuple[BlockTable, ...] = ()
    awq: tuple[str, ...] = ()
    model_class: str = ""
    v1: bool = False
    skippable: str | None = None

    def naming(self, shapes: Mapping[str, Shape]) -> Naming:
        """Return the naming of a file; names in no table are the model's own."""
        stored = self._stored_layers_in(shapes)
        naming = {name: [Piece(name)] for name in shapes if name not in stored}
        for name, layer in sorted(stored.items(), key=lambda item: item[1].index):
            for i, target in enumerate(layer.targets.targets):
                piece = Piece(name, layer.rows(shapes[name], i), layer.columns(shapes[name]))
                naming.setdefault(f"{layer.block}.{target}.weight", []).append(piece)
        return naming

    def _stored_layers_in(self, shapes: Mapping[str, Shape]) -> dict[str, _StoredLayer]:
        tables = [(table, table.sizes(shapes), list(table.layers)) for table in self.blocks]
        found = {}
        for name in shapes:
            match = MODULE.fullmatch(name.removesuffix(".weight"))
            if not match or not shapes[name]:
                continue
            block, leaf = match.groups()
            for table, sizes, order in tables:
                if table.block.fullmatch(block) and leaf in table.layers:
                    index = order.index(leaf)
                    found[name] = _StoredLayer(block, index, table.layers[leaf], sizes)
        return found

    def stored_layers(
        self, modules: Iterable[str], row_major: bool = False
    ) -> dict[str, list[tuple[str, int]]]:
        """Return {stored layer: [(module, index of its piece), ...]} for writing quantized modules.

        The pieces are in the order of the output features. A module in no table keeps its name.

        Raises   Unsupported if a stored layer would contain a module that is not among `modules`
        """
        found: dict[str, dict[str, tuple[str, int]]] = {}
        targets_of: dict[str, tuple[str, ...]] = {}
        for module in modules:
            block, pieces = self._names_of(module)
            for number, names in enumerate(pieces):
                leaf, fused = names[-1 if row_major else 0]
                stored = f"{block}.{leaf}" if block else leaf
                targets_of[stored] = fused.targets
                members = found.setdefault(stored, {})
                members[module.removeprefix(f"{block}.")] = (module, number)
        for stored, members in found.items():
            _require_all(stored, targets_of[stored], members)
        return {
            stored: [members[target] for target in targets_of[stored]]
            for stored, members in found.items()
        }

    def piece_columns(self, module: str, shapes: Mapping[str, Shape]) -> list[int]:
        """Return the input features of each piece of a linear, in a model with these tensors."""
        block, pieces = self._names_of(module)
        tables = (table for table in self.blocks if table.block.fullmatch(block))
        sizes = next((table.sizes(shapes) for table in tables), {})
        all_columns = shapes[f"{module}.weight"][1]
        return [sizes.get(names[0][1].columns, all_columns) for names in pieces]

    def stored_tensor(self, name: str, row_major: bool = False) -> str:
        """Return the name under which files store an unquantized tensor of the model."""
        module, _, leaf = name.rpartition(".")
        block, pieces = self._names_of(module)
        names = [stored for stored, fused in pieces[0] if fused.rows is None]
        return f"{block}.{names[-1 if row_major else 0]}.{leaf}" if block and names else name

    def quantizes(self, module: str) -> bool:
        """Return whether Nunchaku computes this linear with quantized weights, or may do so."""
        match = MODULE.fullmatch(module)
        if match and match[2] in self.awq:
            return True
        block, pieces = self._names_of(module)
        return bool(block) and any(fused.rows is not None for _, fused in pieces[0])

    def _names_of(self, module: str) -> tuple[str, list[NamesOfPiece]]:
        """Return a module's block and the stored names of each of its pieces."""
        match = MODULE.fullmatch(module)
        for table in self.blocks:
            if not match or not table.block.fullmatch(match[1]):
                continue
            pieces: dict[str | None, NamesOfPiece] = {}
            for leaf, fused in table.layers.items():
                if match[2] in fused.targets:
                    pieces.setdefault(fused.columns, []).append((leaf, fused))
            if pieces:
                return match[1], list(pieces.values())
        return "", [[(module, FusedTargets((module,)))]]


def _require_all(stored: str, targets: tuple[str, ...], members: Mapping[str, object]) -> None:
    absent = [target for target in targets if target not in members]
    if absent:
        raise Unsupported(
            f"{stored} holds {', '.join(targets)} together, and {absent[0]} is not quantized"
        )
