"""`mezzotint bench`: how fast a model runs here, against compiled BF16."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.outputs import check_rows, check_trace


def bench(
    model: Annotated[
        str, typer.Argument(help="flux1-dev, flux2-dev, flux2-klein-4b, wan2.2-a14b, z-image-turbo, qwen-image")
    ],
    scheme: Annotated[
        list[str] | None, typer.Option(help="fp8, nvfp4, svdquant-int4, svdquant-nvfp4; may be repeated \\[fp8].")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Also measure BF16, compiled, with cuDNN's attention.")] = True,
    attention: Annotated[str | None, typer.Option(help="fa3, cudnn, sdpa, fa3_fp8 \\[the fastest exact one].")] = None,
    resident: Annotated[str, typer.Option(help="stored, or fp8: 4-bit weights turned into FP8 at load.")] = "stored",
    steps: Annotated[int, typer.Option(min=1, help="Timed calls of the transformer.")] = 20,
    size: Annotated[
        int | None, typer.Option(help="Height in pixels, and width \\[what the model is quoted at].")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in one call.")] = 1,
    profile: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of a few calls of the last scheme.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Append one JSON line for each row.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of a table.")] = False,
) -> None:
    """Time a model's transformer at its real size with random weights, and say where the time goes. Needs a GPU.

    Exits with 1 if something quantized is slower than BF16.

    Examples:

      mezzotint bench flux1-dev

      mezzotint bench flux1-dev --scheme fp8 --scheme nvfp4 --attention fa3_fp8 -o rows.jsonl

      mezzotint bench wan2.2-a14b --no-baseline --profile trace.json
    """
    checks.check_name("no model is called {!r}", model, checks.BENCH_MODELS)
    for name in scheme or ():
        checks.check_name("no scheme is called {!r}", name, checks.BENCH_SCHEMES)
    checks.check_name("no residency is called {!r}", resident, checks.RESIDENT)
    checks.check_kernels(None, attention=attention)
    checks.check_file("--profile", profile)
    checks.check_file("-o", output)
    if output is not None:
        check_rows(output)
    if profile is not None:
        check_trace(profile)
    from mezzotint import bench as benches
    from mezzotint.errors import Unsupported
    from mezzotint.kernels import best_device

    sampling = benches.shape_of(model).sampling.but(size=size)
    cases = [benches.Case(model, name, sampling, batch, attention, resident) for name in scheme or ["fp8"]]
    cases = ([benches.Case(model, benches.BF16, sampling, batch)] if baseline else []) + cases
    device = best_device()
    if device.type != "cuda":
        raise Unsupported("bench times a GPU's kernels, and there is no CUDA GPU here")
    results: list[Any] = []
    rows: list[dict[str, Any]] = []
    for case in cases:
        print(f"{model} {case.scheme}: building, compiling, timing", file=sys.stderr)
        results.append(benches.measure(case, device, steps, profile if case is cases[-1] else None))
        rows.append(benches.row(results[-1], results[0] if baseline else None) | benches.machine(device))
        if output is not None:
            with output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(results)
    slower = list(benches.warnings(results))
    for warning in slower:
        print(f"warning: {warning}", file=sys.stderr)
    if slower:
        raise typer.Exit(1)


def _print(results: list[Any]) -> None:
    from mezzotint.bench import markdown

    print(markdown(results))
    for result in results:
        parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in result.kernels_ms.items())
        print(f"\n{result.case.model} {result.case.scheme}, ms of GPU time: {parts}")
        if result.modulation_ms:
            steps = result.case.sampling.steps
            print(f"once a painting, ms: modulation of {steps} steps, and text {result.modulation_ms:.1f}")
