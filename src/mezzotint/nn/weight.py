"""`layer.weight` of a quantized layer: a read-only tensor, dequantized when its values are read.

It has the shape, dtype and device of an ordinary weight, but no memory, so every write is an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.errors import BadRequest

HINT = (
    "use an ordinary model: call `transformer.dequantize()`, or load BF16 weights; "
    "`layer.dequantize()` returns a copy of this layer's weight."
)


class DecodedWeight(Tensor):
    """The weight of a quantized layer; each use of its values dequantizes the layer again.

    Views are read-only too. Copies (`clone`, `float`, sums) are ordinary tensors.
    """

    _decode: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        strides: Sequence[int] | None = None,
    ) -> "DecodedWeight":
        """Return a tensor with the values of `decode()`, which has this shape, dtype and device."""
        weight: DecodedWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        weight._decode = decode
        return weight

    @classmethod
    def like(cls, values: Tensor, decode: Callable[[], Tensor]) -> "DecodedWeight":
        """Return a tensor with the metadata of `values`."""
        return cls(decode, values.shape, values.dtype, values.device, values.stride())

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        _forbid_writes(function, args, kwargs)
        # `.data` and nn.Parameter call detach, which reads no values.
        if function is torch.ops.aten.detach.default:
            return cls.like(args[0], args[0]._decode)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        decoded = {
            index: leaf._decode()
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, DecodedWeight)
        }
        args, kwargs = pytree.tree_unflatten(
            [decoded.get(index, leaf) for index, leaf in enumerate(leaves)], tree
        )
        # A result that shares memory with a decoded weight is a view: it stays read-only.
        storages = {_storage_id(values) for values in decoded.values()}
        return pytree.tree_map_only(
            Tensor,
            lambda result: _read_only(result) if _storage_id(result) in storages else result,
            function(*args, **kwargs),
        )

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, _value: Any) -> None:
        raise _cannot_write()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as a read-only array."""
        values = self._decode()
        array: np.ndarray[Any, Any] = values.numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self._decode().tolist()

    def untyped_storage(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise BadRequest: there is no memory, and a write to it would crash the process."""
        raise _cannot_write()

    _typed_storage = storage = data_ptr = __dlpack__ = untyped_storage

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DecodedWeight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._decode().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, _memo: Any) -> Tensor:
        return self._decode().clone()


def _read_only(values: Tensor) -> DecodedWeight:
    return DecodedWeight.like(values, lambda: values)


def _storage_id(values: Tensor) -> int:
    """Return an identifier of a tensor's storage, which its views share."""
    identifier: int = values.untyped_storage()._cdata
    return identifier


def _forbid_writes(function: Any, args: Sequence[Any], kwargs: Any) -> None:
    """Raise BadRequest if an operation writes to a DecodedWeight."""
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        if any(isinstance(leaf, DecodedWeight) for leaf in pytree.tree_leaves(given)):
            raise _cannot_write()


def _cannot_write() -> BadRequest:
    return BadRequest(
        "the weight of a quantized layer is dequantized when read, and cannot be written to", HINT
    )


class HasWeight(nn.Module):
    """A layer without a parameter `weight`, but with a readable `weight` as in nn.Linear."""

    in_features: int
    out_features: int

    def dequantize(self) -> Tensor:
        """Return the dequantized weights of the checkpoint, float32 [out, in]."""
        raise NotImplementedError

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        """Return the dtype of the layer's inputs, and the device of its weights."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in the dtype of the layer's inputs, read-only; see DecodedWeight."""
        # torch.compile cannot trace DecodedWeight, and removes an unused dequantization.
        if torch.compiler.is_compiling():
            return self._decoded()
        return DecodedWeight(
            self._decoded, (self.out_features, self.in_features), *self._dtype_and_device()
        )

    @weight.setter
    def weight(self, _value: Any) -> None:
        raise _cannot_write()

    def _decoded(self) -> Tensor:
        return self.dequantize().to(self._dtype_and_device()[0])

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, except for `weight`; assigning an nn.Parameter calls this too."""
        if name == "weight":
            raise _cannot_write()
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the state, but raise for an ordinary weight, which a non-strict load would skip."""
        if f"{prefix}weight" in state_dict:
            raise _cannot_write()
        super()._load_from_state_dict(state_dict, prefix, *args)
