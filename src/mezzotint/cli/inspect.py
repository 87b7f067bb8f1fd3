"""`mezzotint inspect`: what a checkpoint is."""

import json
from typing import Annotated, Any

import typer


def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint file or component folder, or demo-fp8, demo-nvfp4, ...")],
    layers: Annotated[bool, typer.Option("--layers", help="List every quantized layer.")] = False,
    device: Annotated[str | None, typer.Option(help="Whose abilities to speak of [the GPU if there is one].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Say what a checkpoint is, from its headers alone: format, layout, what is missing, who can run it here.

    Exits with 1 if something is missing from it, 2 if it cannot be read.

    Examples:

      mezzotint inspect demo-nvfp4 --layers

      mezzotint inspect ./flux1-fp8/transformer --json
    """
    from mezzotint.inspection import inspect as look
    from mezzotint.pipelines import best_device

    report = look(path, device or best_device())
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report, layers)
    if report.missing:
        raise typer.Exit(1)


def _print(report: Any, layers: bool) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console

    out = console()
    facts = Table.grid(padding=(0, 2))
    facts.add_row("path", f"{report.path} ({len(report.files)} file{'s' if len(report.files) > 1 else ''})")
    facts.add_row("format", f"{report.format}")
    facts.add_row("evidence", report.evidence)
    facts.add_row("family", report.family)
    counts = ", ".join(f"{number} layers {scheme}" for scheme, number in report.schemes().items()) or "nothing"
    facts.add_row("quantized", f"{counts}; {report.coverage:.1%} of all weights")
    for layout in sorted({f"{layer.scheme}: {layer.layout}" for layer in report.layers}):
        facts.add_row("layout", layout)
    facts.add_row("other tensors", f"{report.other_tensors} as they are, {len(report.ignored)} ignored")
    facts.add_row("size", f"{_mib(report.stored_bytes)} stored, {_mib(report.resident_bytes)} of weights when loaded")
    for runner in report.runners:
        facts.add_row("runs here", f"{runner.scheme} on {runner.backend} ({runner.target}): {_answer(runner)}")
    for note in report.notes:
        facts.add_row("note", note)
    for problem in report.missing:
        facts.add_row("[red]broken[/red]", problem)
    out.print(facts)
    if layers:
        out.print(_layer_table(report))


def _answer(runner: Any) -> str:
    if runner.can:
        return "yes" + (f", except: {runner.reason}" if runner.reason else "")
    return f"no, {runner.reason}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _layer_table(report: Any) -> Any:
    from rich.table import Table

    table = Table("layer", "scheme", "out x in", "KiB", "parts", box=None)
    for layer in report.layers:
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        table.add_row(layer.module, layer.scheme, shape, f"{layer.nbytes / 1024:,.0f}", ", ".join(layer.tensors))
    return table
