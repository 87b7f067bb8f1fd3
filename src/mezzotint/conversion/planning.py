"""The plan of a conversion: every output tensor, known before a byte is written."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from mezzotint.checkpoint import Checkpoint, LayerOutline
from mezzotint.checkpoint.encoded_layers import EncodedLayers
from mezzotint.containers import TensorInfo
from mezzotint.conversion.tensor_bytes import (
    copy_scale,
    copy_tensor,
    dequantized_bias_bytes,
    dequantized_bytes,
    tensor_bytes,
)
from mezzotint.errors import BadRequest, CannotWrite, ShapeMismatch, Unsupported, join_names
from mezzotint.formats.writers.writer import CannotStore, Declaration, Pieces, Writer
from mezzotint.saving import Block, Entry, Group
from mezzotint.schemes import BF16
from mezzotint.tensor import unchanged_bias, unquantized_dtype

DECODED = "decoded to BF16"
"""Name of the transformation that dequantizes a layer; it is recorded in mezzotint.json."""

DROPPED_INPUT_SCALE = "without their static input scale"
"""Name of the transformation of an encoded layer whose new scheme cannot use its input scale."""

DECODED_BLOCKS = "decoded from blocks to float32"
"""Name of the transformation of tensors in blocks that are no matrices."""


@dataclass(frozen=True)
class OutputPlan:
    """All tensors of the output, and their description.

    groups        tensors in the order of their data in the source files
    declaration   the format's quantization configuration and metadata
    layers        {module: scheme} of the layers that stay quantized
    transforms    {transformation of values: number of layers}
    """

    groups: tuple[Group, ...]
    declaration: Declaration
    layers: Mapping[str, str]
    transforms: Mapping[str, int]


def plan_contents(
    layers: EncodedLayers, writer: Writer, dequantize: Iterable[str], base: Checkpoint | None
) -> OutputPlan:
    """Plan the tensors that `writer` creates from a checkpoint and its encoded layers.

    layers       of a checkpoint that is placed in its model, so that it is complete and has no
                 other tensors
    dequantize   quantized modules to write unquantized, from `base` or decoded
    Raises       Unsupported, with all reasons, if the target cannot store a layer
    """
    checkpoint = layers.checkpoint
    encoded = layers.encoded_tensors
    names = [name for name in checkpoint.plain if name not in encoded]
    plain = [_plain(checkpoint, name, writer) for name in names]
    packed = checkpoint.contents.packed
    decoded = sum(piece.source in packed for piece in checkpoint.plain.values())
    transforms: Counter[str] = Counter({DECODED_BLOCKS: decoded} if decoded else {})
    transforms.update(_encodings(layers))
    # Modules that are not nn.Linear cannot be quantized in the output. They are always decoded,
    # because the user did not ask for their values from the base.
    decode_only = checkpoint.unquantized.difference(dequantize)
    dequantized = {*dequantize, *checkpoint.unquantized}
    outlines = {
        module: layers.outline(module) for module in layers.modules if module not in dequantized
    }
    for module in _transformed_bf16_layers(writer, outlines):
        dequantized.add(module)
        del outlines[module]
    for module in sorted(dequantized):
        transform, groups = _unquantized(
            checkpoint, module, writer, None if module in decode_only else base
        )
        plain += groups
        names += [entry.key for _, group in groups for entry in group.entries]
        transforms[transform] += 1
    quantized = _quantized(layers, writer, outlines, transforms)
    declaration = writer.declare(
        {module: outline.pieces for module, outline in outlines.items()}, names
    )
    if isinstance(declaration, CannotStore):
        raise _unsupported(checkpoint, writer, {declaration.reason: ["all layers together"]})
    ordered = sorted([*plain, *quantized], key=lambda item: item[0])
    _check_unique([group for _, group in ordered])
    schemes = {module: outline.pieces[0].scheme.name for module, outline in outlines.items()}
    return OutputPlan(tuple(group for _, group in ordered), declaration, schemes, dict(transforms))


def _encodings(layers: EncodedLayers) -> Iterator[str]:
    """Yield the transformations of the encoded layers."""
    for module, scheme in layers.schemes.items():
        yield f"rounded to {scheme.title}"
        if layers.drops_input_scale(module):
            yield DROPPED_INPUT_SCALE


def _transformed_bf16_layers(writer: Writer, outlines: Mapping[str, LayerOutline]) -> list[str]:
    """Return BF16 layers with an input factor or a low-rank part that the target cannot store."""
    return [
        module
        for module, outline in outlines.items()
        if all(piece.scheme is BF16 for piece in outline.pieces)
        and isinstance(writer.layer({module: outline.pieces}), CannotStore)
    ]


def match_globs(modules: Iterable[str], globs: Sequence[str]) -> set[str]:
    """Return the modules that match a glob. Raises BadRequest for a glob that matches none."""
    modules = list(modules)
    for glob in globs:
        if not any(fnmatchcase(module, glob) for module in modules):
            raise BadRequest(
                f"{glob!r} matches no quantized layer",
                "`mezzotint inspect PATH --layers` lists the layers' names.",
            )
    return {module for module in modules if any(fnmatchcase(module, glob) for glob in globs)}


SourceOffset = tuple[str, int]
"""File and offset of a group's first bytes. Groups are written in this order, so that source files
are read sequentially."""


def _plain(checkpoint: Checkpoint, name: str, writer: Writer) -> tuple[SourceOffset, Group]:
    """Plan a tensor that belongs to no quantized layer."""
    piece = checkpoint.plain[name]
    info = checkpoint.header.tensors[piece.source]
    entry = Entry(writer.plain(name), checkpoint.dtype(name), checkpoint.shape(name))
    is_unchanged = piece.rows is None and entry.dtype == info.dtype
    blocks = (
        partial(copy_tensor, info)
        if is_unchanged
        else _computed_blocks(partial(checkpoint.tensor, name))
    )
    return _source_offset(info), Group((entry,), blocks)


def _computed_blocks(make: Callable[[], Tensor]) -> Callable[[], Iterator[memoryview]]:
    return lambda: tensor_bytes(make())


def _unquantized(
    checkpoint: Checkpoint, module: str, writer: Writer, base: Checkpoint | None
) -> tuple[str, list[tuple[SourceOffset, Group]]]:
    """Plan a quantized module in BF16, with values from the base if it has them, else decoded.

    Return the name of the transformation and the planned groups.
    """
    if base is not None and f"{module}.weight" in base.plain:
        _check_same_shape(checkpoint, base, module)
        names = [name for name in (f"{module}.weight", f"{module}.bias") if name in base.plain]
        groups = [_plain(base, name, writer) for name in names]
        return f"taken in BF16 from {base.header.path}", groups
    outline = checkpoint.outline(module)
    offset = _source_offset(outline.stored[0][1])
    out_features = outline.pieces[0].shape[0]
    in_features = sum(piece.shape[1] for piece in outline.pieces)
    entry = Entry(writer.plain(f"{module}.weight"), torch.bfloat16, (out_features, in_features))
    weight = Group((entry,), lambda: dequantized_bytes(checkpoint.read(module), torch.bfloat16))
    bias = _bias(checkpoint, outline, module, writer.plain(f"{module}.bias"))
    return DECODED, [(offset, group) for group in (weight, bias) if group is not None]


def _check_same_shape(checkpoint: Checkpoint, base: Checkpoint, module: str) -> None:
    """Raise ShapeMismatch if the base has another shape, so that it belongs to another model."""
    expected = checkpoint.linear_shapes(module)["weight"]
    actual = base.shape(f"{module}.weight")
    if actual != expected:
        raise ShapeMismatch(
            f"{base.header.path}: {module}.weight has shape {list(actual)}, "
            f"and {checkpoint.header.path} has {list(expected)}",
            "use the base of the same model.",
        )


def _bias(checkpoint: Checkpoint, outline: LayerOutline, module: str, key: str) -> Group | None:
    """Plan the bias of a decoded module: a copy of the stored one, unless decoding changes it."""
    biases = [piece.parts["bias"] for piece in outline.pieces if "bias" in piece.parts]
    if not biases:
        return None
    entry = Entry(key, unquantized_dtype(biases[0].dtype), tuple(biases[0].shape))
    kept = unchanged_bias(outline.pieces)
    info = None if kept is None else outline.source_of(kept)
    if info is not None:
        return Group((entry,), partial(copy_tensor, info))
    return Group((entry,), lambda: dequantized_bias_bytes(checkpoint.read(module), entry.dtype))


def _quantized(
    layers: EncodedLayers,
    writer: Writer,
    outlines: Mapping[str, LayerOutline],
    transforms: Counter[str],
) -> Iterator[tuple[SourceOffset, Group]]:
    """Plan all layers that stay quantized.

    Raises Unsupported with the reasons for all layers that the target cannot store.
    """
    reasons: dict[str, list[str]] = {}
    planned: list[tuple[SourceOffset, Group]] = []
    for modules in writer.groups(outlines):
        group = {module: layers.outline(module, writer.needs_values) for module in modules}
        written = writer.layer({module: outline.pieces for module, outline in group.items()})
        if isinstance(written, CannotStore):
            reasons.setdefault(written.reason, []).extend(modules)
            continue
        transforms.update(written.transforms)
        planned += _group_tensors(layers, writer, group, written.tensors)
    if reasons:
        raise _unsupported(layers.checkpoint, writer, reasons)
    return iter(planned)


def _group_tensors(
    layers: EncodedLayers,
    writer: Writer,
    outlines: Mapping[str, LayerOutline],
    tensors: Mapping[str, Tensor],
) -> list[tuple[SourceOffset, Group]]:
    """Plan the tensors of one group of modules.

    Stored tensors are copied. Tensors whose values are already known, such as constants, are kept
    in memory. All other tensors are computed together when they are written.
    """
    offset = min(
        _source_offset(info) for outline in outlines.values() for _, info in outline.stored
    )
    groups, computed = [], []
    for key, tensor in tensors.items():
        entry, origin = Entry(key, tensor.dtype, tuple(tensor.shape)), _origin(outlines, tensor)
        if origin is not None:
            copy = _copy(outlines, tensor, origin)
            groups.append((_source_offset(origin), Group((entry,), copy)))
        elif not tensor.is_meta and (not writer.needs_values or key.endswith(writer.constants)):
            groups.append((offset, Group((entry,), partial(tensor_bytes, tensor))))
        else:
            computed.append(entry)
    # Tensors with large elements come first, so that each one is aligned to its dtype.
    computed.sort(key=lambda entry: -entry.dtype.itemsize)
    if computed:
        compute = partial(_computed_group, layers, writer, list(outlines), computed)
        groups.append((offset, Group(tuple(computed), compute)))
    return groups


def _origin(outlines: Mapping[str, LayerOutline], tensor: Tensor) -> TensorInfo | None:
    return next(
        (info for outline in outlines.values() if (info := outline.source_of(tensor)) is not None),
        None,
    )


def _copy(
    outlines: Mapping[str, LayerOutline], tensor: Tensor, info: TensorInfo
) -> Callable[[], Iterator[Block]]:
    """Return a function that copies one part. Scales are checked on the way."""
    pieces = [piece for outline in outlines.values() for piece in outline.pieces]
    scheme, part = next(
        (p.scheme, name) for p in pieces for name, value in p.parts.items() if value is tensor
    )
    if scheme.part(part).has_scales:
        return partial(copy_scale, info, scheme, part)
    return partial(copy_tensor, info)


def _computed_group(
    layers: EncodedLayers, writer: Writer, modules: Sequence[str], entries: Sequence[Entry]
) -> Iterator[memoryview]:
    """Yield the bytes of a computed group. Raises CannotWrite if it differs from the plan."""
    pieces: dict[str, Pieces] = {module: layers.read(module) for module in modules}
    written = writer.layer(pieces)
    del pieces
    if isinstance(written, CannotStore):
        raise Unsupported(f"{', '.join(modules)}: {written.reason}")
    for entry in entries:
        tensor = written.tensors[entry.key]
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CannotWrite(
                f"{entry.key} is {tensor.dtype} {list(tensor.shape)}, "
                f"and {entry.dtype} {list(entry.shape)} was planned"
            )
        yield from tensor_bytes(tensor)


def _source_offset(info: TensorInfo) -> SourceOffset:
    return str(info.file), info.start


def _check_unique(groups: Iterable[Group]) -> None:
    counts = Counter(entry.key for group in groups for entry in group.entries)
    duplicates = [key for key, number in counts.items() if number > 1]
    if duplicates:
        raise Unsupported(
            f"{duplicates[0]} and {len(duplicates) - 1} more tensors would be written twice"
        )


def _unsupported(
    checkpoint: Checkpoint, writer: Writer, reasons: Mapping[str, Sequence[str]]
) -> Unsupported:
    lines = [f"\n    {join_names(modules)}: {reason}" for reason, modules in reasons.items()]
    return Unsupported(
        f"{checkpoint.header.path}: cannot be written as {writer.title}:{''.join(lines)}",
        "nothing was written. --to mezzotint stores every layer; "
        "--keep-bf16 GLOB writes layers unquantized.",
    )
