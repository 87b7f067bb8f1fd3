"""Read source images. Imports no PyTorch, because the command line checks --image first."""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from mezzotint.errors import BadRequest

MIN_SIDE, MAX_ASPECT_RATIO = 64, 8
"""Minimum side in pixels and maximum aspect ratio, as FLUX.2's pipelines require."""


@dataclass(frozen=True)
class SourceImage:
    """A source image: the bytes of its file as read, and its path."""

    path: str
    data: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def to_pil(self) -> Image.Image:
        """Decode to an upright RGB image. Raises PIL.UnidentifiedImageError."""
        with Image.open(io.BytesIO(self.data)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")

    def to_dict(self) -> dict[str, str]:
        """Return the entries for parameters of an image and for reports."""
        return {"image": self.path, "image_sha256": self.sha256}


def read_source_image(path: str | Path) -> SourceImage:
    """Read a source image. Raises BadRequest for other files, and shapes that no pipeline takes."""
    if not Path(path).is_file():
        raise BadRequest(f"{path}: no such image", "name a PNG, JPEG or WebP file.")
    image = SourceImage(str(path), Path(path).read_bytes())
    try:
        width, height = image.to_pil.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise BadRequest(
            f"{path}: is not a complete image: {error}", "name a PNG, JPEG or WebP file."
        ) from error
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadRequest(
            f"{path}: is {width} x {height} pixels, and {MIN_SIDE} are needed on each side",
            f"the longer side may be {MAX_ASPECT_RATIO} times the shorter.",
        )
    return image
