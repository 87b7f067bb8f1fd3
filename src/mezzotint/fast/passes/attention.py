"""Select the attention backend of a model. FlashAttention 3 is added to diffusers' dispatch.

cudnn     cuDNN attention through PyTorch; any NVIDIA GPU that cuDNN supports
fa3       FlashAttention 3 in BF16, from the wheel `fa3-fwd`; Hopper
fa3_fp8   FlashAttention 3 with queries, keys and values cast to FP8 without a scale, except while
          `bf16_attention` is open; Hopper, on request only
sdpa      PyTorch's own choice; any device
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mezzotint.errors import Unsupported, require_known
from mezzotint.fast.edits import ModelEdits
from mezzotint.fast.fast_pass import Applied, Pass, PassContext
from mezzotint.kernels import Can, Cannot, Target
from mezzotint.nn import modes_of, override_mode
from mezzotint.schemes.minifloats import round_e4m3

FA3_MODULE = "fa3_fwd_interface"


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention on [batch, tokens, heads, head width].

    name                 value of --attention
    run                  function of query, key, value, mask and scale
    can                  whether it can run on a device
    selected_by_default  True if it may be chosen by itself: it changes only the order of sums
    accepts_fp8          True if queries and keys may be e4m3 already
    bf16                 what replaces it while `bf16_attention` is open, if it computes in FP8
    """

    name: str
    run: Callable[..., Tensor]
    can: Callable[[Target], Can | Cannot]
    selected_by_default: bool = True
    accepts_fp8: bool = False
    bf16: "AttentionBackend | None" = None


def _sdpa_heads_second(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    return _sdpa_heads_second(query, key, value, attn_mask, scale)


def _cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa_heads_second(query, key, value, attn_mask, scale)


def _fa3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    if attn_mask is not None:  # the wheel is built without masks
        return _cudnn(query, key, value, attn_mask, scale)
    out: Tensor = torch.ops.fa3_fwd._flash_attn_forward(
        query, key, value, softmax_scale=scale or query.shape[-1] ** -0.5
    )[0]
    return out


def _fa3_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    if attn_mask is not None:
        return _cudnn(query, key, value, attn_mask, scale)
    # norm_rope returns queries and keys in FP8 already. Quantizing all three here takes longer than
    # attention itself: 626 us instead of 286 (benchmarks/NOTES.md).
    q, k, v = (
        x if x.dtype == torch.float8_e4m3fn else round_e4m3(x.float()) for x in (query, key, value)
    )
    return _fa3(q, k, v, None, scale)


def _require_cuda(target: Target) -> Can | Cannot:
    return (
        Can() if target.device_type == "cuda" else Cannot(f"needs an NVIDIA GPU, this is {target}")
    )


def _require_hopper(target: Target) -> Can | Cannot:
    if not target.is_hopper:
        return Cannot(f"is written for Hopper (sm_90), this is {target}")
    if find_spec(FA3_MODULE) is None:
        return Cannot("is not installed; pip install fa3-fwd")
    return Can()


# On an H100, FlashAttention 3 reaches 618 TFLOP/s sustained in BF16, cuDNN 575, and FP8 817
# (docs/performance.md). FP8 changes the result, so it is never the default.
_FA3 = AttentionBackend("fa3", _fa3, _require_hopper)

ATTENTION_BACKENDS = {
    attention.name: attention
    for attention in (
        _FA3,
        AttentionBackend("cudnn", _cudnn, _require_cuda),
        AttentionBackend("sdpa", _sdpa, lambda _target: Can()),
        AttentionBackend(
            "fa3_fp8",
            _fa3_fp8,
            _require_hopper,
            selected_by_default=False,
            accepts_fp8=True,
            bf16=_FA3,
        ),
    )
}
"""{name: backend}, the fastest first."""


def select_attention(
    target: Target, name: str | None = None
) -> tuple[AttentionBackend, dict[str, str]]:
    """Return the attention backend for `target`, and {name: why not} of faster ones.

    name     name of the backend, or None for the fastest
    Raises   BadRequest if no backend has this name, Unsupported if it cannot run on `target`
    """
    if name is not None:
        require_known("attention backend", name, ATTENTION_BACKENDS)
        answer = ATTENTION_BACKENDS[name].can(target)
        if isinstance(answer, Cannot):
            raise Unsupported(f"attention {name} {answer.reason}")
        return ATTENTION_BACKENDS[name], {}
    declined: dict[str, str] = {}
    for attention in ATTENTION_BACKENDS.values():
        answer = attention.can(target)
        if isinstance(answer, Can) and attention.selected_by_default:
            return attention, declined
        declined[attention.name] = (
            answer.reason if isinstance(answer, Cannot) else "only on request"
        )
    raise Unsupported(f"no attention can run on {target}")


class FastAttnProcessor:
    """A processor that calls its attention backend itself, without diffusers' dispatch."""

    def __init__(self, attention: AttentionBackend) -> None:
        self.attention = attention


def set_attention(
    model: nn.Module, attention: AttentionBackend, edits: ModelEdits | None = None
) -> None:
    """Make every attention layer of a diffusers transformer use this backend."""
    edits = edits or ModelEdits()
    if attention.name.startswith("fa3"):
        importlib.import_module(FA3_MODULE)  # registers torch.ops.fa3_fwd
    if attention.bf16 is not None:  # now, because compiled code guards on diffusers' registry
        _register_backend(attention.bf16)
    modes = modes_of(model)
    edits.set(modes, attention=attention)
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            edits.save(processor, "_attention_backend")
    _switch_processors(model, attention)


def _switch_processors(model: nn.Module, attention: AttentionBackend) -> None:
    backend = _register_backend(attention)
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if isinstance(processor, FastAttnProcessor):
            processor.attention = attention
        elif hasattr(processor, "_attention_backend"):
            processor._attention_backend = backend


@contextmanager
def bf16_attention(model: nn.Module) -> Iterator[None]:
    """Run FP8 attention in BF16 while the context is open. Other attention stays as it is.

    Diffusers' dispatch does not pass the model. So the model's processors are given the BF16
    backend.

    Raises   BadRequest if another thread runs the model or has changed its modes
    """
    attention = modes_of(model).attention
    with override_mode(model, "bf16_attention", True):
        if not (isinstance(attention, AttentionBackend) and attention.bf16):
            yield
            return
        _switch_processors(model, attention.bf16)
        try:
            yield
        finally:
            _switch_processors(model, attention)


def uses_fp8_attention(model: nn.Module) -> bool:
    """Return whether an attention layer of the model takes queries and keys in FP8."""
    processors: Iterator[Any] = (getattr(module, "processor", None) for module in model.modules())
    return any(_accepts_fp8(processor) for processor in processors)


def _accepts_fp8(processor: Any) -> bool:
    """Return whether a processor, one of ours or of diffusers, runs an FP8 attention backend."""
    attention = getattr(processor, "attention", None)
    if isinstance(attention, AttentionBackend):
        return attention.accepts_fp8
    return getattr(processor, "_attention_backend", None) in _fp8_members


_fp8_members: set[Any] = set()
"""Members of diffusers' enumeration that were registered for an FP8 attention backend."""


def _register_backend(attention: AttentionBackend) -> Any:
    """Return the member of diffusers' enumeration for a backend; add it the first time.

    Diffusers (0.42) has no public way to add a backend, so this uses its private registry.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name = f"mezzotint_{attention.name}"
    known = next(
        (member for member in _AttentionBackendRegistry._backends if member.value == name), None
    )
    if known is not None:
        return known
    # An Enum with members cannot be extended, so make a member by hand.
    member = str.__new__(AttentionBackendName, name)
    member._name_ = member._value_ = name
    _AttentionBackendRegistry.register(member)(attention.run)
    if attention.accepts_fp8:
        _fp8_members.add(member)
    return member


class AttentionPass(Pass):
    """Select the attention backend and let diffusers' dispatch use it."""

    name = "attention"
    needs_gpu, compile_only = False, True

    def apply(self, model: nn.Module, context: PassContext) -> Applied:
        attention, declined = select_attention(context.target, context.attention)
        set_attention(model, attention, context.edits)
        context.attention_backend = attention
        return Applied({"attention": attention.name, "declined": declined})


PASS = AttentionPass()
