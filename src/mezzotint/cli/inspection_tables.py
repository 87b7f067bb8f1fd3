"""Tables of `inspect`: the properties of a checkpoint, its layers, and backends per device."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any


def print_report(report: Any, layers: bool) -> None:
    """Print the report, with every quantized layer if `layers` is true."""
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


def print_component(report: Any) -> None:
    """Print what one component of an all-in-one file consists of."""
    from rich.table import Table

    from mezzotint.cli.output import console, foreign

    properties = Table.grid(padding=(0, 2))
    layers = ", ".join(f"{number} layers {name}" for name, number in report.schemes.items())
    dtypes = ", ".join(f"{dtype} {_mib(size)}" for dtype, size in report.dtypes.items())
    for name, value in (
        ("path", str(report.path)),
        ("component", f"{report.component} ({report.kind})"),
        ("format", report.format),
        ("quantized", layers or "nothing"),
        ("tensors", f"{report.tensors}: {dtypes}"),
        ("names", report.names),
        ("stored", _mib(report.stored_bytes)),
    ):
        properties.add_row(name, foreign(value))
    console().print(properties)


def _shorten(lines: Any) -> Iterator[str]:
    """Yield the first lines, and how many more there are."""
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
