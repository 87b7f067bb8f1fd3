"""The files that `generate` writes: their names, and images, videos and contact sheets in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.cli.outputs import check_generated
from mezzotint.errors import BadRequest

if TYPE_CHECKING:
    from mezzotint.generation.generate import GenerationResult

BAD_OUTPUT_SUFFIX = "-bad-output"


@dataclass(frozen=True)
class OutputFiles:
    """Where outputs are saved.

    path       as -o names it, or the default
    total      number of outputs
    replaced   earlier files, written by Mezzotint, that are replaced
    """

    path: Path
    total: int
    replaced: tuple[Path, ...]

    @classmethod
    def plan(cls, output: Path | None, is_video: bool, grid: bool, total: int) -> "OutputFiles":
        """Check the output path before anything is loaded. Raises BadRequest."""
        if is_video and grid:
            raise BadRequest("--grid applies to images, and this model generates videos")
        path = Path("out.mp4" if is_video else "out.png") if output is None else output
        _check_path(path, is_video)
        replaced = check_generated(path, 1 if grid else total, BAD_OUTPUT_SUFFIX)
        return cls(path, total, tuple(replaced))

    def save(self, number: int, result: "GenerationResult", parameters: dict[str, Any]) -> Path:
        """Write the image or video with this number, counted from 0; return its path."""
        from mezzotint.generation.image_io import save_png
        from mezzotint.generation.video_io import save_frames, save_mp4

        path = self._path_of(number, is_bad=any(result.problems))
        if result.fps is None:
            save_png(result.images[0], path, parameters)
        elif path.suffix:
            save_mp4(result.videos[0], path, result.fps, parameters)
        else:
            save_frames(result.videos[0], path, parameters)
        return path

    def save_sheet(
        self, result: "GenerationResult", columns: int, parameters: dict[str, Any]
    ) -> Path:
        """Write one contact sheet with this many images per row; return its path."""
        from mezzotint.generation.image_io import contact_sheet, save_png

        images = result.images
        rows = [images[i : i + columns] for i in range(0, len(images), columns)]
        path = _bad_output_path(self.path) if any(result.problems) else self.path
        save_png(contact_sheet(rows), path, parameters)
        return path

    def _path_of(self, number: int, is_bad: bool) -> Path:
        stem = self.path.stem if self.total == 1 else f"{self.path.stem}-{number + 1}"
        path = self.path.with_stem(stem)
        return _bad_output_path(path) if is_bad else path


def bad_output_files(paths: Sequence[Path]) -> list[str]:
    """Return the paths of outputs that failed their check."""
    return [str(path) for path in paths if path.stem.endswith(BAD_OUTPUT_SUFFIX)]


def _bad_output_path(path: Path) -> Path:
    """Return the path under which an output that failed its check is saved."""
    return path.with_stem(f"{path.stem}{BAD_OUTPUT_SUFFIX}")


def _check_path(path: Path, is_video: bool) -> None:
    """Raise BadRequest for a path that cannot take images, or videos."""
    suffixes: Mapping[str, str] = (
        {".mp4": ".mp4", "": "a folder (no suffix)"} if is_video else {".png": ".png"}
    )
    if path.suffix.lower() not in suffixes:
        kind = "videos" if is_video else "images"
        raise BadRequest(
            f"-o is {path}", f"this model generates {kind}: name {' or '.join(suffixes.values())}."
        )
    if path.is_dir() and any(path.iterdir()):
        raise BadRequest(
            f"-o is {path}, and that folder is not empty", "name a new folder for the frames."
        )
