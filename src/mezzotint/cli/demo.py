"""`mezzotint demo`: the main job on the built-in model."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.outputs import check_sheet


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Contact sheet; the table lies beside it as JSON.")
    ] = Path("demo.png"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... \\[the GPU if there is one].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON on stdout.")] = False,
) -> None:
    """Paint six prompts with the built-in model in BF16, FP8 and NVFP4, and say how far they agree.

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
    from mezzotint.pictures import save_png
    from mezzotint.saving import whole_file

    result = run(device, lambda name: print(f"painting in {name} ...", file=sys.stderr))
    table = json.dumps(result.to_dict(), indent=2)
    save_png(result.sheet, output, {"prompt": "mezzotint demo"})
    with whole_file(output.with_suffix(".json")) as temporary:
        temporary.write_text(table + "\n")
    if as_json:
        print(table)
    else:
        _print(result)
        print(f"wrote {output} and {output.with_suffix('.json')}", file=sys.stderr)


def _print(result: Any) -> None:
    from rich.table import Table

    from mezzotint.cli.output import console

    table = Table("precision", box=None)
    for title in ("weights MiB", "latent cosine", "PSNR dB", "SSIM", "s / picture"):
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
