"""`mezzotint compare`: measure how close a quantized model's images are to the BF16 model's."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli.checks import (
    check_candidate,
    check_gate,
    check_metrics,
    check_writable,
    parse_metrics,
)
from mezzotint.cli.names import METRICS
from mezzotint.cli.options import checked, checked_each
from mezzotint.cli.outputs import check_report
from mezzotint.cli.shared_options import (
    DeviceOptions,
    PromptSetOptions,
    Reference,
    SamplingOptions,
    json_option,
)
from mezzotint.errors import BadRequest
from mezzotint.untrusted.escaping import message


@dataclass(frozen=True, kw_only=True)
class CompareOptions(PromptSetOptions, SamplingOptions, DeviceOptions):
    """Which models to compare, with which images, and where to save the report."""

    reference: Reference
    candidates: Annotated[
        list[str],
        typer.Argument(
            metavar="CANDIDATE...",
            help="One or more sources to compare with the reference, in the same form.",
            callback=checked_each(check_candidate),
        ),
    ]
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the report and the generated images.",
            callback=checked(lambda path: check_writable("-o", path)),
        ),
    ]
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Seeds per prompt; each gives one image.")
    ] = 1
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=f"Image metrics: {METRICS} \\[all].",
            callback=checked(check_metrics),
        ),
    ] = None
    gate: Annotated[
        str | None,
        typer.Option(
            metavar="strict|fp8|w4|FILE",
            help="Limits that a candidate must meet \\[the profile for its precision].",
            callback=checked(check_gate),
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue in a folder that is not empty. Generate only what is missing.",
        ),
    ] = False
    as_json: Annotated[bool, json_option(help="Print report.json on stdout.")] = False


def compare(options: CompareOptions) -> None:
    """Generate the same images with every model and compare each candidate with the reference.

    Each model is loaded once and freed before the next one. The folder gets report.html,
    report.json, report.md and sheet.png. Images are stored in runs/. With --resume, an interrupted
    run continues, and a new candidate does not generate the reference's images again.

    A source is a value that `generate` accepts for --model or --transformer. An optional prefix
    NAME= sets its name in the report. Optional suffixes, such as ",backend=reference", set its
    options: backend, activations (as_stored or bf16), resident, bf16_steps (such as 2+1) and
    transformer_2.

    Models that edit need a source image: --image, or an image after a tab in each line of
    --prompts.

    Exits with 0 if every candidate passes its gate, 1 if one fails, 2 if the command could not run.

    Examples:

      mezzotint compare demo demo-fp8 demo-nvfp4 demo-nvfp4-comfy -o report

      mezzotint compare demo w4a4=demo-nvfp4 w4a16=demo-nvfp4,activations=bf16 -o report --gate w4

      mezzotint compare ./FLUX.1-dev ./flux1-dev-fp8/transformer --prompts prompts.txt --seeds 2
      --steps 8 -o report

      mezzotint compare ./FLUX.1-Kontext-dev ./kontext-fp8 --image street.png -o report

      mezzotint compare ./FLUX.1-dev fast=./flux1-fp8 slow=./flux1-fp8,backend=reference -o report
      --resume
    """
    _check_folder(options.output, options.resume)
    from mezzotint.cli.output import Steps, quiet_libraries

    with Steps() as progress:
        quiet_libraries()
        from mezzotint.quality.compare import compare as run
        from mezzotint.quality.report import write_report

        comparison = run(
            options.reference,
            options.candidates,
            options.output,
            model=options.model,
            prompts=options.prompts,
            image=options.image,
            seeds=options.seeds,
            size=options.sides,
            frames=options.frames,
            metrics=None if options.metrics is None else parse_metrics(options.metrics),
            gate=options.gate,
            device=options.device,
            on_image=lambda done, total, name: progress.say(name, done, total),
            **options.settings,
        )
        progress.say("writing the report")
        files = write_report(comparison, options.output)
    if options.as_json:
        print(files[1].read_text(encoding="utf-8"), end="")
    else:
        _print(comparison.to_dict())
        print(message(f"wrote {', '.join(map(str, files))}"), file=sys.stderr)
    if comparison.verdict != "pass":
        raise typer.Exit(1)


def _check_folder(output: Path, resume: bool) -> None:
    """Raise BadRequest if the folder holds files, unless an earlier comparison is continued."""
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise BadRequest(
            f"-o is {output}, and this folder is not empty",
            "use --resume to continue in it, or name a new folder.",
        )
    check_report(output, "runs")


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console, foreign
    from mezzotint.quality.report import tables

    out = console()
    names = tables.shown_metrics(report)
    table = Table("model", "verdict", box=None)
    for name in names:
        table.add_column(tables.title(name), justify="right")
    for candidate in report["candidates"]:
        cells = [tables.number(name, candidate["metrics"][name]) for name in names]
        table.add_row(foreign(candidate["name"]), candidate["verdict"], *cells)
    for label, values in tables.floor_rows(report):
        table.add_row(
            label, "", *(tables.number(name, values.get(name)) for name in names), style="dim"
        )
    out.print(table)
    for candidate in report["candidates"]:
        for reason in candidate["reasons"]:
            out.print(foreign(f"{candidate['name']} fails: {reason}"), soft_wrap=True)
    out.print(foreign(f"{report['verdict']}: {tables.verdict_sentence(report)}"))
