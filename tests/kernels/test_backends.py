"""Backends of optional libraries and of GPUs that we do not have, up to the library's call.

Each runs on the CPU with fake library functions (tests/stand_ins.py), which read the bytes as the
library documents them. The result is compared with `reference`. No test here shows that a kernel
works on its GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from safetensors.torch import load_file

from mezzotint.kernels import (
    BF16_ACTIVATIONS,
    GPU_GENERATIONS,
    QUANTIZED_ACTIVATIONS,
    Can,
    Cannot,
    Target,
    WeightSpec,
    get_backend,
    select,
)
from mezzotint.kernels.backends import humming as humming_backend
from mezzotint.kernels.backends.torch_nvfp4 import quantize_activation_nvfp4
from mezzotint.kernels.nvfp4_gemm import BLOCKED_SCALES
from mezzotint.kernels.optional_library import OptionalLibrary
from mezzotint.layouts import convert
from mezzotint.nn import QuantLinear
from mezzotint.schemes import NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4
from mezzotint.tensor import PLAIN, QuantTensor
from support import fake_libraries as stand_ins
from support import four_bit_weights as four_bits
from support.backend_cases import (
    FORMS,
    FP4_FORMS,
    IN,
    OUT,
    ROWS,
    RUNS,
    expected,
    sample,
)
from support.errors_of import relative_error

AMPERE, ADA, HOPPER, BLACKWELL, GEFORCE = (
    GPU_GENERATIONS[gpu] for gpu in ("A100", "RTX 40", "H100", "B200", "RTX 50")
)
ERROR = 4e-3
"""The output and the low-rank branch are rounded to BF16, which adds 1.7e-3 each."""
INTERPRETED_ERROR = 5e-3
"""Triton's interpreter cuts off numbers where a GPU rounds them to BF16."""


GPU = {
    **dict.fromkeys(("dequantize", "humming", "weight_only"), AMPERE),
    "nunchaku_int4": ADA,
    "nunchaku_nvfp4": GEFORCE,
}
WITHOUT_LIBRARY = ("dequantize", "weight_only")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Install the fakes of a backend and let it run on the CPU; return the list of its calls."""

    def install_fakes(backend: str) -> list[str]:
        monkeypatch.setattr(type(get_backend(backend)), "can", lambda *_: Can())
        humming_backend._config.cache_clear()
        name = "nunchaku" if backend.startswith("nunchaku") else backend
        return stand_ins.install(monkeypatch, stand_ins.LIBRARIES.get(name, {}))

    return install_fakes


@pytest.mark.parametrize(("backend", "name"), RUNS, ids=lambda value: value.replace(", ", "-"))
def test_layer_equals_reference_up_to_the_librarys_call(
    backend: str, name: str, library: Callable[[str], list[str]]
) -> None:
    y = expected(backend, FORMS[name], sample())
    calls = library(backend)
    layer = QuantLinear(FORMS[name], backend_name=backend)
    result = layer(sample())
    assert layer.selection.backend.name == backend
    assert result.dtype == torch.bfloat16
    assert relative_error(result, y) < (INTERPRETED_ERROR if backend == "dequantize" else ERROR)
    assert calls or backend in WITHOUT_LIBRARY


@pytest.mark.parametrize(("backend", "name"), RUNS, ids=lambda value: value.replace(", ", "-"))
def test_every_layer_is_selected_on_a_supported_gpu(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OptionalLibrary, "unavailable_reason", lambda _: None)
    spec = WeightSpec.of(FORMS[name])
    assert select(spec, GPU.get(backend, BLACKWELL), backend_name=backend).backend.name == backend


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("torch_nvfp4", "svdquant_nvfp4"),
        ("comfy_kitchen", "svdquant_nvfp4"),
        ("flashinfer", "svdquant_nvfp4"),
        ("flashinfer", "svdquant_nvfp4, by row"),
        ("humming", "nvfp4_svd"),
        ("nunchaku_int4", "svdquant_int4"),
        ("nunchaku_nvfp4", "svdquant_nvfp4"),
        ("weight_only", "svdquant_int4, shifted"),
        ("dequantize", "nvfp4_svd"),
    ],
)
def test_a_layer_compiles_without_a_graph_break(
    backend: str, name: str, library: Callable[[str], list[str]]
) -> None:
    library(backend)
    layer = QuantLinear(FORMS[name], backend_name=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(sample()), layer(sample())) < 1e-3
    torch.compiler.reset()  # PyTorch recompiles the same code at most eight times


@pytest.mark.parametrize("shape", [(256, 384), (48, 96), (130, 32)])
def test_cublaslt_operands_equal_comfy_kitchens_bytes(
    shape: tuple[int, int],
) -> None:
    own = four_bits.nvfp4(*shape)
    tiled = convert(own, BLOCKED_SCALES)
    matrix = NVFP4.dequantize(own.parts)
    codes, tiles = comfy_kitchen.quantize_nvfp4(matrix, own.parts["global_scale"], hi_first=False)
    assert torch.equal(tiled.parts["codes"], codes)
    assert torch.equal(tiled.parts["block_scale"].view(torch.uint8), tiles.view(torch.uint8))


@pytest.mark.parametrize("name", ["random", "odd_rows", "odd_tiles", "one_row", "outlier"])
def test_cublaslt_operands_equal_torchaos_bytes(name: str, data: Path) -> None:
    theirs = load_file(data / "oracles/torchao.safetensors")
    parts = {part: theirs[f"{name}.{part}"] for part in ("codes", "block_scale")}
    rows, half = parts["codes"].shape
    tiled = convert(QuantTensor(NVFP4, PLAIN, (rows, 2 * half), parts), BLOCKED_SCALES)
    assert torch.equal(tiled.parts["codes"], parts["codes"])
    assert torch.equal(
        tiled.parts["block_scale"].view(torch.uint8).flatten(),
        theirs[f"{name}.tiles"].view(torch.uint8),
    )


def test_quantized_activation_equals_torchaos_and_comfy_kitchens_bytes(
    data: Path,
) -> None:
    """With random numbers: at midpoints and underflow the two differ (test_oracles.py)."""
    theirs, inputs = (
        load_file(data / f"oracles/{tool}.safetensors") for tool in ("torchao", "modelopt_nvfp4")
    )
    matrix, unit = inputs["random.matrix"], inputs["random.global_scale"]
    own = four_bits.nvfp4(32, matrix.shape[1])
    codes, tiles, _ = quantize_activation_nvfp4(
        matrix, own.with_parts({**own.parts, "input_scale": unit}, PLAIN)
    )
    kitchen = comfy_kitchen.quantize_nvfp4(matrix, unit, hi_first=False)
    for expected_codes, expected_tiles in (
        (theirs["random.codes"], theirs["random.tiles"]),
        kitchen,
    ):
        assert torch.equal(codes, expected_codes)
        assert torch.equal(
            tiles.view(torch.uint8).flatten(), expected_tiles.view(torch.uint8).flatten()
        )


@pytest.mark.parametrize("name", FP4_FORMS)
def test_pytorchs_shape_rules_accept_the_call(name: str) -> None:
    """Meta tensors go through PyTorch's real scaled_mm; only its kernel needs the GPU."""
    backend, weight = get_backend("torch_nvfp4"), convert(FORMS[name], BLOCKED_SCALES)
    weight = replace(weight, prepared=backend.prepare(weight))
    on_meta = {
        field: {part: tensor.to("meta") for part, tensor in getattr(weight, field).items()}
        for field in ("parts", "prepared")
    }
    x = torch.empty(1, ROWS, IN, dtype=torch.bfloat16, device="meta")
    assert backend.linear(x, replace(weight, **on_meta), None, QUANTIZED_ACTIVATIONS).shape == (
        1,
        ROWS,
        OUT,
    )


@pytest.mark.parametrize(
    ("backend", "weight", "target", "activations", "reason"),
    [
        (
            "torch_nvfp4",
            FORMS["nvfp4, static"],
            HOPPER,
            QUANTIZED_ACTIVATIONS,
            "needs FP4 tensor cores (sm_100 or newer), this is sm_90",
        ),
        (
            "torch_nvfp4",
            FORMS["nvfp4, static"],
            BLACKWELL,
            BF16_ACTIVATIONS,
            "the inputs of this layer are not quantized",
        ),
        (
            "torch_nvfp4",
            four_bits.nvfp4(40, 128),
            BLACKWELL,
            QUANTIZED_ACTIVATIONS,
            "multiples of 16 and 32, this is 40 x 128",
        ),
        (
            "comfy_kitchen",
            FORMS["svdquant_int4"],
            BLACKWELL,
            QUANTIZED_ACTIVATIONS,
            "NVFP4 and SVDQuant NVFP4 only, this is SVDQuant INT4",
        ),
        (
            "flashinfer",
            four_bits.nvfp4(48, 128),
            BLACKWELL,
            QUANTIZED_ACTIVATIONS,
            "multiples of 32 and 32, this is 48 x 128",
        ),
        (
            "flashinfer",
            FORMS["nvfp4, static"],
            Target("cuda", (11, 0)),
            QUANTIZED_ACTIVATIONS,
            "sm_121), this is sm_110",
        ),
        (
            "humming",
            FORMS["svdquant_nvfp4"],
            AMPERE,
            QUANTIZED_ACTIVATIONS,
            "supports NVFP4 only, this is SVDQuant NVFP4",
        ),
        (
            "humming",
            FORMS["nvfp4, static"],
            Target("cuda", (7, 5)),
            QUANTIZED_ACTIVATIONS,
            "(sm_80 or newer), this is sm_75",
        ),
        (
            "humming",
            four_bits.nvfp4(48, 128),
            AMPERE,
            QUANTIZED_ACTIVATIONS,
            "multiples of 128 and 64, this is 48 x 128",
        ),
        (
            "nunchaku_int4",
            FORMS["svdquant_int4"],
            HOPPER,
            QUANTIZED_ACTIVATIONS,
            "(sm_80, sm_86, sm_89), this is sm_90",
        ),
        (
            "nunchaku_int4",
            FORMS["svdquant_int4, shifted"],
            ADA,
            QUANTIZED_ACTIVATIONS,
            "cannot apply shift",
        ),
        (
            "nunchaku_nvfp4",
            FORMS["svdquant_nvfp4"],
            BLACKWELL,
            QUANTIZED_ACTIVATIONS,
            "(sm_120, sm_121), this is sm_100",
        ),
        (
            "nunchaku_nvfp4",
            four_bits.svdquant(SVDQUANT_NVFP4, 64, 128),
            GEFORCE,
            QUANTIZED_ACTIVATIONS,
            "multiples of 128 and 128",
        ),
        (
            "weight_only",
            FORMS["nvfp4, static"],
            Target("cpu"),
            QUANTIZED_ACTIVATIONS,
            "needs a CUDA GPU, this is cpu",
        ),
    ],
)
def test_backend_that_cannot_gives_the_reason(
    backend: str,
    weight: QuantTensor,
    target: Target,
    activations: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OptionalLibrary, "unavailable_reason", lambda _: None)
    answer = get_backend(backend).can(WeightSpec.of(weight), target, activations)
    assert isinstance(answer, Cannot)
    assert reason in answer.reason


def test_nunchaku_needs_smoothing_and_low_rank_branch() -> None:
    plain = {part: FORMS["svdquant_int4"].parts[part] for part in ("codes", "block_scale")}
    answer = get_backend("nunchaku_int4").can(
        WeightSpec.of(QuantTensor(SVDQUANT_INT4, PLAIN, (OUT, IN), plain)),
        ADA,
        QUANTIZED_ACTIVATIONS,
    )
    assert answer == Cannot("needs proj_down, proj_up, smooth, which this layer does not have")


NUNCHAKU = OptionalLibrary(
    "nunchaku", "nunchaku", "1.0", "its wheels are elsewhere", expected_submodule="ops"
)


def install(folder: Path, version: str, *modules: str) -> None:
    """Write a distribution called nunchaku as pip would install it."""
    for module in ("__init__", *modules):
        file = folder / f"nunchaku/{module}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise RuntimeError('a check imported the library')")
    metadata = folder / f"nunchaku-{version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: nunchaku\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "modules", "reason"),
    [
        (None, (), "needs nunchaku, which is not installed (its wheels are elsewhere)"),
        (
            "0.16.1",
            ("gibbs_sampler",),
            "the installed nunchaku 0.16.1 is an unrelated project with the same name",
        ),
        ("0.3.2", ("ops",), "needs nunchaku 1.0 or newer, 0.3.2 is installed"),
        ("1.2.0+torch2.11", ("ops",), None),
    ],
)
def test_library_that_is_absent_old_or_another_project_is_reported(
    version: str | None,
    modules: tuple[str, ...],
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    if version is not None:
        install(tmp_path, version, *modules)
    unavailable = NUNCHAKU.unavailable_reason()
    assert (unavailable or "")[: len(reason or "")] == (reason or "")
    assert (unavailable is None) == (reason is None)


def test_package_without_a_distribution_is_not_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nunchaku").mkdir()
    (tmp_path / "nunchaku/__init__.py").touch()
    unavailable = NUNCHAKU.unavailable_reason()
    assert unavailable is not None
    assert "is not nunchaku (its wheels are elsewhere)" in unavailable
