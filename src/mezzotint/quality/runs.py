"""Runs of one model: painted once, kept on disk under a hash of everything that decides the pictures.

runs/KEY/run.json         the model, what was loaded, and what it cost
runs/KEY/SHOT.png         a picture, or a folder of a video's frames
runs/KEY/SHOT.safetensors the latents after each step
runs/KEY/SHOT.json        written last: times, problems, and the SHA-256 of the shot's files

Both JSON files are records (`kept.py`) that hold their own SHA-256, too. What has no record, or is not what its record
says, is painted again, and so is what was put where another run or shot belongs.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mezzotint._version import VERSION
from mezzotint.builtin import PIPELINE_INDEX, resolve
from mezzotint.costs import Laps, clocked, forget_peak, memory, now
from mezzotint.editing import SourceImage
from mezzotint.errors import BrokenFile
from mezzotint.families import Sampling
from mezzotint.hub import AnyPath, HubPath
from mezzotint.kernels import Target
from mezzotint.painting import Painting, paint
from mezzotint.pictures import save_png
from mezzotint.pipeline_index import read_index
from mezzotint.pipelines import SAMPLING_FILE, SECOND, TRANSFORMER, transformers_of
from mezzotint.quality.candidate import Candidate
from mezzotint.quality.kept import FILES, digest, has_its_files, read_record, remove, write_record
from mezzotint.quality.prompts import Prompt, request
from mezzotint.quality.resident import claim_of, resident
from mezzotint.saving import whole_file
from mezzotint.saving.stream import record_of
from mezzotint.videos import save_frames

OTHER_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention by kernels that PyTorch would not take by itself: not cuDNN's, not FlashAttention; on a CPU plain math."""
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Shot:
    """One picture or video to paint.

    other_kernels   compute the attention by other kernels, for the noise floor
    image           the picture that is edited; its bytes are part of the key, what it is called is not
    """

    prompt: str
    seed: int
    other_kernels: bool = False
    image: SourceImage | None = None

    @property
    def key(self) -> str:
        return _key({name: value for name, value in self.to_dict().items() if name != "image"})

    def to_dict(self) -> dict[str, Any]:
        own = {"prompt": self.prompt, "seed": self.seed, "other_kernels": self.other_kernels}
        return own | (self.image.to_dict() if self.image else {})

    @property
    def request(self) -> dict[str, Any]:
        """What `paint` is asked for."""
        return request([Prompt(self.prompt, image=self.image)], self.seed)

    def kernels(self) -> AbstractContextManager[Any]:
        return sdpa_kernel(OTHER_KERNELS) if self.other_kernels else nullcontext()


@dataclass(frozen=True)
class Painted:
    """What was painted for a shot.

    frames      one for a picture
    trajectory  latents after each step, [steps, ...]
    """

    frames: list[Image.Image]
    trajectory: Tensor


@dataclass(frozen=True)
class Run:
    """What one model has painted, in `folder`."""

    candidate: Candidate
    sampling: Sampling
    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        """What was loaded and what it cost. Raises BrokenFile if it was damaged after the run."""
        return _sound(self.facts_file, self.kept_facts())

    def kept_facts(self) -> dict[str, Any] | None:
        """The facts, or None if there are none, or they are damaged or those of another run."""
        facts = read_record(self.facts_file)
        return facts if facts is not None and _key(facts.get("identity")) == self.folder.name else None

    @property
    def facts_file(self) -> Path:
        return self.folder / "run.json"

    def has(self, shot: Shot) -> bool:
        """Whether the shot was painted by this run, and every file of it is what was written."""
        entry = self._kept_entry(shot)
        return entry is not None and has_its_files(self._file(shot, ".json"), entry)

    def painted(self, shot: Shot) -> Painted:
        """What was painted for a shot, read from disk."""
        return Painted(self.frames(shot), load_file(self._file(shot, ".safetensors"))["latents"])

    def frames(self, shot: Shot) -> list[Image.Image]:
        """The picture, or the frames of the video."""
        return [_opened(file) for file in self.frame_files(shot)]

    def frame_files(self, shot: Shot) -> list[Path]:
        """The PNG of the picture, or those of the video's frames."""
        return [self.folder / name for name in self._entry(shot)[FILES] if name.endswith(".png")]

    def laps(self, shot: Shot) -> Laps:
        """How long the painting took."""
        laps = self._entry(shot)["laps"]
        return Laps(laps["encode"], tuple(laps["steps"]), laps["decode"])

    def problems(self, shot: Shot) -> tuple[str, ...]:
        """What the output guard saw."""
        return tuple(self._entry(shot)["problems"])

    def _entry(self, shot: Shot) -> dict[str, Any]:
        return _sound(self._file(shot, ".json"), self._kept_entry(shot))

    def _kept_entry(self, shot: Shot) -> dict[str, Any] | None:
        entry = read_record(self._file(shot, ".json"))
        expected = self._place(shot)
        return entry if entry is not None and expected.items() <= entry.items() else None

    def _place(self, shot: Shot) -> dict[str, Any]:
        """What a record must say to be of this run and shot; the file name of what is edited may differ."""
        return {"run": self.folder.name, "shot": shot.key}

    def keep(self, shot: Shot, painting: Painting, trajectory: Tensor, laps: Laps) -> None:
        """Write a shot in place of what is left of an earlier one; its record comes last."""
        parameters = shot.to_dict() | {"model": self.candidate.name}
        record, frames, picture, latents = (self._file(shot, end) for end in (".json", "", ".png", ".safetensors"))
        for path in (record, frames, picture, latents):
            remove(path)
        if painting.videos:
            save_frames(painting.videos[0], frames, parameters)
        else:
            save_png(painting.images[0], picture, parameters)
        with whole_file(latents) as temporary:
            save_file({"latents": trajectory}, temporary)
        files = [*(sorted(frames.iterdir()) if painting.videos else [picture]), latents]
        facts = {"laps": asdict(laps), "problems": painting.problems[0]}
        write_record(record, self._place(shot) | shot.to_dict() | facts, files)

    def keep_facts(self, facts: dict[str, Any]) -> None:
        write_record(self.facts_file, facts)

    def sweep(self) -> None:
        """Remove temporary files that a killed process has left."""
        for path in self.folder.glob(".*"):
            remove(path)

    def _file(self, shot: Shot, suffix: str) -> Path:
        return self.folder / f"{shot.key}{suffix}"


def paint_run(
    folder: Path,
    candidate: Candidate,
    shots: Sequence[Shot],
    sampling: Sampling,
    device: torch.device,
    on_picture: Callable[[str], None],
) -> Run:
    """Paint what is not there yet, or damaged; the model is loaded only for that, and freed afterwards.

    on_picture   called with the model's name for each shot, painted or found
    """
    identity = run_identity(candidate, sampling, device)
    run = Run(candidate, sampling, folder / _key(identity))
    run.sweep()
    missing = _missing(run, shots)
    for _ in range(len(shots) - len(missing)):
        on_picture(candidate.name)
    if missing:
        _paint_missing(run, identity, missing, device, on_picture)
    return run


def _missing(run: Run, shots: Sequence[Shot]) -> list[Shot]:
    """The shots that are to be painted; without facts one of them is, even if all are there, for these come of it."""
    missing = [shot for shot in shots if not run.has(shot)]
    plain = [shot for shot in shots if not shot.other_kernels]
    if run.kept_facts() is None and not set(plain) & set(missing):
        return [plain[0], *missing]
    return missing


def _paint_missing(
    run: Run,
    identity: dict[str, Any],
    missing: Sequence[Shot],
    device: torch.device,
    on_picture: Callable[[str], None],
) -> None:
    forget_peak(device)
    began = now(device)
    pipe = run.candidate.load(device)
    seconds = now(device) - began
    loaded = asdict(memory(device, "loaded"))
    reports = [report for report in (pipe.load_report, pipe.load_report_2) if report is not None]
    earlier = run.kept_facts() or {}
    facts = earlier or {
        "identity": identity,
        "load": [report.to_dict() for report in reports],
        "claims": [claim for claim in (claim_of(report.path) for report in reports) if claim is not None],
        "resident": resident(pipe).to_dict(),
        "load_seconds": seconds,
    }
    forget_peak(device)
    paint(pipe, **missing[0].request, sampling=run.sampling.but(steps=WARM_UP_STEPS), guard=False)
    for shot in sorted(missing, key=lambda shot: shot.other_kernels):  # whose memory is no cost of the model's
        painted = _paint_one(pipe, run, shot, device)
        if not shot.other_kernels:
            largest = _largest(earlier.get("memory"), [loaded, asdict(memory(device, "painted"))])
            run.keep_facts(facts | {"memory": largest})
        run.keep(shot, *painted)  # last, so that no picture is without its run's facts
        on_picture(run.candidate.name)
    del pipe
    gc.collect()  # a pipeline is part of reference cycles; the next one is to find its memory free


def _paint_one(pipe: Any, run: Run, shot: Shot, device: torch.device) -> tuple[Painting, Tensor, Laps]:
    trajectory: list[Tensor] = []
    with clocked(device, transformers_of(pipe).values()) as clock, shot.kernels():

        def on_step(step: int, latents: Tensor) -> None:
            clock.on_step(step, latents)
            trajectory.append(latents)

        sampling, schedule = run.sampling, run.candidate.schedule
        painting = paint(pipe, **shot.request, sampling=sampling, on_step=on_step, guard=False, bf16_steps=schedule)
    return painting, torch.stack([latents.cpu() for latents in trajectory]), clock.laps


def _largest(earlier: list[dict[str, Any]] | None, later: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The larger of two sessions' memory, where a run was resumed."""
    if earlier is None:
        return later
    return [
        {key: max(b[key], value) if isinstance(value, int) else value for key, value in a.items()}
        for a, b in zip(earlier, later, strict=True)
    ]


def run_identity(candidate: Candidate, sampling: Sampling, device: torch.device) -> dict[str, Any]:
    """All that decides what a model paints for a prompt and a seed: code, settings, and the bytes of its files."""
    model = resolve(candidate.model)
    sources = {TRANSFORMER: candidate.transformer, SECOND: candidate.transformer_2}
    replaced = [component for component, source in sources.items() if source is not None]
    return {
        "versions": {"mezzotint": VERSION, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "device": str(Target.of(device)),
        "activations": candidate.activations,
        "backend": candidate.backend,
        "resident": candidate.resident,
        "bf16_steps": candidate.bf16_steps,
        "sampling": vars(sampling),
        "pipeline": pipeline_hash(model, replaced),
        **{name: content_hash(resolve(source)) for name, source in sources.items() if source is not None},
    }


def pipeline_hash(folder: AnyPath, replaced: Sequence[str]) -> str:
    """SHA-256 of a pipeline's files, those of the replaced components left out but for their configuration."""
    if isinstance(folder, HubPath):
        return f"{folder.repo.name}@{folder.repo.commit}"
    components = [folder / name for name in read_index(folder).components if name not in replaced]
    small = [folder / PIPELINE_INDEX, folder / SAMPLING_FILE]
    return _hash_files(folder, [*small, *components, *(folder / name / "config.json" for name in replaced)])


def content_hash(source: AnyPath) -> str:
    """SHA-256 of a checkpoint's files: a file and the config.json beside it, or all of a folder."""
    if isinstance(source, HubPath):
        return f"{source.repo.name}/{source.path}@{source.repo.commit}"
    if source.is_dir():
        return _hash_files(source, [source])
    return _hash_files(source.parent, [source, source.parent / "config.json"])


def _hash_files(root: Path, places: Sequence[Path]) -> str:
    """Of the names and bytes of files, and of all files in folders; what is not there is left out."""
    files = {file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()}
    return digest({str(file.relative_to(root)): record_of(file).sha256 for file in sorted(files)})


def _key(value: Any) -> str:
    return digest(value)[:20]


def _sound(path: Path, entries: dict[str, Any] | None) -> dict[str, Any]:
    if entries is None:
        raise BrokenFile(f"{path}: was damaged or removed after it was written", "`compare --resume` paints it again.")
    return entries


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")
