"""The declaration of a model family: everything that Mezzotint needs to know about it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.errors import UnknownFormat
from mezzotint.families.latent_grid import LatentGrid, image_latent_grid
from mezzotint.families.naming import Naming
from mezzotint.families.naming_scheme import NamingScheme, Shapes, strip_prefix
from mezzotint.families.nunchaku_names import NunchakuNames
from mezzotint.families.recipe import Recipe
from mezzotint.families.sampling import Sampling, image_arguments

Config = Mapping[str, Any]
"""Entries of a config.json or model_index.json."""


def divide_by_1000(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what most pipelines pass to their transformer, with the rounding of their dtype."""
    return timesteps.to(dtype) / 1000


@dataclass(frozen=True)
class TimeEmbedding:
    """The embedding that the modulation layers of all blocks read.

    module                   name of the module that computes it, [batch, width]
    arguments                arguments of the transformer's forward that it needs, time step first
    scale_timesteps          (scheduler's time steps, dtype) -> the time steps that pipelines pass
    activation               applied to the embedding before a modulation layer
    unsupported_config_key   entry of config.json with which blocks read a second embedding
    """

    module: str
    arguments: tuple[str, ...]
    scale_timesteps: Callable[[Tensor, torch.dtype], Tensor] = divide_by_1000
    activation: Callable[[Tensor], Tensor] = F.silu
    unsupported_config_key: str | None = None


@dataclass(frozen=True)
class Joint:
    """A width that a transformer shares with another component of its pipeline.

    entry       entry of the transformer's configuration; of several, the first one present counts
    component   name of the other component
    width       entry of its configuration
    times       entry = times * width
    """

    entry: str | tuple[str, ...]
    component: str
    width: str
    times: int = 1

    @property
    def entries(self) -> tuple[str, ...]:
        return (self.entry,) if isinstance(self.entry, str) else self.entry


@dataclass(frozen=True)
class PublishedModel:
    """A published model that `mezzotint bench` can build with random weights.

    transformer   name of the class in diffusers
    config        entries that differ from the class's defaults. Source: the vendor's config.json
    sampling      the settings that its speed is quoted at
    """

    transformer: str
    config: Config
    sampling: Sampling


BENCH_IMAGE = Sampling(height=1024, steps=20, guidance=1.0)
"""The settings that the speed of an image model is quoted at."""


@dataclass(frozen=True)
class SourceImagePipeline:
    """A diffusers pipeline that takes a source image.

    name       its class, without "Pipeline" at the end
    required   it fails without an image, although its signature has a default for one
    library    package that it imports when it runs
    """

    name: str
    required: bool = False
    library: str | None = None


DIFFUSERS_LAYER_PAIRS = (
    ("to_v", "to_out.0"),
    ("add_v_proj", "to_add_out"),
    ("net.0.proj", "net.2"),
)
"""Pairs of (values, attention output) and of feed-forward layers, by diffusers' usual names."""
DIFFUSERS_QKV = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
"""Queries, keys and values by diffusers' usual names."""
DIFFUSERS_MODULATION = ("norm", "modulation")
"""Words in the names of layers that compute shift, scale and gate of an AdaLN."""


def same_pipeline(pipeline: str, _index: Config) -> str:
    """Return the pipeline's own class, for families whose pipelines each do one thing."""
    return pipeline


@dataclass(frozen=True)
class Family:
    """Models that share a transformer class. One module of this package, or a plugin, declares it.

    transformer_class        name of the class
    module                   where to import it from
    naming_schemes           the ways to name its tensors, the most specific first
    sampling                 (model_index.json, transformer's config.json) -> recommended settings
    example_inputs           (config.json, settings, batch) -> random arguments of one call
    config                   {diffusers tensor: shape} -> the class's arguments that depend on them
    fusable                  groups of linears in a block that read the same input
    modulation_layers        suffixes of linears in blocks that read one row per image
    time_embedding           what those linears read; None if it is not known
    joints                   widths shared with other components of a pipeline
    pipeline_arguments       (settings, number of prompts) -> arguments of the family's pipelines
    flags                    {empty tensor in a file: the entry of config.json that it sets to true}
    latent_grid              (VAE's config.json, transformer's config.json) -> sizes it can generate
    source_image_pipelines   the pipelines that take a source image, as far as they are tested
    source_image_pipeline    (class, model_index.json) -> the class to use with a source image
    keep_bf16                patterns of layers that lose too much in FP8
    layer_pairs              suffixes (producer, consumer) of layers with little between them
    qkv, gate_up             groups of same-shaped siblings that an exporter may confuse
    modulation_words         parts of the names of layers that compute shift, scale and gate
    nunchaku                 the names of the layers in Nunchaku's files
    published                {name: model} for `mezzotint bench`
    fast                     Recipe for `mezzotint.fast`
    """

    name: str
    title: str
    transformer_class: str
    naming_schemes: tuple[NamingScheme, ...]
    sampling: Callable[[Config, Config], Sampling]
    example_inputs: Callable[[Config, Sampling, int], dict[str, Any]]
    config: Callable[[Shapes], dict[str, Any]]
    fusable: tuple[tuple[str, ...], ...]
    module: str = "diffusers"
    modulation_layers: tuple[str, ...] = ()
    time_embedding: TimeEmbedding | None = None
    joints: tuple[Joint, ...] = ()
    pipeline_arguments: Callable[[Sampling, int], dict[str, Any]] = image_arguments
    flags: Mapping[str, str] = field(default_factory=dict)
    latent_grid: Callable[[Config, Config], LatentGrid] = image_latent_grid
    source_image_pipelines: tuple[SourceImagePipeline, ...] = ()
    source_image_pipeline: Callable[[str, Config], str] = same_pipeline
    keep_bf16: tuple[str, ...] = ()
    layer_pairs: tuple[tuple[str, str], ...] = DIFFUSERS_LAYER_PAIRS
    qkv: tuple[tuple[str, ...], ...] = DIFFUSERS_QKV
    gate_up: tuple[tuple[str, ...], ...] = ()
    modulation_words: tuple[str, ...] = DIFFUSERS_MODULATION
    nunchaku: NunchakuNames = field(default_factory=NunchakuNames)
    published: Mapping[str, PublishedModel] = field(default_factory=dict)
    fast: Recipe = field(default_factory=Recipe)

    def matches(self, shapes: Shapes) -> bool:
        """Return whether tensors, {name: logical shape}, are those of a model of the family."""
        stripped = {short: shapes[name] for short, name in strip_prefix(shapes).items()}
        return any(scheme.owns(stripped) for scheme in self.naming_schemes)

    def naming(self, shapes: Shapes) -> Naming:
        """Return the stored pieces of each tensor of the diffusers model.

        shapes   {stored tensor: logical shape}
        Raises   MissingTensor, ShapeMismatch, UnknownFormat
        """
        flags = self.flags_of(shapes)
        stored = {short: name for short, name in strip_prefix(shapes).items() if name not in flags}
        stripped = {short: shapes[name] for short, name in stored.items()}
        naming = self._naming_scheme(stripped).naming(stripped)
        return {
            name: [replace(piece, source=stored[piece.source]) for piece in naming[name]]
            for name in naming
        }

    def unused_tensors(self, shapes: Shapes) -> dict[str, str]:
        """Return {stored tensor: reason} of the tensors that the diffusers model does not have."""
        stored = strip_prefix(shapes)
        scheme = self._naming_scheme({short: shapes[name] for short, name in stored.items()})
        unused = {
            stored[short]: reason
            for short in stored
            for suffix, reason in scheme.unused_suffixes.items()
            if short.endswith(suffix)
        }
        flags = {
            name: f"an empty tensor that stands for {entry} of config.json"
            for name, entry in self.flags_of(shapes).items()
        }
        return unused | flags

    def flags_of(self, shapes: Shapes) -> dict[str, str]:
        """Return {stored flag: entry of config.json} of empty tensors; they may lack the prefix."""
        entries = {
            name: self.flags.get(name.rpartition(".")[2])
            for name, shape in shapes.items()
            if 0 in shape
        }
        return {name: entry for name, entry in entries.items() if entry is not None}

    def producers_of(self, consumer: str) -> Iterator[str]:
        """Yield the names that the layer before `consumer` would have, by `layer_pairs`."""
        for producer, suffix in self.layer_pairs:
            if consumer.endswith("." + suffix):
                yield consumer.removesuffix(suffix) + producer

    def _naming_scheme(self, stripped: Shapes) -> NamingScheme:
        scheme = next((scheme for scheme in self.naming_schemes if scheme.owns(stripped)), None)
        if scheme is None:
            raise UnknownFormat(f"its tensors are not those of {self.title}")
        return scheme
