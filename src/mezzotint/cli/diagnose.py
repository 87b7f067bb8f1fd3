"""`mezzotint diagnose`: why is a quantized model wrong?"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.sides import sides

SHOWN = 20
"""How many suspects the table has; --json has all."""


def diagnose(
    reference: Annotated[str, typer.Argument(help="\\[NAME=]SOURCE\\[,OPTION=VALUE...]: a pipeline or a transformer.")],
    candidate: Annotated[str, typer.Argument(help="The same.")],
    model: Annotated[
        str | None, typer.Option(help="Pipeline around sources that are transformers \\[the reference, or 'demo'].")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|default|demo|edit", help="One prompt a line \\[the first of the set that fits the model]."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture that prompts edit which name none of their own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise that every picture starts from.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps to record.")] = 2,
    size: Annotated[str | None, typer.Option(metavar="N|WxH", help="In pixels \\[as `generate`].")] = None,
    frames: Annotated[int | None, typer.Option(min=1, max=10_000, help="Frames of a video \\[model's own].")] = None,
    layers: Annotated[str, typer.Option(metavar="GLOB", help="Which layers to look at.")] = "*",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Rank instead what it buys to keep layers, or steps, in BF16.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... \\[the GPU if there is one].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print suspects and all layers as JSON on stdout.")] = False,
) -> None:
    """Find the layers of a candidate that are wrong, and name the cause.

    The reference paints and its layers' inputs are recorded; then each layer of the candidate is read, one at a time:
    its weight against the reference's, its input scale against the inputs, its product by the chosen backend. A cause
    is named where undoing it brings the weight back.

    With --sensitivity, one role of layers at a time is restored to the reference's weights, and ranked by how much
    nearer, per byte, the transformer's predictions come; the patterns are for `convert --keep-bf16`. Then one step at a
    time is run with BF16 activations; the schedule is for `generate --bf16-steps`. Nothing that is found
    makes it exit with 1.

    Exits with 0 if nothing is suspicious, 1 if something is, 2 if it could not run.

    Examples:

      mezzotint diagnose demo demo-nvfp4

      mezzotint diagnose ./FLUX.1-dev ./flux1-dev-nvfp4/transformer --steps 4 --json

      mezzotint diagnose ./FLUX.1-dev ./flux1-fp8,backend=scaled_mm --layers "transformer_blocks.0.*"

      mezzotint diagnose ./FLUX.1-Kontext-dev ./kontext-fp8 --image street.png

      mezzotint diagnose demo demo-nvfp4 --sensitivity --steps 8

      mezzotint diagnose ./wan2.2 ./high-fp8,transformer_2=./low-fp8 --size 832x480 --frames 17
    """
    checks.check_candidates(reference, candidate)
    checks.check_sources(model)
    checks.check_request(prompts, image, size)
    checks.check_device(device)
    from mezzotint.cli.output import Steps, quiet_libraries

    with Steps() as progress:
        quiet_libraries()
        from mezzotint.quality.diagnosis import diagnose as find
        from mezzotint.quality.sensitivity import sensitivity as rank

        found: Any = (rank if sensitivity else find)(
            reference,
            candidate,
            model=model,
            prompts=prompts,
            image=image,
            seed=seed,
            steps=steps,
            size=sides(size),
            frames=frames,
            layers=layers,
            device=device,
            on_progress=lambda done, total, what: progress.say(what, done, total),
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        (_print_gains if sensitivity else _print_suspects)(found)
    if not sensitivity and found.suspects:
        raise typer.Exit(1)


def _print_suspects(diagnosis: Any) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console, foreign

    out = console()
    layers = f"{len(diagnosis.layers)} layers and tensors of {diagnosis.candidate.name}"
    if not diagnosis.suspects:
        out.print(foreign(f"{layers}: nothing suspicious"))
        return
    table = Table("module", "score", "cause", "why", box=None)
    table.columns[1].justify = "right"
    for suspect in diagnosis.suspects[:SHOWN]:
        table.add_row(*map(foreign, (suspect.module, f"{suspect.score:.1f}", suspect.cause, suspect.detail)))
    out.print(table)
    shown = f", of which {SHOWN} are shown" if len(diagnosis.suspects) > SHOWN else ""
    out.print(foreign(f"{layers}: {len(diagnosis.suspects)} suspicious{shown}"))


def _print_gains(found: Any) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console, foreign

    table = Table("--keep-bf16", "layers", "more MiB", "more ms", "error", "fall", "fall per MiB", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for gain in found.gains:
        cost = f"{gain.bytes / 2**20:.1f}", f"{gain.milliseconds:.1f}"
        bought = f"{gain.error:.4f}", f"{gain.fall:+.4f}", f"{gain.fall_per_mib:+.4f}"
        table.add_row(foreign(gain.keep_bf16), str(gain.layers), *cost, *bought)
    console().print(table)
    for component, error in found.error.items():
        print(f"{component}: error of the prediction {error:.4f} with all layers quantized")
    if found.steps:
        _print_steps(found)
    else:
        print("no layer rounds its inputs: BF16 activations in some steps change nothing")


def _print_steps(found: Any) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console

    table = Table("step", "more ms", "error in latents", "fall with BF16 activations", box=None)
    for column in table.columns:
        column.justify = "right"
    for step in found.steps:
        table.add_row(str(step.step), f"{step.milliseconds:.1f}", f"{step.error:.4f}", f"{step.fall:+.4f}")
    console().print(table)
    schedule = found.bf16_steps
    print("BF16 activations buy nothing" if schedule is None else f"advised: --bf16-steps {schedule}")
