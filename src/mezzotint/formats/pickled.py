"""A pickle as data: a machine for the few instructions that describe tensors and plain values, and for nothing else.

A pickle is a program that may call any function by name. This machine calls none: a name stands for one of the few
things that a state dict needs, or the file is refused. Keys of dictionaries are strings and numbers, so that no nested
value is ever hashed, and no instruction reserves memory beyond the bytes that stand in the file.
"""

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from mezzotint.escaping import cut

MAX_SIZE = 32 * 2**20
"""Bytes that all values of a pickle may take in memory; those of a model's 3,000 tensors take 3 MB."""
MAX_STEPS = 2_000_000
"""Instructions; a tensor takes 25."""
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
"""Bytes in memory of what an instruction makes, its place in a list or dictionary included; else 8."""

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
KEYS = (str, int, float, type(None))


class Refused(Exception):
    """The pickle asks for something that no description of tensors needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers, in the entry `data/<key>` of the archive."""

    dtype: torch.dtype
    key: str


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as the pickle describes it; `offset` and `stride` count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_counts(value: object) -> bool:
    """Whether the value is a tuple of numbers that could be lengths."""
    return isinstance(value, tuple) and all(type(number) is int and 0 <= number < 2**48 for number in value)


def _tensor(storage: object, offset: Any, shape: Any, stride: Any, *_: object) -> Described:
    if not (isinstance(storage, Storage) and is_counts((offset,)) and is_counts(shape) and is_counts(stride)):
        raise Refused("a tensor is described by something other than a storage and three lists of lengths")
    if len(shape) > MAX_RANK or len(stride) > MAX_RANK:
        raise Refused(f"describes a tensor of {max(len(shape), len(stride)):,} dimensions")
    return Described(storage, offset, shape, stride)


def _parameter(data: object, *_: object) -> object:
    return data


def _size(values: object = ()) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else ()


def _dictionary() -> dict[Any, Any]:
    return {}


MAKERS: Mapping[str, Callable[..., Any]] = {
    "collections OrderedDict": _dictionary,
    "torch Size": _size,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
VALUES: Mapping[str, torch.dtype] = {f"torch {name}": dtype for name, dtype in (STORAGES | DTYPES).items()}
"""What each name that a file may ask for stands for here: never the thing itself."""


class Machine:
    """Carries out one pickle. `run` may raise Refused, and LookupError, TypeError or ValueError where it is damaged."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.size = 0

    def run(self, program: bytes) -> Any:
        """The value that the pickle describes."""
        for step, (instruction, argument, position) in enumerate(pickletools.genops(program)):
            if instruction.name == "STOP":
                return _shallow(self.stack.pop())
            self.size += SIZES.get(instruction.name, 8)
            self.size += len(argument) * 4 if isinstance(argument, str) else 0
            if self.size > MAX_SIZE or step > MAX_STEPS:
                raise Refused(f"describes more than {MAX_SIZE:,} bytes of values, or in more than {MAX_STEPS:,} steps")
            carry_out = INSTRUCTIONS.get(instruction.name)
            if carry_out is None:
                raise Refused(f"has instruction {instruction.name} at byte {position}")
            carry_out(self, argument)
        raise ValueError("it has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def last(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise LookupError("it takes more values than there are")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def remember(self, number: Any) -> None:
        self.memo[number] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("it appends to what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("it sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, KEYS):
                raise Refused(f"has a dictionary key that is a {type(key).__name__}")
            target[key] = value

    def look_up(self, name: Any) -> None:
        if name not in MAKERS and name not in VALUES:
            raise Refused(f"asks for {cut(str(name).replace(' ', '.', 1))}")
        self.push(MAKERS.get(name, VALUES.get(name)))

    def make(self, _: Any) -> None:
        maker, arguments = self.last(2)
        if not any(maker is known for known in MAKERS.values()) or not isinstance(arguments, tuple):
            raise Refused("calls something that is not called in a description of tensors")
        self.push(maker(*arguments))

    def build(self, _: Any) -> None:
        """Drop the attributes that an OrderedDict carries besides its items; nothing else may carry any."""
        target, _state = self.last(2)
        if not isinstance(target, dict):
            raise Refused(f"sets attributes of a {type(target).__name__}")
        self.push(target)

    def storage(self, _: Any) -> None:
        (identity,) = self.last(1)
        kind, dtype, key, *_rest = identity if isinstance(identity, tuple) and len(identity) == 5 else (None,) * 3
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise Refused("refers to something outside that is no storage")
        self.push(Storage(dtype, key))


def _shallow(value: Any) -> Any:
    """The value, unless it is nested too deeply for what walks through it."""
    level, known = [value], {id(value)}
    for _ in range(MAX_DEPTH):
        inside = chain.from_iterable(_children(outer) for outer in level)
        level = [inner for inner in inside if isinstance(inner, dict | list | tuple) and id(inner) not in known]
        known.update(map(id, level))
        if not level:
            return value
    raise Refused(f"nests its values more than {MAX_DEPTH} deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


INSTRUCTIONS: Mapping[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "MARK": Machine.mark,
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
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "APPEND": lambda machine, _: machine.append(machine.last(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "BINPUT": Machine.remember,
    "LONG_BINPUT": Machine.remember,
    "BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "LONG_BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "GLOBAL": Machine.look_up,
    "REDUCE": Machine.make,
    "BUILD": Machine.build,
    "BINPERSID": Machine.storage,
}
"""All that torch.save writes, by the names of pickletools."""
