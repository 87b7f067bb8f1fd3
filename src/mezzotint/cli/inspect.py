"""`mezzotint inspect`: what a checkpoint is."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any

import typer

from mezzotint.cli import checks


def inspect(
    path: Annotated[
        str, typer.Argument(help="Checkpoint file, component folder, pipeline, Hub id, or demo-fp8, demo-nvfp4, ...")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="BF16 model: settles how bytes are arranged where nothing else does."),
    ] = None,
    scales_from: Annotated[
        str | None, typer.Option(help="Checkpoint that has the input scales which this one lacks, or a backbone.pt.")
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
    layers: Annotated[bool, typer.Option("--layers", help="List every quantized layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print the file's own metadata and quantization config as JSON, and no more.")
    ] = False,
) -> None:
    """Say what a checkpoint is, from its headers: format, layout, what is missing, and who can run it on which GPU.

    Exits with 1 if something is missing from it, 2 if it cannot be read.

    Examples:

      mezzotint inspect demo-nvfp4 --layers

      mezzotint inspect ./flux1-fp8/transformer --json

      mezzotint inspect ./odd.safetensors --rename "^net\\.=" --rename "to_out\\.weight=to_out.0.weight"

      mezzotint inspect ./qwen-image-nvfp4.safetensors --base ./Qwen-Image
    """
    checks.check_sources(path, base, scales_from)
    from mezzotint.checkpoint import inspect as look
    from mezzotint.checkpoint import raw as read_raw
    from mezzotint.formats.renaming import read_renames

    if raw:
        print(json.dumps(read_raw(path, component), indent=2))
        return
    report = look(path, base=base, scales_from=scales_from, component=component, rename=read_renames(rename or ()))
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report, layers)
    if report.missing:
        raise typer.Exit(1)


def _print(report: Any, layers: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mezzotint.cli.output import console

    out = console()
    facts = Table.grid(padding=(0, 2))
    for name, fact in _facts(report):
        facts.add_row(name, escape(fact))
    for problem in report.missing:
        facts.add_row("[red]broken[/red]", escape(problem))
    out.print(facts)
    out.print(_outlook_table(report))
    if layers:
        out.print(_layer_table(report))


def _facts(report: Any) -> Iterator[tuple[str, str]]:
    yield "path", f"{report.path} ({len(report.files)} file{'s' if len(report.files) > 1 else ''})"
    yield "format", report.format
    yield "evidence", report.evidence
    yield "family", report.family
    counts = ", ".join(f"{number} layers {scheme}" for scheme, number in report.schemes().items()) or "nothing"
    yield "quantized", f"{counts}; {report.coverage:.1%} of all weights"
    for layout in sorted({f"{layer.scheme}: {layer.layout}" for layer in report.layers}):
        yield "layout", layout
    yield "other tensors", f"{report.other_tensors} as they are, {len(report.ignored)} ignored"
    yield "stored", _mib(report.stored_bytes)
    for outlook in report.outlooks:
        for use in outlook.backends if outlook.here else ():
            yield "runs here", f"{use.layers} {use.scheme} on {use.backend}{_in_brackets(use)}; {use.why}"
    for note in report.notes:
        yield "note", note


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _outlook_table(report: Any) -> Any:
    """One row for each kind of device; neighbours that are alike share one."""
    from rich.table import Table

    table = Table("on", "weights when loaded", "run by", box=None, pad_edge=False)
    for (here, size, backends), alike in groupby(report.outlooks, lambda o: (o.here, o.resident_bytes, _run_by(o))):
        devices = ", ".join(o.device if o.target == "cpu" else f"{o.device} ({o.target})" for o in alike)
        table.add_row(devices + ", this machine" * here, _mib(size), backends)
    return table


def _run_by(outlook: Any) -> str:
    layers: Counter[str] = Counter()
    for use in outlook.backends:
        layers[f"{use.scheme} on {use.backend}{_in_brackets(use)}"] += use.layers
    return ", ".join(f"{number} {said}" for said, number in layers.items()) or "PyTorch's own layers"


def _in_brackets(use: Any) -> str:
    """What is to be known of a choice: whether it has run on such a device, and which libraries would change it."""
    from mezzotint.kernels.verified import NOT_VERIFIED

    said = [] if use.verified else [NOT_VERIFIED]
    for backend, library in use.libraries.items():
        own = backend == use.backend
        said.append(f"needs {library}, not installed here" if own else f"{backend} with {library} installed")
    return f" ({'; '.join(said)})" if said else ""


def _layer_table(report: Any) -> Any:
    from rich.table import Table

    table = Table("layer", "scheme", "out x in", "KiB", "parts", box=None)
    for layer in report.layers:
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        table.add_row(layer.module, layer.scheme, shape, f"{layer.nbytes / 1024:,.0f}", ", ".join(layer.tensors))
    return table
