"""Videos as files: MP4 with the parameters inside, or a folder of PNG frames."""

import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from mezzotint.errors import BadRequest, Unsupported
from mezzotint.generation.image_io import save_png
from mezzotint.saving import atomic_write

FFMPEG_ARGUMENTS = [
    "-c:v",
    "libx264",
    "-crf",
    "16",
    "-pix_fmt",
    "yuv420p",
    "-movflags",
    "+faststart",
    "-f",
    "mp4",
]
"""H.264 that every player opens, visually close to the frames; only PNG frames are exact."""

COMMENT = b"\xa9cmt"
"""The MP4 box of a comment; `+faststart` puts it before the frames."""
HEAD = 2**22
"""Bytes at the start of a file that are searched for the comment."""


def save_mp4(
    frames: Sequence[Image.Image], path: Path, fps: int, parameters: dict[str, Any]
) -> None:
    """Write an MP4 whose comment holds the parameters as JSON.

    Raises  BadRequest if a side of the frames is odd; Unsupported with the encoder's message
    """
    width, height = frames[0].size
    if width % 2 or height % 2:
        raise BadRequest(
            f"frames of {width} x {height} do not fit into an MP4",
            "write a folder of frames instead.",
        )
    source = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-r",
        str(fps),
        "-i",
        "-",
    ]
    comment = ["-metadata", f"comment={json.dumps(parameters, sort_keys=True)}"]
    with atomic_write(path) as temporary:
        _encode([*source, *FFMPEG_ARGUMENTS, *comment, str(temporary)], frames, path)


def video_parameters(file: Path) -> dict[str, Any] | None:
    """Return the parameters in an MP4's comment, or None if `save_mp4` did not write the file."""
    with file.open("rb") as stream:
        start = stream.read(HEAD)
    comment = start[start.find(COMMENT) :] if COMMENT in start else b""
    # A data box has its size, "data", its type, a language, and the text.
    size = int.from_bytes(comment[4:8], "big")
    try:
        entries = json.loads(comment[20 : 4 + size])
    except (ValueError, RecursionError):
        return None
    return entries if isinstance(entries, dict) and {"prompt", "seed"} <= entries.keys() else None


def save_frames(frames: Sequence[Image.Image], folder: Path, parameters: dict[str, Any]) -> None:
    """Write the frames as frame-0000.png, frame-0001.png, ... into a folder."""
    for number, frame in enumerate(frames):
        save_png(frame, folder / f"frame-{number:04}.png", parameters | {"frame": number})


def _encode(arguments: list[str], frames: Sequence[Image.Image], path: Path) -> None:
    """Run ffmpeg, feed it the frames, and raise if it fails."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe) as ffmpeg:  # noqa: S603
        assert ffmpeg.stdin is not None  # noqa: S101
        with suppress(BrokenPipeError):
            for frame in frames:
                ffmpeg.stdin.write(frame.convert("RGB").tobytes())
        said = ffmpeg.communicate()[1].decode(errors="replace").strip()
    if ffmpeg.returncode:
        raise Unsupported(
            f"{path}: the video could not be encoded: {said}", "write a folder of frames instead."
        )
