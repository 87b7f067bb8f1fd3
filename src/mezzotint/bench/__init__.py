"""Measure speed and memory of a transformer: real shapes, random weights, compared with BF16."""

from mezzotint.bench.measure import Measurement, machine, measure
from mezzotint.bench.random_model import BASELINE, ROTATED, SCHEMES, BenchCase
from mezzotint.bench.shapes import PUBLISHED_MODELS, published_model
from mezzotint.bench.table import markdown, row, warnings
from mezzotint.families.family import PublishedModel

__all__ = [
    "BASELINE",
    "PUBLISHED_MODELS",
    "ROTATED",
    "SCHEMES",
    "BenchCase",
    "Measurement",
    "PublishedModel",
    "machine",
    "markdown",
    "measure",
    "row",
    "published_model",
    "warnings",
]
