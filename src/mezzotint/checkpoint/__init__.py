"""A checkpoint opened but not loaded: its headers, its format, its family, and its layers, to be read one by one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from mezzotint.builtin import component_folder, counterpart, resolve
from mezzotint.checkpoint.names import NamedContents
from mezzotint.checkpoint.settling import inferred, measured
from mezzotint.errors import BadRequest, MezzotintError
from mezzotint.families.naming import Piece
from mezzotint.formats import Header, Recognised, StoredLinear, recognise
from mezzotint.formats.safetensors_file import TensorInfo
from mezzotint.formats.supplement import open_header
from mezzotint.hub import AnyPath
from mezzotint.inspection import Report, report_on
from mezzotint.schemes import Shape
from mezzotint.tensor import QuantTensor, real_weight

MOST_NAMED = 50
"""Tensors without a place that the report's notes name."""


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
class Checkpoint(NamedContents):
    """One component's weights on disk.

    >>> checkpoint = Checkpoint.open("demo-nvfp4")
    >>> checkpoint.weight("transformer_blocks.0.attn.to_q").shape
    torch.Size([256, 256])
    """

    recognised: Recognised

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
        return cls(header, recognised.format.contents(header), recognised)

    @property
    def evidence(self) -> str:
        """Why the format was recognised, and what is known of the layout and how."""
        return "; ".join((self.recognised.evidence, *self.contents.evidence))

    def measured(self, base: "Checkpoint") -> "Checkpoint":
        """The same checkpoint with its layout settled by the base: see `settling.measured`."""
        return replace(self, contents=measured(self, base))

    def inferred(self) -> "Checkpoint":
        """The same checkpoint with its layout settled by statistics: see `settling.inferred`."""
        contents = inferred(self)
        return self if contents is self.contents else replace(self, contents=contents)

    @cached_property
    def report(self) -> Report:
        """What `mezzotint inspect` prints."""
        family, ignored = self.family.title, self.ignored
        report = report_on(self.header, self.recognised, self.contents, self.evidence, family, ignored)
        try:
            unplaced, oddities = tuple(self.unplaced), []
        except MezzotintError as error:
            unplaced, oddities = (), [error.message]
        oddities += [f"{name} has no place in a {family} model" for name in unplaced[:MOST_NAMED]]
        if len(unplaced) > MOST_NAMED:
            oddities.append(f"{len(unplaced) - MOST_NAMED:,} more tensors have no place in a {family} model")
        return replace(report, notes=(*report.notes, *oddities), unplaced=unplaced)

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
