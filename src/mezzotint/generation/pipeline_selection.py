"""Select the diffusers pipeline that takes a source image, and check that it can run."""

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from mezzotint.errors import BadRequest, Unsupported
from mezzotint.families import families
from mezzotint.families.family import SourceImagePipeline

UNSUPPORTED_ARGUMENTS = ("mask_image", "mask", "control_image", "video", "pose_video", "layers")
"""Arguments of pipelines that need more than a prompt and an image."""
IMAGE_TO_IMAGE = "strength"
"""An argument of image-to-image pipelines, which fail without an image."""


def source_image_pipelines() -> list[SourceImagePipeline]:
    """Return the pipelines of all families that take a source image."""
    return [known for family in families().values() for known in family.source_image_pipelines]


def select_pipeline_class(
    pipeline: type[Any], config: Mapping[str, Any], has_source_image: bool
) -> type[Any]:
    """Return the class to generate with: some families have another one for source images.

    config   of the pipeline, or its model_index.json
    """
    if not has_source_image:
        return pipeline
    import diffusers

    names = (f.source_image_pipeline(pipeline.__name__, config) for f in families().values())
    other = next((name for name in names if name != pipeline.__name__), None)
    return pipeline if other is None else getattr(diffusers, other)


def check_source_image(pipeline: type[Any], has_source_image: bool) -> None:
    """Check that a pipeline class can generate with a source image, or without one.

    Raises  BadRequest if it takes no image, or needs one; Unsupported if it lacks a
            library or needs more than a prompt and an image
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    _check_arguments(pipeline.__name__, parameters)
    _check_image(pipeline.__name__, parameters, has_source_image)
    for library in {edit.library for edit in _known(pipeline.__name__) if edit.library}:
        if find_spec(library) is None:
            raise Unsupported(
                f"{pipeline.__name__} needs {library}, which is not installed",
                f"pip install {library}",
            )


def _check_arguments(name: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raise Unsupported for a pipeline that takes no prompt, or needs other arguments."""
    if "prompt" not in parameters:
        raise Unsupported(
            f"{name} takes no prompt", "load it with mezzotint.load, and call it yourself."
        )
    foreign = next((name for name in UNSUPPORTED_ARGUMENTS if name in parameters), None)
    if foreign is not None:
        raise Unsupported(
            f"{name} is called with {foreign}=..., which is not supported here",
            f"load it with mezzotint.load, and call it with {foreign}=... yourself.",
        )


def _check_image(
    name: str, parameters: Mapping[str, inspect.Parameter], has_source_image: bool
) -> None:
    """Raise BadRequest for a source image that is not taken, or a missing one."""
    parameter = parameters.get("image")
    if has_source_image and parameter is None:
        raise BadRequest(
            f"{name} takes no source image, and one was given",
            f"those that do are {_names_of_pipelines()}, each a ...Pipeline.",
        )
    needed = parameter is not None and (
        parameter.default is inspect.Parameter.empty or IMAGE_TO_IMAGE in parameters
    )
    if not has_source_image and (needed or any(edit.required for edit in _known(name))):
        raise BadRequest(
            f"{name} needs a source image, and none was given", "name one with --image."
        )


def _known(name: str) -> list[SourceImagePipeline]:
    return [known for known in source_image_pipelines() if name.startswith(known.name)]


def _names_of_pipelines() -> str:
    *names, last = (known.name for known in source_image_pipelines())
    return f"{', '.join(names)} and {last}"
