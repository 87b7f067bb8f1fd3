"""`mezzotint demo`: compare BF16, FP8 and NVFP4 on the built-in model."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mezzotint.cli.checks import check_file
from mezzotint.cli.options import checked
from mezzotint.cli.outputs import check_sheet
from mezzotint.cli.shared_options import DeviceOptions, json_option

if TYPE_CHECKING:
    from mezzotint.demo import DemoResult


@dataclass(frozen=True, kw_only=True)
class DemoOptions(DeviceOptions):
    """Where to run, and where to save the images."""

    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Contact sheet. The table is written next to it as JSON.",
            callback=checked(lambda path: check_file("-o", path)),
        ),
    ] = Path("demo.png")
    as_json: Annotated[bool, json_option(help="Print the table as JSON on stdout.")] = False


def demo(options: DemoOptions) -> None:
    """Generate six prompts with the built-in model in BF16, FP8 and NVFP4, and compare the images.

    The table shows the size of the weights, and how close the images are to those in BF16.

    Examples:

      mezzotint demo

      mezzotint demo -o /tmp/demo.png --device cpu --json
    """
    output = options.output
    check_sheet(output)
    print("loading PyTorch and diffusers ...", file=sys.stderr)
    from mezzotint.cli.output import quiet_libraries

    quiet_libraries()
    from mezzotint.demo import run
    from mezzotint.generation.image_io import save_png
    from mezzotint.saving import atomic_write

    result = run(options.device, lambda name: print(f"generating in {name} ...", file=sys.stderr))
    table = json.dumps(result.to_dict(), indent=2)
    save_png(result.sheet, output, {"prompt": "mezzotint demo"})
    with atomic_write(output.with_suffix(".json")) as temporary:
        temporary.write_text(table + "\n")
    if options.as_json:
        print(table)
    else:
        _print(result)
        print(f"wrote {output} and {output.with_suffix('.json')}", file=sys.stderr)


def _print(result: "DemoResult") -> None:
    from rich.table import Table

    from mezzotint.cli.output import console

    table = Table("precision", box=None)
    for title in ("weights MiB", "latent cosine", "PSNR dB", "SSIM", "s / image"):
        table.add_column(title, justify="right")
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.weights_mib:.2f}",
            f"{row.latent_cosine:.5f}",
            "equal" if row.psnr is None else f"{row.psnr:.1f}",
            f"{row.ssim:.4f}",
            f"{row.seconds_per_image:.2f}",
        )
    console().print(table)
