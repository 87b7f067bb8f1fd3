"""An opened checkpoint: headers, format and family, with layers that are read one by one."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from mezzotint.builtin import component_folder, matching_component, resolve
from mezzotint.checkpoint.contradictions import contradictions
from mezzotint.checkpoint.layout_detection import detect_from_base, detect_from_statistics
from mezzotint.checkpoint.names import NamedContents
from mezzotint.checkpoint.placement import check_flags, check_tensors
from mezzotint.containers import TensorInfo
from mezzotint.errors import BadRequest, MezzotintError, UnknownFormat
from mezzotint.families.building import model_of_shapes, outline_model
from mezzotint.families.naming import Piece
from mezzotint.formats import DetectedFormat, Header, StoredLinear, detect_format
from mezzotint.formats.companion_files import open_header
from mezzotint.formats.components import transformer_alone
from mezzotint.formats.file_components import file_components
from mezzotint.formats.renaming import Renames
from mezzotint.formats.wrappers import unwrapped
from mezzotint.hub import AnyPath
from mezzotint.inspection import InspectReport, build_report
from mezzotint.schemes import Shape
from mezzotint.tensor import QuantTensor, dequantize_bias, dequantize_pieces

MOST_NAMED = 50
"""Unknown tensors that the report's notes name, at most."""


@dataclass(frozen=True)
class LayerOutline:
    """A module's pieces with parts on the meta device, except parts whose values were requested.

    stored   the parts as the files store them, some of which reading returns unchanged
    """

    pieces: list[QuantTensor]
    stored: list[tuple[Tensor, TensorInfo]]

    def source_of(self, part: Tensor) -> TensorInfo | None:
        """Return the stored tensor whose bytes a part has, or None if reading changes the bytes."""
        return next((info for stored, info in self.stored if stored is part), None)


@dataclass(frozen=True)
class Checkpoint(NamedContents):
    """One component's weights on disk.

    >>> checkpoint = Checkpoint.open("demo-nvfp4")
    >>> checkpoint.weight("transformer_blocks.0.attn.to_q").shape
    torch.Size([256, 256])

    unquantized   quantized modules that are not nn.Linear in the model: their weights are decoded
    """

    detected: DetectedFormat
    unquantized: frozenset[str] = frozenset()

    @classmethod
    def open(
        cls,
        path: str | AnyPath,
        *,
        base: str | AnyPath | None = None,
        component: str | None = None,
        scales_from: str | AnyPath | None = None,
        rename: Renames | None = None,
    ) -> "Checkpoint":
        """Read the headers at `path` and detect the format; no weight is loaded.

        path          a file, a component's folder, a pipeline, a Hub id, a built-in model, or the
                      folder of hf and ckpt that ModelOpt's quantize.py writes
        base          the BF16 model, to detect an unproven byte layout and padding;
                      without it, statistics of a few layers are used
        component     folder inside a pipeline ["transformer"], also of `base` if that is one
        scales_from   a file with the input scales that `path` lacks, or ModelOpt's backbone.pt
        rename        {regular expression: replacement} for names of the tensors, in order
        Raises        CheckpointError, BadRequest
        """
        sister = (
            None if scales_from is None else matching_component(resolve(scales_from), component)
        )
        checkpoint = cls.of(open_header(component_folder(resolve(path), component), sister, rename))
        if base is None:
            return checkpoint.detect_from_statistics()
        reference = cls.of(open_header(matching_component(resolve(base), component)))
        return checkpoint.trim_padding_to(reference).detect_from_base(reference)

    @classmethod
    def of(cls, header: Header) -> "Checkpoint":
        header = transformer_alone(unwrapped(header))
        detected = detect_format(header)
        return cls(header, detected.format.contents(header), detected)

    @property
    def evidence(self) -> str:
        """Why the format matched, and how the layout was detected."""
        return "; ".join((self.detected.evidence, *self.contents.evidence))

    @property
    def contradictions(self) -> tuple[str, ...]:
        """Statements of a configuration about the layout that the tensors contradict."""
        return tuple(contradictions(self.header, self.contents))

    def detect_from_base(self, base: "Checkpoint") -> "Checkpoint":
        """Return a checkpoint with the layout that agrees with the weights of `base`."""
        return replace(self, contents=detect_from_base(self, base))

    def detect_from_statistics(self) -> "Checkpoint":
        """Return a checkpoint with the layout that the statistics of its values show."""
        contents = detect_from_statistics(self)
        return self if contents is self.contents else replace(self, contents=contents)

    @cached_property
    def report(self) -> InspectReport:
        """The report that `mezzotint inspect` prints."""
        family, ignored = self.family.title, self.ignored
        report = build_report(
            self.header, self.detected, self.contents, self.evidence, family, ignored
        )
        unplaced = self._unplaced()
        notes = (
            *report.notes,
            *self.contradictions,
            *_named(unplaced, family),
            *_other_components(self.header),
        )
        report = replace(report, notes=notes, unplaced=unplaced)
        return (
            report
            if report.problems or unplaced
            else replace(report, problems=tuple(self._load_problems()))
        )

    def _unplaced(self) -> tuple[str, ...]:
        """Return the tensors that the model lacks; none if naming fails, see `_load_problems`."""
        try:
            return tuple(self.unknown_tensors)
        except MezzotintError:
            return ()

    def _load_problems(self) -> Iterator[str]:
        """Yield the message of the error that loading the model would raise, if any."""
        try:
            self.placed(self.model())
        except MezzotintError as error:
            yield error.message

    def without_input_scales(self) -> "Checkpoint":
        """Return a checkpoint that ignores its static input scales, present or absent."""
        ignored = dict(self.contents.ignored)
        linears = {}
        for name, linear in self.contents.linears.items():
            keys = {
                part: key
                for part, key in linear.keys.items()
                if part != linear.scheme.static_scale_part
            }
            dropped = linear.keys.items() - keys.items()
            ignored |= {
                key: "inputs stay unquantized on request"
                for _, key in dropped
                if key in self.header.tensors
            }
            linears[name] = replace(linear, keys=keys, dynamic_input=False)
        return replace(self, contents=replace(self.contents, linears=linears, ignored=ignored))

    def trim_padding(self, shapes: Mapping[str, Shape]) -> "Checkpoint":
        """Return a checkpoint without padding of linears; `shapes` is {model tensor: shape}."""
        linears = dict(self.contents.linears)
        for source, modules in self._modules_by_stored_linear().items():
            expected = [shapes.get(f"{module}.weight", ()) for module in modules]
            if any(len(one) != 2 for one in expected) or len({one[1] for one in expected}) != 1:
                continue
            shape = (sum(one[0] for one in expected), expected[0][1])
            cut = replace(linears[source], shape=shape)
            if linears[source].may_be_padded_from(shape) and cut.is_complete(self.header):
                linears[source] = cut
        if linears == self.contents.linears:
            return self  # Its cached properties, such as the naming, stay valid.
        return replace(self, contents=replace(self.contents, linears=linears))

    def trim_padding_to(self, base: "Checkpoint") -> "Checkpoint":
        """Return a checkpoint without padding of linears, by the shapes of `base`."""
        return self.trim_padding({name: base.shape(name) for name in base.plain})

    def restore_unit_axes(self, shapes: Mapping[str, Shape]) -> "Checkpoint":
        """Return a checkpoint whose plain tensors have the leading axes of length 1 of `shapes`.

        shapes   {model tensor: shape}
        """
        if not self.contents.drops_unit_axes:
            return self
        restored = {
            self.plain[name].source: shape
            for name, shape in shapes.items()
            if name in self.plain
            and self.plain[name].rows is None
            and self.shape(name) != shape
            and _without_unit_axes(self.shape(name)) == _without_unit_axes(shape)
        }
        if not restored:
            return self
        reshaped = {**self.contents.reshaped, **restored}
        return replace(self, contents=replace(self.contents, reshaped=reshaped))

    def model(self, base: "Checkpoint | None" = None) -> nn.Module:
        """Build the diffusers model of the tensors on the meta device, for its names and shapes.

        Its configuration is the checkpoint's, else that of `base`, else derived from the shapes.

        Raises  UnknownFormat, MissingTensor, ShapeMismatch
        """
        where, expected = str(self.header.path), self.family.transformer_class
        configs = [
            checkpoint.header.config for checkpoint in (self, base) if checkpoint is not None
        ]
        config = next((config for config in configs if "_class_name" in config), None)
        if config is None:
            return model_of_shapes(
                self.family, self.sources, dict.fromkeys(self.flags.values(), True), where
            )
        if config["_class_name"] != expected:
            raise UnknownFormat(
                f"{where}: config.json names {config['_class_name']}, and the tensors belong to "
                f"{self.family.title} ({expected})",
                "restore the config.json that came with these weights.",
            )
        return outline_model(expected, config)

    def placed(self, model: nn.Module) -> "Checkpoint":
        """Return a checkpoint whose tensors are exactly those of `model`; meta tensors suffice.

        Padding of linears is removed. A quantized nn.Embedding is marked to be decoded.

        Raises  MissingTensor, UnexpectedTensor, ShapeMismatch, UnknownFormat
        """
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        checkpoint = self.trim_padding(shapes).restore_unit_axes(shapes)
        for linear in checkpoint.contents.linears.values():
            linear.check(checkpoint.header)
        check_tensors(checkpoint, shapes)
        check_flags(checkpoint, getattr(model, "config", {}))
        layers = checkpoint.linears
        decoded = frozenset(
            name for name in layers if not isinstance(model.get_submodule(name), nn.Linear)
        )
        return (
            checkpoint
            if decoded == checkpoint.unquantized
            else replace(checkpoint, unquantized=decoded)
        )

    def _modules_by_stored_linear(self) -> dict[str, list[str]]:
        """Return {stored linear: its modules}, of modules that are one piece."""
        modules: dict[str, list[str]] = {}
        for module, pieces in self.linears.items():
            if len(pieces) == 1:
                modules.setdefault(pieces[0].source, []).append(module)
        return modules

    def read(self, module: str) -> list[QuantTensor]:
        """Return the module's pieces, plain, in the order of its input features."""
        if module not in self.linears:
            raise BadRequest(
                f"{self.header.path}: holds no quantized layer {module}",
                "see .modules for those it has.",
            )
        return [
            self._read_piece(self.stored_linear(piece.source), piece)
            for piece in self.linears[module]
        ]

    def _read_piece(self, linear: StoredLinear, piece: Piece) -> QuantTensor:
        linear.check(self.header)
        return _to_piece(linear, linear.read(self.header), piece)

    def outline(self, module: str, values_of: Collection[str] = ()) -> "LayerOutline":
        """Return what `read` returns, on the meta device except for the parts `values_of`."""
        pieces, stored = [], []
        for piece in self.linears[module]:
            linear = self.stored_linear(piece.source)
            outline = linear.outline(self.header, values_of)
            for name, key in linear.keys.items():
                info = self.header.tensors[key]
                as_stored = (
                    linear.is_read_unchanged(name)
                    and outline.parts[name].dtype.itemsize == info.storage_dtype.itemsize
                )
                stored.append((outline.parts[name] if as_stored else info.to_meta(), info))
            pieces.append(_to_piece(linear, outline, piece))
        return LayerOutline(pieces, stored)

    def weight(self, module: str) -> Tensor:
        """Return the dequantized weight, float32 [out, in]."""
        return dequantize_pieces(self.read(module))

    def bias(self, module: str) -> Tensor | None:
        """Return the bias that belongs to `weight`, float32 [out], or None."""
        return dequantize_bias(self.read(module))

    def parts(self, module: str) -> dict[str, Tensor]:
        """Return the plain parts by name; those of several pieces are 0.codes, 1.codes, ..."""
        pieces = self.read(module)
        if len(pieces) == 1:
            return dict(pieces[0].parts)
        return {
            f"{i}.{name}": part
            for i, piece in enumerate(pieces)
            for name, part in piece.parts.items()
        }


def _to_piece(linear: StoredLinear, stored: QuantTensor, piece: Piece) -> QuantTensor:
    """Return the piece of a module in a stored linear: plain, its rows and columns alone."""
    plain = linear.to_plain(stored)
    plain = plain if piece.rows is None else plain.select_rows(piece.rows)
    return plain if piece.columns is None else plain.first_columns(piece.columns)


def _without_unit_axes(shape: Shape) -> Shape:
    """Return the shape from its first axis on that is longer than 1."""
    first = next((axis for axis, side in enumerate(shape) if side != 1), len(shape))
    return shape[first:]


def _named(unplaced: Sequence[str], family: str) -> Iterator[str]:
    """Yield a note on each unknown tensor, and one with the number of further ones."""
    yield from (f"{name} does not belong to a {family} model" for name in unplaced[:MOST_NAMED])
    if len(unplaced) > MOST_NAMED:
        yield f"{len(unplaced) - MOST_NAMED:,} more tensors do not belong to a {family} model"


def _other_components(header: Header) -> Iterator[str]:
    """Yield a note on the components that the file has besides the transformer."""
    if found := file_components(header.skipped):
        yield f"the file has other components: --component {' or '.join(found)} reads them"


open = Checkpoint.open
"""`mezzotint.open`"""


def inspect(
    path: str | AnyPath,
    *,
    base: str | AnyPath | None = None,
    component: str | None = None,
    scales_from: str | AnyPath | None = None,
    rename: Renames | None = None,
) -> InspectReport:
    """Report on a checkpoint; see `open` for the arguments.

    Where the headers leave the layout open, a few rows of a few layers are read, but none of files
    on the Hub.

    Raises   CheckpointError if a file cannot be read or has an unknown format
    """
    return Checkpoint.open(
        path, base=base, component=component, scales_from=scales_from, rename=rename
    ).report


def raw(path: str | AnyPath, component: str | None = None) -> dict[str, Any]:
    """Return the metadata and quantization configurations of the files, unchanged.

    No format is detected, so this works for files of unknown formats too.

    Raises   CheckpointError if a header cannot be read
    """
    header = open_header(component_folder(resolve(path), component))
    return {
        "path": str(header.path),
        "files": [file.name for file in header.files],
        "metadata": dict(header.metadata),
        "quantization_config": header.config.get("quantization_config"),
        "hf_quant_config": dict(header.hf_quant_config),
    }
