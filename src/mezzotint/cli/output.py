"""How commands print: tables on stdout, progress on stderr, nothing cut off where there is no terminal."""

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mezzotint.escaping import cut, printable

PIPED_WIDTH = 200
LONGEST_LINE = 4_000


def console() -> Console:
    """Stdout, as wide as the terminal, or wide enough for whole names where there is none."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)


def foreign(text: object) -> Text:
    """Return text that is from a file or a server as a cell or line: no markup in it, no control characters."""
    return Text(printable(text))


def message(text: object) -> str:
    """Return an error's or note's message for stderr: its lines stay, control characters and endless lines do not."""
    return "\n".join(cut(line, LONGEST_LINE) for line in printable(text, keep="\n").split("\n"))


def quiet_libraries() -> None:
    """Keep the chatter of diffusers and transformers (bars, advice) out of our messages; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def step_progress() -> Progress:
    """A bar of steps with elapsed and remaining time on stderr; silent where stderr is no terminal."""
    err = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )
