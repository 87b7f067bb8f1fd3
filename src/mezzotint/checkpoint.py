"""A checkpoint opened but not loaded: its headers, its format, its family, and its layers under diffusers' names."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mezzotint.builtin import component_folder, counterpart, resolve
from mezzotint.errors import BadRequest, BadScale, MezzotintError, UnknownFormat
from mezzotint.families import Family, family_of
from mezzotint.families.links import writers_of
from mezzotint.families.naming import Naming, Piece
from mezzotint.formats import Contents, Header, Recognised, StoredLinear, recognise
from mezzotint.formats.layout_evidence import sample_of
from mezzotint.formats.layout_inferred import Link, infer_codes, infer_scales
from mezzotint.formats.layout_measured import Sample, measure
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.formats.supplement import open_header
from mezzotint.formats.svdquant_measured import in_rows, measure_vectors
from mezzotint.formats.svdquant_order import smallest
from mezzotint.hub import AnyPath
from mezzotint.inspection import Report, report_on
from mezzotint.schemes import NVFP4, Shape
from mezzotint.tensor import QuantTensor, real_weight, unquantized

SAMPLE_ROWS = 256
SAMPLE_COLUMNS = 2048
LINKS = 6
READER_ROWS = 512


def _span(pieces: Sequence[Piece], linear: StoredLinear) -> range | None:
    """The rows of `linear` that a module is made of, where it is one piece and they follow one another."""
    if len(pieces) != 1:
        return None
    rows = pieces[0].rows
    if rows is None:
        return range(linear.shape[0])
    first, last = int(rows[0]), int(rows[0]) + len(rows)
    return range(first, last) if torch.equal(rows, torch.arange(first, last)) else None


@dataclass(frozen=True)
class Outline:
    """A module's pieces with parts on the meta device, dtypes and shapes without values, unless some were asked for.

    stored   the parts as the files have them; reading passes some of them on untouched
    """

    pieces: list[QuantTensor]
    stored: list[tuple[Tensor, TensorInfo]]

    def origin(self, part: Tensor) -> TensorInfo | None:
        """Where the very bytes of a part lie in the files, or None if reading changes or cuts them."""
        return next((info for stored, info in self.stored if stored is part), None)


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
    def open(
        cls,
        path: str | AnyPath,
        *,
        base: str | AnyPath | None = None,
        component: str | None = None,
        scales_from: str | AnyPath | None = None,
    ) -> "Checkpoint":
        """Read the headers at `path` and recognise them; no weight is loaded.

        path          a file, a component's folder, a pipeline, a Hub id, a built-in model, or the folder of hf and
                      ckpt that ModelOpt's quantize.py writes
        base          the BF16 model: where nothing proves how bytes are arranged, a few layers are held against it;
                      without it, statistics of a few layers may tell; its shapes tell what is padding
        component     folder inside a pipeline ["transformer"]; taken from a base that is one, too
        scales_from   a file of the same weights with the input scales that `path` lacks, or ModelOpt's backbone.pt
        Raises        CheckpointError
        """
        sister = None if scales_from is None else counterpart(resolve(scales_from), component)
        checkpoint = cls.of(open_header(component_folder(resolve(path), component), sister))
        if base is None:
            return checkpoint.inferred()
        reference = cls.of(open_header(counterpart(resolve(base), component)))
        return checkpoint.fitted_to(reference).measured(reference)

    @classmethod
    def of(cls, header: Header) -> "Checkpoint":
        recognised = recognise(header)
        return cls(header, recognised, recognised.format.contents(header))

    @property
    def evidence(self) -> str:
        """Why the format was recognised, and what is known of the layout and how."""
        return "; ".join((self.recognised.evidence, *self.contents.evidence))

    def measured(self, base: "Checkpoint") -> "Checkpoint":
        """The same checkpoint with the layout under which its numbers agree with the base's; reads a few layers.

        Raises  UnknownFormat if no layout agrees, or the base has other layers
        """
        header, contents, where = self.header, self.contents, str(base.header.path)
        sound, contents = sample_of(header, contents)
        if samples := self._samples(sound, base):
            contents = measure(header, contents, samples, where)
        elif sound:
            raise UnknownFormat(
                f"{header.path}: {where} has no unquantized layer that matches {sound[0].module} or its like in shape",
                "is the base the unquantized form of the same model?",
            )
        if samples := self._samples(smallest(header, in_rows(contents)), base):
            contents = measure_vectors(header, contents, samples, where)
        return replace(self, contents=contents)

    def inferred(self) -> "Checkpoint":
        """The same checkpoint with what was only assumed of its layout settled by statistics, where they can tell.

        Reads a few rows of a few layers; of files on the Hub none, whose weights only loading asks for.
        """
        checkpoint, header = self, self.header
        if not header.local:
            return self
        if "scales" in checkpoint.contents.assumed:
            checkpoint = replace(checkpoint, contents=infer_scales(header, checkpoint.contents))
        if "codes" in checkpoint.contents.assumed:
            links, contents = checkpoint._links()
            checkpoint = replace(checkpoint, contents=infer_codes(contents, links))
        return checkpoint

    def _samples(self, linears: Iterable[StoredLinear], base: "Checkpoint") -> list[Sample]:
        """Some output features of those stored linears that the base holds unquantized."""
        return [sample for linear in linears for sample in self._sample(linear, base)]

    def _sample(self, linear: StoredLinear, base: "Checkpoint") -> Iterator[Sample]:
        for module, pieces in self.linears.items():
            name = f"{module}.weight"
            rows = _span(pieces, linear) if pieces[0].source == linear.module else None
            if rows is None or name not in base.plain:
                continue
            own, wanted = (len(rows), linear.shape[1]), base.shape(name)
            if own == wanted or replace(linear, shape=own).may_be_padded_from(wanted):
                weight = base.tensor(name)[:SAMPLE_ROWS]
                yield Sample(linear, rows[0], rows[0] + len(weight), weight)
                return

    def _links(self) -> tuple[list[Link], Contents]:
        """Pairs of layers of which the second, in 4 bits, reads what the first writes; the cheapest to read.

        Contents name those with a scale that is no usable number, which are passed over.
        """
        try:
            modules = self.linears
        except MezzotintError:
            return [], self.contents
        pairs = [(writer, reader) for reader in modules for writer in writers_of(reader)]
        pairs = [pair for pair in pairs if self.stored(modules[pair[1]][0].source).scheme is NVFP4]
        pairs = [pair for pair in pairs if all(self._is_readable(module) for module in pair)]
        pairs.sort(key=lambda pair: math.prod(self.stored(modules[pair[1]][0].source).shape))
        links, faults = [], dict(self.contents.faults)
        for writer, reader in pairs[:LINKS]:
            try:
                links.append(self._link(writer, reader))
            except BadScale as error:
                faults[reader] = error.message
        return links, replace(self.contents, faults=faults)

    def _is_readable(self, module: str) -> bool:
        """Whether the module is there, quantized and sound or as a plain matrix."""
        if module in self.linears:
            return all(self.stored(piece.source).is_sound(self.header) for piece in self.linears[module])
        return f"{module}.weight" in self.plain and len(self.shape(f"{module}.weight")) == 2

    def _link(self, writer: str, reader: str) -> Link:
        (piece, *_) = self.linears[reader]
        linear = self.stored(piece.source)
        outputs = self._row_sizes(writer, min(linear.shape[1], SAMPLE_COLUMNS))
        read = linear.read_rows(self.header, 0, min(linear.shape[0], READER_ROWS))
        columns = read.scheme.dequantize(read.parts).square().sum(0).clamp(min=1e-12).log()
        return Link(linear.layout.codes, outputs, columns[: len(outputs)])

    def _row_sizes(self, module: str, count: int) -> Tensor:
        """Logarithms of the sizes of the first rows of a layer's weight, quantized or not; an even number of them."""
        if module in self.linears:
            (piece, *_) = self.linears[module]
            linear = self.stored(piece.source)
            rows = _span([piece], linear) or range(0)
            first, last = (rows.start, rows.start + min(len(rows), count))
            read = linear.read_rows(self.header, first, last)
            read = read.columns(min(read.shape[1], SAMPLE_COLUMNS))
            weight = read.scheme.dequantize(read.parts)
        else:
            weight = self.tensor(f"{module}.weight")[:count, :SAMPLE_COLUMNS].float()
        return weight[: len(weight) // 2 * 2].square().sum(1).clamp(min=1e-12).log()

    @cached_property
    def report(self) -> Report:
        """What `mezzotint inspect` prints."""
        family, ignored = self.family.title, self.ignored
        report = report_on(self.header, self.recognised, self.contents, self.evidence, family, ignored)
        return replace(report, notes=(*report.notes, *self._oddities()))

    def _oddities(self) -> Iterator[str]:
        """What of the tensors has no place in the model, or that they do not make one up."""
        try:
            for name in self.unplaced:
                yield f"{name} has no place in a {self.family.title} model"
        except MezzotintError as error:
            yield error.message

    @cached_property
    def family(self) -> Family:
        return family_of(self.shapes, str(self.header.path))

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """{name as the file spells it: logical shape} of every plain tensor and of every quantized linear's weight."""
        plain = {key: self.header.tensors[key].shape for key in self.contents.plain}
        shapes = {name: linear.shape for name, linear in self.contents.linears.items()}
        for module, pieces in self.contents.joined.items():
            sides = [shapes.pop(piece) for piece in pieces]
            shapes[module] = (sides[0][0], sum(side[1] for side in sides))
        return plain | {f"{name}.weight": shape for name, shape in shapes.items()}

    @cached_property
    def _naming(self) -> Naming:
        family = self.family
        try:
            return family.naming(self.shapes)
        except MezzotintError as error:
            raise error.at(str(self.header.path)) from error

    @property
    def places(self) -> Collection[str]:
        """Names of the model's tensors, of those that the checkpoint has something for."""
        return self._naming.keys()

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
        quantized: dict[str, tuple[str, ...]] = {f"{name}.weight": (name,) for name in self.contents.linears}
        quantized |= {f"{module}.weight": pieces for module, pieces in self.contents.joined.items()}
        return {
            name.removesuffix(".weight"): [
                replace(piece, source=source) for piece in pieces for source in quantized[piece.source]
            ]
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
            linears[name] = replace(linear, keys=keys, dynamic_input=False)
        return replace(self, contents=replace(self.contents, linears=linears, ignored=ignored))

    def fitted(self, places: Mapping[str, Shape]) -> "Checkpoint":
        """The same checkpoint with the padding of its linears recognised as such, {tensor of the model: shape}."""
        linears = dict(self.contents.linears)
        for source, modules in self._held().items():
            wanted = [places.get(f"{module}.weight", ()) for module in modules]
            if any(len(place) != 2 for place in wanted) or len({place[1] for place in wanted}) != 1:
                continue
            shape = (sum(place[0] for place in wanted), wanted[0][1])
            cut = replace(linears[source], shape=shape)
            if linears[source].may_be_padded_from(shape) and cut.is_sound(self.header):
                linears[source] = cut
        return replace(self, contents=replace(self.contents, linears=linears))

    def fitted_to(self, base: "Checkpoint") -> "Checkpoint":
        """The same checkpoint with the padding of its linears recognised by the shapes that a base has."""
        return self.fitted({name: base.shape(name) for name in base.plain})

    def _held(self) -> dict[str, list[str]]:
        """{stored linear: the modules that it holds}, of those whose modules consist of nothing else."""
        held: dict[str, list[str]] = {}
        for module, pieces in self.linears.items():
            if len(pieces) == 1:
                held.setdefault(pieces[0].source, []).append(module)
        return held

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a plain tensor, by its diffusers name."""
        piece = self.plain[name]
        stored = self.header.tensors[piece.source].shape
        return stored if piece.rows is None else (len(piece.rows), *stored[1:])

    def tensor(self, name: str) -> Tensor:
        """A plain tensor's values, by its diffusers name, in the dtype that `dtype` says."""
        piece = self.plain[name]
        stored = self.header.tensors[piece.source].read().to(self.dtype(name))
        return stored if piece.rows is None else stored[piece.rows]

    def dtype(self, name: str) -> torch.dtype:
        """That of a plain tensor: as it is stored, or BF16, which holds the same numbers, where it is cast to FP8."""
        return unquantized(self.header.tensors[self.plain[name].source].dtype)

    def is_cast(self, name: str) -> bool:
        """Whether the numbers of a plain tensor, or of a quantized layer's bias, are FP8's."""
        if name in self.plain:
            source = self.plain[name].source
        else:
            piece, *_ = self.linears[name.removesuffix(".bias")]
            source = self.stored(piece.source).keys["bias"]
        return self.header.tensors[source].dtype is torch.float8_e4m3fn

    def linear_shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a quantized linear's weight and, if it has one, bias."""
        pieces = self.linears[module]
        stored = [self.stored(piece.source) for piece in pieces]
        rows = len(pieces[0].rows) if pieces[0].rows is not None else stored[0].shape[0]
        columns = [p.columns if p.columns is not None else own.shape[1] for p, own in zip(pieces, stored, strict=True)]
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows, sum(columns))}
        if any("bias" in linear.keys for linear in stored):
            shapes["bias"] = (rows,)
        return shapes

    def read(self, module: str) -> list[QuantTensor]:
        """The module's pieces, plain, in the order of its input features."""
        if module not in self.linears:
            raise BadRequest(f"{self.header.path}: holds no quantized layer {module}", "see .modules for those it has.")
        return [self._read_piece(self.stored(piece.source), piece) for piece in self.linears[module]]

    def _read_piece(self, linear: StoredLinear, piece: Piece) -> QuantTensor:
        linear.check(self.header)
        return _arranged(linear, linear.read(self.header), piece)

    def outline(self, module: str, values_of: Collection[str] = ()) -> "Outline":
        """What `read` gives, without values except those of some parts; nothing else is read."""
        pieces, stored = [], []
        for piece in self.linears[module]:
            linear = self.stored(piece.source)
            outline = linear.outline(self.header, values_of)
            for name, key in linear.keys.items():
                info = self.header.tensors[key]
                stored.append((outline.parts[name] if linear.keeps(name) else info.outline(), info))
            pieces.append(_arranged(linear, outline, piece))
        return Outline(pieces, stored)

    def weight(self, module: str) -> Tensor:
        """The real weights that the file stands for, float32 [out, in]."""
        return real_weight(self.read(module))

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


def _arranged(linear: StoredLinear, stored: QuantTensor, piece: Piece) -> QuantTensor:
    """A stored linear as the piece of a module that it is: plain, and only the piece's rows and columns."""
    plain = linear.plain(stored)
    plain = plain if piece.rows is None else plain.rows(piece.rows)
    return plain if piece.columns is None else plain.columns(piece.columns)


open = Checkpoint.open
"""`mezzotint.open`"""


def inspect(
    path: str | AnyPath,
    *,
    base: str | AnyPath | None = None,
    component: str | None = None,
    scales_from: str | AnyPath | None = None,
) -> Report:
    """Report on a checkpoint; the arguments are those of `open`.

    Weights are read only where nothing in the headers proves how they are arranged: a few rows of a few layers, and
    none of files on the Hub.

    Raises  CheckpointError where a file cannot be read, or is nothing that Mezzotint knows
    """
    return Checkpoint.open(path, base=base, component=component, scales_from=scales_from).report
