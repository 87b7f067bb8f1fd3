"""A diffusers pipeline around a quantized transformer, and the settings that are recommended for it."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from mezzotint.building import load_component
from mezzotint.building import meta_model as meta_model
from mezzotint.builtin import PIPELINE_INDEX, is_pipeline, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.component_files import check_component
from mezzotint.editing import check_pipeline, pipeline_for
from mezzotint.errors import BadRequest, ShapeMismatch, UnknownFormat, listed
from mezzotint.failures import failures_named, memory_named
from mezzotint.families import Family, Sampling, family_with
from mezzotint.hub import AnyPath, HubPath, local_copy
from mezzotint.kernels import AS_STORED, BackendChoice, device_of
from mezzotint.loading import LoadPlan, LoadReport, plan
from mezzotint.loading import load as load_model
from mezzotint.pipeline_index import RESTORE, PipelineIndex, check_link, read_index
from mezzotint.sampling_file import SAMPLING_FILE as SAMPLING_FILE
from mezzotint.sampling_file import read_sampling

TRANSFORMER, SECOND = "transformer", "transformer_2"
NEEDED = (".json", ".safetensors", ".txt", ".model", ".jinja")
VARIANTS = (".fp16.", ".bf16.", ".non_ema.")
"""Which files of a text encoder or VAE on the Hub a pipeline is read from, and which of those are second copies."""
FITTING = "name a transformer of the same size as the pipeline, or the pipeline that the transformer is of."
Planned = dict[str, tuple[LoadPlan, nn.Module]]
"""{component: the plan for a transformer, and the model that it fills}"""


def load(
    model: str | AnyPath = "demo",
    transformer: str | AnyPath | None = None,
    transformer_2: str | AnyPath | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activations: str = AS_STORED,
    backend: BackendChoice = None,
    resident: str | None = None,
    scales_from: str | AnyPath | None = None,
) -> Any:
    """A ready diffusers pipeline whose transformer was read from `transformer`, quantized or not.

    model         folder or Hub id of a diffusers pipeline, or "demo"
    transformer   file, folder or Hub id of a transformer in any format that `inspect` knows; None for the model's own
    transformer_2 the same for the second expert of a model that has two, such as Wan 2.2 A14B
    device        None for the GPU if there is one
    dtype         of everything that is not quantized; scales keep their own
    activations   "as_stored" quantizes each layer's input as the checkpoint says, "bf16" leaves it alone
    backend       name of the one backend to use, {scheme: name}, or None for the best that can
    resident      "stored": 4-bit weights stay 4 bits; "fp8": they become FP8 as they are read, and run as fast as
                  FP8 does; None for FP8 where it would be expanded to anyway and there is room for it
    scales_from   a file with the input scales that `transformer` lacks, or ModelOpt's backbone.pt for it
    Returns       a diffusers pipeline; `load_report` is its LoadReport, `load_report_2` the second expert's or None
    Raises        MezzotintError, before any weight is read if the files do not fit together

    >>> pipe = load("demo", transformer="demo-fp8")
    >>> print(pipe.load_report)
    """
    index = read_index(resolve(model))
    place = device_of(device)
    planned = _plan(index, {TRANSFORMER: transformer, SECOND: transformer_2}, activations, scales_from)
    local = _on_this_machine(index)
    others = _load_others(local, planned, dtype)
    reports = _load_transformers(planned, place, dtype, backend, resident)
    pipe = _assemble(local, others | {name: module.eval() for name, (_, module) in planned.items()}, dtype)
    with memory_named(f"moving the pipeline to {place}"):
        pipe.to(place)
    pipe.load_report, pipe.load_report_2 = reports[TRANSFORMER], reports.get(SECOND)
    return pipe


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """{component: transformer} of a loaded pipeline."""
    found = {component: getattr(pipe, component, None) for component in (TRANSFORMER, SECOND)}
    return {component: transformer for component, transformer in found.items() if transformer is not None}


def plan_transformers(
    folder: AnyPath,
    transformer: str | AnyPath | None,
    transformer_2: str | AnyPath | None,
    activations: str,
    scales_from: str | AnyPath | None = None,
) -> Planned:
    """{component: its plan and its model} of a pipeline's transformers, each the one named or else the pipeline's own.

    The files of all other components are checked as well, as far as they are on this machine.

    Raises  MezzotintError, before any weight is read, if the files are damaged or do not fit together
    """
    return _plan(read_index(folder), {TRANSFORMER: transformer, SECOND: transformer_2}, activations, scales_from)


def _plan(
    index: PipelineIndex,
    sources: Mapping[str, str | AnyPath | None],
    activations: str,
    scales_from: str | AnyPath | None,
) -> Planned:
    _check_files(index, [name for name, source in sources.items() if source is not None])
    scales = {TRANSFORMER: scales_from, SECOND: None}
    return {
        name: plan_transformer(name, source, index, activations, scales[name])
        for name, source in sources.items()
        if source is not None or name in index.components
    }


def plan_transformer(
    component: str,
    source: str | AnyPath | None,
    index: PipelineIndex,
    activations: str,
    scales_from: str | AnyPath | None,
) -> tuple[LoadPlan, nn.Module]:
    """The plan for one transformer and its model, with the configuration that lies beside it or else the pipeline's.

    Raises  MezzotintError if the files do not fit together, or the transformer does not fit the pipeline
    """
    folder, model_class = index.folder, index.class_of(component)
    if model_class is None:
        raise BadRequest(f"{folder}: has no {component}, and {source} was named for it", "name one transformer only.")
    place = folder if source is None else resolve(source)
    checkpoint = _open(place, component if is_pipeline(place) else None, scales_from)
    header, family = checkpoint.header, checkpoint.family
    if family.transformer != model_class:
        raise UnknownFormat(
            f"{header.path}: is a {family.title} transformer ({family.transformer}), and {folder} has a {model_class}",
            "name a transformer of the same family as the pipeline.",
        )
    own = "_class_name" in header.config
    where = f"{header.path}: its configuration" if own else str(index.components[component].config_file)
    module = meta_model(model_class, header.config if own else index.config_of(component), where)
    planned = plan(checkpoint, module, activations)
    check_fit(family, module, index, component, f"{header.path}")
    return planned, module


def check_fit(family: Family, module: nn.Module, index: PipelineIndex, component: str, where: str) -> None:
    """Raise ShapeMismatch if a transformer's widths are not those of the pipeline's other components.

    module   the transformer, whose configuration has all its entries
    where    its file
    """
    config: Any = module.config
    for joint in family.joints:
        entry = next((entry for entry in joint.entries if config.get(entry) is not None), joint.entries[0])
        width = _width(index, joint.component, joint.width)
        if width is not None and config.get(entry) != joint.times * width:
            times = f"{joint.times} times " if joint.times > 1 else ""
            raise ShapeMismatch(
                f"{where}: {entry} is {config.get(entry)}, and {joint.component} of {index.folder} makes it "
                f"{joint.times * width} ({times}its {joint.width} of {width})",
                FITTING,
            )
    channels = _width(index, component, "in_channels")
    if channels is not None and config.get("in_channels") != channels:
        raise ShapeMismatch(
            f"{where}: in_channels is {config.get('in_channels')}, and that of {index.folder}'s own {component} is "
            f"{channels}",
            FITTING,
        )


def _width(index: PipelineIndex, component: str, entry: str) -> int | None:
    """An entry of a component's configuration, or of the language model's in it; None where it says nothing of it."""
    if component not in index.components or not index.components[component].config_file.is_file():
        return None
    config = index.config_of(component)
    inner = config.get("text_config")
    value = config.get(entry, inner.get(entry) if isinstance(inner, dict) else None)
    return value if type(value) is int else None


def _open(place: AnyPath, component: str | None, scales_from: str | AnyPath | None) -> Checkpoint:
    """A transformer's checkpoint; a file on the Hub is fetched where headers do not tell how its bytes are arranged."""
    checkpoint = Checkpoint.open(place, component=component, scales_from=scales_from)
    if checkpoint.contents.assumed and not checkpoint.header.local:
        return Checkpoint.open(local_copy(checkpoint.header.path), scales_from=scales_from)
    return checkpoint


def sampling_of(model: str | AnyPath, edited: Image | None = None) -> Sampling:
    """Recommended settings: those of its family's variant, and over them the pipeline folder's own sampling.json.

    edited   a picture that gives the shape, of the area that is recommended
    Raises   MezzotintError if the pipeline's index or one of its settings cannot be
    """
    index = read_index(resolve(model))
    family = family_with(str(index.class_of(TRANSFORMER)), str(index.folder))
    recommended = family.sampling(index.entries, index.config_of(TRANSFORMER))
    own = index.folder / SAMPLING_FILE
    check_link(own, index.folder)
    if own.is_file():
        recommended = replace(recommended, **read_sampling(own))  # type: ignore[arg-type]
    return recommended if edited is None else recommended.shaped_like(*edited.size)


def check_image(model: str | AnyPath, given: bool) -> None:
    """Raise MezzotintError, no weight read yet, if a model cannot generate from a prompt, with an image or without."""
    index = read_index(resolve(model))
    check_pipeline(pipeline_for(index.pipeline, index.entries, given), given)
    if index.absent:
        raise BadRequest(
            f"{index.folder}: its {PIPELINE_INDEX} leaves out {listed(index.absent)}",
            "give it the missing component, or generate with diffusers' own call and with embeddings.",
        )


def _check_files(index: PipelineIndex, replaced: Collection[str]) -> None:
    """Check the files of all components that are on this machine, without the weights of those that are replaced."""
    if isinstance(index.folder, Path):
        for name, component in index.components.items():
            check_component(component, weights=name not in {*replaced, TRANSFORMER, SECOND})


def _load_transformers(
    planned: Planned, place: torch.device, dtype: torch.dtype, backend: BackendChoice, resident: str | None
) -> dict[str, LoadReport]:
    """Fill the planned models; {component: its report}."""
    reports = {}
    for name, (ready, module) in planned.items():
        with memory_named(f"loading {name}"):
            reports[name] = load_model(ready, module, place, dtype, backend, resident)
    return reports


def _on_this_machine(index: PipelineIndex) -> PipelineIndex:
    """The same pipeline with what it has besides its transformers' weights here; what was fetched is checked."""
    if not isinstance(index.folder, HubPath):
        return index
    local = read_index(_fetch_rest(index, index.folder))
    _check_files(local, ())
    return local


def _load_others(index: PipelineIndex, planned: Collection[str], dtype: torch.dtype) -> dict[str, Any]:
    """{component: what was loaded} of all that the pipeline's class knows besides its transformers."""
    names = [name for name in index.components if name in index.known and name not in planned]
    return {name: load_component(index.components[name], dtype) for name in names}


def _assemble(index: PipelineIndex, components: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline of these components, with the settings of its index."""
    where, name = f"{index.folder / PIPELINE_INDEX}", index.pipeline.__name__
    given = dict.fromkeys(index.absent) | dict(components)  # diffusers wants to be told of what is left out
    with failures_named(where, f"diffusers cannot make a {name} of these components", RESTORE):
        pipe = index.pipeline.from_pretrained(
            index.folder,
            dtype=dtype,
            local_files_only=True,
            **given,
        )
        pipe.set_progress_bar_config(disable=True)
    return pipe


def _fetch_rest(index: PipelineIndex, folder: HubPath) -> Path:
    """Download what a pipeline has besides its transformers' weights; returns its folder in the cache."""
    for name in (SAMPLING_FILE, f"{TRANSFORMER}/config.json", f"{SECOND}/config.json"):
        if (folder / name).is_file():
            (folder / name).fetch()
    for component in index.components.keys() - {TRANSFORMER, SECOND}:
        for file in (folder / component).glob("*"):
            if file.name.endswith(NEEDED) and not any(mark in file.name for mark in VARIANTS):
                file.fetch()
    return (folder / PIPELINE_INDEX).fetch().parent
