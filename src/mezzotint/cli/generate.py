"""`mezzotint generate`: generate images and videos."""

from mezzotint.cli.backend_options import speed_up_pipeline
from mezzotint.cli.generate_options import GenerateOptions
from mezzotint.cli.generation_summary import print_summary
from mezzotint.cli.output_files import OutputFiles


def generate(options: GenerateOptions) -> None:
    """Generate images or videos with a diffusers pipeline whose transformer may be quantized.

    The built-in model is trained on one kind of prompt: "a SIZE COLOR SHAPE on a COLOR background",
    where SIZE is large or small.

    An output that cannot be a valid image (NaN, one color, noise) is saved as NAME-bad-output, and
    the exit code is 1.

    Examples:

      mezzotint generate "a large red circle on a blue background"

      mezzotint generate "a small green triangle on a yellow background" --transformer demo-nvfp4

      mezzotint generate "a large red star on a white background" --count 4 --grid -o grid.png

      mezzotint generate "make it night" --image street.png --model ./FLUX.1-Kontext-dev

      mezzotint generate "a large blue ring on a black background" --bf16-steps 2+1

      mezzotint generate "a cat on the moon" --model ./wan2.2 --transformer ./high-fp8 -o cat.mp4
    """
    options.check()
    from mezzotint.cli.output import Steps, quiet_libraries

    with Steps() as progress:
        quiet_libraries()
        from mezzotint.cli.generation_job import GenerationJob
        from mezzotint.generation.pipeline import load_pipeline

        job = GenerationJob.plan(options)
        files = OutputFiles.plan(options.output, job.is_video, options.grid, len(job.seeds))
        loaded = load_pipeline(
            job.source,
            options.device,
            activations=options.activations,
            backend=options.backend_choice,
            resident=options.resident,
        )
        if options.fast:
            progress.say("compiling")
            speed_up_pipeline(loaded.pipe, options.attention)
        outcome = job.run(loaded, files, progress)
    print_summary(job, files, loaded, outcome)
