"""`mezzotint verify`: is a checkpoint sound?"""

import json
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.progress import bytes_bar

COLOURS = {"NOTE": "dim", "SUSPICIOUS": "yellow", "BROKEN": "red"}


def verify(
    path: Annotated[
        str, typer.Argument(help="Checkpoint file, component folder, pipeline, Hub id, or demo-fp8, demo-nvfp4, ...")
    ],
    base: Annotated[str | None, typer.Option(help="Unquantized component, to compare every layer with.")] = None,
    scales_from: Annotated[
        str | None, typer.Option(help="Checkpoint that has the input scales which this one lacks.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Folder inside a pipeline, such as transformer_2 \\[transformer].")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW", help="Regular expression and what replaces it in tensors' names; may be repeated."
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch broken files again, where the Hub's cache holds them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on stdout.")] = False,
) -> None:
    """Check files, index, checksums, shapes, scales and weights; with --base, every layer's error.

    Exits with 0 if it is sound, 1 if something is suspicious, 2 if it is broken.

    Examples:

      mezzotint verify demo-nvfp4

      mezzotint verify ./flux1-nvfp4/transformer --base ./FLUX.1-dev/transformer --json
    """
    checks.check_sources(path, base, scales_from)
    from mezzotint.formats.renaming import read_renames
    from mezzotint.verifying import verify as run

    with bytes_bar("checking") as on_progress:
        report = run(
            path,
            base,
            component=component,
            scales_from=scales_from,
            repair=repair,
            rename=read_renames(rename or ()),
            on_progress=on_progress,
        )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _print(report: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{report.path}: {report.format}, {len(report.files)} file(s), {report.tensors} tensors", markup=False
    )
    for repair in report.repairs:
        said = "fetched again" if repair.fetched else f"not fetched: {repair.reason}"
        console.print(f"  repair {repair.file}: {said}", markup=False)
    for finding in report.findings:
        name = finding.severity.name
        console.print(f"  [{COLOURS[name]}]{name.lower()}[/] ", end="")
        console.print(f"{finding.where}: {finding.message}", markup=False)
        if finding.hint:
            console.print(f"    hint: {finding.hint}", markup=False)
    for scheme, count, middle, worst in _by_scheme(report.layers):
        console.print(
            f"  {count} {scheme}: relative error median {middle:.4f}, largest {worst.relative_error:.4f} "
            f"({worst.name})",
            markup=False,
        )
    console.print(f"  {report.checksums} checksum(s) compared", markup=False)
    console.print(("[green]sound[/]", "[yellow]suspicious[/]", "[red]broken[/]")[report.exit_code])


def _by_scheme(layers: Any) -> Any:
    """(scheme, number, median error, worst layer) of the layers that were compared."""
    from statistics import median

    for scheme in sorted({layer.scheme for layer in layers}):
        same = [layer for layer in layers if layer.scheme == scheme]
        errors = [layer.relative_error for layer in same]
        yield scheme, len(same), median(errors), max(same, key=lambda layer: layer.relative_error)
