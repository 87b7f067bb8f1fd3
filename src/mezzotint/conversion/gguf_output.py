"""The GGUF file of a planned conversion: makers' names and joined layers.

The plan has diffusers' tensors. Those that the makers fuse are joined row by row; a row's bytes
stay as they are, whatever its type.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.containers import BlockType, DType
from mezzotint.containers.gguf_types import BLOCKS, NUMBER_OF
from mezzotint.conversion.planning import OutputPlan
from mezzotint.conversion.tensor_bytes import tensor_bytes
from mezzotint.errors import Unsupported
from mezzotint.families import Family
from mezzotint.families.original_names import Member, original_layout
from mezzotint.saving import Block, Entry, FileRange, Group
from mezzotint.saving.gguf_file import GGUFFile, GGUFGroup, MetadataValue
from mezzotint.saving.shards import split_group
from mezzotint.schemes import Shape

QUANTIZATION_VERSION = 2
"""Version of ggml's block layouts; gguf-py writes it as GGML_QUANT_VERSION."""
FILE_TYPES = {
    "torch.float32": 0,
    "torch.float16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "torch.bfloat16": 32,
}
"""{type of most bytes: general.file_type}. Source: llama.h, enum llama_ftype"""
SMALL = 1024
"""Elements of the matrices that converters leave in F32."""
BLOCK_TYPES = {f"gguf_{block.name.lower()}": block for block in BLOCKS.values()}


@dataclass(frozen=True)
class _Tensor:
    """One of diffusers' tensors in the plan; `shape` is the logical one."""

    group: Group
    dtype: DType
    shape: Shape


def gguf_file(
    plan: OutputPlan,
    family: Family,
    values: Mapping[str, MetadataValue],
    name: str,
) -> tuple[GGUFFile, OutputPlan]:
    """Return the file to write, and the plan with the tensors of the makers.

    plan      the tensors under diffusers' names
    values    further metadata
    name      name of the file
    Raises    Unsupported if the makers' files have no place for a tensor
    """
    tensors = {
        group.entries[0].key: _described(group, plan)
        for whole in plan.groups
        for group in split_group(whole)
    }
    order = {key: number for number, key in enumerate(tensors)}
    layout = original_layout(family, {key: tensor.shape for key, tensor in tensors.items()})
    groups: list[GGUFGroup] = []
    for original in sorted(layout, key=lambda key: min(order[m.name] for m in layout[key][1])):
        shape, members = layout[original]
        groups.append(_joined(original, shape, members, tensors))
    metadata = {
        **plan.declaration.metadata,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": _file_type(groups),
        **values,
    }
    return (
        GGUFFile(name, tuple(groups), values=metadata),
        replace(plan, groups=tuple(groups)),
    )


def _described(group: Group, plan: OutputPlan) -> _Tensor:
    (entry,) = group.entries
    scheme = plan.layers.get(entry.key.removesuffix(".weight"))
    if scheme is not None and entry.key.endswith(".weight"):
        block = BLOCK_TYPES[scheme]
        columns = entry.shape[1] // block.block_bytes * block.block_elements
        return _Tensor(group, block, (entry.shape[0], columns))
    if str(entry.dtype) not in NUMBER_OF:
        raise Unsupported(f"{entry.key} is {entry.dtype}, which GGUF does not have")
    return _Tensor(group, entry.dtype, entry.shape)


def _joined(
    name: str, shape: Shape, members: Sequence[Member], tensors: Mapping[str, _Tensor]
) -> GGUFGroup:
    """Return a tensor of the makers, joined from its members."""
    parts = [tensors[member.name] for member in members]
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise Unsupported(
            f"{name} joins {' and '.join(member.name for member in members)}, "
            f"which are {' and '.join(sorted(map(str, dtypes)))}",
            "--to mezzotint stores every layer.",
        )
    dtype, groups = parts[0].dtype, [part.group for part in parts]
    size = sum(group.nbytes for group in groups)
    in_order = _rows(members)
    blocks: Callable[[], Iterator[Block]] = (
        partial(_in_succession, groups) if in_order is None else partial(_by_rows, groups, in_order)
    )
    if dtype is torch.bfloat16 and _is_widened(name, shape):
        widened = Entry(name, torch.float32, shape)
        return GGUFGroup.of(Group((widened,), partial(_widened, blocks)), torch.float32, shape)
    entry = Entry(name, torch.uint8, (size,))
    return GGUFGroup.of(Group((entry,), blocks), dtype, shape)


def _rows(members: Sequence[Member]) -> Tensor | None:
    """Return the rows of all members in succession, None if they are in order."""
    rows = [member.rows for member in members if member.rows is not None]
    if not rows:
        return None
    joined = torch.cat(rows)
    return None if torch.equal(joined, torch.arange(len(joined))) else joined


def _in_succession(groups: Sequence[Group]) -> Iterator[Block]:
    for group in groups:
        yield from group.blocks()


def _by_rows(groups: Sequence[Group], rows: Tensor) -> Iterator[Block]:
    """Yield the bytes of rows that are not in order."""
    values = _bytes(partial(_in_succession, groups)).reshape(len(rows), -1)
    ordered = torch.empty_like(values)
    ordered[rows] = values
    yield from tensor_bytes(ordered)


def _bytes(blocks: Callable[[], Iterator[Block]]) -> Tensor:
    """Return all bytes as one vector."""
    joined = bytearray()
    for block in blocks():
        joined += _read(block) if isinstance(block, FileRange) else block
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte()


def _read(block: FileRange) -> bytes:
    with Path(block.file).open("rb") as stream:
        stream.seek(block.start)
        return stream.read(block.nbytes)


def _is_widened(name: str, shape: Shape) -> bool:
    """Return whether converters store a BF16 tensor as F32: all but the matrices of layers.

    ComfyUI-GGUF takes BF16 for a quantized type, which only layers can have.
    """
    matrix = name.endswith(".weight") and len(shape) == 2
    return not matrix or shape[0] * shape[1] <= SMALL


def _widened(blocks: Callable[[], Iterator[Block]]) -> Iterator[Block]:
    yield from tensor_bytes(_bytes(blocks).view(torch.bfloat16).float())


def _file_type(groups: Sequence[GGUFGroup]) -> int:
    """Return the number of the block type of most bytes; without blocks, of the dtype."""
    sizes: Counter[str] = Counter()
    quantized = [group for group in groups if isinstance(group.dtype, BlockType)]
    for group in quantized or groups:
        sizes[str(group.dtype)] += group.nbytes
    ((most, _),) = sizes.most_common(1)
    return FILE_TYPES.get(most, 0)
