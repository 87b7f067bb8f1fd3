"""The modules that the loader puts in place of a quantized nn.Linear, and the modes that they run in."""

from mezzotint.nn.group import GroupedLinear, LinearGroup
from mezzotint.nn.linear import PREPARED, QuantLinear, SplitLinear, linear_of, quant_linears
from mezzotint.nn.modes import attention_is_exact, exact_attention, overrides, unrounded_inputs, use_backend
from mezzotint.nn.weight import DecodedWeight, HasWeight

__all__ = [
    "DecodedWeight",
    "GroupedLinear",
    "HasWeight",
    "LinearGroup",
    "PREPARED",
    "QuantLinear",
    "SplitLinear",
    "attention_is_exact",
    "exact_attention",
    "linear_of",
    "overrides",
    "quant_linears",
    "unrounded_inputs",
    "use_backend",
]
