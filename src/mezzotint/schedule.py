"""Which denoising steps leave the inputs of quantized layers as they are: early steps set out the picture, late ones
its detail, and an error in either is not mended by the steps between."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from mezzotint.errors import BadRequest
from mezzotint.nn import unrounded_inputs

WRITTEN = re.compile(r"(\d+)\+(\d+)")


@dataclass(frozen=True)
class StepSchedule:
    """The first and the last steps run with BF16 activations; written "2+1".

    >>> StepSchedule.read("2+1").covers(27, steps=28)
    True
    """

    first: int = 0
    last: int = 0

    @classmethod
    def read(cls, text: str) -> "StepSchedule":
        """Raises  BadRequest if it is not written FIRST+LAST"""
        numbers = WRITTEN.fullmatch(text)
        if numbers is None:
            raise BadRequest(
                f"{text!r} is no step schedule", "write FIRST+LAST: 2+1 for the first two steps and the last."
            )
        return cls(*map(int, numbers.groups()))

    def __str__(self) -> str:
        return f"{self.first}+{self.last}"

    def covers(self, step: int, steps: int) -> bool:
        """Whether step number `step`, from 0, is among the first or the last of `steps`."""
        return step < self.first or step >= steps - self.last

    @contextmanager
    def followed(self, steps: int) -> Iterator[Callable[[int], None]]:
        """Keep to the schedule while the context is open; yields what is to be told the number of each step done."""
        with ExitStack() as stack:

            def prepare(step: int) -> None:
                stack.close()
                if self.covers(step, steps):
                    stack.enter_context(unrounded_inputs())

            prepare(0)
            yield lambda done: prepare(done + 1)


ALL_AS_STORED = StepSchedule()
