"""Checks of arguments without PyTorch, whose import takes seconds. Options call them when parsed.

The API checks its arguments too; these checks answer at once.
"""

import errno
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mezzotint.builtin import check_exists
from mezzotint.cli.backend_options import parse_backend_choice
from mezzotint.cli.names import (
    ACTIVATIONS,
    BACKENDS,
    DEVICES,
    GATES,
    METRICS,
    PROMPT_SETS,
    RESIDENCY_MODES,
    SCHEMES,
)
from mezzotint.errors import BadRequest, CannotWrite, did_you_mean, there_are
from mezzotint.generation.step_schedule import StepSchedule
from mezzotint.quality.source_spec import split_source


def check_candidate(text: str) -> None:
    """Check `[NAME=]SOURCE[,OPTION=VALUE...]`, a source of `compare` and `diagnose`."""
    _, source, options = split_source(text)
    checks = {
        "transformer_2": check_exists,
        "backend": lambda name: check_backends([name]),
        "resident": RESIDENCY_MODES.check,
        "activations": ACTIVATIONS.check,
        "bf16_steps": StepSchedule.parse,
    }
    check_exists(source)
    for name, value in options.items():
        checks[name](value)


def check_backends(values: Sequence[str]) -> None:
    """Raise BadRequest for a value of --backend that names no backend or no scheme."""
    choice = parse_backend_choice(values)
    for scheme in choice if isinstance(choice, dict) else ():
        SCHEMES.check(scheme)
    for name in choice.values() if isinstance(choice, dict) else filter(None, [choice]):
        BACKENDS.check(name)


def check_metrics(value: str) -> None:
    """Raise BadRequest for a name in --metrics that is no metric."""
    for name in parse_metrics(value):
        METRICS.check(name)


def parse_metrics(value: str) -> list[str]:
    """Return the names in `--metrics NAME,...`."""
    return [name.strip() for name in value.split(",")]


def check_device(name: str) -> None:
    """Raise BadRequest for a misspelled device type. PyTorch checks whether the device exists."""
    kind = name.partition(":")[0]
    if kind not in DEVICES and did_you_mean(kind, DEVICES):
        raise BadRequest(f"there is no device {name!r}", there_are(kind, DEVICES))


def check_prompts(prompts: str) -> None:
    """Raise BadRequest if --prompts names neither a built-in set nor a file."""
    if prompts not in PROMPT_SETS and not Path(prompts).is_file():
        hint = f"{did_you_mean(prompts, PROMPT_SETS)}the sets are: {', '.join(PROMPT_SETS)}."
        raise BadRequest(f"--prompts is {prompts!r}, and this file does not exist", hint)


def check_image(image: Path) -> None:
    """Raise BadRequest if a source image cannot be read."""
    # Importing Pillow is slow, too.
    from mezzotint.generation.source_image import read_source_image

    read_source_image(image)


def check_gate(gate: str) -> None:
    """Raise BadRequest if --gate names neither a profile nor a file."""
    if gate not in GATES and not Path(gate).is_file():
        hint = f"{did_you_mean(gate, GATES)}the profiles are: {', '.join(GATES)}."
        raise BadRequest(f"--gate is {gate!r}, and this file does not exist", hint)


def check_writable(option: str, path: Path) -> None:
    """Raise CannotWrite if a file or folder cannot be created at `path`.

    A temporary file in the nearest existing folder shows that; it is removed at once.
    """
    try:
        _ = path.is_dir() or path.exists()
        folder = next(parent for parent in (path.parent, *path.parent.parents) if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CannotWrite(
            f"{option} is {path}, and nothing can be written there: {error.strerror}"
        ) from error


def check_file(option: str, path: Path) -> None:
    """Raise CannotWrite if `path` is a folder, or a file cannot be created there."""
    check_writable(option, path)
    if path.is_dir():
        raise CannotWrite(f"{option} is {path}, which is a folder", "name a file.")
