"""`mezzotint diagnose`: find the wrong layers of a quantized model, and the causes."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from mezzotint.cli.checks import check_candidate
from mezzotint.cli.options import checked
from mezzotint.cli.shared_options import (
    DeviceOptions,
    PromptSetOptions,
    Reference,
    SizeOptions,
    json_option,
    sampling_option,
)

MAX_ROWS = 20
"""Number of suspects in the table; --json prints all."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions(PromptSetOptions, SizeOptions, DeviceOptions):
    """Which models to compare, and what to measure."""

    reference: Reference
    candidate: Annotated[
        str,
        typer.Argument(
            help="Source to compare with the reference, in the same form.",
            callback=checked(check_candidate),
        ),
    ]
    layers: Annotated[str, typer.Option(metavar="GLOB", help="Layers to diagnose.")] = "*"
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Measure instead which layers and steps gain most from BF16.",
        ),
    ] = False
    as_json: Annotated[
        bool, json_option(help="Print suspects and all layers as JSON on stdout.")
    ] = False
    seed: Annotated[int, sampling_option(min=0, help="Seed of the noise of every image.")] = 0
    steps: Annotated[int, sampling_option(min=1, max=1000, help="Denoising steps to record.")] = 2


def diagnose(options: DiagnoseOptions) -> None:
    """Find the wrong layers of a candidate, and name the cause of each fault.

    The reference generates an image, and the inputs of its layers are recorded. Then the layers of
    the candidate are checked one at a time: the weight against the reference's, the input scale
    against the inputs, and the output of the selected backend. A cause is named if undoing it
    restores the weight.

    Without --prompts, the command uses one prompt of the set for this model.

    With --sensitivity, the command finds the layers that gain most from BF16. It gives one group of
    layers at a time, such as "transformer_blocks.*.attn.to_q", the reference's weights, and ranks
    the groups by error reduction per byte. Pass the best ones to `convert --keep-bf16`. It also
    runs one step at a time with BF16 activations, and recommends a value for
    `generate --bf16-steps`.

    Exits with 0 if nothing is suspicious, 1 if something is, 2 if the command could not run. With
    --sensitivity the exit code is never 1.

    Examples:

      mezzotint diagnose demo demo-nvfp4

      mezzotint diagnose ./FLUX.1-dev ./flux1-dev-nvfp4/transformer --steps 4 --json

      mezzotint diagnose ./FLUX.1-dev ./flux1-fp8,backend=scaled_mm
      --layers "transformer_blocks.0.*"

      mezzotint diagnose ./FLUX.1-Kontext-dev ./kontext-fp8 --image street.png

      mezzotint diagnose demo demo-nvfp4 --sensitivity --steps 8

      mezzotint diagnose ./wan2.2 ./high-fp8,transformer_2=./low-fp8 --size 832x480 --frames 17
    """
    from mezzotint.cli.output import Steps, quiet_libraries

    with Steps() as progress:
        quiet_libraries()
        from mezzotint.quality.diagnose import diagnose as find
        from mezzotint.quality.sensitivity import sensitivity as rank

        result: Any = (rank if options.sensitivity else find)(
            options.reference,
            options.candidate,
            model=options.model,
            prompts=options.prompts,
            image=options.image,
            seed=options.seed,
            steps=options.steps,
            size=options.sides,
            frames=options.frames,
            layers=options.layers,
            device=options.device,
            on_progress=lambda done, total, what: progress.say(what, done, total),
        )
    if options.as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        (_print_gains if options.sensitivity else _print_suspects)(result)
    if not options.sensitivity and result.suspects:
        raise typer.Exit(1)


def _print_suspects(diagnosis: Any) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console, foreign

    out = console()
    layers = f"{len(diagnosis.layers)} layers and tensors of {diagnosis.candidate.name}"
    if not diagnosis.suspects:
        out.print(foreign(f"{layers}: nothing suspicious"))
        return
    table = Table("module", "score", "cause", "details", box=None)
    table.columns[1].justify = "right"
    for suspect in diagnosis.suspects[:MAX_ROWS]:
        table.add_row(
            *map(foreign, (suspect.module, f"{suspect.score:.1f}", suspect.cause, suspect.detail))
        )
    out.print(table)
    shown = f", {MAX_ROWS} of them shown" if len(diagnosis.suspects) > MAX_ROWS else ""
    out.print(foreign(f"{layers}: {len(diagnosis.suspects)} suspicious{shown}"))


def _print_gains(result: Any) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console, foreign

    table = Table(
        "--keep-bf16", "layers", "more MiB", "more ms", "error", "reduction", "per MiB", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for gain in result.gains:
        cost = f"{gain.bytes / 2**20:.1f}", f"{gain.milliseconds:.1f}"
        per_mib = f"{gain.error_reduction_per_mib:+.4f}"
        effect = f"{gain.error:.4f}", f"{gain.error_reduction:+.4f}", per_mib
        table.add_row(foreign(gain.keep_bf16), str(gain.layers), *cost, *effect)
    console().print(table)
    for component, error in result.error.items():
        print(f"{component}: prediction error {error:.4f} with all layers quantized")
    if result.steps:
        _print_steps(result)
    else:
        print("no layer quantizes its activations, so --bf16-steps would have no effect")


def _print_steps(result: Any) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console

    table = Table("step", "more ms", "latent error", "reduction with BF16 activations", box=None)
    for column in table.columns:
        column.justify = "right"
    for step in result.steps:
        table.add_row(
            str(step.step),
            f"{step.milliseconds:.1f}",
            f"{step.error:.4f}",
            f"{step.error_reduction:+.4f}",
        )
    console().print(table)
    schedule = result.bf16_steps
    if schedule is None:
        print("BF16 activations do not reduce the error")
    else:
        print(f"recommended: --bf16-steps {schedule}")
