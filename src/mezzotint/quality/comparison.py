"""The comparison itself: paint, measure, judge. What comes out is a value that the reports are rendered from."""

import datetime
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from mezzotint._version import VERSION
from mezzotint.errors import BadRequest, Unsupported, there_are
from mezzotint.families import Sampling
from mezzotint.kernels import Target, device_of
from mezzotint.pipelines import settings_for
from mezzotint.quality.alone import alone_in
from mezzotint.quality.candidate import Candidate, read_sources
from mezzotint.quality.command import command_line
from mezzotint.quality.cost import cost
from mezzotint.quality.floor import Level, NoiseFloor
from mezzotint.quality.gate import PROFILES, Gate, profile_for, read_gate
from mezzotint.quality.metrics import METRICS, PICTURE_METRICS, unavailable
from mezzotint.quality.pair import Progress
from mezzotint.quality.prompts import Prompt, prompts_for
from mezzotint.quality.resident import Resident
from mezzotint.quality.runs import Run, Shot, paint_run
from mezzotint.quality.scores import Score, intervals, means, score, step_means, worst_pictures
from mezzotint.quality.weights import Weights, weights_of

SCHEMA = "mezzotint.compare/1"
Shots = Mapping[tuple[int, int], Shot]
"""{(number of the prompt, seed): what to paint}"""
PASS, FAIL = "pass", "fail"
RUNS = "runs"


@dataclass(frozen=True)
class Settings:
    """What is painted and measured: every model paints every prompt from every seed."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    metrics: tuple[str, ...]
    device: torch.device

    def shots(self) -> Shots:
        numbered = enumerate(self.prompts)
        return {(i, seed): shot_of(prompt, seed) for i, prompt in numbered for seed in self.seeds}

    @property
    def other_seed(self) -> int:
        """A seed that no picture is painted from but those of the noise floor."""
        return max(self.seeds) + 1


@dataclass(frozen=True)
class Judged:
    """One candidate: its run, its scores, and the verdict."""

    run: Run
    gate: Gate
    scores: tuple[Score, ...]
    drift: Mapping[str, float | None]
    reasons: tuple[str, ...]
    weights: Weights | None

    @property
    def name(self) -> str:
        return self.run.candidate.name

    @property
    def verdict(self) -> str:
        return FAIL if self.reasons else PASS


@dataclass(frozen=True)
class Comparison:
    """The reference, the candidates, and how far apart they are; `to_dict` is report.json, see docs/proof.md."""

    settings: Settings
    reference: Run
    floor: NoiseFloor
    candidates: tuple[Judged, ...]
    missing: Mapping[str, str]
    command: str
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"))

    @property
    def verdict(self) -> str:
        return PASS if all(candidate.verdict == PASS for candidate in self.candidates) else FAIL

    def to_dict(self) -> dict[str, Any]:
        shots = self.settings.shots()
        return {
            "schema": SCHEMA,
            "created": self.created,
            "command": self.command,
            "verdict": self.verdict,
            "environment": _environment(self.settings.device),
            "settings": {
                "prompts": [prompt.to_dict() for prompt in self.settings.prompts],
                "seeds": list(self.settings.seeds),
                "sampling": vars(self.settings.sampling),
                "metrics": list(self.settings.metrics),
                "unavailable": dict(self.missing),
            },
            "reference": _model(self.reference, shots),
            "noise_floor": self.floor.to_dict(),
            "candidates": [_candidate(candidate, shots) for candidate in self.candidates],
        }


def compare(
    reference: str,
    candidates: Sequence[str],
    output: str | Path,
    *,
    model: str | None = None,
    prompts: str | None = None,
    image: str | Path | None = None,
    seeds: int = 1,
    steps: int | None = None,
    size: Mapping[str, int] | None = None,
    guidance: float | None = None,
    frames: int | None = None,
    metrics: Sequence[str] | None = None,
    gate: str | None = None,
    device: str | torch.device | None = None,
    on_picture: Callable[[int, int, str], None] = lambda _done, _total, _name: None,
) -> Comparison:
    """Paint the same prompts from the same noise with every model, and hold the candidates against the reference.

    reference, candidates   `[NAME=]SOURCE[,OPTION=VALUE...]`, see `candidate.read_sources`
    output      folder; what was painted there before, by the same files and settings, is not painted again
    prompts     "default", "demo", "edit" or a file; None for the set that fits the model
    image       file of the picture that is edited by all prompts that name none of their own
    size        None for the model's own area in the shape of the first prompt's picture, if it edits one
    metrics     names of picture metrics, None for all that can be computed; those that a gate has limits on are
                computed besides
    gate        a profile or a TOML file, None for the profile that fits each candidate
    on_picture  called with how many are painted, of how many, and by whom
    Raises      MezzotintError, before anything is painted if the request or a checkpoint cannot be
    """
    sources = read_sources(reference, list(candidates), model)
    if len(sources) < 2:
        raise BadRequest("there is no candidate to compare", "name at least one after the reference.")
    fixed = None if gate is None else read_gate(gate)
    for source in sources:
        source.check()
    chosen = prompts_for([source.model for source in sources], prompts, image)
    sampling = settings_for(
        sources[0].model, chosen[0].picture, steps=steps, guidance=guidance, num_frames=frames, **(size or {})
    )
    settings = Settings(
        prompts=chosen,
        seeds=tuple(range(seeds)),
        sampling=sampling,
        metrics=_checked(metrics, [fixed] if fixed else [read_gate(name) for name in PROFILES], sampling),
        device=device_of(device),
    )
    folder = _folder(Path(output))
    command = command_line(
        [reference, *candidates],
        output=output,
        model=model,
        prompts=prompts,
        image=image,
        seeds=None if seeds == 1 else seeds,
        steps=steps,
        size=size,
        guidance=guidance,
        frames=frames,
        metrics=metrics,
        gate=gate,
        device=device,
    )
    with alone_in(folder):
        return _Comparing(settings, folder, len(sources), command, on_picture).judge(sources, fixed)


def shot_of(prompt: Prompt, seed: int) -> Shot:
    return Shot(prompt.text, seed, image=prompt.image)


def _folder(output: Path) -> Path:
    """The folder that is painted into; made now, so that nothing is painted that cannot be kept."""
    try:
        (output / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"-o is {output}, and there can be no folder: {error.strerror}", "name another.") from error
    return output / RUNS


class _Comparing:
    """One comparison at work: paints into one folder."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        models: int,
        command: str,
        on_picture: Callable[[int, int, str], None],
    ) -> None:
        self.settings, self.folder, self.command = settings, folder, command
        self.shots = settings.shots()
        self.expected = [shot_of(prompt, settings.seeds[0]) for prompt in settings.prompts]
        self.kernels = [replace(shot, other_kernels=True) for shot in self.expected]
        self.others = [replace(shot, seed=settings.other_seed) for shot in self.expected]
        total = models * len(self.shots) + len(self.kernels) + len(self.others)
        self.progress = Progress(total, on_picture)

    def judge(self, sources: Sequence[Candidate], gate: Gate | None) -> Comparison:
        reference = self._paint(sources[0], [*self.shots.values(), *self.kernels, *self.others])
        missing = unavailable(self.settings.metrics, reference.frames(next(iter(self.shots.values())))[0].size)
        floor = NoiseFloor(self._floor(reference, self.kernels), self._floor(reference, self.others))
        judged = tuple(self._judge(reference, source, floor, missing, gate) for source in sources[1:])
        return Comparison(self.settings, reference, floor, judged, missing, self.command)

    def _paint(self, source: Candidate, shots: Sequence[Shot]) -> Run:
        return paint_run(self.folder, source, shots, self.settings.sampling, self.settings.device, self.progress)

    def _floor(self, reference: Run, shots: Sequence[Shot]) -> Level:
        """The reference's own pictures against others of its own, of the same prompts."""
        pairs = zip(self.expected, shots, strict=True)
        names = self.settings.metrics
        scores = [score(0, 0, reference.painted(a), reference.painted(b), names) for a, b in pairs]
        return Level(means(scores), step_means(scores))

    def _judge(
        self, reference: Run, source: Candidate, floor: NoiseFloor, missing: Mapping[str, str], gate: Gate | None
    ) -> Judged:
        run = self._paint(source, list(self.shots.values()))
        scores = tuple(
            score(prompt, seed, reference.painted(shot), run.painted(shot), self.settings.metrics)
            for (prompt, seed), shot in self.shots.items()
        )
        held = Resident(**run.facts["resident"])
        named = gate or read_gate(profile_for(held.quantized_bits, run.facts["claims"]))
        own = named.without(missing)
        drift = {name: floor.drift(name, value) for name, value in means(scores).items()}
        self.progress.say(f"{source.name}: weights")
        weights = weights_of(reference.candidate, source, self.settings.device)
        kept = own.reasons(means(scores), drift, held, weights)
        return Judged(run, own, scores, drift, (*_impostor(run), *self._unsound(reference, run), *kept), weights)

    def _unsound(self, reference: Run, run: Run) -> Iterator[str]:
        """What the output guard objects to in pictures of which the reference's are sound."""
        both = [(run.problems(shot), reference.problems(shot)) for shot in self.shots.values()]
        seen = [own[0] for own, expected in both if own and not expected]
        if seen:
            yield f"{len(seen)} of {len(both)} cannot be pictures: {seen[0]}"


def _impostor(run: Run) -> tuple[str, ...]:
    """A checkpoint that says it is quantized, and of which nothing quantized is resident."""
    if not run.facts["claims"] or run.facts["resident"]["quantized_share"] > 0:
        return ()
    kinds = ", ".join(run.facts["resident"]["bytes"])
    return (
        f"it claims to be quantized ({'; '.join(run.facts['claims'])}), and all its weights are resident as {kinds}",
    )


def _checked(names: Sequence[str] | None, gates: Sequence[Gate], sampling: Sampling) -> tuple[str, ...]:
    """The metrics asked for and those that the gates need, in the order of a report.

    Raises  BadRequest for a metric that does not exist, Unsupported for one asked for that cannot be computed here
    """
    known = tuple(metric.name for metric in PICTURE_METRICS)
    for name in names or ():
        if name not in known:
            raise BadRequest(f"there is no metric {name!r}", there_are(name, known))
    for name, reason in unavailable(names or (), (sampling.width or sampling.size, sampling.size)).items():
        raise Unsupported(f"--metrics has {name}, which {reason}", "leave it out, and all that can be are computed.")
    needed = {limit.metric for gate in gates for limit in gate.limits}
    return known if names is None else tuple(name for name in known if name in {*names, *needed})


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "mezzotint": VERSION,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": f"{device} ({Target.of(device)})" if device.type != "cpu" else "cpu",
        "machine": platform.machine(),
    }


def _model(run: Run, shots: Shots) -> dict[str, Any]:
    return {
        **run.candidate.to_dict(),
        "identity": run.facts["identity"],
        "load": run.facts["load"],
        "claims": run.facts["claims"],
        "resident": run.facts["resident"],
        "problems": list(_problems(run, shots)),
        "cost": cost(run, list(shots.values())),
    }


def _problems(run: Run, shots: Shots) -> Iterator[dict[str, Any]]:
    for (prompt, seed), shot in shots.items():
        if run.problems(shot):
            yield {"prompt": prompt, "seed": seed, "seen": list(run.problems(shot))}


def _candidate(judged: Judged, shots: Shots) -> dict[str, Any]:
    scores = judged.scores
    absent: dict[str, None] = dict.fromkeys(METRICS)
    return {
        "name": judged.name,
        "verdict": judged.verdict,
        "reasons": list(judged.reasons),
        "gate": judged.gate.to_dict(),
        "weights": None if judged.weights is None else judged.weights.to_dict(),
        "metrics": absent | means(scores),
        "intervals": intervals(scores),
        "drift": absent | dict(judged.drift),
        "worst": worst_pictures(scores),
        "trajectory": step_means(scores),
        "pictures": [score.to_dict() for score in scores],
        **_model(judged.run, shots),
    }
