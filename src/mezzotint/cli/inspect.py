"""`mezzotint inspect`: report the contents of a checkpoint."""

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
        str,
        typer.Argument(
            help="Checkpoint file, component folder, pipeline, Hub id, or demo-fp8, demo-nvfp4, ..."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="BF16 model, to detect the byte layout if the headers do not determine it."
        ),
    ] = None,
    scales_from: Annotated[
        str | None,
        typer.Option(help="Checkpoint or backbone.pt to take missing input scales from."),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Folder inside a pipeline, such as transformer_2 \\[transformer]."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Regular expression in tensor names, and its replacement. Repeatable.",
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every quantized layer.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole report as JSON.")
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="Print only the file's metadata and quantization configuration, as JSON.",
        ),
    ] = False,
) -> None:
    """Report a checkpoint's format, layout and missing tensors, and the backends for each GPU.

    Only headers are read. Exits with 0 if they are sound, 1 if there are tensors that are not part
    of the model, 2 if tensors are missing or the file cannot be read, 3 if its format is not
    supported.

    Examples:

      mezzotint inspect demo-nvfp4 --layers

      mezzotint inspect ./flux1-fp8/transformer --json

      mezzotint inspect ./odd.safetensors --rename "^net\\.="
      --rename "to_out\\.weight=to_out.0.weight"

      mezzotint inspect ./qwen-image-nvfp4.safetensors --base ./Qwen-Image
    """
    checks.check_sources(path, base, scales_from)
    from mezzotint.checkpoint import inspect as look
    from mezzotint.checkpoint import raw as read_raw
    from mezzotint.errors import MezzotintError
    from mezzotint.formats.renaming import read_renames
    from mezzotint.verification.findings import VERDICTS

    if raw:
        print(json.dumps(read_raw(path, component), indent=2))
        return
    try:
        report = look(
            path,
            base=base,
            scales_from=scales_from,
            component=component,
            rename=read_renames(rename or ()),
        )
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
    """Return the severity that `verify` would assign."""
    from mezzotint.verification import Severity

    if report.problems:
        return Severity.BROKEN
    return Severity.SUSPICIOUS if report.unplaced else Severity.NOTE


def _refusal(path: str, error: Any) -> dict[str, Any]:
    """Return the JSON for an unreadable file: the failure, and the verdict of `verify`."""
    from mezzotint.verification.findings import VERDICTS, finding_from_error

    return {
        "path": path,
        "verdict": VERDICTS[finding_from_error("format", path, error).severity],
        **Failure.of(error).to_dict(),
    }


def _print(report: Any, layers: bool) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console, foreign

    out = console()
    properties = Table.grid(padding=(0, 2))
    for name, value in _properties(report):
        properties.add_row(name, foreign(value))
    for problem in _shorten(report.problems):
        properties.add_row("[red]broken[/red]", foreign(problem))
    out.print(properties)
    out.print(_device_table(report))
    if layers:
        out.print(_layer_table(report))


def _shorten(lines: Any) -> Iterator[str]:
    """Yield the first lines, and the number of the others."""
    from mezzotint.verification.findings import MAX_PRINTED

    yield from lines[:MAX_PRINTED]
    if len(lines) > MAX_PRINTED:
        yield f"and {len(lines) - MAX_PRINTED:,} more"


def _properties(report: Any) -> Iterator[tuple[str, str]]:
    yield "path", f"{report.path} ({len(report.files)} file{'s' if len(report.files) > 1 else ''})"
    yield "format", report.format
    yield "evidence", report.evidence
    yield "family", report.family
    counts = (
        ", ".join(f"{number} layers {scheme}" for scheme, number in report.schemes().items())
        or "nothing"
    )
    yield "quantized", f"{counts}; {report.coverage:.1%} of all weights"
    for layout in sorted({f"{layer.scheme}: {layer.layout}" for layer in report.layers}):
        yield "layout", layout
    yield "other tensors", f"{report.other_tensors} unquantized, {len(report.ignored)} ignored"
    yield "stored", _mib(report.stored_bytes)
    for device in report.devices:
        for use in device.backends if device.is_this_machine else ():
            backend = f"{use.backend}{_in_brackets(use)}"
            yield "this machine", f"{use.layers} {use.scheme} on {backend}; {use.reasons}"
    for note in _shorten(report.notes):
        yield "note", note


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _device_table(report: Any) -> Any:
    """Return a table with one row per kind of device. Adjacent equal rows are merged."""
    from rich.table import Table

    table = Table("device", "weights when loaded", "backends", box=None, pad_edge=False)
    for (is_this_machine, size, backends), group in groupby(
        report.devices, lambda d: (d.is_this_machine, d.resident_bytes, _backends_text(d))
    ):
        devices = ", ".join(
            d.device if d.target == "cpu" else f"{d.device} ({d.target})" for d in group
        )
        table.add_row(devices + ", this machine" * is_this_machine, _mib(size), backends)
    return table


def _backends_text(device: Any) -> str:
    layers: Counter[str] = Counter()
    for use in device.backends:
        layers[f"{use.scheme} on {use.backend}{_in_brackets(use)}"] += use.layers
    return ", ".join(f"{number} {use}" for use, number in layers.items()) or "PyTorch layers"


def _in_brackets(use: Any) -> str:
    """Return remarks on a backend: whether it was verified, and which libraries are missing."""
    from mezzotint.kernels.verified import NOT_VERIFIED

    remarks = [] if use.verified else [NOT_VERIFIED]
    for backend, library in use.libraries.items():
        if backend == use.backend:
            remarks.append(f"needs {library}, not installed here")
        else:
            remarks.append(f"{backend} with {library} installed")
    return f" ({'; '.join(remarks)})" if remarks else ""


def _layer_table(report: Any) -> Any:
    from rich.table import Table

    from mezzotint.cli.output import foreign

    table = Table("layer", "scheme", "out x in", "KiB", "parts", box=None)
    for layer in report.layers:
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        kib, parts = f"{layer.nbytes / 1024:,.0f}", ", ".join(layer.tensors)
        table.add_row(foreign(layer.module), layer.scheme, shape, kib, foreign(parts))
    return table
