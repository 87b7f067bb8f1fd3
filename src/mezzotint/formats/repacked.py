"""Linears whose parts are computed from the stored tensors, because no layout of bytes is enough.

A tool may pack codes over the rows of a matrix, quantize the scales again, or share a scale between
rows. A `RepackedLinear` describes the stored tensors and the function from them to plain parts.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mezzotint.errors import BadScale, ShapeMismatch
from mezzotint.formats.contents import StoredLinear, missing_part
from mezzotint.formats.header import Header
from mezzotint.schemes import Part, Parts
from mezzotint.schemes.scheme import check_scale
from mezzotint.tensor import QuantTensor


def stored(
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[tuple[int, ...], ...],
    meaning: str,
    scale: bool = False,
    signed: bool = False,
) -> Part:
    """Describe a stored tensor of one layer."""
    return Part(dtypes, lambda _out, _in: shapes, meaning, scale=scale, signed=signed)


def scales_of_blocks(scales: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Return the scales of 2-D blocks as [out, in/group]: a block's scale is that of all its rows.

    The group is the largest one that divides both the blocks and the rows.

    scales   [ceil(out/rows of a block), ceil(in/columns of a block)]
    """
    group = math.gcd(block[1], shape[1])
    rows = torch.arange(shape[0], device=scales.device) // block[0]
    columns = torch.arange(0, shape[1], group, device=scales.device) // block[1]
    return scales[rows[:, None], columns]


@dataclass(frozen=True)
class RepackedLinear(StoredLinear):
    """A quantized linear whose parts `repack` computes.

    keys      {name of a stored tensor, or of a part that is stored as it is: tensor name}
    tensors   {name of a stored tensor: its description}
    repack    {name: stored tensor} -> plain parts; it also runs on meta tensors
    """

    tensors: Mapping[str, Part] = field(default_factory=dict)
    repack: Callable[[Parts], dict[str, Tensor]] = dict

    def part(self, name: str) -> Part:
        return self.tensors[name] if name in self.tensors else self.scheme.part(name)

    def is_read_unchanged(self, part: str) -> bool:
        return part not in self.tensors

    def check(self, header: Header) -> None:
        for name, key in self.keys.items():
            if key not in header.tensors:
                raise missing_part(self, name, key, header)
        for name, key in self.keys.items():
            info = header.tensors[key]
            part, where = self.part(name), f"{info.file.name}: {key}"
            if info.storage_shape not in (allowed := part.shapes(*self.shape)):
                raise ShapeMismatch(
                    f"{where} has shape {list(info.storage_shape)}, "
                    f"expected {' or '.join(str(list(shape)) for shape in allowed)} "
                    f"({part.meaning}, {self.scheme.title} of {self.shape[0]} x {self.shape[1]})",
                    "run `mezzotint inspect PATH` to see how the file is laid out.",
                )
            if info.storage_dtype not in part.dtypes:
                raise ShapeMismatch(
                    f"{where} is {info.dtype}, expected {' or '.join(map(str, part.dtypes))}"
                )
        outline = self.outline(header)
        for name, value in outline.parts.items():
            where = f"{self.module}.{name}"
            self.scheme.check_part(name, tuple(value.shape), value.dtype, self.shape, where)

    def scale_problem(self, header: Header) -> str:
        try:
            self.read(header)
        except BadScale as error:
            return error.message
        return ""

    def outline(self, header: Header, read_parts: Collection[str] = ()) -> QuantTensor:
        if read_parts:
            read = self.read(header)
            kept = {n: v if n in read_parts else v.to("meta") for n, v in read.parts.items()}
            return replace(read, parts=kept)
        return self._tensor({n: header.tensors[key].to_meta() for n, key in self.keys.items()})

    def read(self, header: Header) -> QuantTensor:
        values = {}
        for name, key in self.keys.items():
            info = header.tensors[key]
            values[name] = info.read()
            check_scale(self.part(name), values[name], f"{info.file}: {info.name}")
        tensor = self._tensor(values)
        for name, value in tensor.parts.items():
            self.scheme.check_values(name, value, f"{header.path}: {self.module}.{name}")
        return tensor

    def read_rows(self, header: Header, first: int, last: int) -> QuantTensor:
        return self.read(header).select_rows(torch.arange(first, last))

    def _tensor(self, values: Parts) -> QuantTensor:
        """Return the weight of stored tensors, which may be on the meta device."""
        device = next(iter(values.values())).device
        parts = self.repack(values)
        parts |= {
            name: torch.as_tensor(value, device=device)
            for name, value in self.implied_values.items()
        }
        return QuantTensor(self.scheme, self.layout, self.shape, parts, self.dynamic_input)
