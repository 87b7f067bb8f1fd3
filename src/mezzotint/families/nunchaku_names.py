"""Nunchaku's names for the layers of three families, in both spellings, and row-major SVDQuant's of Z-Image.

Each table says which of the model's linears a stored one holds, one after another along the output features. Several
entries of one block that name the same linear are other spellings of one another, Nunchaku's own first and that of
row-major files last; or, where they have different `columns`, they hold its input features side by side.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.errors import Unsupported
from mezzotint.families.naming import Naming, Piece
from mezzotint.schemes import Shape

PADDED_TO = 128
WIDTH, HIDDEN = "width", "hidden"


@dataclass(frozen=True)
class Holds:
    """The model's linears inside a stored one; each has `rows` x `columns` features, None for those stored."""

    targets: tuple[str, ...]
    rows: str | None = WIDTH
    columns: str | None = WIDTH


@dataclass(frozen=True)
class Table:
    """The stored names of one kind of block.

    block    pattern of the block's own name
    layers   {stored layer: what it holds}
    width    a tensor with as many rows as the model is wide
    hidden   features inside the MLP of a model so wide
    """

    block: re.Pattern[str]
    layers: Mapping[str, Holds]
    width: str
    hidden: Callable[[int], int]

    def sizes(self, shapes: Mapping[str, Shape]) -> Mapping[str | None, int]:
        """{WIDTH: ..., HIDDEN: ...} of the model that these tensors belong to."""
        if not shapes.get(self.width):
            return {}
        width = shapes[self.width][0]
        return {WIDTH: width, HIDDEN: self.hidden(width)}


QKV = Holds(("attn.to_q", "attn.to_k", "attn.to_v"))
ADDED_QKV = Holds(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))


def _same(name: str, rows: str = WIDTH, columns: str = WIDTH) -> dict[str, Holds]:
    return {name: Holds((name,), rows, columns)}


def _norm(name: str, target: str) -> dict[str, Holds]:
    return {name: Holds((target,), None, None)}


FLUX1_DOUBLE = {
    "qkv_proj": QKV,
    "attn.to_qkv": QKV,
    "qkv_proj_context": ADDED_QKV,
    "attn.add_qkv_proj": ADDED_QKV,
    "out_proj": Holds(("attn.to_out.0",)),
    "out_proj_context": Holds(("attn.to_add_out",)),
    "mlp_fc1": Holds(("ff.net.0.proj",), HIDDEN),
    "mlp_fc2": Holds(("ff.net.2",), WIDTH, HIDDEN),
    "mlp_context_fc1": Holds(("ff_context.net.0.proj",), HIDDEN),
    "mlp_context_fc2": Holds(("ff_context.net.2",), WIDTH, HIDDEN),
    **_same("attn.to_out.0"),
    **_same("attn.to_add_out"),
    **_same("ff.net.0.proj", HIDDEN),
    **_same("ff.net.2", WIDTH, HIDDEN),
    **_same("ff_context.net.0.proj", HIDDEN),
    **_same("ff_context.net.2", WIDTH, HIDDEN),
    **_norm("norm_q", "attn.norm_q"),
    **_norm("norm_k", "attn.norm_k"),
    **_norm("norm_added_q", "attn.norm_added_q"),
    **_norm("norm_added_k", "attn.norm_added_k"),
    **_norm("attn.norm_q", "attn.norm_q"),
    **_norm("attn.norm_k", "attn.norm_k"),
    **_norm("attn.norm_added_q", "attn.norm_added_q"),
    **_norm("attn.norm_added_k", "attn.norm_added_k"),
}
FLUX1_SINGLE = {
    "qkv_proj": QKV,
    "attn.to_qkv": QKV,
    "mlp_fc1": Holds(("proj_mlp",), HIDDEN),
    "out_proj": Holds(("proj_out",)),
    "attn.to_out": Holds(("proj_out",)),
    "mlp_fc2": Holds(("proj_out",), WIDTH, HIDDEN),
    **_norm("norm_q", "attn.norm_q"),
    **_norm("norm_k", "attn.norm_k"),
    **_norm("attn.norm_q", "attn.norm_q"),
    **_norm("attn.norm_k", "attn.norm_k"),
}
QWENIMAGE = {
    "attn.to_qkv": QKV,
    "attn.add_qkv_proj": ADDED_QKV,
    **_same("attn.to_out.0"),
    **_same("attn.to_add_out"),
    **_same("img_mlp.net.0.proj", HIDDEN),
    **_same("img_mlp.net.2", WIDTH, HIDDEN),
    **_same("txt_mlp.net.0.proj", HIDDEN),
    **_same("txt_mlp.net.2", WIDTH, HIDDEN),
}
ZIMAGE = {
    "attention.to_qkv": Holds(("attention.to_q", "attention.to_k", "attention.to_v")),
    **_same("attention.to_out.0"),
    "feed_forward.net.0.proj": Holds(("feed_forward.w3", "feed_forward.w1"), HIDDEN),
    "feed_forward.w13": Holds(("feed_forward.w1", "feed_forward.w3"), HIDDEN),
    "feed_forward.net.2": Holds(("feed_forward.w2",), WIDTH, HIDDEN),
    **_same("feed_forward.w2", WIDTH, HIDDEN),
}


def _four(width: int) -> int:
    return 4 * width


def _zimage_hidden(width: int) -> int:
    return int(width / 3 * 8)


DOUBLE, SINGLE = re.compile(r"transformer_blocks\.\d+"), re.compile(r"single_transformer_blocks\.\d+")
REFINED = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+")
TABLES: Mapping[str, tuple[Table, ...]] = {
    "flux1": (
        Table(DOUBLE, FLUX1_DOUBLE, "x_embedder.weight", _four),
        Table(SINGLE, FLUX1_SINGLE, "x_embedder.weight", _four),
    ),
    "qwenimage": (Table(DOUBLE, QWENIMAGE, "img_in.weight", _four),),
    "zimage": (Table(REFINED, ZIMAGE, "layers.0.attention_norm1.weight", _zimage_hidden),),
}
"""{family: its tables}"""
AWQ: Mapping[str, tuple[str, ...]] = {
    "flux1": ("norm1.linear", "norm1_context.linear", "norm.linear"),
    "qwenimage": ("img_mod.1", "txt_mod.1"),
}
"""{family: modulation layers of a block that Nunchaku has in AWQ W4A16, under the model's names}"""

MODULE = re.compile(r"([a-z_]+\.\d+)\.(.+)")


@dataclass(frozen=True)
class _Stored:
    """A stored linear that is in a table: its block, its place in the table, what it holds, the model's sizes."""

    block: str
    place: int
    holds: Holds
    sizes: Mapping[str | None, int]


def nunchaku_naming(family: str, shapes: Mapping[str, Shape]) -> Naming:
    """The naming of a file of this family; names that are in no table stay as they are spelled."""
    stored = _in_tables(family, shapes)
    naming: dict[str, list[Piece]] = {name: [Piece(name)] for name in shapes if name not in stored}
    for name, place in sorted(stored.items(), key=lambda item: item[1].place):
        for i, target in enumerate(place.holds.targets):
            piece = Piece(name, _rows(shapes[name], place, i), _columns(shapes[name], place))
            naming.setdefault(f"{place.block}.{target}.weight", []).append(piece)
    return naming


def _in_tables(family: str, shapes: Mapping[str, Shape]) -> dict[str, _Stored]:
    """{stored name: where it is in the family's tables}"""
    tables = [(table, table.sizes(shapes), list(table.layers)) for table in TABLES.get(family, ())]
    found = {}
    for name in shapes:
        match = MODULE.fullmatch(name.removesuffix(".weight"))
        for table, sizes, order in tables:
            if match and shapes[name] and table.block.fullmatch(match[1]) and match[2] in table.layers:
                found[name] = _Stored(match[1], order.index(match[2]), table.layers[match[2]], sizes)
    return found


def _rows(shape: Shape, stored: _Stored, i: int) -> Tensor | None:
    """Rows of the i-th linear in a stored one, less the padding that follows each of them or all of them."""
    count = len(stored.holds.targets)
    own = stored.sizes.get(stored.holds.rows, shape[0] // count)
    if shape[0] == count * _padded(own):
        step = _padded(own)
    elif shape[0] == _padded(count * own):
        step = own
    else:
        own = step = shape[0] // count  # not the size that the model's width calls for: the plan will say so
    return None if own == shape[0] else torch.arange(i * step, i * step + own)


def _columns(shape: Shape, stored: _Stored) -> int | None:
    """How many input columns are the model's own, None for all."""
    own = stored.sizes.get(stored.holds.columns)
    return own if own is not None and own < shape[-1] == _padded(own) else None


def _padded(size: int) -> int:
    return -(-size // PADDED_TO) * PADDED_TO


def stored_layers(family: str, modules: Iterable[str], row_major: bool = False) -> dict[str, list[tuple[str, int]]]:
    """{stored layer: what it holds, as (module of the model, number of its piece)}, to write quantized modules by.

    The held pieces follow one another along the output features; a module in no table is stored under its own name.
    Raises   Unsupported where a stored layer would hold a module that is not among `modules`
    """
    found: dict[str, dict[str, tuple[str, int]]] = {}
    holding: dict[str, tuple[str, ...]] = {}
    for module in modules:
        block, pieces = _stored_as(family, module)
        for number, spellings in enumerate(pieces):
            leaf, holds = spellings[-1 if row_major else 0]
            stored = f"{block}.{leaf}" if block else leaf
            holding[stored] = holds.targets
            found.setdefault(stored, {})[module.removeprefix(f"{block}.")] = (module, number)
    for stored, held in found.items():
        absent = [target for target in holding[stored] if target not in held]
        if absent:
            raise Unsupported(f"{stored} holds {', '.join(holding[stored])} together, and {absent[0]} is not quantized")
    return {stored: [held[target] for target in holding[stored]] for stored, held in found.items()}


def piece_columns(family: str, module: str, shapes: Mapping[str, Shape]) -> list[int]:
    """How many input features each piece of a linear has, in a model with tensors of these shapes."""
    block, pieces = _stored_as(family, module)
    tables = (table for table in TABLES.get(family, ()) if table.block.fullmatch(block))
    sizes = next((table.sizes(shapes) for table in tables), {})
    whole = shapes[f"{module}.weight"][1]
    return [sizes.get(spellings[0][1].columns, whole) for spellings in pieces]


def stored_tensor(family: str, name: str, row_major: bool = False) -> str:
    """The name under which an unquantized tensor of the model is stored."""
    module, _, leaf = name.rpartition(".")
    block, pieces = _stored_as(family, module)
    spellings = [stored for stored, holds in pieces[0] if holds.rows is None]
    return f"{block}.{spellings[-1 if row_major else 0]}.{leaf}" if block and spellings else name


def in_nunchaku(family: str, module: str) -> bool:
    """Whether Nunchaku computes this linear of the model with quantized weights; Z-Image's refiners it may."""
    match = MODULE.fullmatch(module)
    if match and match[2] in AWQ.get(family, ()):
        return True
    block, pieces = _stored_as(family, module)
    return bool(block) and any(holds.rows is not None for _, holds in pieces[0])


def _stored_as(family: str, module: str) -> tuple[str, list[list[tuple[str, Holds]]]]:
    """A module's block, and for each of its pieces the spellings of the stored layer."""
    match = MODULE.fullmatch(module)
    for table in TABLES.get(family, ()):
        if not match or not table.block.fullmatch(match[1]):
            continue
        pieces: dict[str | None, list[tuple[str, Holds]]] = {}
        for leaf, holds in table.layers.items():
            if match[2] in holds.targets:
                pieces.setdefault(holds.columns, []).append((leaf, holds))
        if pieces:
            return match[1], list(pieces.values())
    return "", [[(module, Holds((module,)))]]
