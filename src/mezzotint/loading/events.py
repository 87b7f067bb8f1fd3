"""Events of a load report: everything that changes speed or numbers."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from mezzotint.errors import join_names
from mezzotint.kernels import QUANTIZED_ACTIVATIONS, BackendUse
from mezzotint.kernels.fp8_folding import MAX_FOLDING_ERROR
from mezzotint.kernels.verified import NOT_VERIFIED
from mezzotint.loading.plan import LoadPlan
from mezzotint.nn import quant_linears
from mezzotint.schemes import BF16, FP8, MXFP8

WITH_BF16_INPUT = ("dequantize", "weight_only")
"""Backends that multiply MXFP8 weights and leave the input unquantized."""


def load_events(
    plan: LoadPlan, model: nn.Module, backends: Sequence[BackendUse], blank: Mapping[str, str]
) -> Iterator[str]:
    """Yield every event of a load, most serious first.

    blank   {blank layer: message}
    """
    yield from plan.checkpoint.header.notes
    yield from plan.checkpoint.contradictions
    yield from _blank_events(blank)
    yield from _backend_events(backends)
    yield from _activation_events(plan)
    yield from _dequantized_events(plan)
    yield from _fp8_events(plan, model)


def _blank_events(blank: Mapping[str, str]) -> Iterator[str]:
    """Yield one event for each message of blank layers: the file may be damaged."""
    for why in dict.fromkeys(blank.values()):
        names = [name for name, reason in blank.items() if reason == why]
        yield f"suspicious: {join_names(names)}: {why}; `mezzotint verify` checks the file"


def _backend_events(backends: Sequence[BackendUse]) -> Iterator[str]:
    for use in backends:
        layers = f"{use.layers} {use.scheme} layers"
        if use.backend == "reference":
            yield f"{layers} run on the slow reference backend ({use.reasons})"
        if use.backend == "dequant_fp8":
            yield f"{layers} quantize their inputs to FP8, but the checkpoint specifies 4 bits"
        if use.scheme == MXFP8.name and use.backend in WITH_BF16_INPUT:
            yield (
                f"{layers} leave their inputs in BF16; resident='fp8' quantizes them, in layers "
                f"whose weights it changes by less than {MAX_FOLDING_ERROR:.1%}"
            )
        if not use.verified:
            yield f"{layers} run on {use.backend}, {NOT_VERIFIED}: never run on such a GPU yet"


def _activation_events(plan: LoadPlan) -> Iterator[str]:
    """Yield what is special about the quantization of layer inputs."""
    linears = plan.checkpoint.contents.linears.values()
    quantized = [linear for linear in linears if linear.scheme is not BF16]
    if plan.activations != QUANTIZED_ACTIVATIONS and linears:
        yield "inputs stay unquantized, as requested; the checkpoint's input scales are not used"
    without = [
        linear
        for linear in quantized
        if linear.scheme.quantize_activation and not linear.quantizes_activation
    ]
    no_scale = "quantized layers have no input scale in the file"
    if plan.activations == QUANTIZED_ACTIVATIONS and without:
        yield f"{len(without)} {no_scale}; their inputs stay unquantized"
    dynamic = [
        linear
        for linear in quantized
        if linear.dynamic_input and linear.scheme.static_scale_part not in linear.keys
    ]
    if dynamic:
        yield f"{len(dynamic)} {no_scale}; theirs is computed at each call"


def _dequantized_events(plan: LoadPlan) -> Iterator[str]:
    """Yield which layers were decoded while they were read."""
    checkpoint = plan.checkpoint
    if checkpoint.unquantized:
        names = join_names(sorted(checkpoint.unquantized))
        yield (
            f"{names}: stored quantized, but not a linear layer of the model; "
            "dequantized weights are loaded"
        )
    linears = checkpoint.contents.linears.values()
    transformed = sum(linear.scheme is BF16 for linear in linears)
    if transformed:
        yield (
            f"{transformed} BF16 layers are stored transformed; their effective weights are loaded"
        )


def _fp8_events(plan: LoadPlan, model: nn.Module) -> Iterator[str]:
    """Yield how many layers were converted to FP8."""
    checkpoint = plan.checkpoint
    converted = Counter(
        checkpoint.scheme(name) is MXFP8
        for name, layer in quant_linears(model).items()
        if layer.sublayers[0].scheme is FP8
        and name in checkpoint.linears
        and checkpoint.scheme(name) is not FP8
    )
    for is_mxfp8, count in converted.items():
        kind, scale = ("mxfp8", "power-of-two scale") if is_mxfp8 else ("4-bit", "scale")
        yield (
            f"{count} {kind} layers became FP8, with one {scale} per row; "
            "their inputs are quantized to FP8"
        )
