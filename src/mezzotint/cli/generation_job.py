"""One run of `generate`: its source and request, and what is saved while it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    source: PipelineSource
    request: Request
    sampling: Sampling
    seeds: tuple[int, ...]
    source_image: SourceImage | None

    @classmethod
    def plan(
        cls,
        source: PipelineSource,
        prompts: Sequence[str],
        seed: int,
        image: Path | None,
        settings: Mapping[str, Any],
        bf16_steps: str,
        bf16_attention_steps: str,
    ) -> "GenerationJob":
        """Make the request for prompts whose seeds follow `seed`. Raises MezzotintError."""
        source_image = None if image is None else read_source_image(image)
        source.check_source_image(source_image is not None)
        pixels = None if source_image is None else source_image.to_pil
        sampling = source.sampling(pixels, **settings)
        seeds = tuple(seed + i for i in range(len(prompts)))
        request = Request(
            prompts,
            seeds,
            sampling,
            [pixels] * len(prompts),
            StepSchedule.parse(bf16_steps),
            StepSchedule.parse(bf16_attention_steps),
            check_output=False,  # bad outputs are saved under another name, and reported at the end
        )
        return cls(source, request, sampling, seeds, source_image)

    @property
    def is_video(self) -> bool:
        """Return whether the model generates videos."""
        return self.sampling.num_frames is not None

    @property
    def image_entries(self) -> dict[str, str]:
        """Return the entries of the source image for parameters and reports."""
        return {} if self.source_image is None else self.source_image.to_dict()

    def parameters(self, loaded: LoadedPipeline, names: Mapping[str, str | None]) -> dict[str, Any]:
        """Return the parameters that all outputs share, as they are written into their files.

        names   of the model and its transformers, as on the command line
        """
        schedules = {
            "bf16_steps": self.request.bf16_steps,
            "bf16_attention_steps": effective_attention_steps(loaded.pipe, self.request),
        }
        second = {"transformer_2": names["transformer_2"]} if names["transformer_2"] else {}
        return {
            "model": names["model"],
            "transformer": names["transformer"],
            "format": loaded.reports["transformer"].format,
            **second,
            **self.image_entries,
            **{name: str(steps) for name, steps in schedules.items() if steps != NO_STEPS},
            **{name: value for name, value in vars(self.sampling).items() if value is not None},
        }

    def run(
        self, pipe: Any, files: OutputFiles, parameters: Mapping[str, Any], progress: Steps
    ) -> Outcome:
        """Generate; save each output as soon as it is made."""
        paths = []

        def save(number: int, result: GenerationResult) -> None:
            own = {"prompt": self.request.prompts[number], "seed": self.seeds[number]}
            paths.append(files.save(number, result, own | dict(parameters)))

        return Outcome(self._generate(pipe, progress, save), tuple(paths))

    def run_sheet(
        self,
        pipe: Any,
        files: OutputFiles,
        parameters: Mapping[str, Any],
        sheet: Mapping[str, Any],
        progress: Steps,
    ) -> Outcome:
        """Generate all images, and save one contact sheet with `sheet["count"]` images per row."""
        result = self._generate(pipe, progress, lambda _number, _result: None)
        path = files.save_sheet(result, sheet["count"], dict(sheet) | dict(parameters))
        return Outcome(result, (path,))

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
