"""FLUX.1 (dev, schnell, Kontext) and every model of its architecture, the built-in one included."""

from mezzotint.families.family import Family, Sampling

FAMILY = Family(
    name="flux1",
    title="FLUX.1",
    transformer="FluxTransformer2DModel",
    signature=frozenset(
        {
            "context_embedder.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
        }
    ),
    sampling=Sampling(size=1024, steps=28, guidance=3.5),
)
