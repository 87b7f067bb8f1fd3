"""MXFP8 weights as FP8 with a scale per row: only blocks far below the largest change."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mezzotint.kernels import (
    QUANTIZED_ACTIVATIONS,
    BackendUse,
    Can,
    Cannot,
    Target,
    WeightSpec,
    select,
)
from mezzotint.kernels.fp8_folding import (
    MAX_FOLDING_ERROR,
    can_fold,
    fold_block_scales,
    folding_error,
)
from mezzotint.loading.events import _backend_events
from mezzotint.loading.placement import AS_STORED_BITS, FP8, Placement
from mezzotint.loading.residency import choose_residency, to_residency
from mezzotint.nn import QuantLinear, quant_linears
from mezzotint.schemes import FP8 as FP8_SCHEME
from mezzotint.schemes import MXFP8
from mezzotint.schemes.mxfp8 import encode_mxfp8
from mezzotint.tensor import PLAIN, QuantTensor
from support.checkpoint_makers import MAKERS
from support.errors_of import relative_error
from support.pipeline_cases import Case

HOPPER = Target("cuda", (9, 0))


def random_matrix(outlier: float = 1.0) -> Tensor:
    """Return Gaussian weights; one of each row is `outlier` times as large."""
    weights = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    weights[:, 7] *= outlier
    return weights


def mxfp8(weights: Tensor) -> QuantTensor:
    return QuantTensor(MXFP8, PLAIN, tuple(weights.shape), encode_mxfp8(weights), True)


def test_encoding_error_of_gaussian_weights() -> None:
    weights = random_matrix()
    parts = encode_mxfp8(weights)
    assert relative_error(MXFP8.decode(parts), weights) < 0.03
    assert torch.equal(MXFP8.decode(parts), MXFP8.quantize_activation(weights, {}))
    assert torch.equal(MXFP8.decode(encode_mxfp8(torch.zeros(2, 64))), torch.zeros(2, 64))


@pytest.mark.parametrize(
    ("outlier", "error"), [(1, 1e-6), (30, 1e-5), (300, 3e-4), (3e3, None), (1e6, None)]
)
def test_folding_changes_ordinary_weights_by_less_than_a_thousandth(
    outlier: float, error: float | None
) -> None:
    """Outliers of 3,000 times the others leave these too few bits: the weight stays MXFP8."""
    weight = mxfp8(random_matrix(outlier))
    folded = fold_block_scales(weight)
    if error is None:
        assert folded is weight
        return
    assert folded.scheme is FP8_SCHEME
    exact, values = (one.scheme.decode(one.parts) for one in (weight, folded))
    assert float(folding_error(values, exact).max()) < error <= MAX_FOLDING_ERROR
    power = torch.log2(folded.parts["weight_scale"])
    assert torch.equal(power, power.round())


def test_a_block_that_would_be_lost_is_kept_although_its_row_is_large() -> None:
    weights = random_matrix()
    weights[5, 64:96] *= 1e-6
    assert fold_block_scales(mxfp8(weights)).scheme is MXFP8
    weights[5, 64:96] = 0
    assert fold_block_scales(mxfp8(weights)).scheme is FP8_SCHEME


def test_a_weight_with_nan_stays_as_it_is() -> None:
    weight = mxfp8(random_matrix())
    weight.parts["codes"].view(torch.uint8)[3, 3] = 0x7F
    assert fold_block_scales(weight) is weight


def test_a_folded_layer_computes_what_the_checkpoint_specifies() -> None:
    """3.5e-2: inputs have a scale per row where MXFP8 has one per 32 columns, both in e4m3."""
    weight = mxfp8(random_matrix())
    weight = weight.with_parts(
        {**weight.parts, "bias": torch.ones(48), "pre_quant_scale": torch.full((256,), 0.5)}, PLAIN
    )
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    folded = to_residency(weight, FP8)
    assert folded.parts.keys() == {"codes", "weight_scale", "bias", "pre_quant_scale"}
    expected = QuantLinear(weight, torch.float32)(x)
    assert relative_error(QuantLinear(folded, torch.float32)(x), expected) < 3.5e-2
    without_bias = {name: part for name, part in folded.parts.items() if name != "bias"}
    spec = WeightSpec.of(folded.with_parts(without_bias, PLAIN))
    assert select(spec, HOPPER).backend.name == "scaled_mm"
    assert to_residency(weight, AS_STORED_BITS) is weight


def test_layers_whose_input_stays_unquantized_are_not_folded() -> None:
    weight = WeightSpec.of(mxfp8(random_matrix()))
    assert isinstance(can_fold(weight, QUANTIZED_ACTIVATIONS), Can)
    answer = can_fold(weight, "bf16")
    assert isinstance(answer, Cannot)
    assert "the inputs of this layer are not quantized" in answer.reason


@pytest.mark.parametrize(
    ("target", "backend", "expected"),
    [
        (HOPPER, None, FP8),
        (HOPPER, "reference", AS_STORED_BITS),
        (HOPPER, {"mxfp8": "weight_only"}, AS_STORED_BITS),
        (Target("cuda", (8, 0)), None, AS_STORED_BITS),
        (Target("cpu"), None, AS_STORED_BITS),
    ],
)
def test_mxfp8_becomes_fp8_where_there_are_fp8_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, target: Target, backend: object, expected: str
) -> None:
    monkeypatch.setattr(Target, "of", lambda _device: target)
    spec, placement = WeightSpec.of(mxfp8(random_matrix())), Placement(torch.device("meta"))
    chosen = choose_residency(placement, [spec], 0, QUANTIZED_ACTIVATIONS, backend)
    assert chosen == expected


@pytest.mark.parametrize("resident", [FP8, AS_STORED_BITS])
def test_folded_layers_are_reported(
    cases: Callable[[str], Case], tmp_path: Path, resident: str
) -> None:
    case = cases("flux1")
    file = MAKERS["flux1"]["comfy mxfp8"](case, tmp_path / "made")
    pipe = case.load(transformer=file, resident=resident)
    layers = quant_linears(pipe.transformer)
    folded = {layer.scheme.name for layer in layers.values()} == {"fp8"}
    assert folded is (resident == FP8)
    assert all(layer.quant_weight.quantizes_activation for layer in layers.values())
    message = (
        f"{len(layers)} mxfp8 layers became FP8, with one power-of-two scale per row; "
        "their inputs are quantized to FP8"
    )
    assert (message in pipe.load_report.events) is folded


def test_layers_that_are_not_folded_on_a_gpu_are_reported() -> None:
    (event,) = _backend_events([BackendUse("mxfp8", "dequantize", 3, {})])
    assert event == (
        "3 mxfp8 layers leave their inputs in BF16; resident='fp8' quantizes them, in layers whose "
        "weights it changes by less than 0.1%"
    )
