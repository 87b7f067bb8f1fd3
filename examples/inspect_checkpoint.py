"""Open a checkpoint without loading it, and decode one layer."""

import mezzotint

checkpoint = mezzotint.open("demo-nvfp4")
print(checkpoint.family.title, checkpoint.detected.format.title)
weight = checkpoint.weight("transformer_blocks.0.attn.to_q")
print(tuple(weight.shape), weight.dtype)
