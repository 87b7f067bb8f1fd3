"""What `speed_up` did to a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class UnfusedLayers:
    """Layers that read the same input but could not be fused, and the reason."""

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class SpeedReport:
    """What `speed_up` did to a model.

    attention                  name of the attention backend
    declined                   {attention backend: why it was not chosen}
    fused_groups               fused linears that each replace several layers
    unfused                    layers on the same input that stay separate, and why
    fused_activations          activations that are fused with the linear before or after them
    activation_fusion_skipped  why this device cannot fuse more activations, or None
    fused_attention            attention layers that normalize and rotate in one kernel
    deferred_residuals         blocks that defer their last addition to the next block
    caches_text_refiner        True if text that has its own blocks is refined once per prompt
    precomputed_layers         modulation layers computed for all steps at once
    uses_cuda_graphs           True if each input shape is recorded as a CUDA graph
    compile_cache              folder of compiled kernels
    skipped                    {pass: why it did nothing}
    """

    attention: str
    declined: Mapping[str, str]
    compile_cache: str
    fused_groups: int = 0
    unfused: tuple[UnfusedLayers, ...] = ()
    fused_activations: int = 0
    activation_fusion_skipped: str | None = None
    fused_attention: int = 0
    deferred_residuals: int = 0
    caches_text_refiner: bool = False
    precomputed_layers: int = 0
    uses_cuda_graphs: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
