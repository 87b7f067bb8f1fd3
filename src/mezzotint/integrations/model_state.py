"""Convert a loaded model to a checkpoint in Mezzotint's format, or to an ordinary model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import Unsupported, join_names
from mezzotint.fast.runtime.serial import Serial
from mezzotint.formats.writers.mezzotint import TARGET
from mezzotint.formats.writers.writer import Declaration, StoredTensors
from mezzotint.hub import AnyPath
from mezzotint.kernels import QUANTIZED_ACTIVATIONS
from mezzotint.nn import QuantLinear, SplitLinear, quant_linears
from mezzotint.schemes import Shape
from mezzotint.tensor import QuantTensor


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """Return the `quantization_config` of a model, or {} if it has no quantized layer."""
    layers = {
        name: [_outline(sublayer) for sublayer in layer.sublayers]
        for name, layer in quant_linears(model).items()
    }
    declared = TARGET.declare(layers, ())
    assert isinstance(declared, Declaration)  # noqa: S101
    return dict(declared.quantization or {})


def stored_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return {key: tensor} of a checkpoint in Mezzotint's format, with plain parts.

    state   the model's state_dict, for the tensors outside of quantized layers
    """
    layers = quant_linears(model)
    inside = tuple(f"{name}." for name in layers)
    tensors = {key: value for key, value in state.items() if not key.startswith(inside)}
    for name, layer in layers.items():
        written = TARGET.layer({name: [sublayer.plain_weight() for sublayer in layer.sublayers]})
        assert isinstance(written, StoredTensors)  # noqa: S101
        tensors |= written.tensors
    return _unshared(tensors)


def check_savable(model: Any, source: AnyPath) -> None:
    """Check that a checkpoint of a model would compute the same outputs.

    source   the checkpoint of the model
    Raises   Unsupported, with the command that writes the source in Mezzotint's format
    """
    reason = next(_obstacles(model), None)
    if reason is not None:
        raise Unsupported(
            f"this {type(model).__name__} cannot be saved: {reason}",
            f"`mezzotint convert {quote(str(source))} -o OUTPUT` converts its checkpoint.",
        )


def _obstacles(model: Any) -> Iterator[str]:
    """Yield the reasons why a model cannot be saved."""
    if offloaded := _on_meta(model):
        yield (
            f"CPU offload has moved {join_names(offloaded)} out of the model; "
            "`pipe.remove_all_hooks()` ends it"
        )
        return
    expected, actual = _expected_tensors(model), _logical_tensors(model)
    if missing := [name for name in expected if name not in actual]:
        yield f"it lacks {join_names(missing)}{_fused_hint(model)}"
    if extra := [name for name in actual if name not in expected]:
        yield f"its class has no {join_names(extra)}, which come from adapters or replaced layers"
    layers = quant_linears(model)
    if adapted := [name for name, layer in layers.items() if _has_adapters(layer)]:
        yield f"the file cannot store adapters of {join_names(adapted)}; use remove_adapter"
    if unquantized := [name for name, layer in layers.items() if not _computes_as_stored(layer)]:
        yield (
            "the file cannot store activations='bf16', which leaves inputs of "
            f"{join_names(unquantized)} in BF16"
        )


def dequantize(model: Any) -> None:
    """Replace every quantized layer by an nn.Linear with its weight in the dtype of its inputs.

    Raises   Unsupported if layers are fused or have adapters, or weights are offloaded
    """
    expected, layers, offloaded = _expected_tensors(model), quant_linears(model), _on_meta(model)
    fused = [name for name in layers if f"{name}.weight" not in expected]
    if adapted := [name for name, layer in layers.items() if _has_adapters(layer)]:
        raise Unsupported(
            f"{join_names(adapted)} have adapters, which dequantized weights do not include",
            "use remove_adapter first.",
        )
    if fused or offloaded:
        reason = "are offloaded" if offloaded else "replace layers of its class"
        raise Unsupported(
            f"this {type(model).__name__} cannot be dequantized: {join_names(offloaded or fused)} "
            f"{reason}{_fused_hint(model)}",
            "load the model again, and dequantize it before speed_up, offloading or adapters.",
        )
    for name, layer in layers.items():
        model.set_submodule(name, _ordinary(layer))


def _ordinary(layer: QuantLinear | SplitLinear) -> nn.Linear:
    weight, bias = layer.weight.clone(), layer.dequantize_bias()
    made = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return made.train(layer.training)


def _outline(sublayer: QuantLinear) -> QuantTensor:
    """Return the weight and bias in the backend's layout; only names and dtypes matter."""
    bias = {} if sublayer.bias is None else {"bias": sublayer.bias}
    weight = sublayer.quant_weight
    return replace(weight, parts={**weight.parts, **bias}, prepared={})


def _computes_as_stored(layer: QuantLinear | SplitLinear) -> bool:
    """Return whether a layer quantizes its inputs as its reloaded copy would."""
    return all(
        sublayer.activations == QUANTIZED_ACTIVATIONS
        or not sublayer.quant_weight.quantizes_activation
        for sublayer in layer.sublayers
    )


def _has_adapters(layer: QuantLinear | SplitLinear) -> bool:
    """Return whether a layer has low-rank adapters."""
    return any(sublayer.adapters for sublayer in layer.sublayers)


def _on_meta(model: nn.Module) -> list[str]:
    """Return the names of a model's tensors on the meta device."""
    return [name for name, value in model.state_dict().items() if value.is_meta]


def _expected_tensors(model: Any) -> dict[str, Shape]:
    """Return {name: shape} of the tensors of a model of this class and configuration."""
    from accelerate import init_empty_weights

    entries = {key: value for key, value in model.config.items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=False):
        empty = type(model).from_config(entries)
    return {name: tuple(value.shape) for name, value in empty.state_dict().items()}


def _logical_tensors(model: nn.Module) -> list[str]:
    """Return the names of a model's tensors, with weight and bias for each quantized layer."""
    layers = quant_linears(model)
    inside = tuple(f"{name}." for name in layers)
    names = [name for name in model.state_dict() if not name.startswith(inside)]
    names += [f"{name}.weight" for name in layers]
    return names + [
        f"{name}.bias"
        for name, layer in layers.items()
        if any(sublayer.bias is not None for sublayer in layer.sublayers)
    ]


def _fused_hint(model: Any) -> str:
    return "; speed_up has fused layers" if isinstance(model.forward, Serial) else ""


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without shared memory, which safetensors does not accept."""
    unshared, seen = {}, set()
    for key, value in tensors.items():
        storage = value.untyped_storage()
        shared = storage.nbytes() != value.nbytes or storage.data_ptr() in seen
        unshared[key] = (
            value.detach().clone(memory_format=torch.contiguous_format)
            if shared
            else value.detach()
        )
        seen.add(storage.data_ptr())
    return unshared
