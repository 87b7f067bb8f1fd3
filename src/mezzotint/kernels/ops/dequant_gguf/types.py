"""Numbers by which our kernel knows GGUF's block types, without an import of Triton."""

from mezzotint.containers.gguf_types import BLOCKS
from mezzotint.schemes import schemes

TYPES = {
    name: number
    for number, block in BLOCKS.items()
    if (name := f"gguf_{block.name.lower()}") in schemes()
}
"""{name of the scheme: GGUF's number of its type}"""
