"""Which denoising steps leave the inputs of quantized layers and of attention as they are: early steps set out the
picture, late ones its detail, and an error in either is not mended by the steps between."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from mezzotint.nn import unrounded_inputs
from mezzotint.speed.attention import exact_attention
from mezzotint.step_schedule import NO_STEPS, StepSchedule

__all__ = ["NO_STEPS", "StepSchedule", "scheduled"]


@contextmanager
def scheduled(layers: StepSchedule, attention: StepSchedule, steps: int) -> Iterator[Callable[[int], None]]:
    """Keep to two schedules while the context is open; yields what is to be told the number of each step done.

    layers      whose steps leave the inputs of quantized layers in BF16, and FP8 attention's with them
    attention   whose steps do that for FP8 attention alone
    """
    with ExitStack() as stack:

        def prepare(step: int) -> None:
            stack.close()
            if layers.covers(step, steps):
                stack.enter_context(unrounded_inputs())
            if layers.covers(step, steps) or attention.covers(step, steps):
                stack.enter_context(exact_attention())

        prepare(0)
        yield lambda done: prepare(done + 1)
