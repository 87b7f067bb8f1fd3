"""Write GGUF files whose layers are encoded as Q4_0."""

from mezzotint.formats.writers.gguf import GGUFTarget
from mezzotint.schemes.gguf_q4_0 import SCHEME

TARGET = GGUFTarget("gguf-q4_0", "GGUF Q4_0", SCHEME)
