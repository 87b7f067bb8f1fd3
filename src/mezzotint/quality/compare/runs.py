"""Generated outputs of one model, stored under a hash of everything that determines the images.

runs/RUN/run.json             the model, its load reports and its cost
runs/RUN/REQUEST.png          an image, or a folder with the frames of a video
runs/RUN/REQUEST.safetensors  the latents after each step
runs/RUN/REQUEST.json         times, problems and the SHA-256 of the files; written last

Both JSON files are records (`records.py`) and contain their own SHA-256. An output is generated
again if its record is absent, does not match the files, or names another run or request.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mezzotint._version import VERSION
from mezzotint.builtin import PIPELINE_INDEX
from mezzotint.costs import StageTimes, memory, reset_peak_memory, synchronized_time, time_stages
from mezzotint.errors import BrokenFile
from mezzotint.families import Sampling
from mezzotint.generation.generate import GenerationResult, generate
from mezzotint.generation.image_io import save_png
from mezzotint.generation.pipeline import LoadedPipeline, transformers_of
from mezzotint.generation.pipeline_index import PipelineIndex
from mezzotint.generation.sampling_file import SAMPLING_FILE
from mezzotint.generation.source_image import SourceImage
from mezzotint.generation.video_io import save_frames
from mezzotint.hub import AnyPath, HubPath
from mezzotint.kernels import Target
from mezzotint.quality.candidate import ModelSpec
from mezzotint.quality.compare.records import (
    FILES,
    digest,
    has_its_files,
    read_record,
    remove,
    write_record,
)
from mezzotint.quality.prompts import Prompt, generate_arguments
from mezzotint.quality.resident import measure_resident, quantization_claim
from mezzotint.saving import atomic_write
from mezzotint.saving.stream import hash_file

OTHER_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels that PyTorch does not select by default: neither cuDNN nor FlashAttention.
On a CPU only MATH is available."""
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class ImageRequest:
    """One image or video to generate.

    other_kernels  use other attention kernels, to measure the noise floor
    image                  image to edit; the key depends on its bytes and not on its file name
    """

    prompt: str
    seed: int
    other_kernels: bool = False
    image: SourceImage | None = None

    @property
    def key(self) -> str:
        """Return the stem of the output's file names."""
        return _key({name: value for name, value in self.to_dict().items() if name != "image"})

    def to_dict(self) -> dict[str, Any]:
        fields = {
            "prompt": self.prompt,
            "seed": self.seed,
            "other_kernels": self.other_kernels,
        }
        return fields | (self.image.to_dict() if self.image else {})

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments for `generate`."""
        return generate_arguments([Prompt(self.prompt, image=self.image)], self.seed)

    def attention_kernels(self) -> AbstractContextManager[Any]:
        """Return a context that selects the attention kernels of this request."""
        return sdpa_kernel(OTHER_KERNELS) if self.other_kernels else nullcontext()


@dataclass(frozen=True)
class GeneratedOutput:
    """The output for one request.

    frames      one frame for an image
    trajectory  latents after each step, [steps, ...]
    """

    frames: list[Image.Image]
    trajectory: Tensor


@dataclass(frozen=True)
class Run:
    """The outputs of one model in `folder`."""

    candidate: ModelSpec
    sampling: Sampling
    folder: Path

    @property
    def info(self) -> dict[str, Any]:
        """Return the load reports and the cost. Raises BrokenFile if the file is damaged."""
        return _require_record(self.info_file, self.stored_info())

    def stored_info(self) -> dict[str, Any] | None:
        """Return the stored info, or None if it is absent, damaged or from another run."""
        info = read_record(self.info_file)
        return info if info is not None and _key(info.get("identity")) == self.folder.name else None

    @property
    def info_file(self) -> Path:
        """Return the path of run.json."""
        return self.folder / "run.json"

    def has(self, request: ImageRequest) -> bool:
        """Return whether this run contains an intact output for the request."""
        entry = self._stored_entry(request)
        return entry is not None and has_its_files(self._file(request, ".json"), entry)

    def output(self, request: ImageRequest) -> GeneratedOutput:
        """Read the output for a request from disk."""
        return GeneratedOutput(
            self.frames(request), load_file(self._file(request, ".safetensors"))["latents"]
        )

    def frames(self, request: ImageRequest) -> list[Image.Image]:
        """Read the image, or the frames of the video."""
        return [_open_image(file) for file in self.frame_files(request)]

    def frame_files(self, request: ImageRequest) -> list[Path]:
        """Return the PNG file of the image, or the PNG files of the video's frames."""
        return [self.folder / name for name in self._entry(request)[FILES] if name.endswith(".png")]

    def stage_times(self, request: ImageRequest) -> StageTimes:
        """Return the time that each stage of the generation took."""
        stages = self._entry(request)["stages"]
        return StageTimes(stages["encode"], tuple(stages["steps"]), stages["decode"])

    def problems(self, request: ImageRequest) -> tuple[str, ...]:
        """Return the problems that the output check found."""
        return tuple(self._entry(request)["problems"])

    def _entry(self, request: ImageRequest) -> dict[str, Any]:
        return _require_record(self._file(request, ".json"), self._stored_entry(request))

    def _stored_entry(self, request: ImageRequest) -> dict[str, Any] | None:
        entry = read_record(self._file(request, ".json"))
        expected = self._identity(request)
        return entry if entry is not None and expected.items() <= entry.items() else None

    def _identity(self, request: ImageRequest) -> dict[str, Any]:
        """Return the entries that identify a record, without the name of the source image."""
        return {"run": self.folder.name, "request": request.key}

    def save(
        self,
        request: ImageRequest,
        result: GenerationResult,
        trajectory: Tensor,
        stages: StageTimes,
    ) -> None:
        """Write the output for a request. Remove the remains of an earlier one first."""
        parameters = request.to_dict() | {"model": self.candidate.name}
        record, frames, image, latents = (
            self._file(request, end) for end in (".json", "", ".png", ".safetensors")
        )
        for path in (record, frames, image, latents):
            remove(path)
        if result.videos:
            save_frames(result.videos[0], frames, parameters)
        else:
            save_png(result.images[0], image, parameters)
        with atomic_write(latents) as temporary:
            save_file({"latents": trajectory}, temporary)
        files = [*(sorted(frames.iterdir()) if result.videos else [image]), latents]
        measured = {"stages": asdict(stages), "problems": result.problems[0]}
        # The record comes last: an output without a record counts as missing.
        write_record(record, self._identity(request) | request.to_dict() | measured, files)

    def save_info(self, info: dict[str, Any]) -> None:
        """Write run.json."""
        write_record(self.info_file, info)

    def remove_temporary_files(self) -> None:
        """Remove temporary files that a killed process left."""
        for path in self.folder.glob(".*"):
            remove(path)

    def _file(self, request: ImageRequest, suffix: str) -> Path:
        return self.folder / f"{request.key}{suffix}"


def generate_run(
    folder: Path,
    candidate: ModelSpec,
    requests: Sequence[ImageRequest],
    sampling: Sampling,
    device: torch.device,
    on_image: Callable[[str], None],
) -> Run:
    """Generate the outputs that are missing or damaged.

    The model is loaded only if an output is missing, and freed afterwards.

    on_image   called with the model's name for each request, generated or found
    """
    identity = run_identity(candidate, sampling, device)
    run = Run(candidate, sampling, folder / _key(identity))
    run.remove_temporary_files()
    missing = _missing(run, requests)
    for _ in range(len(requests) - len(missing)):
        on_image(candidate.name)
    if missing:
        _generate_missing(run, identity, missing, device, on_image)
    return run


def _missing(run: Run, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """Return the requests to generate.

    Without a run.json at least one request is generated, because run.json records its memory use.
    """
    missing = [request for request in requests if not run.has(request)]
    default = [request for request in requests if not request.other_kernels]
    if run.stored_info() is None and not set(default) & set(missing):
        return [default[0], *missing]
    return missing


def _generate_missing(
    run: Run,
    identity: dict[str, Any],
    missing: Sequence[ImageRequest],
    device: torch.device,
    on_image: Callable[[str], None],
) -> None:
    reset_peak_memory(device)
    started = synchronized_time(device)
    loaded_pipeline = run.candidate.load(device)
    pipe = loaded_pipeline.pipe
    seconds = synchronized_time(device) - started
    loaded = asdict(memory(device, "loaded"))
    earlier = run.stored_info() or {}
    info = earlier or _load_info(loaded_pipeline, identity, seconds)
    reset_peak_memory(device)
    generate(
        pipe,
        **missing[0].arguments,
        sampling=run.sampling.replace(steps=WARM_UP_STEPS),
        check_output=False,
    )
    # Requests with other kernels come last, because the model's peak memory must not include it.
    for request in sorted(missing, key=lambda request: request.other_kernels):
        output = _generate_one(pipe, run, request, device)
        if not request.other_kernels:
            generated = asdict(memory(device, "generated"))
            run.save_info(info | {"memory": _largest(earlier.get("memory"), [loaded, generated])})
        # After run.json, so that no output exists without it.
        run.save(request, *output)
        on_image(run.candidate.name)
    del pipe, loaded_pipeline
    gc.collect()  # A pipeline is part of reference cycles; the next one needs its memory.


def _load_info(loaded: LoadedPipeline, identity: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the entries of run.json that are known after loading."""
    reports = list(loaded.reports.values())
    claims = (quantization_claim(report.path) for report in reports)
    return {
        "identity": identity,
        "load": [report.to_dict() for report in reports],
        "claims": [claim for claim in claims if claim is not None],
        "resident": measure_resident(loaded.pipe).to_dict(),
        "load_seconds": seconds,
    }


def _generate_one(
    pipe: DiffusionPipeline, run: Run, request: ImageRequest, device: torch.device
) -> tuple[GenerationResult, Tensor, StageTimes]:
    trajectory: list[Tensor] = []
    with (
        time_stages(device, transformers_of(pipe).values()) as timer,
        request.attention_kernels(),
    ):

        def on_step(step: int, latents: Tensor) -> None:
            timer.on_step(step, latents)
            trajectory.append(latents)

        result = generate(
            pipe,
            **request.arguments,
            sampling=run.sampling,
            on_step=on_step,
            check_output=False,
            bf16_steps=run.candidate.schedule,
        )
    return result, torch.stack([latents.cpu() for latents in trajectory]), timer.stages


def _largest(
    earlier: list[dict[str, Any]] | None, later: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the larger memory figures of two sessions, for a run that was resumed."""
    if earlier is None:
        return later
    return [
        {key: max(b[key], value) if isinstance(value, int) else value for key, value in a.items()}
        for a, b in zip(earlier, later, strict=True)
    ]


def run_identity(candidate: ModelSpec, sampling: Sampling, device: torch.device) -> dict[str, Any]:
    """Return everything that determines the output for a prompt and a seed.

    This includes library versions, settings and the hashes of the model's files.
    """
    source = candidate.source
    return {
        "versions": {
            "mezzotint": VERSION,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "device": str(Target.of(device)),
        "activations": candidate.activations,
        "backend": candidate.backend,
        "resident": candidate.resident,
        "bf16_steps": candidate.bf16_steps,
        "sampling": vars(sampling),
        "pipeline": pipeline_hash(source.index, list(source.replaced)),
        **{name: content_hash(path) for name, path in source.replaced.items()},
    }


def pipeline_hash(index: PipelineIndex, replaced: Sequence[str]) -> str:
    """Return the SHA-256 of a pipeline's files.

    Replaced components contribute only their configuration.
    """
    folder = index.folder
    if isinstance(folder, HubPath):
        return f"{folder.repo.name}@{folder.repo.commit}"
    components = [folder / name for name in index.components if name not in replaced]
    small = [folder / PIPELINE_INDEX, folder / SAMPLING_FILE]
    return _hash_files(
        folder, [*small, *components, *(folder / name / "config.json" for name in replaced)]
    )


def content_hash(source: AnyPath) -> str:
    """Return the SHA-256 of a checkpoint: a file and its config.json, or all files of a folder."""
    if isinstance(source, HubPath):
        return f"{source.repo.name}/{source.path}@{source.repo.commit}"
    if source.is_dir():
        return _hash_files(source, [source])
    return _hash_files(source.parent, [source, source.parent / "config.json"])


def _hash_files(root: Path, paths: Sequence[Path]) -> str:
    """Hash the names and bytes of files and of all files in folders. Absent paths are ignored."""
    files = {
        file
        for path in paths
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    }
    return digest({str(file.relative_to(root)): hash_file(file).sha256 for file in sorted(files)})


def _key(value: Any) -> str:
    return digest(value)[:20]


def _require_record(path: Path, record: dict[str, Any] | None) -> dict[str, Any]:
    """Return the record. Raises BrokenFile if there is none."""
    if record is None:
        raise BrokenFile(
            f"{path}: was damaged or removed after it was written",
            "`compare --resume` generates it again.",
        )
    return record


def _open_image(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
