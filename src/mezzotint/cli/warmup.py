"""`mezzotint warmup`: compile before the first request."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli import checks
from mezzotint.cli import generate_options as options
from mezzotint.cli.backend_options import parse_backend_choice, speed_up_pipeline
from mezzotint.cli.pipeline_source import open_source
from mezzotint.cli.size_option import parse_size

if TYPE_CHECKING:
    from mezzotint.generation.request import Request
    from mezzotint.generation.source import PipelineSource


def warmup(
    model: Annotated[
        str, typer.Argument(help="A diffusers pipeline: folder, Hub id, or 'demo'.")
    ] = "demo",
    transformer: options.Transformer = None,
    transformer_2: options.Transformer2 = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|WxH", help="Size to compile for. Repeatable \\[the model's default]."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Image to edit, as for `generate`. Its tokens change what is compiled.",
        ),
    ] = None,
    frames: options.Frames = None,
    backend: options.Backend = None,
    resident: options.Resident = None,
    attention: options.Attention = None,
    device: options.Device = None,
) -> None:
    """Fill the compile cache for a model and its sizes, so that `--fast` starts in seconds.

    Examples:

      mezzotint warmup ./FLUX.1-dev --transformer ./flux1-dev-fp8 --size 1024 --size 1344x768
    """
    checks.check_sources(model, transformer, transformer_2)
    checks.check_kernels(backend, resident, attention)
    checks.check_device(device)
    checks.check_request(None, image, *(size or ()))
    from mezzotint.cli.output import quiet_libraries

    quiet_libraries()
    from mezzotint.fast import compile_cache_folder
    from mezzotint.generation.generate import generate
    from mezzotint.generation.pipeline import load_pipeline

    source = open_source(model, transformer, transformer_2)
    requests = _requests(source, image, frames, [parse_size(one) for one in size or ()] or [{}])
    choice = parse_backend_choice(backend or [])
    pipe = load_pipeline(source, device, backend=choice, resident=resident).pipe
    speed_up_pipeline(pipe, attention)
    for name, request in requests.items():
        started = time.perf_counter()
        generate(pipe, request)
        print(f"{name}: compiled in {time.perf_counter() - started:.1f} s")
    print(f"compile cache: {compile_cache_folder()}")


def _requests(
    source: "PipelineSource",
    image: Path | None,
    frames: int | None,
    sizes: list[dict[str, int]],
) -> dict[str, "Request"]:
    """Return {size: a request of as few steps as call every transformer}. Raises MezzotintError."""
    from mezzotint.generation.request import Request
    from mezzotint.generation.source_image import read_source_image

    pixels: Any = None if image is None else read_source_image(image).to_pil
    source.check_source_image(pixels is not None)
    # The second transformer runs in later steps, so that it needs a second step.
    steps = len(source.checkpoints)
    settings = [source.sampling(pixels, steps=steps, num_frames=frames, **size) for size in sizes]
    return {
        f"{sampling.width or sampling.height}x{sampling.height}": Request(
            ["a gray stone"],
            sampling=sampling,
            source_images=[pixels],
            check_output=False,
        )
        for sampling in settings
    }
