"""Images and videos of a page: embedded at full size up to a budget, then reduced with a link."""

import base64
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mezzotint.generation.image_io import save_png
from mezzotint.generation.video_io import save_mp4

EMBEDDED_BYTES = 32 * 2**20
"""Budget for embedded media in bytes. Browsers and mail programs still open a page of this size."""
PREVIEW_SIDE = 768
"""Longest side of a reduced image in pixels."""
THUMBNAIL_SIDE = 160
"""Longest side of a frame in a strip in pixels."""
MEDIA_FOLDER = "images"
"""Folder next to the page for files that are in no run: error maps and encoded videos."""


@dataclass(frozen=True)
class Media:
    """An image or a video of the page.

    src    a data URI, or a path relative to the page
    full   path of the full-size file relative to the page; empty if `src` has full size
    """

    src: str
    full: str = ""


class Album:
    """The media of one page in `folder`. Media that are added first are embedded first."""

    def __init__(self, folder: Path, budget: int = EMBEDDED_BYTES) -> None:
        self.folder, self.budget = folder, budget

    def image(self, file: Path) -> Media:
        """Add a PNG of a run."""
        return self._image(file.read_bytes(), lambda: self._link(file))

    def computed_image(self, image: Image.Image, name: str) -> Media:
        """Add an image that is in no file. It is saved under `name` if it is not embedded."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)

        def save() -> str:
            save_png(image, self.folder / MEDIA_FOLDER / f"{name}.png", {})
            return f"{MEDIA_FOLDER}/{name}.png"

        return self._image(buffer.getvalue(), save)

    def thumbnail(self, file: Path) -> Media:
        """Add a PNG of a run as a thumbnail, which the budget does not limit."""
        with Image.open(file) as image:
            return Media(_jpeg(image, THUMBNAIL_SIDE), self._link(file))

    def video(self, frames: Sequence[Image.Image], fps: int, name: str) -> Media | None:
        """Write frames as an MP4 next to the page and add it.

        Return None if a side is odd: H.264 with 4:2:0 chroma requires even sides.
        """
        if frames[0].width % 2 or frames[0].height % 2:
            return None
        path = self.folder / MEDIA_FOLDER / f"{name}.mp4"
        save_mp4(frames, path, fps, {})
        link = f"{MEDIA_FOLDER}/{name}.mp4"
        data = path.read_bytes()
        return Media(self._embed("video/mp4", data) or link, link)

    def _image(self, data: bytes, link: Callable[[], str]) -> Media:
        embedded = self._embed("image/png", data)
        if embedded:
            return Media(embedded)
        with Image.open(io.BytesIO(data)) as image:
            return Media(_jpeg(image, PREVIEW_SIDE), link())

    def _embed(self, mime: str, data: bytes) -> str:
        """Return a data URI, or an empty string if the budget is exhausted."""
        size = len(data) * 4 // 3
        if size > self.budget:
            return ""
        self.budget -= size
        return _uri(mime, data)

    def _link(self, file: Path) -> str:
        """Return the path of a file relative to the page. Copy files from other folders."""
        if not file.is_relative_to(self.folder):
            copy = self.folder / MEDIA_FOLDER / f"{file.parent.name}-{file.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            file = copy
        return file.relative_to(self.folder).as_posix()


def _jpeg(image: Image.Image, longest: int) -> str:
    scale = min(1.0, longest / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=88)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
