"""What a conversion will write, to the last tensor, before a byte is written."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from mezzotint.checkpoint import Checkpoint, Outline
from mezzotint.converting.bytes_of import bytes_of, copied, copied_scale, decoded, decoded_bias
from mezzotint.errors import BadRequest, CannotWrite, ShapeMismatch, Unsupported, listed
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.formats.writing import Declaration, Pieces, Refusal, Writer
from mezzotint.saving import Block, Entry, Group
from mezzotint.schemes import BF16
from mezzotint.tensor import unquantized


@dataclass(frozen=True)
class Contents:
    """Every tensor of the output, and what is said of them.

    groups       in the order in which the source files hold what they are made of
    layers       {module: scheme} of those that stay quantized
    transforms   {what was done to the numbers: how many layers}
    """

    groups: tuple[Group, ...]
    declaration: Declaration
    layers: Mapping[str, str]
    transforms: Mapping[str, int]


def plan_contents(
    checkpoint: Checkpoint, writer: Writer, unquantize: Iterable[str], base: Checkpoint | None
) -> Contents:
    """The tensors that `writer` makes of the checkpoint's layers, those in `unquantize` decoded or taken from `base`.

    Layers that are no nn.Linear in the model are decoded, whatever `base` holds.

    checkpoint   placed in its model, so that it is complete and holds nothing else
    Raises       Unsupported, with every reason, if the target has no place for some layer
    """
    plain = [_plain(checkpoint, name, writer) for name in checkpoint.plain]
    names = list(checkpoint.plain)
    transforms: Counter[str] = Counter()
    decode_only = checkpoint.unquantized.difference(unquantize)
    bare = {*unquantize, *checkpoint.unquantized}
    outlines = {module: checkpoint.outline(module) for module in checkpoint.linears if module not in bare}
    for module in _merely_transformed(writer, outlines):
        bare.add(module)
        del outlines[module]
    for module in sorted(bare):
        where, groups = _unquantized(checkpoint, module, writer, None if module in decode_only else base)
        plain += groups
        names += [entry.key for _, group in groups for entry in group.entries]
        transforms[where] += 1
    quantized = _quantized(checkpoint, writer, outlines, transforms)
    declaration = writer.declare({module: outline.pieces for module, outline in outlines.items()}, names)
    if isinstance(declaration, Refusal):
        raise _refused(checkpoint, writer, {declaration.reason: ["the layers together"]})
    ordered = sorted([*plain, *quantized], key=lambda placed: placed[0])
    _check_unique([group for _, group in ordered])
    schemes = {module: outline.pieces[0].scheme.name for module, outline in outlines.items()}
    return Contents(tuple(group for _, group in ordered), declaration, schemes, dict(transforms))


def _merely_transformed(writer: Writer, outlines: Mapping[str, Outline]) -> list[str]:
    """Layers in BF16 beside a factor or a low-rank part, which the target has no place for."""
    return [
        module
        for module, outline in outlines.items()
        if all(piece.scheme is BF16 for piece in outline.pieces)
        and isinstance(writer.layer({module: outline.pieces}), Refusal)
    ]


def matching(modules: Iterable[str], globs: Sequence[str]) -> set[str]:
    """The modules that some glob names; raises BadRequest for a glob that names none."""
    modules = list(modules)
    for glob in globs:
        if not any(fnmatchcase(module, glob) for module in modules):
            raise BadRequest(
                f"{glob!r} matches no quantized layer", "`mezzotint inspect PATH --layers` lists the layers' names."
            )
    return {module for module in modules if any(fnmatchcase(module, glob) for glob in globs)}


Place = tuple[str, int]
"""Where a group's first bytes come from: file and offset. Groups are written in this order, to read ahead in one go."""


def _plain(checkpoint: Checkpoint, name: str, writer: Writer) -> tuple[Place, Group]:
    """A tensor of no quantized layer."""
    piece = checkpoint.plain[name]
    info = checkpoint.header.tensors[piece.source]
    entry = Entry(writer.plain(name), checkpoint.dtype(name), checkpoint.shape(name))
    as_it_is = piece.rows is None and entry.dtype == info.dtype
    blocks = partial(copied, info) if as_it_is else _computed(partial(checkpoint.tensor, name))
    return _place(info), Group((entry,), blocks)


def _computed(make: Callable[[], Tensor]) -> Callable[[], Iterator[memoryview]]:
    return lambda: bytes_of(make())


def _unquantized(
    checkpoint: Checkpoint, module: str, writer: Writer, base: Checkpoint | None
) -> tuple[str, list[tuple[Place, Group]]]:
    """A quantized module in BF16, and where its values are from: the base if it has them, else decoded."""
    if base is not None and f"{module}.weight" in base.plain:
        _check_same_shape(checkpoint, base, module)
        names = [name for name in (f"{module}.weight", f"{module}.bias") if name in base.plain]
        return f"taken in BF16 from {base.header.path}", [_plain(base, name, writer) for name in names]
    outline = checkpoint.outline(module)
    place = _place(outline.stored[0][1])
    out_features, in_features = outline.pieces[0].shape[0], sum(piece.shape[1] for piece in outline.pieces)
    entry = Entry(writer.plain(f"{module}.weight"), torch.bfloat16, (out_features, in_features))
    groups = [(place, Group((entry,), lambda: decoded(checkpoint.read(module), torch.bfloat16)))]
    bias = _bias(checkpoint, outline, module, writer.plain(f"{module}.bias"))
    return "decoded to BF16", groups + ([(place, bias)] if bias is not None else [])


def _check_same_shape(checkpoint: Checkpoint, base: Checkpoint, module: str) -> None:
    """Raise ShapeMismatch if the base has a layer of this name and another shape: it is another model's."""
    expected = checkpoint.linear_shapes(module)["weight"]
    found = base.shape(f"{module}.weight")
    if found != expected:
        raise ShapeMismatch(
            f"{base.header.path}: {module}.weight has shape {list(found)}, and {checkpoint.header.path} has "
            f"{list(expected)}",
            "name the base of the same model.",
        )


def _bias(checkpoint: Checkpoint, outline: Outline, module: str, key: str) -> Group | None:
    """The bias of a decoded module: the stored one as it is, unless decoding changes it."""
    biases = [piece.parts["bias"] for piece in outline.pieces if "bias" in piece.parts]
    if not biases:
        return None
    entry = Entry(key, unquantized(biases[0].dtype), tuple(biases[0].shape))
    info = outline.origin(biases[0])
    changed = entry.dtype != biases[0].dtype or any("shift" in piece.parts for piece in outline.pieces)
    if len(biases) == 1 and info is not None and not changed:
        return Group((entry,), partial(copied, info))
    return Group((entry,), lambda: decoded_bias(checkpoint.read(module), entry.dtype))


def _quantized(
    checkpoint: Checkpoint, writer: Writer, outlines: Mapping[str, Outline], transforms: Counter[str]
) -> Iterator[tuple[Place, Group]]:
    """The groups of all layers that stay quantized; every refusal is collected before any is raised."""
    refusals: dict[str, list[str]] = {}
    found: list[tuple[Place, Group]] = []
    for modules in writer.groups(outlines):
        own = {module: checkpoint.outline(module, writer.decisive) for module in modules}
        written = writer.layer({module: outline.pieces for module, outline in own.items()})
        if isinstance(written, Refusal):
            refusals.setdefault(written.reason, []).extend(modules)
            continue
        transforms.update(written.transforms)
        found += _stored(checkpoint, writer, own, written.tensors)
    if refusals:
        raise _refused(checkpoint, writer, refusals)
    return iter(found)


def _stored(
    checkpoint: Checkpoint, writer: Writer, outlines: Mapping[str, Outline], tensors: Mapping[str, Tensor]
) -> list[tuple[Place, Group]]:
    """The tensors of one group: what is stored as it is gets copied, what is known without reading is kept, and the
    rest is made together."""
    place = min(_place(info) for outline in outlines.values() for _, info in outline.stored)
    groups, made = [], []
    for key, tensor in tensors.items():
        entry, origin = Entry(key, tensor.dtype, tuple(tensor.shape)), _origin(outlines, tensor)
        if origin is not None:
            groups.append((_place(origin), Group((entry,), _copy(outlines, tensor, origin))))
        elif not (tensor.is_meta or writer.decisive):
            groups.append((place, Group((entry,), partial(bytes_of, tensor))))
        else:
            made.append(entry)
    made.sort(key=lambda entry: -entry.dtype.itemsize)
    if made:
        groups.append((place, Group(tuple(made), partial(_made, checkpoint, writer, list(outlines), made))))
    return groups


def _origin(outlines: Mapping[str, Outline], tensor: Tensor) -> TensorInfo | None:
    return next((info for outline in outlines.values() if (info := outline.origin(tensor)) is not None), None)


def _copy(outlines: Mapping[str, Outline], tensor: Tensor, info: TensorInfo) -> Callable[[], Iterator[Block]]:
    """Copying of one part; scales are looked at on the way."""
    pieces = [piece for outline in outlines.values() for piece in outline.pieces]
    scheme, part = next((p.scheme, name) for p in pieces for name, value in p.parts.items() if value is tensor)
    return partial(copied_scale, info, scheme, part) if scheme.part(part).scale else partial(copied, info)


def _made(
    checkpoint: Checkpoint, writer: Writer, modules: Sequence[str], entries: Sequence[Entry]
) -> Iterator[memoryview]:
    """The bytes of a group that is computed, held against what was planned."""
    pieces: dict[str, Pieces] = {module: checkpoint.read(module) for module in modules}
    written = writer.layer(pieces)
    del pieces
    if isinstance(written, Refusal):
        raise Unsupported(f"{', '.join(modules)}: {written.reason}")
    for entry in entries:
        tensor = written.tensors[entry.key]
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CannotWrite(
                f"{entry.key} came out as {tensor.dtype} {list(tensor.shape)}, "
                f"planned {entry.dtype} {list(entry.shape)}"
            )
        yield from bytes_of(tensor)


def _place(info: TensorInfo) -> Place:
    return str(info.file), info.start


def _check_unique(groups: Iterable[Group]) -> None:
    counts = Counter(entry.key for group in groups for entry in group.entries)
    twice = [key for key, number in counts.items() if number > 1]
    if twice:
        raise Unsupported(f"{twice[0]} would be written twice, as would {len(twice) - 1} more tensors")


def _refused(checkpoint: Checkpoint, writer: Writer, refusals: Mapping[str, Sequence[str]]) -> Unsupported:
    lines = [f"\n    {listed(modules)}: {reason}" for reason, modules in refusals.items()]
    return Unsupported(
        f"{checkpoint.header.path}: cannot be written as {writer.title}:{''.join(lines)}",
        "nothing was written. --to mezzotint holds every layer; --keep-bf16 GLOB leaves layers unquantized.",
    )
