"""Turn a checkpoint of any format into another: planned from headers, streamed, and whole or not there at all."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mezzotint._version import VERSION
from mezzotint.builtin import PIPELINE_INDEX, component_folder, counterpart, is_pipeline, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.converting.destination import Destination
from mezzotint.converting.earlier_output import strangers
from mezzotint.converting.planning import Contents, matching, plan_contents, refuse_unplaced
from mezzotint.converting.provenance import PIPELINE, VERSION_KEY, model_config, plan_name, source_facts
from mezzotint.converting.reading import files_read, tensor_files
from mezzotint.errors import BadRequest, listed
from mezzotint.families.nunchaku_names import in_nunchaku, stored_layers, stored_tensor
from mezzotint.formats import targets
from mezzotint.formats.writing import Model, Target, Writer
from mezzotint.hub import AnyPath, local_copy
from mezzotint.saving import HeldFiles, Output, Shard, into_shards, write_output

__all__ = ["ConvertReport", "convert"]

SHARD_BYTES = 4 * 10**9
Progress = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes there are in all."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion wrote.

    layers       {scheme: number of layers that stay quantized}
    transforms   {what was done to the numbers: number of layers}; empty where every payload is what it was
    resumed      shards that an earlier, interrupted run had finished
    nbytes       of all shards
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
    ignored: Mapping[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"source": str(self.source), "output": str(self.output)}


def convert(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    to: str = "mezzotint",
    scales_from: str | Path | None = None,
    keep_bf16: Sequence[str] = (),
    component: str | None = None,
    merge_into: str | AnyPath | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ConvertReport:
    """Write the checkpoint at `source` as another format.

    base          BF16 component of the same model: for layers of `keep_bf16`, for a configuration that is missing,
                  and to settle how bytes are arranged where nothing else does
    to            mezzotint, bf16, modelopt, comfy, nunchaku, row-major
    scales_from   checkpoint whose static input scales fill in for those that `source` lacks
    keep_bf16     globs on diffusers' module names; these layers are written unquantized
    component     folder inside `source`, where that is a whole pipeline, and inside the output of `merge_into`
                  ["transformer"]
    merge_into    folder or Hub id of a diffusers pipeline: `output` becomes a copy of it with this component, whose
                  configuration stays the pipeline's
    shard_bytes   largest size of one file's tensors
    overwrite     replace an earlier output at `output`, once the new one is complete; anything else there is refused
    Raises        MezzotintError; what was at `output` is then untouched
    """
    started = time.monotonic()
    target = _target(to)
    destination = Destination.of(Path(output), target, component, merge_into)
    place, base_place = resolve(source), None if base is None else resolve(base)
    inside = component if merge_into is None or is_pipeline(place) else None
    read = [place, *(resolve(path) for path in (base_place, scales_from) if path is not None)]
    destination.check([*read, component_folder(place, inside)], overwrite)
    with HeldFiles() as held:
        for path in read:
            held.hold(files_read(path, component))
        base_checkpoint = None if base_place is None else Checkpoint.open(counterpart(base_place, component))
        checkpoint = _open(place, inside, base_checkpoint, scales_from)
        if base_checkpoint is not None:
            refuse_unplaced(checkpoint, [name for name in checkpoint.plain if name not in base_checkpoint.places])
        config = _config(checkpoint, base_checkpoint, destination)
        contents = _contents(checkpoint, target.writer(_model(checkpoint, config)), keep_bf16, base_checkpoint)
        shards = _shards(contents, destination, config, shard_bytes)
        planned = _output(destination, shards, contents, config, to, [checkpoint, base_checkpoint], held)
        resumed = write_output(planned, overwrite, _counter(planned.total, on_progress))
    return ConvertReport(
        source=Path(str(checkpoint.header.path)),
        source_format=checkpoint.recognised.format.name,
        output=destination.path,
        target=to,
        layers=dict(Counter(contents.layers.values())),
        tensors=sum(len(group.entries) for group in contents.groups),
        shards=tuple(shard.name for shard in shards),
        resumed=tuple(resumed),
        nbytes=planned.nbytes,
        seconds=time.monotonic() - started,
        transforms=contents.transforms,
        ignored=checkpoint.ignored,
        notes=(*checkpoint.header.notes, *_notes(config, destination)),
    )


def _target(to: str) -> Target:
    if to not in targets():
        raise BadRequest(f"there is no target {to!r}", f"there are: {', '.join(targets())}.")
    return targets()[to]


def _model(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Model:
    """What writers of files with fused layers ask of the checkpoint's family."""
    name = checkpoint.family.name
    return Model(
        checkpoint.family.transformer,
        config,
        partial(stored_layers, name),
        partial(stored_tensor, name),
        partial(in_nunchaku, name),
    )


def _open(path: AnyPath, component: str | None, base: Checkpoint | None, scales_from: str | Path | None) -> Checkpoint:
    """The source, its files here, its layout settled, and its padding undone as far as the base tells."""
    place = local_copy(component_folder(path, component))
    return Checkpoint.open(place, base=None if base is None else base.header.path, scales_from=scales_from)


def _contents(checkpoint: Checkpoint, writer: Writer, keep_bf16: Sequence[str], base: Checkpoint | None) -> Contents:
    modules = checkpoint.linears
    if writer.name == "bf16":
        return plan_contents(checkpoint, writer, modules, None)
    return plan_contents(checkpoint, writer, matching(modules, keep_bf16), base)


def _config(checkpoint: Checkpoint, base: Checkpoint | None, destination: Destination) -> dict[str, Any]:
    """The configuration to write: that of the pipeline which the output becomes, else the source's or the base's."""
    if destination.merged is None:
        return model_config(checkpoint, base)
    destination.merged.check(checkpoint)
    return destination.merged.config


def _shards(contents: Contents, destination: Destination, config: Mapping[str, Any], limit: int) -> list[Shard]:
    metadata = {"format": "pt", **contents.declaration.metadata}
    if destination.file:
        metadata[VERSION_KEY] = VERSION
        metadata |= {"config": json.dumps(config)} if config else {}
    return into_shards(
        contents.groups, None if destination.file else limit, destination.folder, destination.stem, metadata
    )


def _output(
    destination: Destination,
    shards: list[Shard],
    contents: Contents,
    config: Mapping[str, Any],
    to: str,
    read: Sequence[Checkpoint | None],
    held: HeldFiles,
) -> Output:
    """The output, named after everything that decides its bytes; every file that is read for it is held from now on."""
    quantization = contents.declaration.quantization
    config = {**config, **({} if quantization is None else {"quantization_config": quantization})}
    sources = [source_facts(checkpoint) for checkpoint in read if checkpoint is not None]
    provenance: dict[str, Any] = {"target": to, "sources": sources, "transforms": contents.transforms}
    copies = {} if destination.merged is None else destination.merged.files()
    if destination.merged is not None:
        provenance[PIPELINE] = {"path": str(destination.merged.folder), "files": list(copies)}
    held.hold(tensor_files(read))
    held.hold(copies.values())
    return Output(
        destination.path,
        plan_name(shards, {"config": config, "provenance": provenance, "files": held.stamps}),
        shards,
        partial(destination.finish, config, provenance, shards),
        destination.file,
        copies,
        strangers,
        held.check,
    )


def _counter(total: int, on_progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if on_progress is not None:
            on_progress(done, total)

    return count


def _notes(config: Mapping[str, Any], destination: Destination) -> Iterator[str]:
    if "_class_name" not in config:
        yield "no model configuration was found beside the source; name --base, or load with the pipeline's own"
    if destination.merged is not None and (left := destination.merged.left_out()):
        yield f"{listed(left)} of {destination.merged.folder} not copied, as {PIPELINE_INDEX} does not name it"
