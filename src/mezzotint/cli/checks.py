"""Checks of arguments without PyTorch, whose import takes seconds.

The API checks its arguments against its registries. tests/cli/test_cli_checks.py asserts that the
names in this module are equal to the registries.
"""

import errno
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from mezzotint.builtin import DATA, check_exists
from mezzotint.cli.backend_options import parse_backend_choice
from mezzotint.cli.size_option import parse_size
from mezzotint.errors import BadRequest, CannotWrite, did_you_mean, there_are
from mezzotint.generation.step_schedule import StepSchedule
from mezzotint.quality.source_spec import split_source

ACTIVATIONS = ("as_stored", "bf16")
ATTENTIONS = ("fa3", "cudnn", "sdpa", "fa3_fp8")
BACKENDS = (
    "comfy_kitchen",
    "dequant_fp8",
    "flashinfer",
    "gemv",
    "humming",
    "nunchaku_int4",
    "nunchaku_nvfp4",
    "reference",
    "scaled_mm",
    "torch_nvfp4",
    "weight_only",
)
BENCH_MODELS = (
    "flux1-dev",
    "flux2-dev",
    "flux2-klein-4b",
    "wan2.2-a14b",
    "z-image-turbo",
    "qwen-image",
)
BENCH_SCHEMES = ("bf16", "fp8", "nvfp4", "svdquant-int4", "svdquant-nvfp4")
DEVICES = (
    "cpu",
    "cuda",
    "xpu",
    "mps",
    "hip",
    "hpu",
    "mtia",
    "npu",
    "xla",
    "maia",
    "vulkan",
    "meta",
)
GATES = tuple(sorted(file.stem for file in (DATA / "gates").glob("*.toml")))
METRICS = ("psnr", "ssim", "ms_ssim", "flip", "lpips", "st_lpips", "mae")
PROMPT_SETS = tuple(sorted(file.stem for file in (DATA / "prompts").glob("*.txt")))
RESIDENT = ("stored", "fp8")
SCHEMES = (
    *("awq_w4a16", "bf16", "codebook4", "fp8", "fp8_groups", "int8", "llm_int8", "mxfp8", "nvfp4"),
    *(f"int{bits}_groups" for bits in range(2, 9)),
    *("svdquant_int4", "svdquant_nvfp4"),
)
NO_ACTIVATIONS = "activations is {!r}"
TARGETS = ("bf16", "comfy", "mezzotint", "modelopt", "nunchaku", "row-major")


def check_name(message: str, name: str | None, supported: Iterable[str]) -> None:
    """Raise BadRequest, with similar names in the hint, if a name is not supported.

    message   error message, with {!r} for the name
    """
    names = tuple(supported)
    if name is not None and name not in names:
        raise BadRequest(message.format(name), there_are(name, names))


def check_sources(*names: str | None) -> None:
    """Raise NotACheckpoint for a name that is no built-in model, no path and no Hub id."""
    for name in names:
        if name is not None:
            check_exists(name)


def check_candidates(*sources: str) -> None:
    """Check `[NAME=]SOURCE[,OPTION=VALUE...]`, the sources of `compare` and `diagnose`."""
    for text in sources:
        _, source, options = split_source(text)
        check_sources(source, options.get("transformer_2"))
        check_kernels(
            [options["backend"]] if "backend" in options else None, options.get("resident")
        )
        check_name(NO_ACTIVATIONS, options.get("activations"), ACTIVATIONS)
        check_steps(options.get("bf16_steps"))


def check_kernels(
    backend: Sequence[str] | None, resident: str | None = None, attention: str | None = None
) -> None:
    """Raise BadRequest for an unsupported value of --backend, --resident or --attention."""
    choice = parse_backend_choice(backend or ())
    for scheme in choice if isinstance(choice, dict) else ():
        check_name("no scheme is called {!r}", scheme, SCHEMES)
    for name in choice.values() if isinstance(choice, dict) else (choice,):
        check_name("no backend is called {!r}", name, BACKENDS)
    check_name("resident is {!r}", resident, RESIDENT)
    check_name("no attention is called {!r}", attention, ATTENTIONS)


def check_device(name: str | None) -> None:
    """Raise BadRequest for a misspelled device type. PyTorch checks whether the device exists."""
    kind = (name or "cpu").partition(":")[0]
    if kind not in DEVICES and did_you_mean(kind, DEVICES):
        raise BadRequest(f"no kind of device is called {kind!r}", there_are(kind, DEVICES))


def check_steps(*schedules: str | None) -> None:
    """Raise BadRequest for a step schedule that does not have the form FIRST+LAST."""
    for schedule in schedules:
        if schedule is not None:
            StepSchedule.parse(schedule)


def check_request(prompts: str | None, image: Path | None, *sizes: str | None) -> None:
    """Raise BadRequest for an invalid value of --prompts, --image or --size."""
    if prompts is not None and prompts not in PROMPT_SETS and not Path(prompts).is_file():
        hint = f"{did_you_mean(prompts, PROMPT_SETS)}the sets are: {', '.join(PROMPT_SETS)}."
        raise BadRequest(f"--prompts is {prompts!r}, and this file does not exist", hint)
    if image is not None:
        # The import of Pillow is slow, too.
        from mezzotint.generation.source_image import read_source_image

        read_source_image(image)
    for size in sizes:
        parse_size(size)


def check_gate(gate: str | None) -> None:
    """Raise BadRequest for a gate that is neither a profile nor a file."""
    if gate is not None and gate not in GATES and not Path(gate).is_file():
        hint = f"{did_you_mean(gate, GATES)}the profiles are: {', '.join(GATES)}."
        raise BadRequest(f"--gate is {gate!r}, and this file does not exist", hint)


def check_writable(option: str, path: Path | None) -> None:
    """Raise CannotWrite if a file or folder cannot be created at `path`.

    A temporary file in the nearest existing folder shows that; it is removed at once.
    """
    if path is None:
        return
    try:
        _ = path.is_dir() or path.exists()
        folder = next(parent for parent in (path.parent, *path.parent.parents) if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CannotWrite(
            f"{option} is {path}, and nothing can be written there: {error.strerror}"
        ) from error


def check_file(option: str, path: Path | None) -> None:
    """Raise CannotWrite if `path` is a folder, or a file cannot be created there."""
    check_writable(option, path)
    if path is not None and path.is_dir():
        raise CannotWrite(f"{option} is {path}, which is a folder", "name a file.")
