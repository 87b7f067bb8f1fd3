"""Carry out a load plan: read the tensors into a model."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.kernels import BackendChoice, WeightSpec, backend_for_scheme, check_backend_choice
from mezzotint.loading.blank_layers import BLANK_WEIGHT, is_blank, why_blank
from mezzotint.loading.diffusers_fusing import forbid_fusing
from mezzotint.loading.placement import Placement
from mezzotint.loading.plan import LoadPlan
from mezzotint.loading.report import LoadReport, report
from mezzotint.loading.residency import choose_residency, to_residency
from mezzotint.nn import make_linear, modes_of
from mezzotint.schemes import BF16
from mezzotint.tensor import QuantTensor, dequantize_pieces


def load(
    plan: LoadPlan,
    model: nn.Module,
    placement: Placement,
    dtype: torch.dtype,
    backend: BackendChoice = None,
) -> LoadReport:
    """Fill `model` in place: replace quantized linears, and cast everything else to `dtype`.

    Modules that the model's class keeps in float32 stay so. Scales keep the dtype of the file.

    placement   where the model lives, and in what form its weights stay
    backend     name of the one backend to use, {scheme: name}, or None for the best
    Raises      BadRequest, Unsupported if no backend can run a layer there
    """
    check_backend_choice(backend)
    plan.checkpoint.header.fetch()
    blank = replace_linears(plan, model, placement, dtype, backend)
    for name in plan.checkpoint.plain:
        value = plan.checkpoint.tensor(name)
        if is_blank(name, value):
            blank[name] = BLANK_WEIGHT
        _assign(model, name, value.to(placement.device, _dtype_of(model, name, dtype)))
    return report(plan, model, blank)


def replace_linears(
    plan: LoadPlan,
    model: nn.Module,
    placement: Placement,
    dtype: torch.dtype,
    backend: BackendChoice = None,
) -> dict[str, str]:
    """Replace each nn.Linear that is stored quantized by a QuantLinear or SplitLinear.

    Returns   {blank layer: message}, with the messages of `verify`
    """
    checkpoint, device = plan.checkpoint, placement.device
    blank: dict[str, str] = {}
    specs, other_bytes = _weight_specs(checkpoint)
    residency = choose_residency(placement, specs, other_bytes, plan.activations, backend)
    for name in checkpoint.linears:
        pieces = checkpoint.read(name)
        if why := next(filter(None, map(why_blank, pieces)), ""):
            blank[name] = why
        if pieces[0].scheme is BF16 or name in checkpoint.unquantized:
            _load_dequantized(model, name, pieces, device, dtype)
            continue
        backend_name = backend_for_scheme(backend, pieces[0].scheme)
        pieces = [to_residency(piece.to(device), residency, plan.activations) for piece in pieces]
        layer_dtype = _dtype_of(model, name, dtype)
        layer = make_linear(pieces, layer_dtype, plan.activations, backend_name)
        model.set_submodule(name, layer)
    forbid_fusing(model)
    modes_of(model)  # lets all layers share them
    return blank


def _weight_specs(checkpoint: Checkpoint) -> tuple[list[WeightSpec], int]:
    """Return the specs of the quantized layers, and the bytes of everything else in BF16."""
    quantized, numbers = [], 0
    for name in checkpoint.linears:
        pieces = checkpoint.outline(name).pieces
        if pieces[0].scheme is BF16 or name in checkpoint.unquantized:
            numbers += sum(math.prod(piece.shape) for piece in pieces)
        else:
            quantized += [WeightSpec.of(piece) for piece in pieces]
    numbers += sum(math.prod(checkpoint.shape(name)) for name in checkpoint.plain)
    return quantized, numbers * torch.bfloat16.itemsize


def _load_dequantized(
    model: nn.Module,
    name: str,
    pieces: Sequence[QuantTensor],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fill an ordinary module with the decoded weights of a transformed or quantized layer."""
    values = {
        "weight": dequantize_pieces(pieces),
        "bias": pieces[0].scheme.dequantize_bias(pieces[0].parts),
    }
    for leaf, value in values.items():
        if value is not None:
            path = f"{name}.{leaf}"
            _assign(model, path, value.to(device, _dtype_of(model, path, dtype)))


def _dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that the model's class requires; diffusers lists the float32 modules."""
    keep_in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or []
    return torch.float32 if set(keep_in_fp32) & set(name.split(".")) else dtype


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter or buffer, which may be on the meta device."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(leaf, value)
