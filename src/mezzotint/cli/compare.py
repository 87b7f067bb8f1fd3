"""`mezzotint compare`: does a quantized model still paint what BF16 paints?"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.outputs import check_report
from mezzotint.cli.sides import sides
from mezzotint.errors import BadRequest
from mezzotint.escaping import message


def compare(
    reference: Annotated[str, typer.Argument(help="\\[NAME=]SOURCE\\[,OPTION=VALUE...]: a pipeline or a transformer.")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATE...", help="The same, one or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and what was painted.")],
    model: Annotated[
        str | None, typer.Option(help="Pipeline around sources that are transformers \\[the reference, or 'demo'].")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE|default|demo|edit", help="One prompt a line \\[the set that fits].")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture that prompts edit which name none of their own.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Pictures for each prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps \\[model's own].")] = None,
    size: Annotated[str | None, typer.Option(metavar="N|WxH", help="In pixels \\[as `generate`].")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale \\[model's own].")] = None,
    frames: Annotated[int | None, typer.Option(min=1, max=10_000, help="Frames of a video \\[model's own].")] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="psnr, ssim, ms_ssim, flip, st_lpips, lpips, mae \\[all].")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(metavar="strict|fp8|w4|FILE", help="What a candidate must keep \\[its own profile].")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in a folder that is not empty: paint only what is missing there.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... \\[the GPU if there is one].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json on stdout.")] = False,
) -> None:
    """Paint the same prompts from the same noise with every model, and hold the candidates against the reference.

    Each model is loaded once, paints everything, and is freed before the next. The folder gets report.html,
    report.json, report.md and sheet.png, and under runs/ what was painted; with --resume, a killed run goes on, and a
    candidate is added without painting the reference again.

    A source is whatever `generate` takes as --model or --transformer. Before it may stand a name for the report, after
    it options of its own: backend, activations (as_stored or bf16), resident, bf16_steps (2+1), transformer_2.

    Models that edit are given --image, or a picture after each prompt and a tab in the file of --prompts.

    Exits with 0 if every candidate passes its gate, 1 if one fails, 2 if it could not run.

    Examples:

      mezzotint compare demo demo-fp8 demo-nvfp4 demo-nvfp4-comfy -o report

      mezzotint compare demo w4a4=demo-nvfp4 w4a16=demo-nvfp4,activations=bf16 -o report --gate w4

      mezzotint compare ./FLUX.1-dev ./flux1-dev-fp8/transformer --prompts prompts.txt --seeds 2 --steps 8 -o report

      mezzotint compare ./FLUX.1-Kontext-dev ./kontext-fp8 --image street.png -o report

      mezzotint compare ./FLUX.1-dev fast=./flux1-fp8 slow=./flux1-fp8,backend=reference -o report --resume
    """
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise BadRequest(
            f"-o is {output}, and that folder is not empty", "--resume goes on there; or name a new folder."
        )
    asked = None if metrics is None else [name.strip() for name in metrics.split(",")]
    for name in asked or ():
        checks.check_name("there is no metric {!r}", name, checks.METRICS)
    checks.check_candidates(reference, *candidates)
    checks.check_sources(model)
    checks.check_request(prompts, image, size)
    checks.check_gate(gate)
    checks.check_device(device)
    checks.check_writable("-o", output)
    check_report(output, "runs")
    from mezzotint.cli.output import Steps, quiet_libraries

    with Steps() as progress:
        quiet_libraries()
        from mezzotint.quality.comparison import compare as run
        from mezzotint.quality.report import write_report

        comparison = run(
            reference,
            candidates,
            output,
            model=model,
            prompts=prompts,
            image=image,
            seeds=seeds,
            steps=steps,
            size=sides(size),
            guidance=guidance,
            frames=frames,
            metrics=asked,
            gate=gate,
            device=device,
            on_picture=lambda done, total, name: progress.say(name, done, total),
        )
        progress.say("writing the report")
        files = write_report(comparison, output)
    if as_json:
        print(files[1].read_text(encoding="utf-8"), end="")
    else:
        _print(comparison.to_dict())
        print(message(f"wrote {', '.join(map(str, files))}"), file=sys.stderr)
    if comparison.verdict != "pass":
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console, foreign
    from mezzotint.quality.report import tables

    out = console()
    names = tables.shown(report)
    table = Table("model", "verdict", box=None)
    for name in names:
        table.add_column(tables.title(name), justify="right")
    for candidate in report["candidates"]:
        cells = [tables.number(name, candidate["metrics"][name]) for name in names]
        table.add_row(foreign(candidate["name"]), candidate["verdict"], *cells)
    for label, values in tables.floor_rows(report):
        table.add_row(label, "", *(tables.number(name, values.get(name)) for name in names), style="dim")
    out.print(table)
    for candidate in report["candidates"]:
        for reason in candidate["reasons"]:
            out.print(foreign(f"{candidate['name']} fails: {reason}"), soft_wrap=True)
    out.print(foreign(f"{report['verdict']}: {tables.verdict_sentence(report)}"))
