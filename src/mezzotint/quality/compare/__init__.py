"""Comparison of quantized models with a reference: generate, measure and judge."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch

from mezzotint.errors import BadRequest
from mezzotint.kernels import resolve_device
from mezzotint.quality.candidate import ModelSpec, parse_sources
from mezzotint.quality.compare.command import command_line
from mezzotint.quality.compare.comparison import CandidateResult, Comparison
from mezzotint.quality.compare.floor import NoiseFloor, NoiseLevel
from mezzotint.quality.compare.folder_lock import lock_folder
from mezzotint.quality.compare.gate import PROFILES, Gate, profile_for, read_gate
from mezzotint.quality.compare.runs import ImageRequest, Run, generate_run
from mezzotint.quality.compare.scores import means, score, step_means
from mezzotint.quality.compare.settings import (
    ComparisonSettings,
    SamplingSettings,
    request_for,
    select_metrics,
)
from mezzotint.quality.metrics.image import unavailable
from mezzotint.quality.pair import Progress
from mezzotint.quality.prompts import prompts_for
from mezzotint.quality.resident import Resident
from mezzotint.quality.weights import check_weights

__all__ = ["CandidateResult", "Comparison", "compare"]

RUNS = "runs"


def compare(
    reference: str,
    candidates: Sequence[str],
    output: str | Path,
    *,
    model: str | None = None,
    prompts: str | None = None,
    image: str | Path | None = None,
    seeds: int = 1,
    size: Mapping[str, int] | None = None,
    frames: int | None = None,
    metrics: Sequence[str] | None = None,
    gate: str | None = None,
    device: str | torch.device | None = None,
    on_image: Callable[[int, int, str], None] = lambda _done, _total, _name: None,
    **sampling: Unpack[SamplingSettings],
) -> Comparison:
    """Generate the same images with every model and measure each candidate against the reference.

    reference, candidates   `[NAME=]SOURCE[,OPTION=VALUE...]`; see `parse_sources`
    output    folder; images in it are reused if model files and settings are the same
    prompts   "default", "demo", "edit" or a file; None selects the set for the model
    image     file of the source image for prompts that name no image
    size      None selects the model's default area, in the shape of the first source image
    metrics   names of image metrics; None selects all. Metrics that a gate limits are added.
    gate      a profile or a TOML file; None selects the profile for each candidate's precision
    on_image  called with the number of finished images, the total and the model's name
    sampling  steps, guidance, negative_prompt and other settings of every model
    Raises    MezzotintError; before anything is generated if the arguments cannot be used
    """
    sources = parse_sources(reference, list(candidates), model)
    if len(sources) < 2:
        raise BadRequest(
            "there is no candidate to compare", "name at least one after the reference."
        )
    fixed_gate = None if gate is None else read_gate(gate)
    for source in sources:
        source.check()
    selected = prompts_for([source.source for source in sources], prompts, image)
    effective = sources[0].source.sampling(
        selected[0].source_image, num_frames=frames, **(size or {}), **sampling
    )
    gates = [fixed_gate] if fixed_gate else [read_gate(name) for name in PROFILES]
    settings = ComparisonSettings(
        prompts=selected,
        seeds=tuple(range(seeds)),
        sampling=effective,
        metrics=select_metrics(metrics, gates, effective),
        device=resolve_device(device),
    )
    folder = _make_folder(Path(output))
    command = command_line([reference, *candidates], output=output, model=model, prompts=prompts,
                           image=image, seeds=None if seeds == 1 else seeds, size=size,
                           frames=frames, **sampling, metrics=metrics, gate=gate,
                           device=device)  # fmt: skip
    with lock_folder(folder):
        comparison = _ComparisonRun(settings, folder, len(sources), command, on_image)
        return comparison.run(sources, fixed_gate)


def _make_folder(output: Path) -> Path:
    """Create the folder for the runs.

    Raises BadRequest if that fails, before time is spent on images that cannot be stored.
    """
    try:
        (output / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"-o is {output}, and this folder cannot be created: {error.strerror}",
            "name another folder.",
        ) from error
    return output / RUNS


class _ComparisonRun:
    """One comparison in progress. It generates into one folder."""

    def __init__(
        self,
        settings: ComparisonSettings,
        folder: Path,
        models: int,
        command: str,
        on_image: Callable[[int, int, str], None],
    ) -> None:
        self.settings, self.folder, self.command = settings, folder, command
        self.requests = settings.requests()
        self.first_seed = [request_for(prompt, settings.seeds[0]) for prompt in settings.prompts]
        self.other_kernels = [replace(request, other_kernels=True) for request in self.first_seed]
        self.other_seed = [
            replace(request, seed=settings.other_seed) for request in self.first_seed
        ]
        floor = len(self.other_kernels) + len(self.other_seed)
        self.progress = Progress(models * len(self.requests) + floor, on_image)

    def run(self, sources: Sequence[ModelSpec], gate: Gate | None) -> Comparison:
        # The noise floor needs additional images, of the reference only.
        requests = [*self.requests.values(), *self.other_kernels, *self.other_seed]
        reference = self._generate(sources[0], requests)
        size = reference.frames(requests[0])[0].size
        missing = unavailable(self.settings.metrics, size)
        floor = NoiseFloor(
            self._floor(reference, self.other_kernels), self._floor(reference, self.other_seed)
        )
        results = tuple(
            self._judge(reference, source, floor, missing, gate) for source in sources[1:]
        )
        return Comparison(self.settings, reference, floor, results, missing, self.command)

    def _generate(self, source: ModelSpec, requests: Sequence[ImageRequest]) -> Run:
        return generate_run(
            self.folder,
            source,
            requests,
            self.settings.sampling,
            self.settings.device,
            self.progress,
        )

    def _floor(self, reference: Run, requests: Sequence[ImageRequest]) -> NoiseLevel:
        """Compare the reference's images with its other images of the same prompts."""
        pairs = zip(self.first_seed, requests, strict=True)
        names = self.settings.metrics
        scores = [score(0, 0, reference.output(a), reference.output(b), names) for a, b in pairs]
        return NoiseLevel(means(scores), step_means(scores))

    def _judge(
        self,
        reference: Run,
        source: ModelSpec,
        floor: NoiseFloor,
        missing: Mapping[str, str],
        gate: Gate | None,
    ) -> CandidateResult:
        run = self._generate(source, list(self.requests.values()))
        scores = tuple(
            score(
                prompt, seed, reference.output(request), run.output(request), self.settings.metrics
            )
            for (prompt, seed), request in self.requests.items()
        )
        resident = Resident(**run.info["resident"])
        profile = gate or read_gate(profile_for(resident.quantized_bits, run.info["claims"]))
        available = profile.without(missing)
        drift = {name: floor.drift(name, value) for name, value in means(scores).items()}
        self.progress.report(f"{source.name}: weights")
        weights = check_weights(reference.candidate, source, self.settings.device)
        reasons = (
            *_unquantized_claims(run),
            *self._bad_outputs(reference, run),
            *available.reasons(means(scores), drift, resident, weights),
        )
        return CandidateResult(run, available, scores, drift, reasons, weights)

    def _bad_outputs(self, reference: Run, run: Run) -> Iterator[str]:
        """Yield the problems of images for which the reference's image has none."""
        problems = [
            run.problems(request)[0]
            for request in self.requests.values()
            if run.problems(request) and not reference.problems(request)
        ]
        if problems:
            total = len(self.requests)
            yield f"{len(problems)} of {total} outputs are not valid images: {problems[0]}"


def _unquantized_claims(run: Run) -> tuple[str, ...]:
    """Return a reason if a checkpoint claims to be quantized and no resident weight is."""
    if not run.info["claims"] or run.info["resident"]["quantized_share"] > 0:
        return ()
    dtypes = ", ".join(run.info["resident"]["bytes"])
    return (
        f"it claims to be quantized ({'; '.join(run.info['claims'])}), "
        f"and all its weights are resident as {dtypes}",
    )
