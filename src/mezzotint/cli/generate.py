"""`mezzotint generate`: paint pictures and videos."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli.kernels import choice, is_fp8, make_fast
from mezzotint.cli.outputs import check_painted
from mezzotint.cli.sides import sides
from mezzotint.errors import BadRequest
from mezzotint.escaping import message

if TYPE_CHECKING:
    from mezzotint.painting import Painting

EXAMPLES = """
Paint pictures, or videos, with a diffusers pipeline whose transformer may be quantized.

The built-in model knows captions of one form: "a SIZE COLOUR SHAPE on a COLOUR background", SIZE large or small.

What cannot be a picture (NaN, a single colour, noise) is written as NAME-unsound, and the exit code is 1.

Examples:

  mezzotint generate "a large red circle on a blue background"

  mezzotint generate "a small green triangle on a yellow background" --transformer demo-nvfp4 -o triangle.png

  mezzotint generate "a large red star on a white background" "a small blue ring on a black background" --grid -o g.png

  mezzotint generate "make it night" --image street.png --model ./FLUX.1-Kontext-dev --transformer ./kontext-fp8

  mezzotint generate "a large blue ring on a black background" --transformer demo-nvfp4 --bf16-steps 2+1

  mezzotint generate "a cat on the moon" --model ./wan2.2 --transformer ./high-fp8 --transformer-2 ./low-fp8 -o cat.mp4
"""
UNSOUND = "-unsound"


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to paint; several make several.")],
    model: Annotated[str, typer.Option(help="A diffusers pipeline: folder, Hub id, or 'demo'.")] = "demo",
    transformer: Annotated[
        str | None,
        typer.Option(help="Quantized transformer: file, folder, Hub id, or demo-fp8, demo-nvfp4, demo-nvfp4-comfy."),
    ] = None,
    transformer_2: Annotated[str | None, typer.Option(help="The second expert's, for Wan 2.2 A14B.")] = None,
    scales_from: Annotated[
        str | None, typer.Option(help="Checkpoint that has the input scales which the transformer lacks.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW", help="Regular expression and what replaces it in tensors' names; may be repeated."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture to edit, or to begin a video with, where a model can.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="PNG; for a video MP4, or a folder for its frames; several get -1, -2, ..."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps \\[model's own].")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Number i starts from the noise of seed + i.")] = 0,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|WxH",
            help="Side of a square, or width x height, in pixels \\[model's own area, in the shape of --image].",
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, max=10_000, help="Frames of a video \\[model's own].")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale \\[model's own].")] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="Pictures or videos for each prompt.")] = 1,
    grid: Annotated[
        bool, typer.Option("--grid", help="One sheet (rows = prompts) instead of single pictures.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... \\[the GPU if there is one].")] = None,
    activations: Annotated[
        str, typer.Option(help="as_stored or bf16: quantize the layers' inputs or not.")
    ] = "as_stored",
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="[SCHEME=]NAME", help="Kernel backend, for all or for a scheme \\[the best that can]."),
    ] = None,
    resident: Annotated[
        str | None,
        typer.Option(help="stored or fp8: whether 4-bit weights stay 4 bits \\[by the memory that is free]."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Compile first, 10 to 30 s at the first time: for many pictures.")
    ] = False,
    attention: Annotated[
        str | None, typer.Option(help="With --fast: fa3, cudnn, sdpa, fa3_fp8 \\[the fastest exact one].")
    ] = None,
    bf16_steps: Annotated[
        str | None,
        typer.Option(metavar="FIRST+LAST", help="Steps with BF16 activations, as diagnose --sensitivity advises."),
    ] = None,
    bf16_attention_steps: Annotated[
        str, typer.Option(metavar="FIRST+LAST", help="Steps with BF16 attention, where --attention is in FP8.")
    ] = "2+1",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")] = False,
) -> None:
    from mezzotint.cli.output import Steps, quiet_libraries

    checks.check_sources(model, transformer, transformer_2, scales_from)
    checks.check_kernels(backend, resident, attention)
    checks.check_name(checks.NO_ACTIVATIONS, activations, checks.ACTIVATIONS)
    checks.check_steps(bf16_steps, bf16_attention_steps)
    checks.check_device(device)
    checks.check_request(None, image, size)
    checks.check_writable("-o", output or Path())
    if attention is not None and not fast:
        raise BadRequest("--attention is chosen with --fast", "add --fast, or leave it out.")
    with Steps() as progress:
        quiet_libraries()
        from mezzotint.editing import read_image
        from mezzotint.formats.renaming import read_renames
        from mezzotint.painting import paint, unsound
        from mezzotint.pipelines import check_image, load, settings_for
        from mezzotint.schedule import NO_STEPS, StepSchedule

        schedules = {
            "bf16_steps": StepSchedule.read(bf16_steps) if bf16_steps else NO_STEPS,
            "bf16_attention_steps": StepSchedule.read(bf16_attention_steps) if is_fp8(attention) else NO_STEPS,
        }
        source = None if image is None else read_image(image)
        check_image(model, source is not None)
        picture = source.picture if source else None
        settings = settings_for(model, picture, steps=steps, guidance=guidance, num_frames=frames, **sides(size))
        output = _checked_output(output, settings.num_frames is not None, grid)
        replaced = check_painted(output, len(prompts) * count, grid, UNSOUND)
        pipe = load(
            model,
            transformer,
            transformer_2,
            device,
            activations=activations,
            backend=choice(backend or []),
            resident=resident,
            scales_from=scales_from,
            rename=read_renames(rename or ()),
        )
        if fast:
            progress.say("making it fast")
            make_fast(pipe, attention)
        repeated = [prompt for prompt in prompts for _ in range(count)]
        seeds = [seed + i for i in range(len(repeated))]
        total = settings.steps * len(repeated)
        progress.say("painting", 0, total)
        painting = paint(
            pipe,
            repeated,
            seeds,
            settings,
            lambda step, _: progress.say("painting", step + 1, total),
            guard=False,
            images=[picture] * len(repeated),
            **schedules,
        )

    common = {"model": model, "transformer": transformer, "format": pipe.load_report.format}
    common |= {"transformer_2": transformer_2} if transformer_2 else {}
    edited = source.to_dict() if source else {}
    common |= edited
    common |= {name: str(schedule) for name, schedule in schedules.items() if schedule != NO_STEPS}
    common |= {name: value for name, value in vars(settings).items() if value is not None}
    if grid:
        output = _marked(output) if any(painting.problems) else output
        rows = [painting.images[i : i + count] for i in range(0, len(repeated), count)]
        written = [_save_sheet(rows, output, {"prompt": " | ".join(prompts), "seed": seed, "count": count} | common)]
    else:
        parameters = [{"prompt": p, "seed": s} | common for p, s in zip(repeated, seeds, strict=True)]
        written = list(_save_each(painting, output, parameters))
    reports = [report for report in (pipe.load_report, pipe.load_report_2) if report is not None]
    events = [event for report in reports for event in report.events]
    events += [f"{path} replaces an earlier one that Mezzotint wrote" for path in replaced]
    for note in dict.fromkeys([*events, *painting.notes]):
        print(message(f"note: {note}"), file=sys.stderr)
    if as_json:
        result = {"files": [str(p) for p in written], "seeds": seeds, "sampling": vars(settings)} | edited
        result["notes"] = list(painting.notes)
        result["problems"] = [list(seen) for seen in painting.problems]
        loads = dict(zip(("load", "load_2"), (report.to_dict() for report in reports), strict=False))
        print(json.dumps(result | loads, indent=2))
    else:
        print("\n".join(str(path) for path in written))
    if any(painting.problems):
        seen, hint = unsound(repeated, painting.problems)
        print(message(f"error: {seen}\n  hint: {hint} See {', '.join(_unsound_files(written))}."), file=sys.stderr)
        raise typer.Exit(1)


generate.__doc__ = EXAMPLES


def _checked_output(output: Path | None, video: bool, grid: bool) -> Path:
    """Where to write, checked before anything is loaded."""
    if video and grid:
        raise BadRequest("--grid is for pictures, and this model paints videos")
    if output is None:
        return Path("out.mp4" if video else "out.png")
    kinds = (".mp4", "") if video else (".png",)
    if output.suffix.lower() not in kinds:
        named = " or ".join(kind or "a folder (no suffix)" for kind in kinds)
        raise BadRequest(f"-o is {output}", f"this model paints {'videos' if video else 'pictures'}: name {named}.")
    if output.is_dir() and any(output.iterdir()):
        raise BadRequest(f"-o is {output}, and that folder is not empty", "name a new folder for the frames.")
    return output


def _marked(path: Path) -> Path:
    """The name under which something is kept for a look that the output guard objects to."""
    return path.with_stem(f"{path.stem}{UNSOUND}")


def _unsound_files(written: list[Path]) -> list[str]:
    return [str(path) for path in written if path.stem.endswith(UNSOUND)]


def _save_sheet(rows: Any, output: Path, parameters: dict[str, Any]) -> Path:
    from mezzotint.pictures import save_png, sheet

    save_png(sheet(rows), output, parameters)
    return output


def _save_each(painting: "Painting", output: Path, parameters: list[dict[str, Any]]) -> Iterator[Path]:
    """Write every picture or video; yields the paths."""
    from mezzotint.pictures import save_png
    from mezzotint.videos import save_frames, save_mp4

    for i, entries in enumerate(parameters):
        path = output if len(parameters) == 1 else output.with_stem(f"{output.stem}-{i + 1}")
        path = _marked(path) if painting.problems[i] else path
        if painting.fps is None:
            save_png(painting.images[i], path, entries)
        elif path.suffix:
            save_mp4(painting.videos[i], path, painting.fps, entries)
        else:
            save_frames(painting.videos[i], path, entries)
        yield path
