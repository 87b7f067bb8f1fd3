"""Z-Image and Z-Image-Turbo."""

from mezzotint.families.family import Family, Sampling

FAMILY = Family(
    name="zimage",
    title="Z-Image",
    transformer="ZImageTransformer2DModel",
    signature=frozenset({"cap_embedder.1.weight", "layers.0.feed_forward.w1.weight", "layers.0.attention.to_q.weight"}),
    sampling=Sampling(size=1024, steps=9, guidance=0.0),
)
