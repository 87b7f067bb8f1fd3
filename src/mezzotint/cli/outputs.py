"""Refuse to overwrite files that Mezzotint did not write."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from mezzotint.errors import BadRequest

ROW = {"case", "call_ms"}
"""Keys of every line that `bench -o` appends."""
REPORT = {"report.html", "report.json", "report.md", "sheet.png"}
HEAD = 4096
"""Bytes at the start of a page that name Mezzotint."""
LARGEST_REPORT = 2**26


def check_generated(output: Path, total: int, bad_output_suffix: str) -> list[Path]:
    """Raise BadRequest if a file that Mezzotint did not write is where an output will be.

    output               the file, or folder of frames, that -o names
    total                number of outputs
    bad_output_suffix    added to the names of outputs that fail their check
    Returns              earlier files, written by Mezzotint, that will be replaced
    """
    from mezzotint.saving import remove_leftovers

    stems = [output.stem] if total == 1 else [f"{output.stem}-{i + 1}" for i in range(total)]
    paths = [output.with_stem(stem) for stem in stems]
    for path in (*paths, *(path.with_stem(f"{path.stem}{bad_output_suffix}") for path in paths)):
        remove_leftovers(path)
        if not _is_empty_folder(path):
            _refuse_to_replace([path], is_generated)
    return [path for path in paths if path.is_file()]


def is_generated(file: Path) -> bool:
    """Return whether an image or video holds the parameters that Mezzotint writes."""
    from mezzotint.generation.image_io import holds_parameters
    from mezzotint.generation.video_io import video_parameters

    is_video = file.suffix.lower() == ".mp4"
    return video_parameters(file) is not None if is_video else holds_parameters(file)


def check_sheet(output: Path) -> None:
    """Raise BadRequest if `demo` would overwrite a foreign contact sheet or table."""
    _refuse_to_replace([output], is_generated)
    _refuse_to_replace([output.with_suffix(".json")], lambda _table: output.exists())


def check_rows(output: Path) -> None:
    """Raise BadRequest if `bench` would append its lines to a file of another kind."""
    _refuse_to_replace([output], _holds_rows)


def check_trace(profile: Path) -> None:
    """Raise BadRequest if the trace file exists: a trace does not say which program wrote it."""
    _refuse_to_replace([profile], lambda _file: False)


def check_report(folder: Path, runs: str) -> None:
    """Raise BadRequest if `compare --resume` would write to a foreign folder or file."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / runs).is_dir():
        raise BadRequest(
            f"-o is {folder}, and compare has generated nothing there ({runs} is missing)",
            "name a new folder.",
        )
    _refuse_to_replace([folder / name for name in sorted(REPORT)], _is_of_report)


def _is_of_report(file: Path) -> bool:
    if file.suffix == ".png":
        return is_generated(file)
    if file.suffix == ".html":
        with file.open("rb") as stream:
            return b"compared by Mezzotint" in stream.read(HEAD)
    return _has_keys(file.with_suffix(".json"), {"schema", "verdict", "noise_floor"})


def _has_keys(file: Path, keys: set[str]) -> bool:
    if not file.is_file() or file.stat().st_size > LARGEST_REPORT:
        return False
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(entries, dict) and keys <= entries.keys()


def _holds_rows(file: Path) -> bool:
    """Return whether a file is empty, or begins with rows and ends with a line break."""
    if not file.stat().st_size:
        return True
    try:
        with file.open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in islice(stream, 100)]
    except (ValueError, RecursionError):
        return False
    with file.open("rb") as raw:
        raw.seek(-1, 2)
        ended = raw.read(1) == b"\n"
    return ended and all(isinstance(row, dict) and row.keys() >= ROW for row in rows)


def _refuse_to_replace(paths: list[Path], written_here: Callable[[Path], bool]) -> None:
    """Call `saving.refuse_to_replace`, which is imported late because it imports PyTorch."""
    from mezzotint.saving import refuse_to_replace

    refuse_to_replace(paths, written_here)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
