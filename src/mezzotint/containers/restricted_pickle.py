"""An interpreter for pickles that describe tensors and plain values, and nothing else.

A pickle is a program that may call any function by name. This interpreter calls none: a name maps
to one of the few values that a state dict needs, or the file is rejected. Keys of dictionaries are
strings and numbers, because hashing nested values can take exponential time. No instruction
reserves more memory than the file has bytes.
Source: https://github.com/python/cpython/blob/3.12/Lib/pickletools.py
"""

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from mezzotint.untrusted.escaping import cut

MAX_SIZE = 32 * 2**20
"""Bytes of memory for all values of a pickle; a model's 3,000 tensors take 3 MB."""
MAX_STEPS = 2_000_000
"""Instructions in a pickle; a tensor takes 25."""
MAX_DEPTH = 64
MAX_RANK = 8
SIZES = {
    "EMPTY_DICT": 72,
    "EMPTY_LIST": 64,
    "MARK": 64,
    "TUPLE": 56,
    "TUPLE1": 56,
    "TUPLE2": 64,
    "TUPLE3": 72,
    "BINFLOAT": 32,
    "BINUNICODE": 64,
    "LONG1": 40,
    "BININT": 40,
    "REDUCE": 80,
    "BINPERSID": 64,
    "BINPUT": 100,
    "LONG_BINPUT": 140,
}
"""Bytes of memory of an instruction's result, including its slot in a container; others have 8."""

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()} | {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
KEY_TYPES = (str, int, float, type(None))


class UnsafePickle(Exception):
    """The pickle uses a feature that no description of tensors needs; the message names it."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat array of numbers, in the entry `data/<key>` of the archive."""

    dtype: torch.dtype
    key: str


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """A tensor as the pickle describes it; `offset` and `stride` count elements, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_size_tuple(value: object) -> bool:
    """Return whether the value is a tuple of integers that could be lengths."""
    return isinstance(value, tuple) and all(
        type(number) is int and 0 <= number < 2**48 for number in value
    )


def _tensor(storage: object, offset: Any, shape: Any, stride: Any, *_: object) -> TensorDescription:
    if not (
        isinstance(storage, Storage)
        and is_size_tuple((offset,))
        and is_size_tuple(shape)
        and is_size_tuple(stride)
    ):
        raise UnsafePickle(
            "a tensor is described by something other than a storage and three lists of lengths"
        )
    if len(shape) > MAX_RANK or len(stride) > MAX_RANK:
        raise UnsafePickle(f"describes a tensor of {max(len(shape), len(stride)):,} dimensions")
    return TensorDescription(storage, offset, shape, stride)


def _tensor_of_bytes(
    storage: object, offset: Any, shape: Any, stride: Any, _grad: object, _hooks: object, dtype: Any
) -> TensorDescription:
    """Describe a tensor of a dtype without a storage class of its own, such as FP8."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise UnsafePickle("a tensor is described by something other than a storage and a dtype")
    return _tensor(replace(storage, dtype=dtype), offset, shape, stride)


def _parameter(data: object, *_: object) -> object:
    return data


def _size(values: object = ()) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else ()


def _dictionary() -> dict[Any, Any]:
    return {}


CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "collections OrderedDict": _dictionary,
    "torch Size": _size,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils _rebuild_parameter": _parameter,
}
VALUES: Mapping[str, torch.dtype] = {
    f"torch {name}": dtype for name, dtype in (STORAGES | DTYPES).items()
} | {"torch.storage UntypedStorage": torch.uint8}
"""{name that a file may use: its substitute}; PyTorch's own objects are never used."""


class PickleInterpreter:
    """Interpret one pickle.

    `run` raises UnsafePickle, or LookupError, TypeError or ValueError if the pickle is damaged.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.size = 0

    def run(self, program: bytes) -> Any:
        """Return the value that the pickle describes."""
        for step, (instruction, argument, position) in enumerate(pickletools.genops(program)):
            if instruction.name == "STOP":
                return _shallow(self.stack.pop())
            self.size += SIZES.get(instruction.name, 8)
            self.size += len(argument) * 4 if isinstance(argument, str) else 0
            if self.size > MAX_SIZE or step > MAX_STEPS:
                raise UnsafePickle(
                    f"describes more than {MAX_SIZE:,} bytes of values, "
                    f"or in more than {MAX_STEPS:,} steps"
                )
            execute = INSTRUCTIONS.get(instruction.name)
            if execute is None:
                raise UnsafePickle(f"has instruction {instruction.name} at byte {position}")
            execute(self, argument)
        raise ValueError("it has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise LookupError("it takes more values than there are")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def memoize(self, number: Any) -> None:
        self.memo[number] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("it appends to an object that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("it sets items of an object that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, KEY_TYPES):
                raise UnsafePickle(f"has a dictionary key that is a {type(key).__name__}")
            target[key] = value

    def look_up(self, name: Any) -> None:
        if name not in CONSTRUCTORS and name not in VALUES:
            raise UnsafePickle(f"asks for {cut(str(name).replace(' ', '.', 1))}")
        self.push(CONSTRUCTORS.get(name, VALUES.get(name)))

    def reduce(self, _: Any) -> None:
        maker, arguments = self.pop(2)
        if not any(maker is known for known in CONSTRUCTORS.values()) or not isinstance(
            arguments, tuple
        ):
            raise UnsafePickle("calls something that is not called in a description of tensors")
        self.push(maker(*arguments))

    def build(self, _: Any) -> None:
        """Drop the attributes of an OrderedDict; no other object may have any."""
        target, _state = self.pop(2)
        if not isinstance(target, dict):
            raise UnsafePickle(f"sets attributes of a {type(target).__name__}")
        self.push(target)

    def storage(self, _: Any) -> None:
        (identity,) = self.pop(1)
        kind, dtype, key, *_rest = (
            identity if isinstance(identity, tuple) and len(identity) == 5 else (None,) * 3
        )
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise UnsafePickle("refers to an external object that is not a storage")
        self.push(Storage(dtype, key))


def _shallow(value: Any) -> Any:
    """Return the value. Raises UnsafePickle if it is nested too deeply for recursive code."""
    level, known = [value], {id(value)}
    for _ in range(MAX_DEPTH):
        inside = chain.from_iterable(_children(outer) for outer in level)
        level = [
            inner
            for inner in inside
            if isinstance(inner, dict | list | tuple) and id(inner) not in known
        ]
        known.update(map(id, level))
        if not level:
            return value
    raise UnsafePickle(f"nests its values more than {MAX_DEPTH} deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


INSTRUCTIONS: Mapping[str, Callable[[PickleInterpreter, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "MARK": PickleInterpreter.mark,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
        lambda machine, argument: machine.push(argument),
    ),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "BINPUT": PickleInterpreter.memoize,
    "LONG_BINPUT": PickleInterpreter.memoize,
    "BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "LONG_BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "GLOBAL": PickleInterpreter.look_up,
    "REDUCE": PickleInterpreter.reduce,
    "BUILD": PickleInterpreter.build,
    "BINPERSID": PickleInterpreter.storage,
}
"""All instructions that torch.save writes, by their names in pickletools."""
