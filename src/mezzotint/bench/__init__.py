"""How fast a model's transformer runs, and in how much memory: real shapes, random weights, against compiled BF16."""

from mezzotint.bench.measure import Measured, machine, measure
from mezzotint.bench.random_model import BF16, ENCODERS, Case
from mezzotint.bench.shapes import SHAPES, Shape, shape_of
from mezzotint.bench.table import markdown, row, warnings

__all__ = [
    "BF16",
    "ENCODERS",
    "SHAPES",
    "Case",
    "Measured",
    "Shape",
    "machine",
    "markdown",
    "measure",
    "row",
    "shape_of",
    "warnings",
]
