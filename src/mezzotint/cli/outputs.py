"""What may be written over without a word: what Mezzotint itself has written there before, and nothing else."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from mezzotint.errors import BadRequest

ROW = {"case", "call_ms"}
"""What every line that `bench -o` appends has."""
REPORT = {"report.html", "report.json", "report.md", "sheet.png"}
HEAD = 4096
"""Bytes within which a page says that Mezzotint made it."""
LARGEST_REPORT = 2**26


def check_painted(output: Path, number: int, grid: bool, unsound: str) -> list[Path]:
    """Raise BadRequest if a picture or video of someone else is where one of ours will be; ours are replaced.

    output    the file, or folder of frames, that -o names
    number    how many are painted
    unsound   what is added to the names of those that the guard objects to
    Returns   our own earlier files that will be replaced
    """
    from mezzotint.saving import remove_leftovers

    stems = [output.stem] if grid or number == 1 else [f"{output.stem}-{i + 1}" for i in range(number)]
    paths = [output.with_stem(stem) for stem in stems]
    for path in (*paths, *(path.with_stem(f"{path.stem}{unsound}") for path in paths)):
        remove_leftovers(path)
        if not _is_empty_folder(path):
            _refuse_to_replace([path], is_painted)
    return [path for path in paths if path.is_file()]


def is_painted(file: Path) -> bool:
    """Whether a picture or video holds the parameters that Mezzotint writes into its own."""
    from mezzotint.pictures import holds_parameters
    from mezzotint.videos import video_parameters

    return video_parameters(file) is not None if file.suffix.lower() == ".mp4" else holds_parameters(file)


def check_sheet(output: Path) -> None:
    """Raise BadRequest if something else is where `demo` writes its sheet, and the table beside it."""
    _refuse_to_replace([output], is_painted)
    _refuse_to_replace([output.with_suffix(".json")], lambda _table: output.exists())


def check_rows(output: Path) -> None:
    """Raise BadRequest if `bench` would append its lines to anything but such lines."""
    _refuse_to_replace([output], _holds_rows)


def check_trace(profile: Path) -> None:
    """Raise BadRequest if there is anything where a trace will be: a trace does not say whose it is."""
    _refuse_to_replace([profile], lambda _file: False)


def check_report(folder: Path, runs: str) -> None:
    """Raise BadRequest if `compare --resume` would write into a folder, or over files, that are not its own."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / runs).is_dir():
        raise BadRequest(
            f"-o is {folder}, and compare has painted nothing there ({runs} is missing)", "name a new folder."
        )
    _refuse_to_replace([folder / name for name in sorted(REPORT)], _is_of_report)


def _is_of_report(file: Path) -> bool:
    if file.suffix == ".png":
        return is_painted(file)
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
    """Whether a file is empty, or the first lines of it are rows, and its last one is ended."""
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
    """`saving.refuse_to_replace`; imported here, as it brings PyTorch along, and a bad argument is told before that."""
    from mezzotint.saving import refuse_to_replace

    refuse_to_replace(paths, written_here)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
