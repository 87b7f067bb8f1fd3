"""`mezzotint verify`: check whether a checkpoint is intact."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from mezzotint.builtin import check_exists
from mezzotint.cli.options import checked
from mezzotint.cli.progress import byte_progress
from mezzotint.cli.shared_options import CheckpointOptions, json_option

COLORS = {"NOTE": "dim", "SUSPICIOUS": "yellow", "BROKEN": "red", "NOT_READ": "yellow"}
VERDICT_COLORS = ("green", "yellow", "red", "yellow")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(CheckpointOptions):
    """What to check, and what to compare it with."""

    base: Annotated[
        str | None,
        typer.Option(
            help="Unquantized component to compare every layer with.",
            callback=checked(check_exists),
        ),
    ] = None
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Download broken files again, if they came from the Hub."),
    ] = False
    as_json: Annotated[bool, json_option(help="Print the whole report as JSON on stdout.")] = False


def verify(options: VerifyOptions) -> None:
    """Check files, index, checksums, shapes, scales and weights of a checkpoint.

    With --base, also report each layer's error. Exits with 0 if the checkpoint is sound, 1 if
    something is suspicious, 2 if it is broken, 3 if its format is not supported.

    Examples:

      mezzotint verify demo-nvfp4

      mezzotint verify ./flux1-nvfp4/transformer --base ./FLUX.1-dev/transformer --json
    """
    from mezzotint.verification import verify as run

    with byte_progress("checking") as on_progress:
        report = run(
            options.checkpoint,
            options.base,
            component=options.component,
            scales_from=options.scales_from,
            repair=options.repair,
            rename=options.renames,
            on_progress=on_progress,
        )
    if options.as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _print(report: Any) -> None:
    from rich.console import Console

    from mezzotint.cli.output import foreign
    from mezzotint.untrusted.escaping import LONGEST_LINE, cut
    from mezzotint.verification.findings import VERDICTS, worst_first

    console = Console(highlight=False, soft_wrap=True)
    counts = f"{len(report.files)} file(s), {report.tensors} tensors"
    console.print(foreign(f"{report.path}: {report.format}, {counts}"))
    for repair in report.repairs:
        result = "downloaded again" if repair.fetched else f"not downloaded: {repair.reason}"
        console.print(foreign(f"  repair {repair.file}: {result}"))
    printed = worst_first(report.findings)
    for finding in printed:
        name = finding.severity.name
        console.print(f"  [{COLORS[name]}]{name.lower().replace('_', ' ')}[/] ", end="")
        console.print(foreign(cut(f"{finding.where}: {finding.message}", LONGEST_LINE)))
        if finding.hint:
            console.print(foreign(f"    hint: {finding.hint}"))
    if more := len(report.findings) - len(printed):
        console.print(f"  and {more:,} more findings")
    for scheme, count, typical, worst in _by_scheme(report.layers):
        error = f"median relative error {typical:.4f}, largest {worst.relative_error:.4f}"
        console.print(foreign(f"  {count} {scheme}: {error} ({worst.name})"))
    console.print(f"  {report.checksums} checksum(s) compared")
    console.print(VERDICTS[report.exit_code], style=VERDICT_COLORS[report.exit_code])


def _by_scheme(layers: Any) -> Any:
    """Yield (scheme, count, median error, worst layer) of the compared layers."""
    from statistics import median

    for scheme in sorted({layer.scheme for layer in layers}):
        members = [layer for layer in layers if layer.scheme == scheme]
        errors = [layer.relative_error for layer in members]
        worst = max(members, key=lambda layer: layer.relative_error)
        yield scheme, len(members), median(errors), worst
