"""Run-time support of a fast model: CUDA graphs, caches, weight watching."""
