"""`mezzotint convert`: write a checkpoint in another format."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.progress import byte_progress


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint file, component folder, pipeline, Hub id, or demo-fp8, demo-nvfp4, ..."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Output folder; for comfy, gguf and nunchaku, file."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Target format: mezzotint, bf16, modelopt, comfy, gguf, gguf-q8_0, gguf-q4_0, "
            "nunchaku or row-major."
        ),
    ] = "mezzotint",
    base: Annotated[
        str | None,
        typer.Option(
            help="BF16 component of the same model, for --keep-bf16 and a missing configuration."
        ),
    ] = None,
    scales_from: Annotated[
        str | None,
        typer.Option(help="Checkpoint to take missing input scales from."),
    ] = None,
    keep_bf16: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers to write unquantized. Repeatable."),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Folder inside a pipeline, such as transformer_2 \\[transformer]."),
    ] = None,
    merge_into: Annotated[
        str | None,
        typer.Option(
            metavar="PIPELINE",
            help="Pipeline to copy; the output is a copy with the converted component.",
        ),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Regular expression in tensor names, and its replacement. Repeatable.",
        ),
    ] = None,
    shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Largest size of a shard in 10^9 bytes.")
    ] = 4.0,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an earlier output when the new one is complete, and nothing else.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on stdout.")
    ] = False,
) -> None:
    """Write a checkpoint in another format.

    The command fails before it writes anything if the target format cannot store a layer. The
    output appears only when it is complete. After an interruption, the same command reuses the
    finished shards. With --overwrite, the command replaces the output of an earlier conversion, and
    refuses to replace anything else.

    Examples:

      mezzotint convert demo-nvfp4 -o ./demo-mezzotint

      mezzotint convert ./flux1-nvfp4/transformer --to comfy -o flux1-nvfp4.safetensors

      mezzotint convert ./svdq-int4_r32-z-image-turbo.safetensors --to row-major -o ./z-image-rows

      mezzotint convert ./z-image-rows --to nunchaku -o svdq-int4_r32-z-image-turbo.safetensors

      mezzotint convert ./mixed.safetensors --scales-from ./full.safetensors --base ./FLUX.2-dev
      -o ./out

      mezzotint convert ./export --keep-bf16 "*.ff.net.*" --base ./FLUX.1 --merge-into ./FLUX.1
      -o ./FLUX.1-nvfp4
    """
    checks.check_name("there is no target {!r}", to, checks.TARGETS)
    checks.check_sources(source, base, scales_from, merge_into)
    checks.check_writable("-o", output)
    from mezzotint.conversion import convert as run
    from mezzotint.formats.renaming import read_renames

    with byte_progress("writing") as on_progress:
        report = run(
            source,
            output,
            base=base,
            to=to,
            scales_from=scales_from,
            keep_bf16=keep_bf16 or (),
            component=component,
            merge_into=merge_into,
            shard_bytes=int(shard_gb * 1e9),
            overwrite=overwrite,
            rename=read_renames(rename or ()),
            on_progress=on_progress,
        )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)


def _print(report: Any) -> None:
    layers = ", ".join(f"{number} {scheme}" for scheme, number in report.layers.items()) or "no"
    print(f"{report.output}")
    formats = f"{report.source_format} to {report.target}"
    print(f"  {formats}: {layers} layers quantized, {report.tensors} tensors in total")
    mib = report.nbytes / 2**20
    speed = mib / max(report.seconds, 1e-9)
    files = f"{len(report.shards)} file(s)"
    print(f"  {mib:,.1f} MiB in {files}, {report.seconds:.1f} s, {speed:,.0f} MiB/s")
    if report.resumed:
        print(f"  {len(report.resumed)} file(s) reused from an interrupted run")
    for transform, number in report.transforms.items():
        print(f"  transform: {number} layers {transform}")
    if not report.transforms:
        print("  lossless: the quantized values are unchanged")
    if report.ignored:
        reasons = ", ".join(sorted(set(report.ignored.values())))
        print(f"  {len(report.ignored)} tensors ignored ({reasons})")
