"""`mezzotint inspect`: what a checkpoint is."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.failures import Failure


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

    Exits with 0 if it is sound as far as headers tell, 1 if it holds tensors that the model has no place for, 2 if
    something is missing from it or it cannot be read, 3 if its format is none that is read.

    Examples:

      mezzotint inspect demo-nvfp4 --layers

      mezzotint inspect ./flux1-fp8/transformer --json

      mezzotint inspect ./odd.safetensors --rename "^net\\.=" --rename "to_out\\.weight=to_out.0.weight"

      mezzotint inspect ./qwen-image-nvfp4.safetensors --base ./Qwen-Image
    """
    checks.check_sources(path, base, scales_from)
    from mezzotint.checkpoint import inspect as look
    from mezzotint.checkpoint import raw as read_raw
    from mezzotint.errors import MezzotintError
    from mezzotint.formats.renaming import read_renames
    from mezzotint.verifying.findings import VERDICTS

    if raw:
        print(json.dumps(read_raw(path, component), indent=2))
        return
    try:
        report = look(path, base=base, scales_from=scales_from, component=component, rename=read_renames(rename or ()))
    except MezzotintError as error:
        if not as_json:
            raise
        print(json.dumps(_refusal(path, error), indent=2))
        raise typer.Exit(Failure.of(error).exit_code) from error
    if as_json:
        print(json.dumps(report.to_dict() | {"verdict": VERDICTS[_severity(report)]}, indent=2))
    else:
        _print(report, layers)
    if severity := _severity(report):
        raise typer.Exit(int(severity))


def _severity(report: Any) -> Any:
    """How bad it is, as `verify` has it."""
    from mezzotint.verifying import Severity

    if report.missing:
        return Severity.BROKEN
    return Severity.SUSPICIOUS if report.unplaced else Severity.NOTE


def _refusal(path: str, error: Any) -> dict[str, Any]:
    """Return the JSON of a file that cannot be read: the failure, and the verdict that `verify` gives such files."""
    from mezzotint.verifying.findings import VERDICTS, of_error

    return {"path": path, "verdict": VERDICTS[of_error("format", path, error).severity], **Failure.of(error).to_dict()}


def _print(report: Any, layers: bool) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console, foreign

    out = console()
    facts = Table.grid(padding=(0, 2))
    for name, fact in _facts(report):
        facts.add_row(name, foreign(fact))
    for problem in _first(report.missing):
        facts.add_row("[red]broken[/red]", foreign(problem))
    out.print(facts)
    out.print(_outlook_table(report))
    if layers:
        out.print(_layer_table(report))


def _first(lines: Any) -> Iterator[str]:
    """The first lines, and how many more there are."""
    from mezzotint.verifying.findings import MOST_PRINTED

    yield from lines[:MOST_PRINTED]
    if len(lines) > MOST_PRINTED:
        yield f"and {len(lines) - MOST_PRINTED:,} more"


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
    for note in _first(report.notes):
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

    from mezzotint.cli.output import foreign

    table = Table("layer", "scheme", "out x in", "KiB", "parts", box=None)
    for layer in report.layers:
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        kib, parts = f"{layer.nbytes / 1024:,.0f}", ", ".join(layer.tensors)
        table.add_row(foreign(layer.module), layer.scheme, shape, kib, foreign(parts))
    return table
