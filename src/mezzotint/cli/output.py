"""How commands print: tables on stdout, progress on stderr, nothing cut off where there is no terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PIPED_WIDTH = 200


def console() -> Console:
    """Stdout, as wide as the terminal, or wide enough for whole names where there is none."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)


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
