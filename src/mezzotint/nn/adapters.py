"""Low-rank adapters (LoRA) as values on a layer: y += scale * (x @ down.T) @ up.T."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import BadRequest, ShapeMismatch


class LowRankAdapter(nn.Module):
    """One adapter of a layer, in BF16. Its tensors move with the layer and are in no state dict.

    The scale is multiplied into `up`, so a new scale is a new tensor, which CUDA graphs notice.
    Source: LoRA, https://arxiv.org/abs/2106.09685

    down    [rank, in]
    up      [rows, rank]
    start   first output feature that the adapter adds to; not 0 in a fused layer
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0, start: int = 0) -> None:
        super().__init__()
        self.start, self.scale = start, scale
        self.register_buffer("down", down.detach().bfloat16(), persistent=False)
        self.register_buffer("up", (up.detach().float() * scale).bfloat16(), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y [..., out] plus the adapter's output for x [..., in]."""
        delta = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        end = y.shape[-1] - self.start - delta.shape[-1]
        return y + F.pad(delta, (self.start, end)).to(y.dtype)

    def shifted(self, start: int) -> "LowRankAdapter":
        """Return this adapter for a fused layer in which its layer begins at row `start`."""
        moved = LowRankAdapter(self.down, self.up, start=self.start + start)
        moved.scale = self.scale
        return moved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowRankAdapter":
        """Move the tensors; they stay BF16 when the model is cast."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.down, self.up = self.down.bfloat16(), self.up.bfloat16()
        return self


def adapter_key(name: str, member: int | None = None) -> str:
    """Return the key of an adapter among a layer's modules; `member` is a fused layer's index.

    Raises   BadRequest if the name is empty or has a dot, which module names cannot have
    """
    if not name or "." in name:
        raise BadRequest(f"{name!r} is not a valid name of an adapter", "use a name without dots.")
    return f"adapter_{name}" if member is None else f"adapter_{name}@{member}"


def check_adapter(down: Tensor, up: Tensor, in_features: int, out_features: int) -> None:
    """Raise ShapeMismatch unless down is [rank, in] and up is [out, rank]."""
    shapes = tuple(down.shape), tuple(up.shape)
    if down.ndim == up.ndim == 2 and shapes == (
        (up.shape[1], in_features),
        (out_features, down.shape[0]),
    ):
        return
    raise ShapeMismatch(
        f"an adapter of {shapes[0]} and {shapes[1]} does not fit a layer of {in_features} inputs "
        f"and {out_features} outputs"
    )


def remove_adapter(adapters: nn.ModuleDict, key: str, name: str) -> None:
    """Remove one adapter. Raises BadRequest if there is none of this name."""
    if key not in adapters:
        raise BadRequest(f"the layer has no adapter called {name!r}", "set_adapter adds one.")
    del adapters[key]


def apply_adapters(adapters: nn.ModuleDict, x: Tensor, y: Tensor) -> Tensor:
    """Return y [..., out] plus the outputs of a layer's adapters for its input x [..., in]."""
    for adapter in adapters.values():
        y = adapter(x, y)
    return y
