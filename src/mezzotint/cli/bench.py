"""`mezzotint bench`: time a model on this GPU against compiled BF16."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.outputs import check_rows, check_trace


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help=(
                "Model: flux1-dev, flux2-dev, flux2-klein-4b, wan2.2-a14b, z-image-turbo "
                "or qwen-image."
            )
        ),
    ],
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Quantization scheme: fp8, nvfp4, svdquant-int4 or svdquant-nvfp4. "
                "Repeatable \\[fp8]."
            )
        ),
    ] = None,
    baseline: Annotated[
        bool, typer.Option(help="Also time compiled BF16 with cuDNN attention.")
    ] = True,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Attention backend: fa3, cudnn, sdpa or fa3_fp8 \\[the fastest BF16 one]."
        ),
    ] = None,
    resident: Annotated[
        str,
        typer.Option(
            help="stored: keep 4-bit weights in 4 bits. fp8: convert them to FP8 at load."
        ),
    ] = "stored",
    steps: Annotated[int, typer.Option(min=1, help="Number of timed transformer calls.")] = 20,
    size: Annotated[
        int | None,
        typer.Option(help="Image height and width in pixels \\[the published benchmark size]."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    profile: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of a few calls of the last scheme.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Append one JSON line per row to this file."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the rows as JSON instead of a table.")
    ] = False,
) -> None:
    """Time a transformer at its real size with random weights, and show where the time goes.

    This command requires a GPU. It exits with 1 if a quantized model is slower than BF16.

    Examples:

      mezzotint bench flux1-dev

      mezzotint bench flux1-dev --scheme fp8 --scheme nvfp4 --attention fa3_fp8 -o rows.jsonl

      mezzotint bench wan2.2-a14b --no-baseline --profile trace.json
    """
    _check(model, scheme or (), resident, attention, profile, output)
    from mezzotint import bench as benches
    from mezzotint.errors import Unsupported
    from mezzotint.kernels import best_device

    sampling = benches.published_model(model).sampling.replace(height=size)
    cases = [
        benches.BenchCase(model, name, sampling, batch, attention, resident)
        for name in scheme or ["fp8"]
    ]
    if baseline:
        cases.insert(0, benches.BenchCase(model, benches.BASELINE, sampling, batch))
    device = best_device()
    if device.type != "cuda":
        raise Unsupported("bench times GPU kernels, and no CUDA GPU was found")
    results: list[Any] = []
    rows: list[dict[str, Any]] = []
    for case in cases:
        print(f"{model} {case.scheme}: building, compiling, timing", file=sys.stderr)
        results.append(benches.measure(case, device, steps, profile if case is cases[-1] else None))
        reference = results[0] if baseline else None
        rows.append(benches.row(results[-1], reference) | benches.machine(device))
        if output is not None:
            # Each row is written at once, so that an interrupted run keeps its results.
            with output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(results)
    warnings = list(benches.warnings(results))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if warnings:
        raise typer.Exit(1)


def _check(
    model: str,
    schemes: Sequence[str],
    resident: str,
    attention: str | None,
    profile: Path | None,
    output: Path | None,
) -> None:
    """Check all options before PyTorch is imported."""
    checks.check_name("no model is called {!r}", model, checks.BENCH_MODELS)
    for name in schemes:
        checks.check_name("no scheme is called {!r}", name, checks.BENCH_SCHEMES)
    checks.check_name("no residency is called {!r}", resident, checks.RESIDENT)
    checks.check_kernels(None, attention=attention)
    checks.check_file("--profile", profile)
    checks.check_file("-o", output)
    if output is not None:
        check_rows(output)
    if profile is not None:
        check_trace(profile)


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
