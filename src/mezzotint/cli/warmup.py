"""`mezzotint warmup`: compile before the first request."""

import time
from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli import checks
from mezzotint.cli.kernels import choice, make_fast
from mezzotint.cli.sides import sides


def warmup(
    model: Annotated[str, typer.Argument(help="A diffusers pipeline: folder, Hub id, or 'demo'.")] = "demo",
    transformer: Annotated[str | None, typer.Option(help="Quantized transformer, as `generate` takes it.")] = None,
    transformer_2: Annotated[str | None, typer.Option(help="The second expert's, for Wan 2.2 A14B.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="N|WxH", help="What will be painted; may be repeated \\[model's own].")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Picture to edit, as `generate` takes it; it is more to compute."),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video \\[model's own].")] = None,
    backend: Annotated[list[str] | None, typer.Option(metavar="[SCHEME=]NAME", help="As `generate` takes it.")] = None,
    resident: Annotated[str | None, typer.Option(help="As `generate` takes it.")] = None,
    attention: Annotated[str | None, typer.Option(help="As `generate --fast` takes it.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... \\[the GPU if there is one].")] = None,
) -> None:
    """Fill the compile cache for a model and the sizes it will paint, so that `generate --fast` starts in seconds.

    Examples:

      mezzotint warmup ./FLUX.1-dev --transformer ./flux1-dev-fp8 --size 1024 --size 1344x768
    """
    checks.check_sources(model, transformer, transformer_2)
    checks.check_kernels(backend, resident, attention)
    checks.check_device(device)
    checks.check_request(None, image, *(size or ()))
    from mezzotint.cli.output import quiet_libraries

    quiet_libraries()
    from mezzotint.editing import read_image
    from mezzotint.painting import paint
    from mezzotint.pipelines import check_image, load, settings_for
    from mezzotint.speed import cache_folder

    picture = None if image is None else read_image(image).picture
    check_image(model, picture is not None)
    few = 2 if transformer_2 else 1
    planned = [
        settings_for(model, picture, steps=few, num_frames=frames, **sides(one)) for one in [*(size or ())] or [None]
    ]
    pipe = load(model, transformer, transformer_2, device, backend=choice(backend or []), resident=resident)
    make_fast(pipe, attention)
    for settings in planned:
        began = time.perf_counter()
        paint(pipe, ["a grey stone"], sampling=settings, guard=False, images=[picture])
        print(f"{settings.width or settings.size}x{settings.size}: ready after {time.perf_counter() - began:.1f} s")
    print(f"kept in {cache_folder()}")
