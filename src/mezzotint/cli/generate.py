"""`mezzotint generate`: generate images and videos."""

from pathlib import Path

from mezzotint.cli import checks
from mezzotint.cli import generate_options as options
from mezzotint.cli.backend_options import parse_backend_choice, speed_up_pipeline
from mezzotint.cli.generation_summary import print_summary
from mezzotint.cli.output_files import OutputFiles
from mezzotint.cli.pipeline_source import open_source
from mezzotint.cli.size_option import parse_size
from mezzotint.errors import BadRequest
from mezzotint.generation.step_schedule import FP8_ATTENTION_STEPS, NO_STEPS

HELP = """
Generate images or videos with a diffusers pipeline whose transformer may be quantized.

The built-in model knows one kind of prompt: "a SIZE COLOR SHAPE on a COLOR background", SIZE large
or small.

An output that cannot be a valid image (NaN, one color, noise) is saved as NAME-bad-output, and the
exit code is 1.

Examples:

  mezzotint generate "a large red circle on a blue background"

  mezzotint generate "a small green triangle on a yellow background" --transformer demo-nvfp4

  mezzotint generate "a large red star on a white background" --count 4 --grid -o grid.png

  mezzotint generate "make it night" --image street.png --model ./FLUX.1-Kontext-dev

  mezzotint generate "a large blue ring on a black background" --bf16-steps 2+1

  mezzotint generate "a cat on the moon" --model ./wan2.2 --transformer ./high-fp8 -o cat.mp4
"""


def generate(
    prompts: options.Prompts,
    model: options.Model = "demo",
    transformer: options.Transformer = None,
    transformer_2: options.Transformer2 = None,
    scales_from: options.ScalesFrom = None,
    rename: options.Rename = None,
    image: options.SourceImageFile = None,
    output: options.Output = None,
    steps: options.NumSteps = None,
    seed: options.Seed = 0,
    size: options.Size = None,
    frames: options.Frames = None,
    guidance: options.Guidance = None,
    guidance_2: options.Guidance2 = None,
    true_cfg: options.TrueCfg = None,
    negative_prompt: options.NegativePrompt = None,
    flow_shift: options.FlowShift = None,
    count: options.Count = 1,
    grid: options.Grid = False,
    device: options.Device = None,
    activations: options.Activations = "as_stored",
    backend: options.Backend = None,
    resident: options.Resident = None,
    fast: options.Fast = False,
    attention: options.Attention = None,
    bf16_steps: options.Bf16Steps = str(NO_STEPS),
    bf16_attention_steps: options.Bf16AttentionSteps = str(FP8_ATTENTION_STEPS),
    as_json: options.AsJson = False,
) -> None:
    checks.check_sources(model, transformer, transformer_2, scales_from)
    checks.check_kernels(backend, resident, attention)
    checks.check_name(checks.NO_ACTIVATIONS, activations, checks.ACTIVATIONS)
    checks.check_steps(bf16_steps, bf16_attention_steps)
    checks.check_device(device)
    checks.check_request(None, image, size)
    checks.check_writable("-o", output or Path())
    if attention is not None and not fast:
        raise BadRequest("--attention requires --fast", "add --fast, or leave it out.")
    from mezzotint.cli.output import Steps, quiet_libraries

    with Steps() as progress:
        quiet_libraries()
        from mezzotint.cli.generation_job import GenerationJob
        from mezzotint.generation.pipeline import load_pipeline

        settings = {
            "steps": steps,
            "guidance": guidance,
            "guidance_2": guidance_2,
            "true_cfg_scale": true_cfg,
            "negative_prompt": negative_prompt,
            "flow_shift": flow_shift,
            "num_frames": frames,
        }
        job = GenerationJob.plan(
            open_source(model, transformer, transformer_2, scales_from, rename),
            [prompt for prompt in prompts for _ in range(count)],
            seed,
            image,
            settings | parse_size(size),
            bf16_steps,
            bf16_attention_steps,
        )
        files = OutputFiles.plan(output, job.is_video, grid, len(prompts) * count)
        loaded = load_pipeline(
            job.source,
            device,
            activations=activations,
            backend=parse_backend_choice(backend or []),
            resident=resident,
        )
        if fast:
            progress.say("compiling")
            speed_up_pipeline(loaded.pipe, attention)
        names = {"model": model, "transformer": transformer, "transformer_2": transformer_2}
        parameters = job.parameters(loaded, names)
        if grid:
            sheet = {"prompt": " | ".join(prompts), "seed": seed, "count": count}
            outcome = job.run_sheet(loaded.pipe, files, parameters, sheet, progress)
        else:
            outcome = job.run(loaded.pipe, files, parameters, progress)
    print_summary(job, files, loaded, outcome, as_json)


generate.__doc__ = HELP
