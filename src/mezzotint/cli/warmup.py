"""`mezzotint warmup`: compile before the first request."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.builtin import check_exists
from mezzotint.cli.backend_options import speed_up_pipeline
from mezzotint.cli.options import checked, checked_each
from mezzotint.cli.shared_options import (
    FramesOptions,
    KernelOptions,
    TransformerOptions,
    sampling_option,
)
from mezzotint.cli.size_option import parse_size

if TYPE_CHECKING:
    from mezzotint.generation.request import Request
    from mezzotint.generation.source import PipelineSource


@dataclass(frozen=True, kw_only=True)
class WarmupOptions(TransformerOptions, FramesOptions, KernelOptions):
    """What to compile."""

    model: Annotated[
        str,
        typer.Argument(
            help="A diffusers pipeline: folder, Hub id, or 'demo'.", callback=checked(check_exists)
        ),
    ] = "demo"
    size: Annotated[
        list[str],
        sampling_option(
            metavar="N|WxH",
            help="Size to compile for. Repeatable \\[the model's default].",
            callback=checked_each(parse_size),
        ),
    ] = field(default_factory=list)


def warmup(options: WarmupOptions) -> None:
    """Fill the compile cache for a model and its sizes, so that `--fast` starts in seconds.

    The command compiles the model as `generate --fast` does, for one shape of inputs per size. The
    number of frames and a source image change the shape too: name the same ones here.

    Examples:

      mezzotint warmup ./FLUX.1-dev --transformer ./flux1-dev-fp8 --size 1024 --size 1344x768

      mezzotint warmup ./FLUX.1-Kontext-dev --image street.png
    """
    from mezzotint.cli.output import quiet_libraries

    quiet_libraries()
    from mezzotint.fast import compile_cache_folder
    from mezzotint.generation.generate import generate
    from mezzotint.generation.pipeline import load_pipeline
    from mezzotint.generation.source import PipelineSource

    source = PipelineSource.open(options.model, options.transformers)
    requests = _requests(source, options)
    pipe = load_pipeline(
        source, options.device, backend=options.backend_choice, resident=options.resident
    ).pipe
    speed_up_pipeline(pipe, options.attention)
    for name, request in requests.items():
        started = time.perf_counter()
        generate(pipe, request)
        print(f"{name}: compiled in {time.perf_counter() - started:.1f} s")
    print(f"compile cache: {compile_cache_folder()}")


def _requests(source: "PipelineSource", options: WarmupOptions) -> dict[str, "Request"]:
    """Return {size: a request of as few steps as call every transformer}. Raises MezzotintError."""
    from mezzotint.generation.request import Request
    from mezzotint.generation.source_image import read_source_image

    pixels: Any = None if options.image is None else read_source_image(options.image).to_pil
    source.check_source_image(pixels is not None)
    # The second transformer runs in later steps, so that it needs a second step.
    steps = len(source.checkpoints)
    sizes = [parse_size(size) for size in options.size] or [{}]
    settings = [
        source.sampling(pixels, steps=steps, num_frames=options.frames, **size) for size in sizes
    ]
    return {
        f"{sampling.width or sampling.height}x{sampling.height}": Request(
            ["a gray stone"],
            sampling=sampling,
            source_images=[pixels],
            check_output=False,
        )
        for sampling in settings
    }
