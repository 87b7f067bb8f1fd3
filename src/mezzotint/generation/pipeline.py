"""Load a diffusers pipeline whose transformers may be quantized."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import nn

from mezzotint.builtin import DEMO, PIPELINE_INDEX, resolve
from mezzotint.families import Sampling
from mezzotint.formats.renaming import Renames
from mezzotint.generation.component_loading import load_component
from mezzotint.generation.download import localize
from mezzotint.generation.pipeline_index import (
    TRANSFORMER,
    TRANSFORMER_2,
    TRANSFORMERS,
    PipelineIndex,
    read_index,
)
from mezzotint.generation.source import PipelineSource, check_files, index_sampling
from mezzotint.generation.transformer_planning import PlannedTransformers
from mezzotint.hub import AnyPath
from mezzotint.kernels import QUANTIZED_ACTIVATIONS, BackendChoice, resolve_device
from mezzotint.loading import LoadReport, Placement
from mezzotint.loading import load as load_model
from mezzotint.untrusted.config_limits import RESTORE
from mezzotint.untrusted.library_failures import convert_errors, convert_memory_errors


@dataclass(frozen=True)
class LoadedPipeline:
    """A diffusers pipeline that is ready to run.

    pipe      the diffusers pipeline
    reports   {component: what was loaded, and how} of its transformers
    """

    pipe: DiffusionPipeline
    reports: Mapping[str, LoadReport]


def load(
    model: str | AnyPath = DEMO,
    transformer: str | AnyPath | None = None,
    transformer_2: str | AnyPath | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activations: str = QUANTIZED_ACTIVATIONS,
    backend: BackendChoice = None,
    resident: str | None = None,
    scales_from: str | AnyPath | None = None,
    rename: Renames | None = None,
) -> DiffusionPipeline:
    """Load a diffusers pipeline with a transformer from another checkpoint, quantized or not.

    model           folder or Hub id of a diffusers pipeline, or "demo"
    transformer     file, folder or Hub id of a transformer in any format that `inspect` knows; None
                    for the
                    pipeline's own
    transformer_2   the second transformer of a model that has two, such as Wan 2.2 A14B
    scales_from     a file with the input scales that `transformer` lacks, or ModelOpt's backbone.pt
                    for it
    rename          {regular expression: replacement} for the transformers' tensor names
    Others          see `load_pipeline`
    Returns         a diffusers pipeline; its attributes `load_report` and `load_report_2` are the
                    LoadReports of its
                    transformers, the second one None if there is one transformer
    Raises          MezzotintError, before any weight is read if the files do not fit together

    >>> pipe = load("demo", transformer="demo-fp8")
    >>> print(pipe.load_report)
    """
    source = PipelineSource.open(
        model,
        {TRANSFORMER: transformer, TRANSFORMER_2: transformer_2},
        scales_from=scales_from,
        rename=rename,
    )
    loaded = load_pipeline(source, device, dtype, activations, backend, resident)
    pipe = loaded.pipe
    pipe.load_report, pipe.load_report_2 = (loaded.reports.get(name) for name in TRANSFORMERS)
    return pipe


def load_pipeline(
    source: PipelineSource,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activations: str = QUANTIZED_ACTIVATIONS,
    backend: BackendChoice = None,
    resident: str | None = None,
) -> LoadedPipeline:
    """Load the pipeline of an opened source.

    device        None for the GPU if there is one
    dtype         of everything that is not quantized; scales keep their own
    activations   "as_stored" quantizes each layer's input as the checkpoint says, "bf16" leaves it
                  in BF16
    backend       name of the only backend to use, {scheme: name}, or None for the best that can run
    resident      "stored" keeps 4-bit weights in 4 bits; "fp8" converts them to FP8 when they are
                  read, as fast as
                  FP8; None converts where FP8 is used anyway and memory allows
    Raises        MezzotintError, before any weight is read if the files do not fit together
    """
    target = resolve_device(device)
    planned = source.plan(activations)
    local = localize(source.index)
    if local is not source.index:
        check_files(local)
    others = _load_others(local, planned, dtype)
    reports = _load_transformers(planned, target, dtype, backend, resident)
    modules = {name: module.eval() for name, (_, module) in planned.items()}
    pipe = _assemble(local, others | modules, dtype)
    with convert_memory_errors(f"moving the pipeline to {target}"):
        pipe.to(target)
    return LoadedPipeline(pipe, reports)


def transformers_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return {component: transformer} of a loaded pipeline."""
    modules = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    return {name: module for name, module in modules.items() if module is not None}


def recommended_sampling(model: str | AnyPath, source_image: Image | None = None) -> Sampling:
    """Return the recommended settings of a pipeline, in the aspect ratio of a source image.

    Raises  MezzotintError if the pipeline's index or sampling.json is invalid
    """
    return index_sampling(read_index(resolve(model)), source_image)


def _load_transformers(
    planned: PlannedTransformers,
    device: torch.device,
    dtype: torch.dtype,
    backend: BackendChoice,
    resident: str | None,
) -> dict[str, LoadReport]:
    """Fill the planned modules with weights; return {component: its report}."""
    # Imported here because it imports diffusers.
    from mezzotint.integrations.diffusers import mark_quantized

    placement = Placement(device, resident)
    reports = {}
    for name, (load_plan, module) in planned.items():
        with convert_memory_errors(f"loading {name}"):
            reports[name] = load_model(load_plan, module, placement, dtype, backend)
        mark_quantized(module, reports[name])
    return reports


def _load_others(
    index: PipelineIndex, planned: Collection[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Return {name: loaded component} of all that the pipeline takes besides its transformers."""
    names = [name for name in index.components if name in index.known and name not in planned]
    return {name: load_component(index.components[name], dtype) for name in names}


def _assemble(
    index: PipelineIndex, components: Mapping[str, Any], dtype: torch.dtype
) -> DiffusionPipeline:
    """Make the pipeline of these components, with the settings of its index."""
    where, name = f"{index.folder / PIPELINE_INDEX}", index.pipeline.__name__
    # diffusers must be told about components that are absent, or it looks for their folders.
    arguments = dict.fromkeys(index.absent) | dict(components)
    with convert_errors(where, f"diffusers cannot make a {name} of these components", RESTORE):
        pipe = index.pipeline.from_pretrained(
            index.folder, dtype=dtype, local_files_only=True, **arguments
        )
        pipe.set_progress_bar_config(disable=True)
    return pipe
