"""A family in one file: a small transformer, and everything that Mezzotint needs for it."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.families.converter_trace import trace_converter
from mezzotint.families.example_inputs import packed_size
from mezzotint.families.family import BENCH_IMAGE, Config, Family, PublishedModel
from mezzotint.families.naming import Naming
from mezzotint.families.naming_scheme import NamingScheme, Shapes, has_tensors
from mezzotint.families.sampling import Sampling
from mezzotint.families.sizes import blocks, columns, rows

QKV = ("to_q", "to_k", "to_v")


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in QKV)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))
        return x + self.to_out(mixed)


class TinyTransformer2DModel(ModelMixin, ConfigMixin):
    _repeated_blocks = ("TinyBlock",)

    @register_to_config
    def __init__(self, in_channels: int = 16, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.patch_in = nn.Linear(in_channels, width)
        self.tiny_blocks = nn.ModuleList(TinyBlock(width) for _ in range(num_layers))
        self.patch_out = nn.Linear(width, in_channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        x = self.patch_in(hidden_states) + timestep[:, None, None]
        for block in self.tiny_blocks:
            x = block(x)
        return (self.patch_out(x),)


def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the makers' tensors, and split their fused queries, keys and values."""
    converted = {}
    for name, value in tensors.items():
        known = name.replace("net.", "tiny_blocks.").replace("first.", "patch_in.")
        known = known.replace("last.", "patch_out.").replace(".out.", ".to_out.")
        names = [known.replace(".qkv.", f".{leaf}.") for leaf in QKV] if "qkv" in name else [known]
        converted |= dict(zip(names, value.chunk(len(names)), strict=True))
    return converted


def from_original(shapes: Shapes) -> Naming:
    return trace_converter(convert, shapes)


def sampling(_index: Config, _config: Config) -> Sampling:
    return Sampling(height=64, steps=2, guidance=1.0)


def example(config: Config, sampling: Sampling, batch: int) -> dict[str, Any]:
    height, width = packed_size(sampling)
    tokens = torch.randn(batch, height * width, config["in_channels"])
    return {"hidden_states": tokens, "timestep": torch.full((batch,), 0.5)}


def config(shapes: Shapes) -> dict[str, Any]:
    return {
        "in_channels": columns(shapes, "patch_in.weight"),
        "width": rows(shapes, "patch_in.weight"),
        "num_layers": blocks(shapes, "tiny_blocks"),
    }


FAMILY = Family(
    name="tiny",
    title="Tiny",
    transformer_class="TinyTransformer2DModel",
    module=__name__,
    naming_schemes=(
        NamingScheme(has_tensors("patch_in.weight", "tiny_blocks.0.to_q.weight")),
        NamingScheme(has_tensors("first.weight", "net.0.qkv.weight"), from_original),
    ),
    sampling=sampling,
    example_inputs=example,
    config=config,
    fusable=(QKV,),
    published={"tiny-1": PublishedModel("TinyTransformer2DModel", {}, BENCH_IMAGE)},
)
