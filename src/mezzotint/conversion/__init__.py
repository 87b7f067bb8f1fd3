"""Conversion of a checkpoint to another format: planned from headers, streamed, and atomic."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mezzotint._version import VERSION
from mezzotint.builtin import (
    PIPELINE_INDEX,
    component_folder,
    is_pipeline,
    matching_component,
    resolve,
)
from mezzotint.checkpoint import Checkpoint
from mezzotint.conversion.destination import Destination
from mezzotint.conversion.earlier_output import unknown_files
from mezzotint.conversion.gguf_output import gguf_file
from mezzotint.conversion.planning import OutputPlan, plan_contents
from mezzotint.conversion.progress import Progress, counter
from mezzotint.conversion.provenance import (
    PIPELINE,
    VERSION_KEY,
    model_config,
    plan_digest,
    source_info,
)
from mezzotint.conversion.reading import files_read, tensor_files
from mezzotint.conversion.requantization import AddedError, LayerChoice, scheme_of
from mezzotint.errors import join_names, require_known
from mezzotint.formats import targets
from mezzotint.formats.renaming import Renames
from mezzotint.formats.writers.gguf import GGUFTarget
from mezzotint.formats.writers.writer import ModelInfo, Target, Writer
from mezzotint.hub import AnyPath, local_copy
from mezzotint.saving import Output, Shard, WatchedFiles, split_into_shards, write_output
from mezzotint.saving.gguf_file import GGUFFile
from mezzotint.schemes import Scheme

__all__ = ["ConvertReport", "convert"]

SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True)
class ConvertReport:
    """The result of a conversion.

    layers       {scheme: number of layers that stay quantized}
    transforms   {transformation of values: number of layers}; empty for a lossless conversion
    errors       {layer: |W - source| / |source|} of the layers that were encoded in `scheme`
    kept         {layer: why it was not encoded in `scheme`}
    resumed      shards that an earlier, interrupted run had finished
    nbytes       size of all shards
    ignored      {tensor of the source that was not written: reason}
    """

    source: Path
    source_format: str
    output: Path
    target: str
    layers: Mapping[str, int]
    tensors: int
    shards: tuple[str, ...]
    resumed: tuple[str, ...]
    nbytes: int
    seconds: float
    transforms: Mapping[str, int]
    errors: Mapping[str, float]
    kept: Mapping[str, str]
    ignored: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def added_error(self) -> AddedError | None:
        """The largest and the mean of `errors`, or None if no layer was encoded."""
        return AddedError.of(self.errors)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        added = self.added_error
        paths = {"source": str(self.source), "output": str(self.output)}
        return asdict(self) | paths | {"added_error": None if added is None else asdict(added)}


def convert(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    to: str = "mezzotint",
    scales_from: str | Path | None = None,
    scheme: str | None = None,
    keep_bf16: Sequence[str] = (),
    component: str | None = None,
    merge_into: str | AnyPath | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    rename: Renames | None = None,
    on_progress: Progress | None = None,
) -> ConvertReport:
    """Write the checkpoint at `source` in another format.

    base          BF16 component of the same model: source of the layers of `keep_bf16` and of a
                  missing configuration, and reference for an ambiguous byte layout
    to            mezzotint, bf16, modelopt, comfy, nunchaku, row-major, gguf, gguf-q8_0, gguf-q4_0
    scales_from   checkpoint to take missing static input scales from
    scheme        name of a scheme to encode the layers in, rounded to nearest: those that the
                  source has quantized, or of an unquantized source the linear layers of the
                  blocks. Layers in this scheme stay as they are.
    keep_bf16     globs on diffusers module names; these layers are written unquantized
    component     folder inside `source`, if `source` is a pipeline, and inside the output of
                  `merge_into` ["transformer"]
    merge_into    folder or Hub id of a diffusers pipeline; `output` becomes a copy of it with the
                  converted component. The component keeps the pipeline's configuration.
    shard_bytes   largest total size of one file's tensors
    overwrite     replace an earlier output at `output` when the new one is complete; anything else
                  is refused
    rename        {regular expression: replacement} for tensor names of the source
    Raises        MezzotintError; `output` is then unchanged
    """
    started = time.monotonic()
    target, encoder = _target(to, scheme)
    destination = Destination.of(Path(output), target, component, merge_into)
    source_path = resolve(source)
    base_path = None if base is None else resolve(base)
    scales_path = None if scales_from is None else resolve(scales_from)
    inside = component if merge_into is None or is_pipeline(source_path) else None
    inputs = [source_path, *(path for path in (base_path, scales_path) if path is not None)]
    destination.check([*inputs, component_folder(source_path, inside)], overwrite)
    with WatchedFiles() as watched:
        for path in inputs:
            watched.watch(files_read(path, component))
        reference = (
            None if base_path is None else Checkpoint.open(matching_component(base_path, component))
        )
        checkpoint = _open(source_path, inside, reference, scales_path, rename)
        checkpoint = checkpoint.placed(checkpoint.model(reference))
        config = _config(checkpoint, reference, destination)
        choice = LayerChoice.of(checkpoint, checkpoint.model(reference), encoder, keep_bf16)
        writer = target.writer(ModelInfo(checkpoint.family, config))
        contents = _contents(choice, writer, reference)
        shards, contents = _files(contents, target, checkpoint, destination, config, shard_bytes)
        planned = _output(
            destination, shards, contents, config, to, [checkpoint, reference], watched
        )
        planned = replace(planned, measured=choice.layers.errors)
        resumed = write_output(planned, overwrite, counter(planned.total, on_progress))
    return ConvertReport(
        source=Path(str(checkpoint.header.path)),
        source_format=checkpoint.detected.format.name,
        output=destination.path,
        target=to,
        layers=dict(Counter(contents.layers.values())),
        tensors=sum(len(group.entries) for group in contents.groups),
        shards=tuple(shard.name for shard in shards),
        resumed=tuple(resumed),
        nbytes=planned.nbytes,
        seconds=time.monotonic() - started,
        transforms=contents.transforms,
        errors=dict(choice.layers.errors),
        kept=choice.kept,
        ignored=checkpoint.ignored,
        notes=tuple(_notes(checkpoint, config, destination)),
    )


def _target(to: str, scheme: str | None) -> tuple[Target, Scheme | None]:
    """Return the target, and the scheme to encode layers in. Raises BadRequest."""
    require_known("target", to, targets())
    return targets()[to], scheme_of(scheme, targets()[to])


def _open(
    path: AnyPath,
    component: str | None,
    base: Checkpoint | None,
    scales_from: AnyPath | None,
    rename: Renames | None,
) -> Checkpoint:
    """Download the source if needed, and open it with a detected layout and without padding."""
    local = local_copy(component_folder(path, component))
    reference = None if base is None else base.header.path
    return Checkpoint.open(local, base=reference, scales_from=scales_from, rename=rename)


def _contents(choice: LayerChoice, writer: Writer, base: Checkpoint | None) -> OutputPlan:
    if writer.name == "bf16":
        return plan_contents(choice.layers, writer, choice.layers.checkpoint.linears, None)
    return plan_contents(choice.layers, writer, choice.unquantized, base)


def _config(
    checkpoint: Checkpoint, base: Checkpoint | None, destination: Destination
) -> dict[str, Any]:
    """Return the configuration to write: the merged pipeline's, the source's or the base's."""
    if destination.base_pipeline is None:
        return model_config(checkpoint, base)
    destination.base_pipeline.check(checkpoint)
    return destination.base_pipeline.config


def _files(
    contents: OutputPlan,
    target: Target,
    checkpoint: Checkpoint,
    destination: Destination,
    config: Mapping[str, Any],
    limit: int,
) -> tuple[list[Shard], OutputPlan]:
    """Return the files to write, and the plan with their tensors."""
    if isinstance(target, GGUFTarget):
        file, contents = _gguf_file(contents, checkpoint, destination, config)
        return [file], contents
    return _shards(contents, destination, config, limit), contents


def _shards(
    contents: OutputPlan, destination: Destination, config: Mapping[str, Any], limit: int
) -> list[Shard]:
    metadata = {"format": "pt", **contents.declaration.metadata}
    if destination.file:
        metadata[VERSION_KEY] = VERSION
        metadata |= {"config": json.dumps(config)} if config else {}
    return split_into_shards(
        contents.groups,
        None if destination.file else limit,
        destination.folder,
        destination.stem,
        metadata,
    )


def _gguf_file(
    contents: OutputPlan,
    checkpoint: Checkpoint,
    destination: Destination,
    config: Mapping[str, Any],
) -> tuple[GGUFFile, OutputPlan]:
    values = {VERSION_KEY: VERSION} | ({"config": json.dumps(config)} if config else {})
    return gguf_file(contents, checkpoint.family, values, destination.path.name)


def _output(
    destination: Destination,
    shards: list[Shard],
    contents: OutputPlan,
    config: Mapping[str, Any],
    to: str,
    inputs: Sequence[Checkpoint | None],
    watched: WatchedFiles,
) -> Output:
    """Return the output with a digest of everything that determines its bytes.

    From here on, `watched` also contains every file whose tensors or bytes are copied.
    """
    quantization = contents.declaration.quantization
    config = {**config, **({} if quantization is None else {"quantization_config": quantization})}
    sources = [source_info(checkpoint) for checkpoint in inputs if checkpoint is not None]
    provenance: dict[str, Any] = {
        "target": to,
        "sources": sources,
        "transforms": contents.transforms,
    }
    pipeline = destination.base_pipeline
    copies = {} if pipeline is None else pipeline.files()
    if pipeline is not None:
        provenance[PIPELINE] = {"path": str(pipeline.folder), "files": list(copies)}
    watched.watch(tensor_files(inputs))
    watched.watch(copies.values())
    return Output(
        destination.path,
        plan_digest(shards, {"config": config, "provenance": provenance, "files": watched.stamps}),
        shards,
        partial(destination.finish, config, provenance, shards),
        destination.file,
        copies,
        unknown_files,
        watched.check,
    )


def _notes(
    checkpoint: Checkpoint, config: Mapping[str, Any], destination: Destination
) -> Iterator[str]:
    yield from checkpoint.header.notes
    yield from checkpoint.contradictions
    if "_class_name" not in config:
        yield from (
            f"{key} is not written; {entry} is true in the model's configuration"
            for key, entry in checkpoint.flags.items()
        )
        yield (
            "the source has no model configuration; "
            "name --base, or load the output with a pipeline's configuration"
        )
    pipeline = destination.base_pipeline
    if pipeline is not None and (skipped := pipeline.skipped_files()):
        yield (
            f"{join_names(skipped)} of {pipeline.folder} not copied, "
            f"because {PIPELINE_INDEX} does not name it"
        )
