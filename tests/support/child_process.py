"""Run work in a child process that must die."""

import os
from collections.abc import Callable
from pathlib import Path

from mezzotint.saving import (
    atomic_write,
)


def die() -> None:
    """End the process as SIGKILL does: nothing is cleaned up."""
    os._exit(9)


def in_a_child(work: Callable[[], object]) -> None:
    """Do the work in a child process, in which it must die."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def write_half(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        die()
