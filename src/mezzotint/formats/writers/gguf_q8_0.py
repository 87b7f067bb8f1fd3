"""Write GGUF files whose layers are encoded as Q8_0."""

from mezzotint.formats.writers.gguf import GGUFTarget
from mezzotint.schemes.gguf_q8_0 import SCHEME

TARGET = GGUFTarget("gguf-q8_0", "GGUF Q8_0", SCHEME)
