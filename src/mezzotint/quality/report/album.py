"""Images and videos of a page: inside it at full size while there is room, then reduced, with the file beside it."""

import base64
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mezzotint.pictures import save_png
from mezzotint.videos import save_mp4

ROOM = 32 * 2**20
"""Bytes of a page that full-size images and videos may take; browsers and mail programs still open that."""
PREVIEW = 768
"""Longest side of an image that stands in the page for a larger one beside it."""
THUMBNAIL = 160
"""Longest side of a frame in a strip."""
BESIDE = "pictures"
"""The folder beside the page for what is in no run: error maps and encoded videos."""


@dataclass(frozen=True)
class Shown:
    """An image or a video of the page.

    src    a data URI, or the path of a file beside the page
    full   the path of the full-size file beside the page, or empty if `src` is of full size itself
    """

    src: str
    full: str = ""


class Album:
    """The images of one page, which lies in `folder`; those that are added first find room in it."""

    def __init__(self, folder: Path, room: int = ROOM) -> None:
        self.folder, self.room = folder, room

    def image(self, file: Path) -> Shown:
        """Show a PNG of a run."""
        return self._shown(file.read_bytes(), lambda: self._beside(file))

    def drawing(self, image: Image.Image, name: str) -> Shown:
        """Show an image that is in no file; `name` is what its file is called if it needs one."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)

        def saved() -> str:
            save_png(image, self.folder / BESIDE / f"{name}.png", {})
            return f"{BESIDE}/{name}.png"

        return self._shown(buffer.getvalue(), saved)

    def thumbnail(self, file: Path) -> Shown:
        """Show a PNG of a run small, whatever the room."""
        with Image.open(file) as image:
            return Shown(_jpeg(image, THUMBNAIL), self._beside(file))

    def video(self, frames: Sequence[Image.Image], fps: int, name: str) -> Shown | None:
        """Show frames as an MP4, which is written beside the page; None if their sides are odd, which no MP4 has."""
        if frames[0].width % 2 or frames[0].height % 2:
            return None
        path = self.folder / BESIDE / f"{name}.mp4"
        save_mp4(frames, path, fps, {})
        link = f"{BESIDE}/{name}.mp4"
        data = path.read_bytes()
        return Shown(self._inside("video/mp4", data) or link, link)

    def _shown(self, data: bytes, link: Callable[[], str]) -> Shown:
        inside = self._inside("image/png", data)
        if inside:
            return Shown(inside)
        with Image.open(io.BytesIO(data)) as image:
            return Shown(_jpeg(image, PREVIEW), link())

    def _inside(self, kind: str, data: bytes) -> str:
        """The bytes as a data URI, or nothing where there is no room left."""
        size = len(data) * 4 // 3
        if size > self.room:
            return ""
        self.room -= size
        return _uri(kind, data)

    def _beside(self, file: Path) -> str:
        """The path from the page to a file, which is copied if the page lies elsewhere."""
        if not file.is_relative_to(self.folder):
            copy = self.folder / BESIDE / f"{file.parent.name}-{file.name}"
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


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
