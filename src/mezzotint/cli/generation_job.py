"""One run of `generate`: its source and request, and what is saved while it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.cli.generate_options import GenerateOptions
from mezzotint.cli.output import Steps
from mezzotint.cli.output_files import OutputFiles
from mezzotint.families import Sampling
from mezzotint.generation.generate import (
    GenerationResult,
    effective_attention_steps,
    generate_stream,
)
from mezzotint.generation.pipeline import LoadedPipeline
from mezzotint.generation.request import Request
from mezzotint.generation.schedule import NO_STEPS, StepSchedule
from mezzotint.generation.source import PipelineSource
from mezzotint.generation.source_image import SourceImage, read_source_image


@dataclass(frozen=True)
class Outcome:
    """The result of a run, and the files that it was saved to."""

    result: GenerationResult
    files: tuple[Path, ...]


@dataclass(frozen=True)
class GenerationJob:
    """What to generate, checked before any weight is read."""

    options: GenerateOptions
    source: PipelineSource
    request: Request
    sampling: Sampling
    seeds: tuple[int, ...]
    source_image: SourceImage | None

    @classmethod
    def plan(cls, options: GenerateOptions) -> "GenerationJob":
        """Open the model, and make a request with consecutive seeds. Raises MezzotintError."""
        source = PipelineSource.open(
            options.model,
            options.transformers,
            scales_from=options.scales_from,
            rename=options.renames,
        )
        source_image = None if options.image is None else read_source_image(options.image)
        source.check_source_image(source_image is not None)
        pixels = None if source_image is None else source_image.to_pil
        sampling = source.sampling(
            pixels, num_frames=options.frames, **options.sides, **options.settings
        )
        prompts = options.repeated_prompts
        seeds = tuple(options.seed + i for i in range(len(prompts)))
        request = Request(
            prompts,
            seeds,
            sampling,
            [pixels] * len(prompts),
            StepSchedule.parse(options.bf16_steps),
            StepSchedule.parse(options.bf16_attention_steps),
            check_output=False,  # bad outputs are saved under another name, and reported at the end
        )
        return cls(options, source, request, sampling, seeds, source_image)

    @property
    def is_video(self) -> bool:
        """Return whether the model generates videos."""
        return self.sampling.num_frames is not None

    @property
    def image_entries(self) -> dict[str, str]:
        """Return the entries of the source image for parameters and reports."""
        return {} if self.source_image is None else self.source_image.to_dict()

    def run(self, loaded: LoadedPipeline, files: OutputFiles, progress: Steps) -> Outcome:
        """Generate and save: each output as soon as it is made, or one contact sheet at the end."""
        parameters = self._parameters(loaded)
        if self.options.grid:
            return self._run_sheet(loaded.pipe, files, parameters, progress)
        paths = []

        def save(number: int, result: GenerationResult) -> None:
            of_output = {"prompt": self.request.prompts[number], "seed": self.seeds[number]}
            paths.append(files.save(number, result, of_output | parameters))

        return Outcome(self._generate(loaded.pipe, progress, save), tuple(paths))

    def _run_sheet(
        self, pipe: Any, files: OutputFiles, parameters: Mapping[str, Any], progress: Steps
    ) -> Outcome:
        result = self._generate(pipe, progress, lambda _number, _result: None)
        count = self.options.count
        of_sheet = {
            "prompt": " | ".join(self.options.prompts),
            "seed": self.options.seed,
            "count": count,
        }
        return Outcome(result, (files.save_sheet(result, count, {**of_sheet, **parameters}),))

    def _parameters(self, loaded: LoadedPipeline) -> dict[str, Any]:
        """Return the parameters that all outputs share, as they are written into their files."""
        schedules = {
            "bf16_steps": self.request.bf16_steps,
            "bf16_attention_steps": effective_attention_steps(loaded.pipe, self.request),
        }
        second = self.options.transformer_2
        return {
            "model": self.options.model,
            "transformer": self.options.transformer,
            "format": loaded.reports["transformer"].format,
            **({"transformer_2": second} if second else {}),
            **self.image_entries,
            **{name: str(steps) for name, steps in schedules.items() if steps != NO_STEPS},
            **{name: value for name, value in vars(self.sampling).items() if value is not None},
        }

    def _generate(
        self, pipe: Any, progress: Steps, on_result: Callable[[int, GenerationResult], None]
    ) -> GenerationResult:
        total = self.sampling.steps * len(self.request.prompts)
        progress.say("generating", 0, total)
        stream = generate_stream(
            pipe,
            self.request,
            on_step=lambda step, _latents: progress.say("generating", step + 1, total),
        )
        results = []
        for number, result in enumerate(stream):
            on_result(number, result)
            results.append(result)
        return GenerationResult.merge(results)
