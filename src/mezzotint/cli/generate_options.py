"""Options of the commands that generate: one name for each, with its help text."""

from pathlib import Path
from typing import Annotated

import typer

Prompts = Annotated[
    list[str],
    typer.Argument(metavar="PROMPT...", help="One or more prompts; each produces its own image."),
]
Model = Annotated[str, typer.Option(help="A diffusers pipeline: folder, Hub id, or 'demo'.")]
Transformer = Annotated[
    str | None,
    typer.Option(
        help="Quantized transformer: file, folder, Hub id, or demo-fp8, demo-nvfp4, "
        "demo-nvfp4-comfy."
    ),
]
Transformer2 = Annotated[
    str | None,
    typer.Option(help="Quantized transformer of the second expert (Wan 2.2 A14B)."),
]
ScalesFrom = Annotated[
    str | None, typer.Option(help="Checkpoint to take missing input scales from.")
]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW",
        help="Regular expression and its replacement in tensor names. Repeatable.",
    ),
]
SourceImageFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Image to edit, or the first frame of a video, for models that accept one.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Output PNG. For a video, an MP4 or a folder of frames. "
        "Several outputs get -1, -2, ...",
    ),
]
NumSteps = Annotated[
    int | None, typer.Option(min=1, max=1000, help="Denoising steps \\[the model's default].")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Base seed; image i uses seed + i.")]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="N|WxH",
        help="Side of a square, or WIDTHxHEIGHT, in pixels "
        "\\[the model's default; with --image, its aspect ratio].",
    ),
]
Frames = Annotated[
    int | None, typer.Option(min=1, max=10_000, help="Video frames \\[the model's default].")
]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale \\[the model's default].")
]
Guidance2 = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Guidance scale of the second expert, for Wan 2.2 A14B \\[the same as --guidance].",
    ),
]
TrueCfg = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="True classifier-free guidance, for FLUX.1 and Qwen-Image \\[the model's default].",
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What to steer away from; needs guidance that uses it."),
]
FlowShift = Annotated[
    float | None,
    typer.Option(
        min=0, help="Flow shift of the scheduler, as for Wan and Z-Image \\[the model's default]."
    ),
]
Count = Annotated[int, typer.Option(min=1, max=1000, help="Images or videos per prompt.")]
Grid = Annotated[
    bool,
    typer.Option(
        "--grid", help="Write one contact sheet (one row per prompt) instead of separate images."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ... \\[the GPU, if there is one].")
]
Activations = Annotated[
    str,
    typer.Option(
        help="as_stored: quantize activations as the checkpoint specifies. "
        "bf16: leave them in BF16."
    ),
]
Backend = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[SCHEME=]NAME",
        help="Kernel backend, for all layers or for one scheme "
        "\\[the fastest available]. Repeatable.",
    ),
]
Resident = Annotated[
    str | None,
    typer.Option(
        help="stored: keep 4-bit weights in 4 bits. "
        "fp8: convert them to FP8 at load \\[chosen by free memory]."
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Compile first (10 to 30 s the first time). Pays off when generating many images.",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention backend for --fast: fa3, cudnn, sdpa or fa3_fp8 \\[the fastest BF16 one]."
    ),
]
Bf16Steps = Annotated[
    str,
    typer.Option(
        metavar="FIRST+LAST",
        help="First and last steps to run with BF16 activations; see `diagnose --sensitivity`.",
    ),
]
Bf16AttentionSteps = Annotated[
    str,
    typer.Option(
        metavar="FIRST+LAST",
        help="First and last steps to run with BF16 attention, when --attention is FP8.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the settings and output files as JSON on stdout.")
]
