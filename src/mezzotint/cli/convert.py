"""`mezzotint convert`: one format into another."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.progress import bytes_bar


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint file, component folder, pipeline, or demo-fp8, ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; for comfy and nunchaku, the file.")],
    to: Annotated[str, typer.Option(help="mezzotint, bf16, modelopt, comfy, nunchaku, row-major")] = "mezzotint",
    base: Annotated[
        str | None, typer.Option(help="BF16 component of the same model, for --keep-bf16 and a missing config.")
    ] = None,
    scales_from: Annotated[
        str | None, typer.Option(help="Checkpoint that has the input scales which the source lacks.")
    ] = None,
    keep_bf16: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Layers to write unquantized; may be repeated.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Folder inside a pipeline, such as transformer_2 \\[transformer].")
    ] = None,
    merge_into: Annotated[
        str | None,
        typer.Option(metavar="PIPELINE", help="Folder or Hub id: make the output a whole pipeline, the rest copied."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW", help="Regular expression and what replaces it in tensors' names; may be repeated."
        ),
    ] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest shard, in 10^9 bytes.")] = 4.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output, and nothing else, once the new is complete.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Write a checkpoint as another format. What the target cannot hold is refused before anything is written.

    The output appears whole or not at all. After an interruption the same command goes on with the shards that are
    finished. --overwrite replaces what an earlier conversion has written; where anything else lies, it refuses.

    Examples:

      mezzotint convert demo-nvfp4 -o ./demo-mezzotint

      mezzotint convert ./flux1-nvfp4/transformer --to comfy -o flux1-nvfp4.safetensors

      mezzotint convert ./svdq-int4_r32-z-image-turbo.safetensors --to row-major -o ./z-image-rows

      mezzotint convert ./z-image-rows --to nunchaku -o svdq-int4_r32-z-image-turbo.safetensors

      mezzotint convert ./mixed.safetensors --scales-from ./full.safetensors --base ./FLUX.2-dev -o ./out

      mezzotint convert ./export --keep-bf16 "*.ff.net.*" --base ./FLUX.1 --merge-into ./FLUX.1 -o ./FLUX.1-nvfp4
    """
    checks.check_name("there is no target {!r}", to, checks.TARGETS)
    checks.check_sources(source, base, scales_from, merge_into)
    checks.check_writable("-o", output)
    from mezzotint.converting import convert as run
    from mezzotint.formats.renaming import read_renames

    with bytes_bar("writing") as on_progress:
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
    print(f"  {report.source_format} to {report.target}: {layers} layers quantized, {report.tensors} tensors in all")
    mib = report.nbytes / 2**20
    speed = mib / max(report.seconds, 1e-9)
    print(f"  {mib:,.1f} MiB in {len(report.shards)} file(s), {report.seconds:.1f} s, {speed:,.0f} MiB/s")
    if report.resumed:
        print(f"  {len(report.resumed)} file(s) were there from an interrupted run")
    for transform, number in report.transforms.items():
        print(f"  transform: {number} layers {transform}")
    if not report.transforms:
        print("  lossless: the quantized numbers are unchanged")
    if report.ignored:
        print(f"  {len(report.ignored)} tensors ignored ({', '.join(sorted(set(report.ignored.values())))})")
