"""`mezzotint generate`: paint pictures."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLES = """
Paint pictures with a diffusers pipeline whose transformer may be quantized.

Examples:

  mezzotint generate "a large red circle on a blue background"

  mezzotint generate "a small green triangle on a yellow background" --transformer demo-nvfp4 -o triangle.png

  mezzotint generate "a red star on a white background" "a blue ring on a black background" --count 3 --grid -o grid.png
"""


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to paint; several make several.")],
    model: Annotated[str, typer.Option(help="Folder of a diffusers pipeline, or 'demo'.")] = "demo",
    transformer: Annotated[
        str | None,
        typer.Option(help="Quantized transformer: file, folder, or demo-fp8, demo-nvfp4, demo-nvfp4-comfy."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write; several get -1, -2, ...")] = Path(
        "out.png"
    ),
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps [model's own].")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Picture i starts from the noise of seed + i.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=16, max=8192, help="Height and width in pixels [model's own].")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale [model's own].")] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="Pictures for each prompt.")] = 1,
    grid: Annotated[
        bool, typer.Option("--grid", help="One sheet (rows = prompts) instead of single pictures.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [the GPU if there is one].")] = None,
    activations: Annotated[
        str, typer.Option(help="as_stored or bf16: quantize the layers' inputs or not.")
    ] = "as_stored",
    backend: Annotated[str | None, typer.Option(help="The one kernel backend to use [the best that can].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")] = False,
) -> None:
    from mezzotint.cli.output import quiet_libraries, step_progress

    with step_progress() as progress:
        bar = progress.add_task("loading", total=None)
        quiet_libraries()
        from mezzotint.pictures import save_png, sheet
        from mezzotint.pipelines import load, paint, sampling_of

        settings = sampling_of(model).but(steps=steps, size=size, guidance=guidance)
        pipe = load(model, transformer, device=device, activations=activations, backend=backend)
        repeated = [prompt for prompt in prompts for _ in range(count)]
        seeds = [seed + i for i in range(len(repeated))]
        progress.update(bar, description="painting", total=settings.steps * len(repeated), completed=0)
        painting = paint(pipe, repeated, seeds, settings, lambda step, _: progress.update(bar, completed=step + 1))

    common = {"model": model, "transformer": transformer, "format": pipe.load_report.format} | vars(settings)
    written: list[Path] = []
    if grid:
        rows = [painting.images[i : i + count] for i in range(0, len(repeated), count)]
        _save(
            sheet(rows),
            output,
            {"prompt": " | ".join(prompts), "seed": seed, "count": count} | common,
            written,
            save_png,
        )
    else:
        for i, picture in enumerate(painting.images):
            path = output if len(repeated) == 1 else output.with_stem(f"{output.stem}-{i + 1}")
            _save(picture, path, {"prompt": repeated[i], "seed": seeds[i]} | common, written, save_png)
    for event in pipe.load_report.events:
        print(f"note: {event}", file=sys.stderr)
    if as_json:
        result = {"files": [str(p) for p in written], "seeds": seeds, "sampling": vars(settings)}
        print(json.dumps(result | {"load": pipe.load_report.to_dict()}, indent=2))
    else:
        print("\n".join(str(path) for path in written))


generate.__doc__ = EXAMPLES


def _save(picture: Any, path: Path, parameters: dict[str, Any], written: list[Path], save_png: Any) -> None:
    save_png(picture, path, parameters)
    written.append(path)
