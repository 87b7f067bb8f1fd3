"""A diffusers pipeline around a quantized transformer, and the settings that are recommended for it."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from mezzotint.builtin import PIPELINE_INDEX, is_pipeline, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.editing import check_pipeline, pipeline_for
from mezzotint.errors import BadRequest, NotACheckpoint, UnknownFormat
from mezzotint.families import Sampling, family_with
from mezzotint.families.building import meta_model as meta_model
from mezzotint.formats.renaming import Renames
from mezzotint.hub import AnyPath, HubPath, local_copy
from mezzotint.kernels import AS_STORED, BackendChoice, device_of
from mezzotint.latent_grid import LatentGrid
from mezzotint.loading import LoadPlan, plan
from mezzotint.loading import load as load_model

TRANSFORMER, SECOND, VAE = "transformer", "transformer_2", "vae"
SAMPLING_FILE = "sampling.json"
NEEDED = (".json", ".safetensors", ".txt", ".model", ".jinja")
VARIANTS = (".fp16.", ".bf16.", ".non_ema.")
"""Which files of a text encoder or VAE on the Hub a pipeline is read from, and which of those are second copies."""


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
    rename: Renames | None = None,
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
    rename        {regular expression: replacement} for transformers that differ in their tensors' names alone
    Returns       a diffusers pipeline; `load_report` is its LoadReport, `load_report_2` the second expert's or None
    Raises        MezzotintError, before any weight is read if the files do not fit together

    >>> pipe = load("demo", transformer="demo-fp8")
    >>> print(pipe.load_report)
    """
    folder = resolve(model)
    index = _pipeline_index(folder)
    place = device_of(device)
    planned = plan_transformers(folder, transformer, transformer_2, activations, scales_from, rename)
    reports = {
        component: load_model(ready, module, place, dtype, backend, resident)
        for component, (ready, module) in planned.items()
    }
    from mezzotint.diffusers_quantizer import mark_quantized  # which imports diffusers

    modules = {component: module.eval() for component, (_, module) in planned.items()}
    for component, module in modules.items():
        mark_quantized(module, reports[component])
    here = _fetch_rest(index, folder) if isinstance(folder, HubPath) else folder
    pipe = _pipeline_class(index, folder).from_pretrained(here, dtype=dtype, local_files_only=True, **modules)
    pipe.set_progress_bar_config(disable=True)
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
    rename: Renames | None = None,
) -> dict[str, tuple[LoadPlan, nn.Module]]:
    """{component: its plan and its model} of a pipeline's transformers, each the one named or else the pipeline's own.

    Raises  MezzotintError, before any weight is read, if the files do not fit together
    """
    index = _pipeline_index(folder)
    return {
        component: plan_transformer(
            component, source, index, folder, activations, scales, None if source is None else rename
        )
        for component, source, scales in ((TRANSFORMER, transformer, scales_from), (SECOND, transformer_2, None))
        if source is not None or _class_of(index, component) is not None
    }


def plan_transformer(
    component: str,
    source: str | AnyPath | None,
    index: dict[str, Any],
    folder: AnyPath,
    activations: str,
    scales_from: str | AnyPath | None,
    rename: Renames | None = None,
) -> tuple[LoadPlan, nn.Module]:
    """The plan for one transformer and its model, with the configuration that lies beside it or else the pipeline's."""
    model_class = _class_of(index, component)
    if model_class is None:
        raise BadRequest(f"{folder}: has no {component}, and {source} was named for it", "name one transformer only.")
    place = folder if source is None else resolve(source)
    inside = component if is_pipeline(place) else None
    checkpoint = Checkpoint.open(place, component=inside, scales_from=scales_from, rename=rename)
    if checkpoint.contents.assumed and not checkpoint.header.local:
        checkpoint = Checkpoint.open(local_copy(checkpoint.header.path), scales_from=scales_from, rename=rename)
    header, family = checkpoint.header, checkpoint.family
    if family.transformer != model_class:
        raise UnknownFormat(
            f"{header.path}: is a {family.title} transformer ({family.transformer}), and {folder} has a {model_class}",
            "name a transformer of the same family as the pipeline.",
        )
    config = header.config if "_class_name" in header.config else _component_config(folder, component)
    module = meta_model(model_class, config)
    return plan(checkpoint, module, activations), module


def sampling_of(model: str | AnyPath, edited: Image | None = None) -> Sampling:
    """Recommended settings: those of its family's variant, and over them the pipeline folder's own sampling.json.

    edited   a picture that gives the shape, of the area that is recommended
    """
    folder = resolve(model)
    index = _pipeline_index(folder)
    family = family_with(str(_class_of(index, TRANSFORMER)), str(folder))
    recommended = family.sampling(index, _component_config(folder, TRANSFORMER))
    own = folder / SAMPLING_FILE
    if own.is_file():
        known = {entry.name for entry in fields(Sampling)}
        changes = {key: value for key, value in json.loads(own.read_text()).items() if key in known}
        recommended = replace(recommended, **changes)
    return recommended if edited is None else recommended.shaped_like(*edited.size)


def settings_for(model: str | AnyPath, edited: Image | None = None, **given: int | float | None) -> Sampling:
    """`sampling_of` a model with the settings that are given and not None, checked before anything is loaded.

    Raises  BadRequest for frames of a picture, and for sides or frames that the model's latents do not come in
    """
    own = sampling_of(model, edited)
    if given.get("num_frames") is not None and own.num_frames is None:
        raise BadRequest("--frames is for videos, and this model paints pictures")
    settings = own.but(**given)
    folder = resolve(model)
    LatentGrid.of(*(_component_config(folder, component) for component in (VAE, TRANSFORMER))).check(settings)
    return settings


def check_image(model: str | AnyPath, given: bool) -> None:
    """Raise BadRequest, no weight read yet, if a model cannot edit the picture that is given, or needs one."""
    folder = resolve(model)
    index = _pipeline_index(folder)
    check_pipeline(pipeline_for(_pipeline_class(index, folder), index, given), given)


def _pipeline_index(folder: AnyPath) -> dict[str, Any]:
    if not is_pipeline(folder):
        raise NotACheckpoint(
            f"{folder}: no diffusers pipeline is there ({PIPELINE_INDEX} is missing)",
            "name the folder of a pipeline as --model, and the quantized file as --transformer.",
        )
    entries: dict[str, Any] = json.loads((folder / PIPELINE_INDEX).read_text(encoding="utf-8"))
    return entries


def _fetch_rest(index: dict[str, Any], folder: HubPath) -> Path:
    """Download what a pipeline has besides its transformers' weights; returns its folder in the cache."""
    for name in (SAMPLING_FILE, f"{TRANSFORMER}/config.json", f"{SECOND}/config.json"):
        if (folder / name).is_file():
            (folder / name).fetch()
    for component in index.keys() - {TRANSFORMER, SECOND}:
        for file in (folder / component).glob("*"):
            if file.name.endswith(NEEDED) and not any(mark in file.name for mark in VARIANTS):
                file.fetch()
    return (folder / PIPELINE_INDEX).fetch().parent


def _pipeline_class(index: dict[str, Any], folder: AnyPath) -> Any:
    """The pipeline's own class. The general one does not see which components are optional in it, and would read
    Wan's transformers from the folder over those it is given (diffusers 0.42)."""
    import diffusers

    name = str(index.get("_class_name"))
    if not hasattr(diffusers, name):
        raise UnknownFormat(f"{folder}: its pipeline class {name} is not one of diffusers {diffusers.__version__}")
    return getattr(diffusers, name)


def _class_of(index: dict[str, Any], component: str) -> str | None:
    """The class that model_index.json gives a component, or None where the pipeline is without it."""
    entry = index.get(component) or [None, None]
    return None if entry[1] is None else str(entry[1])


def _component_config(folder: AnyPath, component: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    return config
