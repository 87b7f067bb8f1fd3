"""Options that several commands share: base classes of the commands' options.

An option is absent if it is None, or an empty list. Properties return values as the API takes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.builtin import check_exists
from mezzotint.cli.backend_options import parse_backend_choice
from mezzotint.cli.checks import (
    check_backends,
    check_candidate,
    check_device,
    check_image,
    check_prompts,
)
from mezzotint.cli.names import ATTENTIONS, RESIDENCY_MODES
from mezzotint.cli.options import checked
from mezzotint.cli.size_option import parse_size

json_option = partial(typer.Option, "--json")
"""The option --json; each command says what it prints."""
sampling_option = partial(typer.Option, rich_help_panel="Sampling")
kernel_option = partial(typer.Option, rich_help_panel="Kernels")

Reference = Annotated[
    str,
    typer.Argument(
        help="\\[NAME=]SOURCE\\[,OPTION=VALUE...]: a pipeline or a transformer.",
        callback=checked(check_candidate),
    ),
]


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where to run."""

    device: Annotated[
        str | None,
        typer.Option(
            help="Device: cpu, cuda, cuda:1, ... \\[the GPU, if there is one].",
            callback=checked(check_device),
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How a compiled transformer computes attention."""

    attention: Annotated[
        str | None,
        kernel_option(
            help=f"Attention backend of a compiled model: {ATTENTIONS} \\[the fastest BF16 one].",
            callback=checked(ATTENTIONS.check),
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class KernelOptions(AttentionOptions, DeviceOptions):
    """How a loaded model runs."""

    backend: Annotated[
        list[str],
        kernel_option(
            metavar="[SCHEME=]NAME",
            help="Kernel backend, for all layers or for one scheme "
            "\\[the fastest available]. Repeatable.",
            callback=checked(check_backends),
        ),
    ] = field(default_factory=list)
    resident: Annotated[
        str | None,
        kernel_option(
            help="stored: keep weights as stored. "
            "fp8: convert 4-bit and MXFP8 weights to FP8 at load \\[chosen by free memory].",
            callback=checked(RESIDENCY_MODES.check),
        ),
    ] = None

    @property
    def backend_choice(self) -> str | dict[str, str] | None:
        """Return one backend for all layers, {scheme: backend}, or None for the fastest."""
        return parse_backend_choice(self.backend)


@dataclass(frozen=True, kw_only=True)
class TensorOptions:
    """How the tensors of an unusual checkpoint are completed and named."""

    scales_from: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint, or backbone.pt of ModelOpt, to take missing input scales from.",
            callback=checked(check_exists),
        ),
    ] = None
    rename: Annotated[
        list[str],
        typer.Option(
            metavar="OLD=NEW",
            help="Regular expression in tensor names, and its replacement. Repeatable.",
        ),
    ] = field(default_factory=list)

    @property
    def renames(self) -> dict[str, str]:
        """Return {regular expression: replacement}. Raises BadRequest."""
        from mezzotint.formats.renaming import read_renames

        return read_renames(self.rename)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(TensorOptions):
    """Which checkpoint to read."""

    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint file, component folder, pipeline, Hub id, or a built-in model: "
            "demo-fp8, demo-nvfp4, ...",
            callback=checked(check_exists),
        ),
    ]
    component: Annotated[
        str | None,
        typer.Option(
            help="Folder inside a pipeline, such as transformer_2 \\[transformer]. For inspect and "
            "convert, also a part of an all-in-one file: text_encoder, vae, ..."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class FramesOptions:
    """How long a video is."""

    frames: Annotated[
        int | None,
        sampling_option(min=1, max=10_000, help="Video frames \\[the model's default]."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SizeOptions(FramesOptions):
    """How large an image or video is."""

    size: Annotated[
        str | None,
        sampling_option(
            metavar="N|WxH",
            help="Side of a square, or WIDTHxHEIGHT, in pixels "
            "\\[the model's default; with a source image, its aspect ratio].",
            callback=checked(parse_size),
        ),
    ] = None

    @property
    def sides(self) -> dict[str, int]:
        """Return the width and height in pixels, or {} for the model's default."""
        return parse_size(self.size)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(SizeOptions):
    """The settings of a generation."""

    steps: Annotated[
        int | None,
        sampling_option(min=1, max=1000, help="Denoising steps \\[the model's default]."),
    ] = None
    guidance: Annotated[
        float | None, sampling_option(min=0, help="Guidance scale \\[the model's default].")
    ] = None
    guidance_2: Annotated[
        float | None,
        sampling_option(
            min=0,
            help="Guidance scale of the second transformer, for Wan 2.2 A14B "
            "\\[the same as --guidance].",
        ),
    ] = None
    true_cfg: Annotated[
        float | None,
        sampling_option(
            min=0,
            help="True classifier-free guidance scale, for FLUX.1 and Qwen-Image "
            "\\[the model's default].",
        ),
    ] = None
    negative_prompt: Annotated[
        str | None,
        sampling_option(
            metavar="TEXT", help="What to avoid. Requires a guidance scale that uses it."
        ),
    ] = None
    flow_shift: Annotated[
        float | None,
        sampling_option(
            min=0.01,  # 0 would make every sigma 0
            help="Timestep shift of the scheduler, such as for Wan and Z-Image "
            "\\[the model's default].",
        ),
    ] = None

    @property
    def settings(self) -> dict[str, Any]:
        """Return {field of `Sampling`: value, or None for the model's default}, without sizes."""
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "guidance_2": self.guidance_2,
            "true_cfg_scale": self.true_cfg,
            "negative_prompt": self.negative_prompt,
            "flow_shift": self.flow_shift,
        }


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """Transformers that replace those of the pipeline, and the source image."""

    transformer: Annotated[
        str | None,
        typer.Option(
            help="Quantized transformer: file, folder, Hub id, or a built-in one: demo-fp8, "
            "demo-nvfp4, demo-nvfp4-comfy.",
            callback=checked(check_exists),
        ),
    ] = None
    transformer_2: Annotated[
        str | None,
        typer.Option(
            help="Quantized transformer of the second expert (Wan 2.2 A14B).",
            callback=checked(check_exists),
        ),
    ] = None
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Image to edit, or the first frame of a video, for models that accept one.",
            callback=checked(check_image),
        ),
    ] = None

    @property
    def transformers(self) -> Mapping[str, str | None]:
        """Return {component: the transformer that replaces it, if any}."""
        return {"transformer": self.transformer, "transformer_2": self.transformer_2}


@dataclass(frozen=True, kw_only=True)
class PromptSetOptions:
    """The pipeline and the prompts that models are compared with."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Pipeline for sources that are only a transformer "
            "\\[the reference, or the built-in model].",
            callback=checked(check_exists),
        ),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|default|demo|edit",
            help="File with one prompt per line, or a built-in set \\[the set for this model].",
            callback=checked(check_prompts),
        ),
    ] = None
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Image to edit, for prompts that name no image.",
            callback=checked(check_image),
        ),
    ] = None
