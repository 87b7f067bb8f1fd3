"""`layer.weight` of a quantized layer: an ordinary weight's shape, dtype and device, decoded when values are read.

There is no memory behind it that a write could change, so that every write is an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezzotint.errors import BadRequest

HINT = (
    "change an ordinary model: `transformer.dequantize()` decodes this one, or load BF16 weights; "
    "`layer.dequantize()` gives a copy of this layer's weight."
)


class DecodedWeight(Tensor):
    """What a quantized layer's weight reads as. Metadata is free; each use of values decodes the weight anew.

    Views of it cannot be written to either. What PyTorch copies out of it (`clone`, `float`, sums) is an ordinary
    tensor.
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
        """Return a tensor that has the values of `decode`, which gives one of this shape, dtype and device."""
        made: DecodedWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        made._decode = decode
        return made

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
        _refuse_writes(function, args, kwargs)
        if (
            function is torch.ops.aten.detach.default
        ):  # no values are read: what `.data` and nn.Parameter come to
            return cls.like(args[0], args[0]._decode)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        decoded = {
            place: leaf._decode()
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, DecodedWeight)
        }
        args, kwargs = pytree.tree_unflatten(
            [decoded.get(place, leaf) for place, leaf in enumerate(leaves)], tree
        )
        memories = {_memory(values) for values in decoded.values()}
        return pytree.tree_map_only(
            Tensor,
            lambda made: _read_only(made) if _memory(made) in memories else made,
            function(*args, **kwargs),
        )

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, _value: Any) -> None:
        raise _cannot_write()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an array that cannot be written to."""
        values = self._decode()
        array: np.ndarray[Any, Any] = values.numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self._decode().tolist()

    def untyped_storage(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse: there is no memory, and a write to it would end the process."""
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


def _memory(values: Tensor) -> int:
    """Return what tells the memory of a tensor and of its views from any other."""
    memory: int = values.untyped_storage()._cdata
    return memory


def _refuse_writes(function: Any, args: Sequence[Any], kwargs: Any) -> None:
    """Raise BadRequest if an operation writes to a DecodedWeight."""
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        if any(isinstance(leaf, DecodedWeight) for leaf in pytree.tree_leaves(given)):
            raise _cannot_write()


def _cannot_write() -> BadRequest:
    return BadRequest(
        "the weight of a quantized layer is decoded when it is read, and cannot be written to", HINT
    )


class HasWeight(nn.Module):
    """A layer without a parameter `weight`, whose `weight` can be read as an nn.Linear's can."""

    in_features: int
    out_features: int

    def dequantize(self) -> Tensor:
        """Return the real weights that the checkpoint stands for, float32 [out, in]."""
        raise NotImplementedError

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        """Return the dtype of the inputs that the layer's owner is to expect, and where the weights are."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The decoded weight [out, in] in the dtype of the layer's inputs, read-only; see DecodedWeight."""
        if (
            torch.compiler.is_compiling()
        ):  # it traces no such class, and drops a decoding that nothing reads
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
        """As nn.Module does, which is also what assigning an nn.Parameter comes to."""
        if name == "weight":
            raise _cannot_write()
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As nn.Module does; an ordinary weight is refused, which a load that is not strict would pass over."""
        if f"{prefix}weight" in state_dict:
            raise _cannot_write()
        super()._load_from_state_dict(state_dict, prefix, *args)
