"""The options of `generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mezzotint.builtin import check_exists
from mezzotint.cli.checks import check_writable
from mezzotint.cli.names import ACTIVATIONS
from mezzotint.cli.options import checked
from mezzotint.cli.shared_options import (
    KernelOptions,
    SamplingOptions,
    TensorOptions,
    TransformerOptions,
    json_option,
    kernel_option,
    sampling_option,
)
from mezzotint.errors import BadRequest
from mezzotint.generation.step_schedule import FP8_ATTENTION_STEPS, NO_STEPS, StepSchedule


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(TransformerOptions, TensorOptions, SamplingOptions, KernelOptions):
    """What to generate, with which model, and where to save it."""

    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...", help="One or more prompts; each produces its own image."
        ),
    ]
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output PNG. For a video, an MP4 or a folder of frames. "
            "Several outputs get -1, -2, ...",
            callback=checked(lambda path: check_writable("-o", path)),
        ),
    ] = None
    model: Annotated[
        str,
        typer.Option(
            help="A diffusers pipeline: folder, Hub id, or 'demo'.", callback=checked(check_exists)
        ),
    ] = "demo"
    count: Annotated[int, typer.Option(min=1, max=1000, help="Images or videos per prompt.")] = 1
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="Write one contact sheet (one row per prompt) instead of separate images.",
        ),
    ] = False
    as_json: Annotated[
        bool, json_option(help="Print the settings and output files as JSON on stdout.")
    ] = False
    seed: Annotated[
        int, sampling_option(min=0, max=2**63 - 1, help="Base seed; image i uses seed + i.")
    ] = 0
    fast: Annotated[
        bool,
        kernel_option(
            "--fast",
            help="Compile the model first (10 to 30 s the first time). Pays off for many images.",
        ),
    ] = False
    activations: Annotated[
        str,
        kernel_option(
            help="as_stored: quantize activations as the checkpoint specifies. "
            "bf16: leave them in BF16.",
            callback=checked(ACTIVATIONS.check),
        ),
    ] = "as_stored"
    bf16_steps: Annotated[
        str,
        kernel_option(
            metavar="FIRST+LAST",
            help="How many of the first and last steps run with BF16 activations; "
            "`diagnose --sensitivity` recommends a value.",
            callback=checked(StepSchedule.parse),
        ),
    ] = str(NO_STEPS)
    bf16_attention_steps: Annotated[
        str,
        kernel_option(
            metavar="FIRST+LAST",
            help="How many of the first and last steps run with BF16 attention, "
            "if --attention is FP8.",
            callback=checked(StepSchedule.parse),
        ),
    ] = str(FP8_ATTENTION_STEPS)

    def check(self) -> None:
        """Raise BadRequest for options that do not go together."""
        if self.attention is not None and not self.fast:
            raise BadRequest("--attention requires --fast", "add --fast, or leave it out.")
        if self.output is None:
            # The default is a file in the current folder.
            check_writable("-o", Path("out.png"))

    @property
    def repeated_prompts(self) -> list[str]:
        """Return the prompt of each output."""
        return [prompt for prompt in self.prompts for _ in range(self.count)]
