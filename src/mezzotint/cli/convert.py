"""`mezzotint convert`: write a checkpoint in another format."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.builtin import check_exists
from mezzotint.cli.checks import check_writable
from mezzotint.cli.names import ENCODERS, TARGETS
from mezzotint.cli.options import checked
from mezzotint.cli.progress import byte_progress
from mezzotint.cli.shared_options import CheckpointOptions, json_option
from mezzotint.errors import BadRequest


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(CheckpointOptions):
    """What to convert, and what to write."""

    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Output folder; for comfy, gguf and nunchaku, output file.",
            callback=checked(lambda path: check_writable("-o", path)),
        ),
    ]
    to: Annotated[
        str, typer.Option(help=f"Target format: {TARGETS}.", callback=checked(TARGETS.check))
    ] = "mezzotint"
    scheme: Annotated[
        str | None,
        typer.Option(
            help=f"Scheme to encode the layers in: {ENCODERS} \\[the source's].",
            callback=checked(ENCODERS.check),
        ),
    ] = None
    base: Annotated[
        str | None,
        typer.Option(
            help="BF16 component of the same model. Supplies the layers of --keep-bf16, which are "
            "decoded otherwise, and a missing configuration.",
            callback=checked(check_exists),
        ),
    ] = None
    keep_bf16: Annotated[
        list[str], typer.Option(metavar="GLOB", help="Layers to write in BF16. Repeatable.")
    ] = field(default_factory=list)
    merge_into: Annotated[
        str | None,
        typer.Option(
            metavar="PIPELINE",
            help="Pipeline to copy; the output is a copy with the converted component.",
            callback=checked(check_exists),
        ),
    ] = None
    shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Largest size of a shard in GB (10^9 bytes).")
    ] = 4.0
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an earlier output when the new one is complete, and nothing else.",
        ),
    ] = False
    as_json: Annotated[bool, json_option(help="Print the report as JSON on stdout.")] = False


def convert(options: ConvertOptions) -> None:
    """Write a checkpoint in another format.

    The command fails before it writes anything if the target format cannot store a layer. The
    output appears only when it is complete. After an interruption, the same command reuses the
    finished shards. With --overwrite, the command replaces the output of an earlier conversion, and
    refuses to replace anything else.

    With --scheme, the command encodes the layers again, rounded to nearest. These are the layers
    that the source has quantized, or else the linear layers of the model's blocks. The report says
    which error that adds to the weights.

    Examples:

      mezzotint convert demo-nvfp4 -o ./demo-mezzotint

      mezzotint convert ./flux1-nvfp4/transformer --to comfy -o flux1-nvfp4.safetensors

      mezzotint convert ./svdq-int4_r32-z-image-turbo.safetensors --to row-major -o ./z-image-rows

      mezzotint convert ./z-image-rows --to nunchaku -o svdq-int4_r32-z-image-turbo.safetensors

      mezzotint convert ./flux1-dev-Q4_K_S.gguf --scheme nvfp4 --to comfy -o flux1-nvfp4.safetensors

      mezzotint convert ./all-in-one.safetensors --component vae -o vae.safetensors

      mezzotint convert ./mixed.safetensors --scales-from ./full.safetensors --base ./FLUX.2-dev
      -o ./out

      mezzotint convert ./export --keep-bf16 "*.ff.net.*" --base ./FLUX.1 --merge-into ./FLUX.1
      -o ./FLUX.1-nvfp4
    """
    from mezzotint.checkpoint.file_component import is_in_file
    from mezzotint.conversion import convert as run

    if options.merge_into is None and is_in_file(options.checkpoint, options.component):
        _extract(options)
        return
    with byte_progress("writing") as on_progress:
        report = run(
            options.checkpoint,
            options.output,
            base=options.base,
            to=options.to,
            scheme=options.scheme,
            scales_from=options.scales_from,
            keep_bf16=options.keep_bf16,
            component=options.component,
            merge_into=options.merge_into,
            shard_bytes=int(options.shard_gb * 1e9),
            overwrite=options.overwrite,
            rename=options.renames,
            on_progress=on_progress,
        )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)


def _extract(options: ConvertOptions) -> None:
    """Write one component of an all-in-one file. Raises BadRequest for options of conversions."""
    from mezzotint.conversion.extraction import extract_component

    given = {
        "--to": options.to != "mezzotint",
        "--scheme": options.scheme,
        "--base": options.base,
        "--scales-from": options.scales_from,
        "--keep-bf16": options.keep_bf16,
    }
    refused = [name for name, value in given.items() if value]
    if refused:
        raise BadRequest(
            f"{', '.join(refused)}: {options.component} of a file is written as it is stored",
            "leave these options out.",
        )
    with byte_progress("writing") as on_progress:
        report = extract_component(
            options.checkpoint,
            options.output,
            str(options.component),
            rename=options.renames,
            overwrite=options.overwrite,
            on_progress=on_progress,
        )
    if options.as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    component = report.component
    print(f"{report.output}")
    print(f"  {component.component}: {component.tensors} tensors, unchanged ({component.format})")
    print(f"  {report.nbytes / 2**20:,.1f} MiB, with {component.names}")


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
    if (added := report.added_error) is not None:
        print(
            f"  added error of the weights: {added.mean:.4f} on average, "
            f"{added.largest:.4f} in {added.layer}"
        )
    for layer, reason in report.kept.items():
        print(f"  kept as it is: {layer} {reason}")
    if not report.transforms:
        print("  lossless: the quantized values are unchanged")
    if report.ignored:
        reasons = ", ".join(sorted(set(report.ignored.values())))
        print(f"  {len(report.ignored)} tensors ignored ({reasons})")
