"""A quantized weight as a value: its parts, their scheme, and their byte layout."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mezzotint.errors import ShapeMismatch
from mezzotint.schemes import Scheme
from mezzotint.schemes.scheme import FP8_DTYPES


@dataclass(frozen=True)
class Layout:
    """How the bytes of a quantized weight are arranged.

    codes      "low_first": the low nibble is the even column, or one code per byte
               "high_first": the high nibble is the even column
               "low_first_int8": low nibble first, in signed bytes
               "fragments": the order of Nunchaku's kernels; "awq_words": AWQ's int32
    scales     "row_major": [out, in/group]; "by_group": [in/group, out]
               "tiles_128x4": NVIDIA's blocked order, padded to whole tiles
               "fragments", "micro_fragments": the order of Nunchaku's kernels, 16 and 8 bits
               "awq_groups": [in/group, out], padded
    vectors    of bias, smooth and channel_scale: "plain", or "fragments" as Nunchaku's kernels read
    low_rank   "plain": proj_down [rank, in]; "down_by_column": proj_down [in, rank]
               "fragments": the order of Nunchaku's kernels

    Source: https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout (tiles_128x4)
    """

    codes: str = "low_first"
    scales: str = "row_major"
    vectors: str = "plain"
    low_rank: str = "plain"

    def __str__(self) -> str:
        fields = [f"codes {self.codes}", f"scales {self.scales}"]
        fields += [f"vectors {self.vectors}"] if self.vectors != "plain" else []
        fields += [f"low rank {self.low_rank}"] if self.low_rank != "plain" else []
        return ", ".join(fields).replace("_", " ")


PLAIN = Layout()


@dataclass(frozen=True)
class QuantTensor:
    """The quantized weight of a linear layer.

    shape           of the float32 weight: (out, in)
    dynamic_input   without a static scale in `parts`, quantize the input with a scale per call
    prepared        tensors that `Backend.prepare` computed from the parts
    """

    scheme: Scheme
    layout: Layout
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]
    dynamic_input: bool = False
    prepared: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def quantizes_activation(self) -> bool:
        """Whether the layer quantizes its input before the GEMM."""
        return self.scheme.quantizes_activation(self.parts, self.dynamic_input)

    @property
    def group(self) -> int:
        """Input features that share a scale: the scheme's number, or what block_scale shows."""
        if self.scheme.group > 1 or "block_scale" not in self.parts:
            return self.scheme.group
        return self.shape[1] // self.parts["block_scale"].shape[-1]

    def with_parts(self, parts: Mapping[str, Tensor], layout: Layout) -> "QuantTensor":
        return replace(self, parts=dict(parts), layout=layout)

    def select_rows(self, index: Tensor) -> "QuantTensor":
        """Return the weight of the output features `index` [n], in that order; plain parts only."""
        selected = {
            name: part[index]
            if self.scheme.part(name).rows and part.shape[:1] == self.shape[:1]
            else part
            for name, part in self.parts.items()
        }
        return replace(self, parts=selected, shape=(len(index), self.shape[1]))

    def first_columns(self, count: int) -> "QuantTensor":
        """Return the weight of the first `count` input features; plain parts only.

        Raises   ShapeMismatch if `count` splits a group that shares a scale
        """
        in_features = self.shape[1]
        rotation = len(self.parts["rotation"]) if "rotation" in self.parts else 1
        group = math.lcm(self.group, rotation)
        if count % group:
            raise ShapeMismatch(
                f"{self.scheme.title} weight of {in_features} input features cannot be cut to "
                f"{count}: that is not a multiple of {group}"
            )
        cut = {
            name: part[..., : part.shape[-1] * count // in_features].contiguous()
            if self.scheme.part(name).columns
            else part
            for name, part in self.parts.items()
        }
        return replace(self, parts=cut, shape=(self.shape[0], count))

    def to(self, device: torch.device) -> "QuantTensor":
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def concat_rows(tensors: Sequence[QuantTensor]) -> QuantTensor:
    """Concatenate weights of layers with the same input along their output features.

    All parts must be plain.
    A scale for a whole matrix becomes one scale per row where the matrices differ.

    Raises   ShapeMismatch if they differ in a part of the input: smooth, proj_down, input_scale
    """
    first = tensors[0]
    if any(
        tensor.parts.keys() != first.parts.keys() or tensor.scheme is not first.scheme
        for tensor in tensors
    ):
        raise ShapeMismatch(
            "weights cannot be concatenated by rows: they do not have the same parts"
        )
    parts = {name: _concat_part(name, tensors) for name in first.parts}
    return replace(
        first, parts=parts, shape=(sum(tensor.shape[0] for tensor in tensors), first.shape[1])
    )


def _concat_part(name: str, tensors: Sequence[QuantTensor]) -> Tensor:
    first, parts = tensors[0], [tensor.parts[name] for tensor in tensors]
    by_row = first.scheme.part(name).rows
    if by_row and all(
        part.shape[:1] == tensor.shape[:1] for part, tensor in zip(parts, tensors, strict=True)
    ):
        if len({part.shape[1:] for part in parts}) > 1:
            raise ShapeMismatch(
                f"weights cannot be concatenated by rows: the shapes of their {name} differ"
            )
        return torch.cat(parts)
    if all(torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    if by_row:
        rows = [tensor.shape[0] for tensor in tensors]
        return torch.cat(
            [part.reshape(-1).expand(count) for part, count in zip(parts, rows, strict=True)]
        )
    raise ShapeMismatch(f"weights cannot be concatenated by rows: their {name} differ")


def dequantize_pieces(pieces: Sequence[QuantTensor]) -> Tensor:
    """Dequantize a layer's plain pieces and join them along input features: float32 [out, in]."""
    return torch.cat([piece.scheme.dequantize(piece.parts) for piece in pieces], dim=1)


def dequantize_bias(pieces: Sequence[QuantTensor]) -> Tensor | None:
    """Return the bias that belongs to `dequantize_pieces`, float32 [out], or None."""
    biases = [piece.scheme.dequantize_bias(piece.parts) for piece in pieces]
    present = [bias for bias in biases if bias is not None]
    return sum(present[1:], start=present[0]) if present else None


def unchanged_bias(pieces: Sequence[QuantTensor]) -> Tensor | None:
    """Return the stored bias of a layer, if dequantizing the layer leaves its values and dtype."""
    stored = [piece.parts["bias"] for piece in pieces if "bias" in piece.parts]
    shifted = any("shift" in piece.parts for piece in pieces)
    if len(stored) != 1 or shifted or stored[0].dtype != unquantized_dtype(stored[0].dtype):
        return None
    return stored[0]


def unquantized_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for loading an unquantized tensor: BF16 for FP8, which it holds exactly."""
    return torch.bfloat16 if dtype in FP8_DTYPES else dtype


def relative_error(values: Tensor, expected: Tensor) -> float:
    """Return |values - expected| / |expected| in the Frobenius norm; infinity if a value is NaN."""
    tiny = torch.finfo(torch.float32).tiny
    error = float(
        (values.float() - expected.float()).norm() / expected.float().norm().clamp_min(tiny)
    )
    return math.inf if math.isnan(error) else error
