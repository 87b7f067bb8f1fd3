"""A loaded model as a checkpoint in Mezzotint's format, and as an ordinary model."""

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
    """Return the `quantization_config` of a model, {} if none of its layers is quantized."""
    layers = {
        name: [_outline(product) for product in layer.sublayers]
        for name, layer in quant_linears(model).items()
    }
    declared = TARGET.declare(layers, ())
    assert isinstance(declared, Declaration)  # noqa: S101
    return dict(declared.quantization or {})


def stored_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, {key: tensor}: parts are plain, whatever the backends want.

    state   the model's state_dict, which gives the tensors of no quantized layer
    """
    layers = quant_linears(model)
    inside = tuple(f"{name}." for name in layers)
    tensors = {key: value for key, value in state.items() if not key.startswith(inside)}
    for name, layer in layers.items():
        written = TARGET.layer({name: [product.plain_weight() for product in layer.sublayers]})
        assert isinstance(written, StoredTensors)  # noqa: S101
        tensors |= written.tensors
    return _apart(tensors)


def check_savable(model: Any, source: AnyPath) -> None:
    """Check that a checkpoint of a model would compute what the model does.

    source   what the model was loaded from
    Raises   Unsupported, with the command that writes the source in Mezzotint's format
    """
    reason = next(_obstacles(model), None)
    if reason is not None:
        raise Unsupported(
            f"this {type(model).__name__} cannot be saved: {reason}",
            f"`mezzotint convert {quote(str(source))} -o OUTPUT` writes what it was loaded from.",
        )


def _obstacles(model: Any) -> Iterator[str]:
    """Why a model cannot be saved."""
    if away := _away(model):
        yield f"{join_names(away)} not in memory, because of CPU offload; `pipe.remove_all_hooks()` ends that"
        return
    places, sources = _places(model), _sources(model)
    if missing := [name for name in places if name not in sources]:
        yield f"it lacks {join_names(missing)}{_why(model)}"
    if extra := [name for name in sources if name not in places]:
        yield f"its class has no place for {join_names(extra)}, which adapters or replaced layers have brought"
    if adapted := [name for name, layer in quant_linears(model).items() if _has_adapters(layer)]:
        yield f"the adapters of {join_names(adapted)} have no place in the file; remove_adapter removes one"
    if unquantized := [
        name for name, layer in quant_linears(model).items() if not _computes_as_stored(layer)
    ]:
        yield f"activations='bf16' leaves inputs of {join_names(unquantized)} in BF16, and the file cannot say so"


def dequantize(model: Any) -> None:
    """Replace every quantized layer by an nn.Linear with its decoded weight, in the dtype of the layer's inputs.

    Raises   Unsupported if layers were joined, or weights are elsewhere
    """
    places, layers, away = _places(model), quant_linears(model), _away(model)
    replaced = [name for name in layers if f"{name}.weight" not in places]
    if adapted := [name for name, layer in layers.items() if _has_adapters(layer)]:
        raise Unsupported(
            f"{join_names(adapted)} have adapters, which decoded weights do not include",
            "remove_adapter removes one.",
        )
    if replaced or away:
        raise Unsupported(
            f"this {type(model).__name__} cannot be dequantized: {join_names(away or replaced)} "
            f"{'not in memory' if away else 'in place of its own layers'}{_why(model)}",
            "load the model again, and dequantize it before it is made fast, offloaded or given adapters.",
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


def _outline(product: QuantLinear) -> QuantTensor:
    """The weight with its bias, its bytes as the backend has them: enough for names and kinds of parts."""
    bias = {} if product.bias is None else {"bias": product.bias}
    return replace(product.quant_weight, parts={**product.quant_weight.parts, **bias}, prepared={})


def _computes_as_stored(layer: QuantLinear | SplitLinear) -> bool:
    """Return whether a layer rounds its inputs exactly if it would when it is loaded again."""
    return all(
        p.activations == QUANTIZED_ACTIVATIONS or not p.quant_weight.quantizes_activation
        for p in layer.sublayers
    )


def _has_adapters(layer: QuantLinear | SplitLinear) -> bool:
    """Return whether a layer computes with low-rank adapters."""
    return any(piece.adapters for piece in layer.sublayers)


def _away(model: nn.Module) -> list[str]:
    """The tensors of a model that are on the meta device."""
    return [name for name, value in model.state_dict().items() if value.is_meta]


def _places(model: Any) -> dict[str, Shape]:
    """The tensors that a model of this class and configuration has, {name: shape}."""
    from accelerate import init_empty_weights

    entries = {key: value for key, value in model.config.items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=False):
        empty = type(model).from_config(entries)
    return {name: tuple(value.shape) for name, value in empty.state_dict().items()}


def _sources(model: nn.Module) -> list[str]:
    """The tensors that a model has, its quantized layers taken for what they stand for."""
    layers = quant_linears(model)
    inside = tuple(f"{name}." for name in layers)
    names = [name for name in model.state_dict() if not name.startswith(inside)]
    names += [f"{name}.weight" for name in layers]
    return names + [
        f"{name}.bias"
        for name, layer in layers.items()
        if any(p.bias is not None for p in layer.sublayers)
    ]


def _why(model: Any) -> str:
    return "; it was made fast, which joins layers" if isinstance(model.forward, Serial) else ""


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each in memory of its own, as a file has them."""
    made, seen = {}, set()
    for key, value in tensors.items():
        storage = value.untyped_storage()
        shared = storage.nbytes() != value.nbytes or storage.data_ptr() in seen
        made[key] = (
            value.detach().clone(memory_format=torch.contiguous_format)
            if shared
            else value.detach()
        )
        seen.add(storage.data_ptr())
    return made
