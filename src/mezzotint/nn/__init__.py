"""The modules that replace a quantized nn.Linear, and the execution modes of their model."""

from mezzotint.nn.adapters import LowRankAdapter
from mezzotint.nn.fused import FusedLinear, FusedLinearSlice, fuse_layers
from mezzotint.nn.linear import PREPARED_PREFIX, QuantLinear
from mezzotint.nn.modes import (
    ExecutionModes,
    modes_of,
    override_mode,
    unquantized_activations,
    use_backend,
)
from mezzotint.nn.split import SplitLinear, make_linear, quant_linears
from mezzotint.nn.weight import DecodedWeight, HasWeight

__all__ = [
    "DecodedWeight",
    "ExecutionModes",
    "FusedLinear",
    "FusedLinearSlice",
    "HasWeight",
    "LowRankAdapter",
    "PREPARED_PREFIX",
    "QuantLinear",
    "SplitLinear",
    "fuse_layers",
    "make_linear",
    "modes_of",
    "override_mode",
    "quant_linears",
    "unquantized_activations",
    "use_backend",
]
