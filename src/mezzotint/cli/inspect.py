"""`mezzotint inspect`: report the contents of a checkpoint."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from mezzotint.builtin import check_exists
from mezzotint.cli.failures import Failure
from mezzotint.cli.inspection_tables import print_component, print_report
from mezzotint.cli.options import checked
from mezzotint.cli.shared_options import CheckpointOptions, json_option
from mezzotint.errors import MezzotintError


@dataclass(frozen=True, kw_only=True)
class InspectOptions(CheckpointOptions):
    """What to inspect, and how much to print."""

    base: Annotated[
        str | None,
        typer.Option(
            help="BF16 model, to detect the byte layout if the headers do not determine it.",
            callback=checked(check_exists),
        ),
    ] = None
    layers: Annotated[bool, typer.Option("--layers", help="List every quantized layer.")] = False
    as_json: Annotated[bool, json_option(help="Print the whole report as JSON on stdout.")] = False
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="Print only the file's metadata and quantization configuration, as JSON.",
        ),
    ] = False


def inspect(options: InspectOptions) -> None:
    """Report a checkpoint's format, layout and missing tensors, and the backends for each GPU.

    Only headers are read, not the weights; `verify` checks those. Exits with 0 if the headers are
    sound. Exits with 1 if some tensors are not part of the model, 2 if tensors are missing or the
    file cannot be read, 3 if its format is not supported.

    Examples:

      mezzotint inspect demo-nvfp4 --layers

      mezzotint inspect ./flux1-fp8/transformer --json

      mezzotint inspect ./odd.safetensors --rename "^net\\.="
      --rename "to_out\\.weight=to_out.0.weight"

      mezzotint inspect ./qwen-image-nvfp4.safetensors --base ./Qwen-Image

      mezzotint inspect ./all-in-one.safetensors --component text_encoder
    """
    from mezzotint.checkpoint import raw as read_raw

    if options.raw:
        print(json.dumps(read_raw(options.checkpoint, options.component), indent=2))
        return
    if _is_in_file(options):
        _print_component(options)
        return
    report = _inspect(options)
    severity = _severity(report)
    if options.as_json:
        print(json.dumps(report.to_dict() | {"verdict": _verdict(severity)}, indent=2))
    else:
        print_report(report, options.layers)
    if severity:
        raise typer.Exit(int(severity))


def _is_in_file(options: InspectOptions) -> bool:
    """Return whether --component names a part of a single file."""
    from mezzotint.checkpoint.file_component import is_in_file

    return is_in_file(options.checkpoint, options.component)


def _print_component(options: InspectOptions) -> None:
    from mezzotint.checkpoint.file_component import inspect_component

    report = _report(
        options,
        lambda: inspect_component(options.checkpoint, str(options.component), options.renames),
    )
    if options.as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_component(report)


def _inspect(options: InspectOptions) -> Any:
    from mezzotint.checkpoint import inspect as look

    return _report(
        options,
        lambda: look(
            options.checkpoint,
            base=options.base,
            scales_from=options.scales_from,
            component=options.component,
            rename=options.renames,
        ),
    )


def _report(options: InspectOptions, read: Callable[[], Any]) -> Any:
    """Return the report. With --json, print the failure if there is one, and raise typer.Exit."""
    try:
        return read()
    except MezzotintError as error:
        if not options.as_json:
            raise
        print(json.dumps(_refusal(options.checkpoint, error), indent=2))
        raise typer.Exit(Failure.of(error).exit_code) from error


def _severity(report: Any) -> Any:
    """Return the severity that `verify` would assign."""
    from mezzotint.verification import Severity

    if report.problems:
        return Severity.BROKEN
    return Severity.SUSPICIOUS if report.unplaced else Severity.NOTE


def _verdict(severity: Any) -> str:
    from mezzotint.verification.findings import VERDICTS

    return VERDICTS[severity]


def _refusal(path: str, error: MezzotintError) -> dict[str, Any]:
    """Return the JSON for an unreadable file: the failure, and the verdict of `verify`."""
    from mezzotint.verification.findings import finding_from_error

    verdict = _verdict(finding_from_error("format", path, error).severity)
    return {"path": path, "verdict": verdict, **Failure.of(error).to_dict()}
