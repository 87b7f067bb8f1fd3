"""Which denoising steps leave the inputs of quantized layers and of attention as they are: early steps set out the
picture, late ones its detail, and an error in either is not mended by the steps between."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from mezzotint.nn import exact_attention, unrounded_inputs
from mezzotint.step_schedule import NO_STEPS, StepSchedule

__all__ = ["NO_STEPS", "StepSchedule", "scheduled"]


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
