"""What surrounds the product with the codes: smoothing before it, scales of rows, low-rank branches and bias behind it.

The formula is that of `mezzotint.schemes.scheme`; the branches are in the dtype of the input.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.schemes.scheme import scaled_input
from mezzotint.tensor import QuantTensor

Product = Callable[[Tensor, Tensor | None], Tensor]
"""(z [rows, in], bias [out] or None) to [rows, out], both in z's dtype."""


def around(x: Tensor, weight: QuantTensor, bias: Tensor | None, product: Product) -> Tensor:
    """The layer whose codes `product` multiplies: x [..., in] to [..., out] in x's dtype.

    A `row_factor` [out] among what was prepared multiplies the product, before anything is added.
    """
    parts = weight.parts
    own = x.reshape(-1, weight.shape[1])
    scaled = scaled_input(own, parts).to(x.dtype) if {"shift", "smooth", "pre_quant_scale"} & set(parts) else own
    bias = None if bias is None else bias.to(x.dtype)
    factor = weight.prepared.get("row_factor")
    if factor is None:
        y = product(scaled, bias)
    else:
        y = (product(scaled, None) * factor).to(x.dtype)
        y = y if bias is None else y + bias
    for branch, read in (("lora", scaled), ("proj", own)):
        if f"{branch}_down" in parts:
            down = F.linear(read, parts[f"{branch}_down"].to(x.dtype))
            y = torch.addmm(y, down, parts[f"{branch}_up"].to(x.dtype).t())
    return y.reshape(*x.shape[:-1], weight.shape[0])
