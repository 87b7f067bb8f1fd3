"""Which denoising steps a schedule covers: written FIRST+LAST, and read without importing PyTorch."""

import re
from dataclasses import dataclass

from mezzotint.errors import BadRequest

WRITTEN = re.compile(r"(\d{1,9})\+(\d{1,9})")


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
