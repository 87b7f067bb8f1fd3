"""Step schedules: first and last denoising steps, written FIRST+LAST. Imports no PyTorch."""

import re
from dataclasses import dataclass

from mezzotint.errors import BadRequest

PATTERN = re.compile(r"(\d{1,9})\+(\d{1,9})")


@dataclass(frozen=True)
class StepSchedule:
    """The first and the last steps of a generation; written "2+1".

    >>> StepSchedule.parse("2+1").covers(27, num_steps=28)
    True
    """

    first: int = 0
    last: int = 0

    @classmethod
    def parse(cls, text: str) -> "StepSchedule":
        """Parse FIRST+LAST. Raises BadRequest for any other text."""
        numbers = PATTERN.fullmatch(text)
        if numbers is None:
            raise BadRequest(
                f"{text!r} is not a step schedule",
                "write FIRST+LAST: 2+1 for the first two steps and the last.",
            )
        return cls(*map(int, numbers.groups()))

    def __str__(self) -> str:
        return f"{self.first}+{self.last}"

    def covers(self, step: int, num_steps: int) -> bool:
        """Return whether a step, counted from 0, is a first or last one of `num_steps`."""
        return step < self.first or step >= num_steps - self.last


NO_STEPS = StepSchedule()
FP8_ATTENTION_STEPS = StepSchedule(2, 1)
"""Steps that run FP8 attention in BF16 by default.

Early steps set the composition and the last one sets the detail, so errors there are visible.
These three steps remove most of the error of FP8 attention; see tests/generation/test_schedule.py.
"""
