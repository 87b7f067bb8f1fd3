"""Which attention a model runs: diffusers' own dispatch, with FlashAttention 3 from the wheel `fa3-fwd` added to it.

cudnn     cuDNN's, through PyTorch; any NVIDIA GPU that it knows
fa3       FlashAttention 3 in BF16; Hopper
fa3_fp8   FlashAttention 3 with queries, keys and values rounded to FP8 as they are, except while `exact_attention` is
          open; Hopper, on request only
sdpa      PyTorch's own choice; anywhere
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mezzotint.errors import BadRequest, Unsupported, there_are
from mezzotint.kernels import Can, Cannot, Target
from mezzotint.nn import attention_is_exact
from mezzotint.schemes.rounding import round_e4m3

WHEEL = "fa3_fwd_interface"


@dataclass(frozen=True)
class Attention:
    """One way of computing attention on [batch, tokens, heads, head width].

    automatic   may be chosen without being asked for: it changes no more than the order of sums
    fp8         takes queries and keys that are rounded to FP8 already
    """

    name: str
    run: Callable[..., Tensor]
    can: Callable[[Target], Can | Cannot]
    automatic: bool = True
    fp8: bool = False


def _permuted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    return _permuted(query, key, value, attn_mask, scale)


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _permuted(query, key, value, attn_mask, scale)


def _fa3(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    if attn_mask is not None:  # the wheel has no masks
        return _cudnn(query, key, value, attn_mask, scale)
    out: Tensor = torch.ops.fa3_fwd._flash_attn_forward(
        query, key, value, softmax_scale=scale or query.shape[-1] ** -0.5
    )[0]
    return out


def _fa3_fp8(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    if attn_mask is not None:
        return _cudnn(query, key, value, attn_mask, scale)
    if attention_is_exact():
        return _fa3(query, key, value, None, scale)
    q, k, v = (x if x.dtype == torch.float8_e4m3fn else round_e4m3(x.float()) for x in (query, key, value))
    return _fa3(q, k, v, None, scale)


def _on_cuda(target: Target) -> Can | Cannot:
    return Can() if target.kind == "cuda" else Cannot(f"needs an NVIDIA GPU, this is {target}")


def _on_hopper(target: Target) -> Can | Cannot:
    if not target.is_hopper:
        return Cannot(f"is written for Hopper (sm_90), this is {target}")
    if find_spec(WHEEL) is None:
        return Cannot("is not installed; pip install fa3-fwd")
    return Can()


ATTENTIONS = {
    attention.name: attention
    for attention in (
        Attention("fa3", _fa3, _on_hopper),
        Attention("cudnn", _cudnn, _on_cuda),
        Attention("sdpa", _sdpa, lambda _target: Can()),
        Attention("fa3_fp8", _fa3_fp8, _on_hopper, automatic=False, fp8=True),
    )
}
"""{name: attention}, the fastest first."""


def choose(target: Target, name: str | None = None) -> tuple[Attention, dict[str, str]]:
    """The attention called `name`, or else the fastest for `target`; and {name: why not} of the others.

    Raises   BadRequest if there is none of this name, Unsupported if it cannot run there
    """
    if name is not None:
        if name not in ATTENTIONS:
            raise BadRequest(f"no attention is called {name!r}", there_are(name, ATTENTIONS))
        answer = ATTENTIONS[name].can(target)
        if isinstance(answer, Cannot):
            raise Unsupported(f"attention {name} {answer.reason}")
        return ATTENTIONS[name], {}
    declined: dict[str, str] = {}
    for attention in ATTENTIONS.values():
        answer = attention.can(target)
        if isinstance(answer, Can) and attention.automatic:
            return attention, declined
        declined[attention.name] = answer.reason if isinstance(answer, Cannot) else "only on request"
    raise Unsupported(f"no attention can run on {target}")


def set_attention(model: nn.Module, attention: Attention) -> None:
    """Make every attention layer of a diffusers transformer use this one."""
    if attention.name.startswith("fa3"):
        importlib.import_module(WHEEL)
    backend = _registered(attention)
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = backend


def _registered(attention: Attention) -> Any:
    """The member of diffusers' enumeration that stands for it. Diffusers (0.42) has no public way of adding one."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name = f"mezzotint_{attention.name}"
    known = next((member for member in _AttentionBackendRegistry._backends if member.value == name), None)
    if known is not None:
        return known
    member = str.__new__(AttentionBackendName, name)
    member._name_ = member._value_ = name
    _AttentionBackendRegistry.register(member)(attention.run)
    return member
