"""Apply step schedules: some steps keep the inputs of quantized layers and of attention in BF16.

Early steps set the composition and late steps set the detail. The steps in between do not correct
an error in either.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from mezzotint.fast.passes.attention import bf16_attention
from mezzotint.generation.step_schedule import FP8_ATTENTION_STEPS, NO_STEPS, StepSchedule
from mezzotint.nn import unquantized_activations

__all__ = ["FP8_ATTENTION_STEPS", "NO_STEPS", "StepSchedule", "apply_schedule"]


@contextmanager
def apply_schedule(
    models: Collection[nn.Module],
    bf16_steps: StepSchedule,
    bf16_attention_steps: StepSchedule,
    num_steps: int,
) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Apply two schedules to some models while the context is open.

    Yields a function that takes the number of a completed step and returns a context. Inside it,
    the modes are as they were outside, so a callback may run the same models without them.

    models                 the transformers of the pipeline
    bf16_steps             steps that keep activations of quantized layers, and FP8 attention, in
                           BF16
    bf16_attention_steps   steps that keep only FP8 attention in BF16
    num_steps              number of denoising steps
    """
    with ExitStack() as stack:

        def prepare(step: int) -> None:
            layers = bf16_steps.covers(step, num_steps)
            for model in models:
                if layers:
                    stack.enter_context(unquantized_activations(model))
                if layers or bf16_attention_steps.covers(step, num_steps):
                    stack.enter_context(bf16_attention(model))

        @contextmanager
        def between_steps(completed: int) -> Iterator[None]:
            stack.close()
            yield
            prepare(completed + 1)

        prepare(0)
        yield between_steps
