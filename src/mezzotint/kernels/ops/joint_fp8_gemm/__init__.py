"""Two FP8 GEMMs, for text and image tokens, into one output tensor."""
