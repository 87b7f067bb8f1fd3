"""Qwen-Image."""

from mezzotint.families.family import Family, Sampling

FAMILY = Family(
    name="qwenimage",
    title="Qwen-Image",
    transformer="QwenImageTransformer2DModel",
    signature=frozenset({"img_in.weight", "transformer_blocks.0.img_mlp.net.2.weight", "txt_norm.weight"}),
    sampling=Sampling(size=1328, steps=50, guidance=4.0),
)
