"""Arguments checked without PyTorch, so that a wrong one is answered before the seconds that its import takes.

The API checks them again, by what there is; tests/test_cli_checks.py holds the names here to those.
"""

import errno
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from mezzotint.builtin import DATA, check_exists
from mezzotint.cli.kernels import choice
from mezzotint.cli.sides import sides
from mezzotint.errors import BadRequest, CannotWrite, did_you_mean, there_are
from mezzotint.sources import split_source
from mezzotint.step_schedule import StepSchedule

ACTIVATIONS = ("as_stored", "bf16")
ATTENTIONS = ("fa3", "cudnn", "sdpa", "fa3_fp8")
BACKENDS = (
    "comfy_kitchen",
    "expand",
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
BENCH_MODELS = ("flux1-dev", "flux2-dev", "flux2-klein-4b", "wan2.2-a14b", "z-image-turbo", "qwen-image")
BENCH_SCHEMES = ("bf16", "fp8", "nvfp4", "svdquant-int4", "svdquant-nvfp4")
DEVICES = ("cpu", "cuda", "xpu", "mps", "hip", "hpu", "mtia", "npu", "xla", "maia", "vulkan", "meta")
GATES = tuple(sorted(file.stem for file in (DATA / "gates").glob("*.toml")))
METRICS = ("psnr", "ssim", "ms_ssim", "flip", "lpips", "st_lpips", "mae")
PROMPT_SETS = tuple(sorted(file.stem for file in (DATA / "prompts").glob("*.txt")))
RESIDENT = ("stored", "fp8")
SCHEMES = ("awq_w4a16", "bf16", "fp8", "int8", "mxfp8", "nvfp4", "svdquant_int4", "svdquant_nvfp4")
NO_ACTIVATIONS = "activations is {!r}"
TARGETS = ("bf16", "comfy", "mezzotint", "modelopt", "nunchaku", "row-major")


def check_name(message: str, given: str | None, known: Iterable[str]) -> None:
    """Raise BadRequest, with the nearest of the known names, if what is given is none of them.

    message   what is wrong then, as the API says it, with {!r} for what is given
    """
    names = tuple(known)
    if given is not None and given not in names:
        raise BadRequest(message.format(given), there_are(given, names))


def check_sources(*names: str | None) -> None:
    """Raise NotACheckpoint for a model that is neither built in nor here, and cannot be on the Hub."""
    for name in names:
        if name is not None:
            check_exists(name)


def check_candidates(*sources: str) -> None:
    """Raise what is wrong with `[NAME=]SOURCE[,OPTION=VALUE...]`, as `compare` and `diagnose` take them."""
    for text in sources:
        _, source, options = split_source(text)
        check_sources(source, options.get("transformer_2"))
        check_kernels([options["backend"]] if "backend" in options else None, options.get("resident"))
        check_name(NO_ACTIVATIONS, options.get("activations"), ACTIVATIONS)
        check_steps(options.get("bf16_steps"))


def check_kernels(backend: Sequence[str] | None, resident: str | None = None, attention: str | None = None) -> None:
    """Raise BadRequest for --backend, --resident or --attention that do not exist."""
    asked = choice(backend or ())
    for scheme in asked if isinstance(asked, dict) else ():
        check_name("no scheme is called {!r}", scheme, SCHEMES)
    for name in asked.values() if isinstance(asked, dict) else (asked,):
        check_name("no backend is called {!r}", name, BACKENDS)
    check_name("resident is {!r}", resident, RESIDENT)
    check_name("no attention is called {!r}", attention, ATTENTIONS)


def check_device(name: str | None) -> None:
    """Raise BadRequest for a kind of device that is misspelt; whether there is one here, PyTorch knows."""
    kind = (name or "cpu").partition(":")[0]
    if kind not in DEVICES and did_you_mean(kind, DEVICES):
        raise BadRequest(f"no kind of device is called {kind!r}", there_are(kind, DEVICES))


def check_steps(*schedules: str | None) -> None:
    """Raise BadRequest for a step schedule that is not written FIRST+LAST."""
    for written in schedules:
        if written is not None:
            StepSchedule.read(written)


def check_request(prompts: str | None, image: Path | None, *sizes: str | None) -> None:
    """Raise BadRequest for --prompts, --image or --size that cannot be."""
    if prompts is not None and prompts not in PROMPT_SETS and not Path(prompts).is_file():
        hint = f"{did_you_mean(prompts, PROMPT_SETS)}the sets are: {', '.join(PROMPT_SETS)}."
        raise BadRequest(f"--prompts is {prompts!r}, and no such file is there", hint)
    if image is not None:
        from mezzotint.editing import read_image  # Pillow takes a while, too

        read_image(image)
    for size in sizes:
        sides(size)


def check_gate(gate: str | None) -> None:
    """Raise BadRequest for a gate that is neither a profile nor a file."""
    if gate is not None and gate not in GATES and not Path(gate).is_file():
        hint = f"{did_you_mean(gate, GATES)}the profiles are: {', '.join(GATES)}."
        raise BadRequest(f"--gate is {gate!r}, and no such file is there", hint)


def check_writable(option: str, path: Path | None) -> None:
    """Raise CannotWrite if no file or folder could appear at `path`; nothing is left where it is tried."""
    if path is None:
        return
    try:
        _ = path.is_dir() or path.exists()
        folder = next(place for place in (path.parent, *path.parent.parents) if place.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CannotWrite(f"{option} is {path}, and nothing can be written there: {error.strerror}") from error


def check_file(option: str, path: Path | None) -> None:
    """Raise CannotWrite if `path` is a folder, or no file could appear there."""
    check_writable(option, path)
    if path is not None and path.is_dir():
        raise CannotWrite(f"{option} is {path}, and that is a folder", "name a file.")
