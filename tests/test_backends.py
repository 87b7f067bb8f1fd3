"""Backends that rest on optional libraries or on GPUs that we do not have, up to the library's own call.

Each runs on the CPU with stand-ins for what it calls (tests/stand_ins.py), which read the bytes as the library
documents them; what comes back is held against `reference`. None of it shows that a kernel works on its GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import four_bits
import stand_ins
from mezzotint.kernels import AS_STORED, BF16, GENERATIONS, Can, Cannot, Target, WeightSpec, named, select
from mezzotint.kernels import humming as humming_backend
from mezzotint.kernels.libraries import Library
from mezzotint.kernels.nvfp4_product import TILED
from mezzotint.kernels.torch_nvfp4 import rounded_input
from mezzotint.layouts import convert
from mezzotint.nn import QuantLinear
from mezzotint.schemes import NVFP4, SVDQUANT_INT4, SVDQUANT_NVFP4
from mezzotint.tensor import PLAIN, QuantTensor, join_rows

OUT, IN, ROWS = 256, 384, 37
AMPERE, ADA, HOPPER, BLACKWELL, GEFORCE = (GENERATIONS[gpu] for gpu in ("A100", "RTX 40", "H100", "B200", "RTX 50"))
ERROR = 4e-3
"""The output is BF16 (1.7e-3), and so is what leaves the low-rank branch."""


def joined(out: int, in_: int) -> QuantTensor:
    """Two NVFP4 matrices on the same input, whose scales are kept by row."""
    one, two = four_bits.nvfp4(out // 2, in_), four_bits.nvfp4(out // 2, in_)
    return join_rows([one, two.with_parts({**two.parts, "global_scale": two.parts["global_scale"] * 3}, PLAIN)])


def with_channels(out: int, in_: int) -> QuantTensor:
    """Nunchaku's NVFP4 of fused q, k and v: a scale for each row, and one for the matrix."""
    own = four_bits.svdquant(SVDQUANT_NVFP4, out, in_)
    scale = (four_bits.random(out, seed=5).abs() + 0.5).bfloat16()
    return own.with_parts({**own.parts, "channel_scale": scale}, PLAIN)


def smoothed_exactly(weight: QuantTensor) -> QuantTensor:
    """The same weight with its smoothing rounded to powers of two, so that no input is at another code for having been
    smoothed in BF16 and not in float32."""
    names = {"smooth", "pre_quant_scale"} & set(weight.parts)
    powers = {name: torch.exp2(torch.log2(weight.parts[name].float()).round()) for name in names}
    return weight.with_parts({**weight.parts, **{n: p.to(weight.parts[n].dtype) for n, p in powers.items()}}, PLAIN)


def all_forms(out: int, in_: int) -> dict[str, QuantTensor]:
    others = {"nvfp4, joined": joined(out, in_), "svdquant_nvfp4, by row": with_channels(out, in_)}
    return {name: smoothed_exactly(own) for name, own in (four_bits.all_of(out, in_) | others).items()}


FORMS = all_forms(OUT, IN)
INTO_FP4 = [name for name in FORMS if "int4" not in name]
RUNS = [
    *(("torch_nvfp4", name) for name in INTO_FP4),
    *(("comfy_kitchen", name) for name in INTO_FP4),
    *(("flashinfer", name) for name in INTO_FP4),
    *(("humming", name) for name in INTO_FP4 if not name.startswith("svdquant")),
    ("nunchaku_int4", "svdquant_int4"),
    ("nunchaku_nvfp4", "svdquant_nvfp4"),
    ("nunchaku_nvfp4", "svdquant_nvfp4, by row"),
    *(("weight_only", name) for name in FORMS),
]
GPU = {"humming": AMPERE, "weight_only": AMPERE, "nunchaku_int4": ADA, "nunchaku_nvfp4": GEFORCE}
EXACT_INPUT = ("humming", "weight_only")
ROUNDS_AS_NVFP4 = ("comfy_kitchen", "flashinfer")


def relative_error(candidate: Tensor, reference: Tensor) -> float:
    return float(torch.linalg.norm((candidate - reference).float()) / torch.linalg.norm(reference.float()))


def sample(rows: int = ROWS, in_: int = IN) -> Tensor:
    """What a layer is given, within the range of the static scales once it is smoothed; BF16 [1, rows, in]."""
    return (four_bits.random(1, rows, in_, seed=9).clamp(-4, 4) / 3).bfloat16()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Put the stand-ins of a backend in place, and let it be chosen on the CPU; returns what will have been called."""

    def put(backend: str) -> list[str]:
        monkeypatch.setattr(type(named(backend)), "can", lambda *_: Can())
        humming_backend._config.cache_clear()
        name = "nunchaku" if backend.startswith("nunchaku") else backend
        return stand_ins.install(monkeypatch, stand_ins.LIBRARIES.get(name, {}))

    return put


def as_standard_nvfp4(weight: QuantTensor) -> QuantTensor:
    """SVDQuant NVFP4 with inputs rounded as NVFP4's are, in units of 1, instead of as Nunchaku rounds them."""
    one = torch.ones_like(weight.parts["global_scale"])
    parts = dict(weight.parts) | {"input_scale": one}
    parts["global_scale"] = parts["global_scale"] * parts.pop("channel_scale", one).float()
    return QuantTensor(NVFP4, PLAIN, weight.shape, parts)


def expected(backend: str, weight: QuantTensor, x: Tensor) -> Tensor:
    """What `reference` makes of x, float32, its input rounded as the backend is to round it."""
    if backend in ROUNDS_AS_NVFP4 and weight.scheme is SVDQUANT_NVFP4:
        weight = as_standard_nvfp4(weight)
    activations = BF16 if backend in EXACT_INPUT else AS_STORED
    return QuantLinear(weight, torch.float32, activations, only="reference")(x.float())


@pytest.mark.parametrize(("backend", "name"), RUNS, ids=lambda value: value.replace(", ", "-"))
def test_a_layer_up_to_the_librarys_call_is_what_reference_says(
    backend: str, name: str, library: Callable[[str], list[str]]
) -> None:
    y = expected(backend, FORMS[name], sample())
    calls = library(backend)
    layer = QuantLinear(FORMS[name], only=backend)
    found = layer(sample())
    assert layer.selection.backend.name == backend
    assert found.dtype == torch.bfloat16
    assert relative_error(found, y) < ERROR
    assert calls or backend == "weight_only"


@pytest.mark.parametrize(("backend", "name"), RUNS, ids=lambda value: value.replace(", ", "-"))
def test_each_of_these_layers_is_taken_on_a_gpu_that_suits(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "missing", lambda _: None)
    spec = WeightSpec.of(FORMS[name])
    assert select(spec, GPU.get(backend, BLACKWELL), only=backend).backend.name == backend


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
    ],
)
def test_a_layer_compiles_without_a_graph_break(backend: str, name: str, library: Callable[[str], list[str]]) -> None:
    library(backend)
    layer = QuantLinear(FORMS[name], only=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(sample()), layer(sample())) < 1e-3
    torch.compiler.reset()  # each layer here is another compilation of the same code, of which there may be eight


@pytest.mark.parametrize("shape", [(256, 384), (48, 96), (130, 32)])
def test_what_is_handed_to_cublaslt_is_in_comfy_kitchens_order_bit_for_bit(shape: tuple[int, int]) -> None:
    own = four_bits.nvfp4(*shape)
    tiled = convert(own, TILED)
    matrix = NVFP4.dequantize(own.parts)
    codes, tiles = comfy_kitchen.quantize_nvfp4(matrix, own.parts["global_scale"], hi_first=False)
    assert torch.equal(tiled.parts["codes"], codes)
    assert torch.equal(tiled.parts["block_scale"].view(torch.uint8), tiles.view(torch.uint8))


@pytest.mark.parametrize("name", ["random", "odd_rows", "odd_tiles", "one_row", "outlier"])
def test_what_is_handed_to_cublaslt_is_in_torchaos_order_bit_for_bit(name: str, data: Path) -> None:
    theirs = load_file(data / "oracles/torchao.safetensors")
    parts = {part: theirs[f"{name}.{part}"] for part in ("codes", "block_scale")}
    rows, half = parts["codes"].shape
    tiled = convert(QuantTensor(NVFP4, PLAIN, (rows, 2 * half), parts), TILED)
    assert torch.equal(tiled.parts["codes"], parts["codes"])
    assert torch.equal(
        tiled.parts["block_scale"].view(torch.uint8).flatten(), theirs[f"{name}.tiles"].view(torch.uint8)
    )


def test_an_input_is_rounded_to_the_bytes_that_torchao_and_comfy_kitchen_make_of_it(data: Path) -> None:
    """The matrix of random numbers: at midpoints and underflow the two differ (test_oracles.py)."""
    theirs, inputs = (load_file(data / f"oracles/{tool}.safetensors") for tool in ("torchao", "modelopt_nvfp4"))
    matrix, unit = inputs["random.matrix"], inputs["random.global_scale"]
    own = four_bits.nvfp4(32, matrix.shape[1])
    codes, tiles, _ = rounded_input(matrix, own.with_parts({**own.parts, "input_scale": unit}, PLAIN))
    kitchen = comfy_kitchen.quantize_nvfp4(matrix, unit, hi_first=False)
    for expected_codes, expected_tiles in ((theirs["random.codes"], theirs["random.tiles"]), kitchen):
        assert torch.equal(codes, expected_codes)
        assert torch.equal(tiles.view(torch.uint8).flatten(), expected_tiles.view(torch.uint8).flatten())


@pytest.mark.parametrize("name", INTO_FP4)
def test_pytorchs_own_shape_rules_take_the_call(name: str) -> None:
    """Tensors without values go through PyTorch's real scaled_mm; only its kernel needs the GPU."""
    backend, weight = named("torch_nvfp4"), convert(FORMS[name], TILED)
    weight = replace(weight, prepared=backend.prepare(weight))
    on_meta = {
        field: {part: tensor.to("meta") for part, tensor in getattr(weight, field).items()}
        for field in ("parts", "prepared")
    }
    x = torch.empty(1, ROWS, IN, dtype=torch.bfloat16, device="meta")
    assert backend.linear(x, replace(weight, **on_meta), None, AS_STORED).shape == (1, ROWS, OUT)


@pytest.mark.parametrize(
    ("backend", "weight", "target", "activations", "reason"),
    [
        (
            "torch_nvfp4",
            FORMS["nvfp4, static"],
            HOPPER,
            AS_STORED,
            "needs FP4 tensor cores (sm_100 or newer), this is sm_90",
        ),
        ("torch_nvfp4", FORMS["nvfp4, static"], BLACKWELL, BF16, "the inputs of this layer are not quantized"),
        ("torch_nvfp4", four_bits.nvfp4(40, 128), BLACKWELL, AS_STORED, "multiples of 16 and 32, this is 40 x 128"),
        (
            "comfy_kitchen",
            FORMS["svdquant_int4"],
            BLACKWELL,
            AS_STORED,
            "NVFP4 and SVDQuant NVFP4 only, this is SVDQuant INT4",
        ),
        ("flashinfer", four_bits.nvfp4(48, 128), BLACKWELL, AS_STORED, "multiples of 32 and 32, this is 48 x 128"),
        ("flashinfer", FORMS["nvfp4, static"], Target("cuda", (11, 0)), AS_STORED, "sm_121), this is sm_110"),
        ("humming", FORMS["svdquant_nvfp4"], AMPERE, AS_STORED, "multiplies NVFP4 only, this is SVDQuant NVFP4"),
        ("humming", FORMS["nvfp4, static"], Target("cuda", (7, 5)), AS_STORED, "(sm_80 or newer), this is sm_75"),
        ("humming", four_bits.nvfp4(48, 128), AMPERE, AS_STORED, "multiples of 128 and 64, this is 48 x 128"),
        ("nunchaku_int4", FORMS["svdquant_int4"], HOPPER, AS_STORED, "(sm_80, sm_86, sm_89), this is sm_90"),
        ("nunchaku_int4", FORMS["svdquant_int4, shifted"], ADA, AS_STORED, "has no way to apply shift"),
        ("nunchaku_nvfp4", FORMS["svdquant_nvfp4"], BLACKWELL, AS_STORED, "(sm_120, sm_121), this is sm_100"),
        ("nunchaku_nvfp4", four_bits.svdquant(SVDQUANT_NVFP4, 64, 128), GEFORCE, AS_STORED, "multiples of 128 and 128"),
        ("weight_only", FORMS["nvfp4, static"], Target("cpu"), AS_STORED, "needs a CUDA GPU, this is cpu"),
    ],
)
def test_a_backend_that_cannot_says_why(
    backend: str, weight: QuantTensor, target: Target, activations: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "missing", lambda _: None)
    answer = named(backend).can(WeightSpec.of(weight), target, activations)
    assert isinstance(answer, Cannot)
    assert reason in answer.reason


def test_nunchaku_needs_smoothing_and_a_low_rank_branch() -> None:
    plain = {part: FORMS["svdquant_int4"].parts[part] for part in ("codes", "block_scale")}
    answer = named("nunchaku_int4").can(
        WeightSpec.of(QuantTensor(SVDQUANT_INT4, PLAIN, (OUT, IN), plain)), ADA, AS_STORED
    )
    assert answer == Cannot("needs proj_down, proj_up, smooth, which this layer does not have")


NUNCHAKU = Library("nunchaku", "nunchaku", "1.0", "its wheels are elsewhere", holds="ops")


def install(folder: Path, version: str, *modules: str) -> None:
    """A distribution called nunchaku, as pip would leave it."""
    for module in ("__init__", *modules):
        file = folder / f"nunchaku/{module}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise RuntimeError('imported to find out whether it is there')")
    metadata = folder / f"nunchaku-{version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: nunchaku\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "modules", "reason"),
    [
        (None, (), "needs nunchaku, which is not installed (its wheels are elsewhere)"),
        ("0.16.1", ("gibbs_sampler",), "the nunchaku 0.16.1 that is installed is an unrelated project of that name"),
        ("0.3.2", ("ops",), "needs nunchaku 1.0 or newer, 0.3.2 is installed"),
        ("1.2.0+torch2.11", ("ops",), None),
    ],
)
def test_a_library_that_is_absent_too_old_or_another_of_that_name_is_told_apart(
    version: str | None, modules: tuple[str, ...], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    if version is not None:
        install(tmp_path, version, *modules)
    found = NUNCHAKU.missing()
    assert (found or "")[: len(reason or "")] == (reason or "")
    assert (found is None) == (reason is None)


def test_another_package_under_a_librarys_name_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nunchaku").mkdir()
    (tmp_path / "nunchaku/__init__.py").touch()
    found = NUNCHAKU.missing()
    assert found is not None
    assert "is not nunchaku (its wheels are elsewhere)" in found
