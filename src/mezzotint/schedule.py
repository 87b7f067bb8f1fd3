"""Which denoising steps leave the inputs of quantized layers and of attention as they are: early steps set out the
picture, late ones its detail, and an error in either is not mended by the steps between."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from mezzotint.errors import BadRequest
from mezzotint.nn import exact_attention, unrounded_inputs

WRITTEN = re.compile(r"(\d+)\+(\d+)")


@dataclass(frozen=True)
class StepSchedule:
    """The first and the last of the steps; written "2+1".

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


NO_STEPS = StepSchedule()


@contextmanager
def scheduled(
    layers: StepSchedule, attention: StepSchedule, steps: int
) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Keep to two schedules while the context is open, in this thread.

    Yields a context to open between two steps, given the number of the one that is done: in it modes are as they were
    outside, so that what runs there for other models is not changed.

    layers      whose steps leave the inputs of quantized layers in BF16, and FP8 attention's with them
    attention   whose steps do that for FP8 attention alone
    """
    with ExitStack() as stack:

        def prepare(step: int) -> None:
            if layers.covers(step, steps):
                stack.enter_context(unrounded_inputs())
            if layers.covers(step, steps) or attention.covers(step, steps):
                stack.enter_context(exact_attention())

        @contextmanager
        def between(done: int) -> Iterator[None]:
            stack.close()
            yield
            prepare(done + 1)

        prepare(0)
        yield between
