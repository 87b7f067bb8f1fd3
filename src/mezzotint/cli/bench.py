"""`mezzotint bench`: time a model on this GPU against compiled BF16."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.checks import check_file
from mezzotint.cli.names import BENCH_MODELS, BENCH_SCHEMES, RESIDENCY_MODES
from mezzotint.cli.options import checked, checked_each
from mezzotint.cli.outputs import check_rows, check_trace
from mezzotint.cli.shared_options import AttentionOptions, json_option, kernel_option

if TYPE_CHECKING:
    from mezzotint.bench import BenchCase


@dataclass(frozen=True, kw_only=True)
class BenchOptions(AttentionOptions):
    """What to time, and where to save the results."""

    model: Annotated[
        str,
        typer.Argument(help=f"Model: {BENCH_MODELS}.", callback=checked(BENCH_MODELS.check)),
    ]
    scheme: Annotated[
        list[str],
        typer.Option(
            help=f"Quantization scheme: {BENCH_SCHEMES}. Repeatable.",
            callback=checked_each(BENCH_SCHEMES.check),
        ),
    ] = field(default_factory=lambda: ["fp8"])
    baseline: Annotated[
        bool, typer.Option(help="Also time compiled BF16 with cuDNN attention.")
    ] = True
    steps: Annotated[int, typer.Option(min=1, help="Number of timed transformer calls.")] = 20
    size: Annotated[
        int | None,
        typer.Option(help="Image height and width in pixels \\[the published benchmark size]."),
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Write a Chrome trace of a few calls of the last scheme.",
            callback=checked(lambda path: check_file("--profile", path)),
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Append one JSON line per row to this file.",
            callback=checked(lambda path: check_file("-o", path)),
        ),
    ] = None
    as_json: Annotated[bool, json_option(help="Print the rows as JSON instead of a table.")] = False
    resident: Annotated[
        str,
        kernel_option(
            help="stored: keep weights as stored. fp8: convert 4-bit and MXFP8 weights to FP8.",
            callback=checked(RESIDENCY_MODES.check),
        ),
    ] = "stored"


def bench(options: BenchOptions) -> None:
    """Time a transformer at its real size with random weights, and show where the time goes.

    This command requires a GPU. It exits with 1 if a quantized model is slower than BF16.

    Examples:

      mezzotint bench flux1-dev

      mezzotint bench flux1-dev --scheme fp8 --scheme nvfp4 --attention fa3_fp8 -o rows.jsonl

      mezzotint bench wan2.2-a14b --no-baseline --profile trace.json
    """
    _check_outputs(options)
    from mezzotint import bench as benches
    from mezzotint.errors import Unsupported
    from mezzotint.kernels import best_device

    cases = _cases(options)
    device = best_device()
    if device.type != "cuda":
        raise Unsupported("bench times GPU kernels, and no CUDA GPU was found")
    results: list[Any] = []
    rows: list[dict[str, Any]] = []
    for case in cases:
        print(f"{case.model} {case.scheme}: building, compiling, timing", file=sys.stderr)
        profile = options.profile if case is cases[-1] else None
        results.append(benches.measure(case, device, options.steps, profile))
        reference = results[0] if options.baseline else None
        rows.append(benches.row(results[-1], reference) | benches.machine(device))
        if options.output is not None:
            # Each row is written at once, so that an interrupted run keeps its results.
            with options.output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if options.as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(results)
    warnings = list(benches.warnings(results))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if warnings:
        raise typer.Exit(1)


def _check_outputs(options: BenchOptions) -> None:
    """Raise BadRequest if an output would change a file that Mezzotint did not write."""
    if options.output is not None:
        check_rows(options.output)
    if options.profile is not None:
        check_trace(options.profile)


def _cases(options: BenchOptions) -> list["BenchCase"]:
    """Return what to time: BF16 first, unless --no-baseline, then every scheme."""
    from mezzotint.bench import BASELINE, BenchCase, published_model

    sampling = published_model(options.model).sampling.replace(height=options.size)
    cases = [
        BenchCase(
            options.model, scheme, sampling, options.batch, options.attention, options.resident
        )
        for scheme in options.scheme
    ]
    if options.baseline:
        cases.insert(0, BenchCase(options.model, BASELINE, sampling, options.batch))
    return cases


def _print(results: list[Any]) -> None:
    from mezzotint.bench import markdown

    print(markdown(results))
    for result in results:
        parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in result.kernels_ms.items())
        print(f"\n{result.case.model} {result.case.scheme}, ms of GPU time: {parts}")
        if result.modulation_ms:
            steps = result.case.sampling.steps
            print(
                f"once per generation, ms: modulation of {steps} steps and text "
                f"{result.modulation_ms:.1f}"
            )
