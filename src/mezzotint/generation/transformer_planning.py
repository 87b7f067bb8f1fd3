"""The transformers of a pipeline: opened, planned, and checked against the pipeline."""

from torch import nn

from mezzotint.builtin import is_pipeline, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadRequest, UnknownFormat
from mezzotint.families.building import build_meta_model
from mezzotint.formats.renaming import Renames
from mezzotint.generation.fit import check_fit
from mezzotint.generation.pipeline_index import PipelineIndex
from mezzotint.hub import AnyPath, local_copy
from mezzotint.kernels import QUANTIZED_ACTIVATIONS
from mezzotint.loading import LoadPlan, plan

PlannedTransformers = dict[str, tuple[LoadPlan, nn.Module]]
"""{component: its load plan, and the module on the meta device that the plan fills}"""


def open_transformer(
    component: str,
    path: str | AnyPath | None,
    index: PipelineIndex,
    scales_from: str | AnyPath | None = None,
    rename: Renames | None = None,
) -> Checkpoint:
    """Open the checkpoint of one transformer; no weight is read.

    path     None for the pipeline's own transformer
    Raises   MezzotintError if it cannot be read, or is of another family than the pipeline
    """
    model_class = index.class_of(component)
    if model_class is None:
        raise BadRequest(
            f"{index.folder}: has no {component}, and {path} was named for it",
            "name one transformer only.",
        )
    source = index.folder if path is None else resolve(path)
    checkpoint = _open(source, component if is_pipeline(source) else None, scales_from, rename)
    family = checkpoint.family
    if family.transformer_class != model_class:
        raise UnknownFormat(
            f"{checkpoint.header.path}: is a {family.title} transformer "
            f"({family.transformer_class}), and {index.folder} has a {model_class}",
            "name a transformer of the same family as the pipeline.",
        )
    return checkpoint


def plan_transformer(
    component: str,
    checkpoint: Checkpoint,
    index: PipelineIndex,
    activations: str = QUANTIZED_ACTIVATIONS,
) -> tuple[LoadPlan, nn.Module]:
    """Plan how a transformer is loaded, with its own configuration or else the pipeline's.

    Raises  MezzotintError if the checkpoint is incomplete, or does not fit the pipeline
    """
    header = checkpoint.header
    has_config = "_class_name" in header.config
    config = header.config if has_config else index.config_of(component)
    config_file = index.components[component].config_file
    where = f"{header.path}: its configuration" if has_config else str(config_file)
    module = build_meta_model(str(index.class_of(component)), config, where)
    planned = plan(checkpoint, module, activations)
    check_fit(checkpoint.family, module, index, component, f"{header.path}")
    return planned, module


def _open(
    path: AnyPath, component: str | None, scales_from: str | AnyPath | None, rename: Renames | None
) -> Checkpoint:
    """Open a checkpoint. Download a Hub file whose headers do not determine its layout."""
    checkpoint = Checkpoint.open(path, component=component, scales_from=scales_from, rename=rename)
    if checkpoint.contents.assumed and not checkpoint.header.local:
        return Checkpoint.open(
            local_copy(checkpoint.header.path), scales_from=scales_from, rename=rename
        )
    return checkpoint
