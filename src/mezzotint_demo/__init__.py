"""The built-in model: a small trained FLUX.1 in BF16, and recipes of its quantized copies.

`demo_model/` in Mezzotint's repository says how both were made.
"""

from pathlib import Path

PIPELINE = Path(__file__).parent / "pipeline"
COPIES = Path(__file__).parent / "copies"
