"""Pictures that are edited: how they are read, and which of diffusers' pipelines take one."""

import hashlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from mezzotint.errors import BadRequest, Unsupported

TAKE_ONE = "FluxKontext, Flux2, Flux2Klein, QwenImageEdit, QwenImageEditPlus and WanImageToVideo"
"""Names of the pipelines that this is tested with, less the `Pipeline` at their ends."""
FAIL_WITHOUT = ("QwenImageEdit", "QwenImageLayered")
"""How pipelines begin that take the size of a picture whose default is None."""
NEVER_GIVEN = ("mask_image", "mask", "control_image", "video", "pose_video", "layers")
"""Arguments of pipelines that do more than generate from a prompt and an image: nothing here gives or takes those."""
CHANGES = "strength"
"""An argument of pipelines that begin with an image and change it: they fail without one."""
LIBRARIES = {"WanImageToVideo": "ftfy", "QwenImageEdit": "torchvision"}
"""{how pipelines begin: what they do not work without}. The one cleans prompts, the other reads videos if asked to."""
SMALLEST, LONGEST = 64, 8
"""Pixels of the shorter side, and how many times it the longer may be: what FLUX.2's pipelines ask for."""


@dataclass(frozen=True)
class SourceImage:
    """A picture to edit: the bytes of its file as they were when it was read, and what the file is called."""

    path: str
    data: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def picture(self) -> Image.Image:
        """RGB, upright; raises PIL.UnidentifiedImageError if it is none."""
        with Image.open(io.BytesIO(self.data)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")

    def to_dict(self) -> dict[str, str]:
        """As parameters of a picture and entries of a report have it."""
        return {"image": self.path, "image_sha256": self.sha256}


def read_image(path: str | Path) -> SourceImage:
    """Read a picture that is to be edited. Raises BadRequest if it is none, or has a shape that no pipeline takes."""
    if not Path(path).is_file():
        raise BadRequest(f"{path}: no such picture is there", "name a PNG, JPEG or WebP file.")
    image = SourceImage(str(path), Path(path).read_bytes())
    try:
        width, height = image.picture.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise BadRequest(f"{path}: is not a whole picture: {error}", "name a PNG, JPEG or WebP file.") from error
    if min(width, height) < SMALLEST or max(width, height) > LONGEST * min(width, height):
        raise BadRequest(
            f"{path}: is {width} x {height} pixels, and {SMALLEST} are needed on each side",
            f"the longer side may be {LONGEST} times the shorter.",
        )
    return image


def pipeline_for(pipeline: type[Any], config: Mapping[str, Any], given: bool) -> type[Any]:
    """The class that paints with a picture, or without: Wan 2.2 TI2V-5B is for both, and published as what takes none.

    config   of the pipeline, or its model_index.json
    """
    if given and pipeline.__name__ == "WanPipeline" and config.get("expand_timesteps"):
        from diffusers import WanImageToVideoPipeline

        return WanImageToVideoPipeline  # type: ignore[no-any-return]
    return pipeline


def check_pipeline(pipeline: type[Any], given: bool) -> None:
    """Whether a diffusers pipeline can do with a picture to edit, or without one.

    Raises  BadRequest if it takes none and one is given, or needs one and has none; Unsupported if it lacks a library,
            or needs what is neither a prompt nor an image
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in parameters:
        raise Unsupported(f"{pipeline.__name__} takes no prompt", "load it with mezzotint.load, and call it yourself.")
    foreign = next((name for name in NEVER_GIVEN if name in parameters), None)
    if foreign is not None:
        raise Unsupported(
            f"{pipeline.__name__} is called with {foreign}=..., and here only a prompt and an image are given",
            f"load it with mezzotint.load, and call it with {foreign}=... yourself.",
        )
    parameter = parameters.get("image")
    if given and parameter is None:
        raise BadRequest(
            f"{pipeline.__name__} takes no picture, and one is given to be edited",
            f"those that do are {TAKE_ONE}, each a ...Pipeline.",
        )
    needed = parameter is not None and (parameter.default is inspect.Parameter.empty or CHANGES in parameters)
    if not given and (needed or pipeline.__name__.startswith(FAIL_WITHOUT)):
        raise BadRequest(f"{pipeline.__name__} edits a picture, and none is given", "name one with --image.")
    for begins, library in LIBRARIES.items():
        if pipeline.__name__.startswith(begins) and find_spec(library) is None:
            raise Unsupported(f"{pipeline.__name__} needs {library}, which is not installed", f"pip install {library}")
