"""Names that arguments accept, known without PyTorch, whose import takes seconds.

The API checks its arguments against its registries. tests/cli/test_cli_checks.py asserts that the
names in this module are those of the registries. A plugin declares its names in its objects, so
that only the registry knows them: it is imported if a plugin is installed and a name is unknown.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points

from mezzotint.builtin import DATA
from mezzotint.errors import require_known


@dataclass(frozen=True)
class Names:
    """The names of one kind of object.

    kind        what messages call such an object
    built_in    names that Mezzotint declares
    plugins     entry point group of plugins that declare more; see `mezzotint.discover`
    registry    returns all names, those of plugins included
    """

    kind: str
    built_in: tuple[str, ...]
    plugins: str | None = None
    registry: Callable[[], Iterable[str]] = tuple

    def check(self, name: str) -> None:
        """Raise BadRequest, with similar names in the hint, if there is no such object."""
        if name not in self.built_in:
            has_plugins = self.plugins is not None and entry_points(group=self.plugins)
            require_known(self.kind, name, self.registry() if has_plugins else self.built_in)

    def __str__(self) -> str:
        """Return the built-in names for a help text: a, b or c."""
        *first, last = self.built_in
        return f"{', '.join(first)} or {last}"


def _schemes() -> Iterable[str]:
    from mezzotint.schemes import schemes

    return schemes()


def _encoders() -> Iterable[str]:
    from mezzotint.schemes import encoders

    return encoders()


def _backends() -> Iterable[str]:
    from mezzotint.kernels import all_backends

    return all_backends()


def _targets() -> Iterable[str]:
    from mezzotint.formats import targets

    return targets()


def _bench_models() -> Iterable[str]:
    from mezzotint.bench import PUBLISHED_MODELS

    return PUBLISHED_MODELS


def _bench_schemes() -> Iterable[str]:
    from mezzotint.bench import BASELINE, ROTATED, SCHEMES

    return (BASELINE, *SCHEMES, *ROTATED)


ACTIVATIONS = Names("activation mode", ("as_stored", "bf16"))
ATTENTIONS = Names("attention backend", ("fa3", "cudnn", "sdpa", "fa3_fp8"))
BACKENDS = Names(
    "backend",
    (
        "comfy_kitchen",
        "dequant_fp8",
        "dequantize",
        "flashinfer",
        "gemv",
        "humming",
        "int8_mm",
        "nunchaku_int4",
        "nunchaku_nvfp4",
        "reference",
        "scaled_mm",
        "torch_nvfp4",
        "weight_only",
    ),
    "mezzotint.backends",
    _backends,
)
BENCH_MODELS = Names(
    "model",
    (
        "flux1-dev",
        "flux2-dev",
        "flux2-klein-4b",
        "wan2.2-a14b",
        "z-image-turbo",
        "qwen-image",
    ),
    "mezzotint.families",
    _bench_models,
)
BENCH_SCHEMES = Names(
    "scheme",
    (
        *("bf16", "fp8", "mxfp8", "nvfp4", "svdquant-int4", "svdquant-nvfp4", "codebook4"),
        *("gguf_q8_0", "gguf_q6_k", "gguf_q5_k", "gguf_q5_1", "gguf_q5_0", "gguf_q4_k"),
        *("gguf_q4_1", "gguf_q4_0", "gguf_q3_k", "gguf_q2_k", "gguf_iq4_nl", "gguf_iq4_xs"),
        *("int2_groups", "int3_groups", "int4_groups", "int5_groups", "int6_groups"),
        *("int7_groups", "int8_groups", "int8", "int8-convrot", "int4_rows", "int4_rows-convrot"),
        *("int4_rows_a8", "w4a8", "w4a8-convrot"),
    ),
    "mezzotint.schemes",
    _bench_schemes,
)
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
ENCODERS = Names(
    "scheme",
    (
        *("awq_w4a16", "fp8", "gguf_q4_0", "gguf_q4_1", "gguf_q5_0", "gguf_q5_1", "gguf_q8_0"),
        *("int8", "mxfp8", "nvfp4", "svdquant_int4", "svdquant_nvfp4"),
    ),
    "mezzotint.schemes",
    _encoders,
)
GATES = tuple(sorted(file.stem for file in (DATA / "gates").glob("*.toml")))
METRICS = Names("metric", ("psnr", "ssim", "ms_ssim", "flip", "lpips", "st_lpips", "mae"))
PROMPT_SETS = tuple(sorted(file.stem for file in (DATA / "prompts").glob("*.txt")))
RESIDENCY_MODES = Names("residency mode", ("stored", "fp8"))
SCHEMES = Names(
    "scheme",
    (
        *("awq_centered", "awq_w4a16", "bf16", "codebook4", "fp8"),
        *("fp8_e5m2", "fp8_groups", "gguf_iq4_nl", "gguf_iq4_xs", "gguf_q2_k"),
        *("gguf_q3_k", "gguf_q4_0", "gguf_q4_1", "gguf_q4_k", "gguf_q5_0"),
        *("gguf_q5_1", "gguf_q5_k", "gguf_q6_k", "gguf_q8_0", "int2_groups"),
        *("int2_shifted", "int3_groups", "int4_groups", "int4_rows", "int4_rows_a8"),
        *("int4_shifted", "int5_groups", "int6_groups", "int7_groups", "int8"),
        *("int8_groups", "llm_int8", "mxfp8", "nvfp4", "svdquant_int4"),
        *("svdquant_nvfp4", "w4a8", "w6a8"),
    ),
    "mezzotint.schemes",
    _schemes,
)
TARGETS = Names(
    "target",
    (
        *("mezzotint", "bf16", "modelopt", "comfy", "nunchaku", "row-major"),
        *("gguf", "gguf-q8_0", "gguf-q4_0"),
    ),
    "mezzotint.writers",
    _targets,
)
