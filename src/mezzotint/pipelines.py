"""A diffusers pipeline around a quantized transformer, and the pictures it paints."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.builtin import resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import BadRequest, NotACheckpoint, UnknownFormat
from mezzotint.families import Sampling, families
from mezzotint.kernels import AS_STORED
from mezzotint.loading import LoadReport, plan
from mezzotint.loading import load as load_model

TRANSFORMER = "transformer"
SAMPLING_FILE = "sampling.json"


@dataclass(frozen=True)
class Painting:
    """Pictures, one a prompt, and the latents that the last step left: [prompts, ...] in the transformer's dtype."""

    images: list[Any]
    latents: Tensor


def load(
    model: str | Path = "demo",
    transformer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activations: str = AS_STORED,
    backend: str | None = None,
) -> Any:
    """A ready diffusers pipeline whose transformer was read from `transformer`, quantized or not.

    model         folder of a diffusers pipeline, or "demo"
    transformer   file or folder of a transformer in any format that `inspect` knows; None for the pipeline's own
    device        None for the GPU if there is one
    dtype         of everything that is not quantized; scales keep their own
    activations   "as_stored" quantizes each layer's input as the checkpoint says, "bf16" leaves it alone
    backend       name of the one backend to use, None for the best that can
    Returns       a diffusers pipeline; its `load_report` is a LoadReport
    Raises        MezzotintError, before any weight is read if the files do not fit together

    >>> pipe = load("demo", transformer="demo-fp8")
    >>> print(pipe.load_report)
    """
    from diffusers import DiffusionPipeline

    folder = resolve(model)
    index = _pipeline_index(folder)
    checkpoint = Checkpoint.open(transformer if transformer is not None else folder / TRANSFORMER)
    place = torch.device(device) if device is not None else best_device()
    module, report = load_transformer(checkpoint, index, folder, place, dtype, activations, backend)
    pipe = DiffusionPipeline.from_pretrained(folder, transformer=module, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(place)
    pipe.load_report = report
    return pipe


def load_transformer(
    checkpoint: Checkpoint,
    index: dict[str, Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    activations: str,
    backend: str | None,
) -> tuple[nn.Module, LoadReport]:
    """The transformer alone, with the configuration that lies beside it or else the pipeline's."""
    model_class = index.get(TRANSFORMER, [None, None])[1]
    header, family = checkpoint.header, checkpoint.family
    if family.transformer != model_class:
        raise UnknownFormat(
            f"{header.path}: is a {family.title} transformer ({family.transformer}), and {folder} has a {model_class}",
            "name a transformer of the same family as the pipeline.",
        )
    config = header.config if "_class_name" in header.config else _component_config(folder)
    module = meta_model(str(model_class), config)
    report = load_model(plan(checkpoint, module, activations), module, device, dtype, backend)
    return module.eval(), report


def meta_model(class_name: str, config: dict[str, Any] | Any) -> nn.Module:
    """The diffusers class built from its configuration with every parameter on the meta device."""
    import diffusers
    from accelerate import init_empty_weights

    entries = {key: value for key, value in config.items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=False):
        model: nn.Module = getattr(diffusers, class_name).from_config(entries)
    return model


def best_device() -> torch.device:
    """The accelerator that PyTorch found, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def sampling_of(model: str | Path) -> Sampling:
    """Recommended settings: the pipeline folder's own sampling.json, or else those of its family."""
    folder = resolve(model)
    own = folder / SAMPLING_FILE
    if own.is_file():
        known = {field.name for field in fields(Sampling)}
        return Sampling(**{key: value for key, value in json.loads(own.read_text()).items() if key in known})
    class_name = _pipeline_index(folder).get(TRANSFORMER, [None, None])[1]
    return next(family.sampling for family in families().values() if family.transformer == class_name)


def paint(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    on_step: Callable[[int, Tensor], None] = lambda _step, _latents: None,
) -> Painting:
    """Paint one picture for each prompt; picture i starts from the noise of seeds[i], drawn on the CPU.

    seeds      None for 0, 1, 2, ...
    sampling   None for the model's recommended settings
    on_step    called after each step with its number, counted over all pictures, and the latents
    Raises     BadRequest if there is not one seed for each prompt
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise BadRequest(f"{len(prompts)} prompts and {len(seeds)} seeds", "give one seed for each prompt.")
    sampling = sampling or sampling_of(pipe.config._name_or_path)
    images: list[Any] = []
    latents: list[Tensor] = []
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        image, last = _paint_one(pipe, prompt, seed, sampling, partial(_count_on, on_step, number * sampling.steps))
        images.append(image)
        latents.append(last)
    return Painting(images, torch.cat(latents))


def _count_on(on_step: Callable[[int, Tensor], None], before: int, step: int, latents: Tensor) -> None:
    on_step(before + step, latents)


def _paint_one(
    pipe: Any, prompt: str, seed: int, sampling: Sampling, on_step: Callable[[int, Tensor], None]
) -> tuple[Any, Tensor]:
    """One picture and its last latents. Alone in its batch, so that it does not depend on its neighbours."""
    last: list[Tensor] = []

    def keep(_pipe: Any, step: int, _timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        last[:] = [values["latents"]]
        on_step(step, values["latents"])
        return {}

    extra = {} if sampling.max_sequence_length is None else {"max_sequence_length": sampling.max_sequence_length}
    result = pipe(
        prompt=prompt,
        height=sampling.size,
        width=sampling.size,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=keep,
        **extra,
    )
    return result.images[0], last[0]


def _pipeline_index(folder: Path) -> dict[str, Any]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise NotACheckpoint(
            f"{folder}: no diffusers pipeline is there (model_index.json is missing)",
            "name the folder of a pipeline as --model, and the quantized file as --transformer.",
        )
    entries: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    return entries


def _component_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / TRANSFORMER / "config.json").read_text(encoding="utf-8"))
    return config
