"""`mezzotint demo`: compare BF16, FP8 and NVFP4 on the built-in model."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mezzotint.cli import checks
from mezzotint.cli import generate_options as options
from mezzotint.cli.outputs import check_sheet

if TYPE_CHECKING:
    from mezzotint.demo import DemoResult


def demo(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Contact sheet. The table is written next to it as JSON."
        ),
    ] = Path("demo.png"),
    device: options.Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the table as JSON on stdout.")
    ] = False,
) -> None:
    """Generate six prompts with the built-in model in BF16, FP8 and NVFP4, and compare the images.

    Examples:

      mezzotint demo

      mezzotint demo -o /tmp/demo.png --device cpu --json
    """
    checks.check_file("-o", output)
    checks.check_device(device)
    check_sheet(output)
    print("loading PyTorch and diffusers ...", file=sys.stderr)
    from mezzotint.cli.output import quiet_libraries

    quiet_libraries()
    from mezzotint.demo import run
    from mezzotint.generation.image_io import save_png
    from mezzotint.saving import atomic_write

    result = run(device, lambda name: print(f"generating in {name} ...", file=sys.stderr))
    table = json.dumps(result.to_dict(), indent=2)
    save_png(result.sheet, output, {"prompt": "mezzotint demo"})
    with atomic_write(output.with_suffix(".json")) as temporary:
        temporary.write_text(table + "\n")
    if as_json:
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
