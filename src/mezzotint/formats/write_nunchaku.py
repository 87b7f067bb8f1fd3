"""Writing Nunchaku's merged single file: SVDQuant in fragments, fused layers under Nunchaku's names."""

import json
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from mezzotint.errors import listed
from mezzotint.formats.svdquant_writer import FusedNames, nunchaku_tensors, the_one_branch
from mezzotint.formats.writing import Declaration, Model, Pieces, Refusal, Writer
from mezzotint.layouts.arrangements import grown
from mezzotint.layouts.nunchaku import RANKS
from mezzotint.schemes import SVDQUANT_NVFP4, Scheme

FLUX1, ZIMAGE = "FluxTransformer2DModel", "ZImageTransformer2DModel"
MODEL_CLASS = {
    FLUX1: "NunchakuFluxTransformer2dModel",
    "QwenImageTransformer2DModel": "NunchakuQwenImageTransformer2DModel",
    ZIMAGE: "NunchakuZImageTransformer2DModel",
}
"""{diffusers' class: Nunchaku's, as its files spell it}"""
REFINER = "_refiner."
"""In the names of the Z-Image layers that may all be left unquantized."""


class NunchakuTarget:
    name = "nunchaku"
    title = "Nunchaku single file"
    file = True

    def writer(self, model: Model) -> Writer:
        return NunchakuWriter(model, False, partial(nunchaku_tensors, v1=model.transformer == FLUX1))


TARGET = NunchakuTarget()


class NunchakuWriter(FusedNames):
    name = NunchakuTarget.name
    title = NunchakuTarget.title

    def declare(self, layers: Mapping[str, Pieces], plain: Collection[str]) -> Declaration | Refusal:
        branch = the_one_branch(layers, "Nunchaku")
        if isinstance(branch, Refusal):
            return branch
        if "_class_name" not in self.model.config:
            return Refusal("no model configuration was found, and Nunchaku's file carries it; --base names one")
        unquantized = self._unquantized(layers, plain)
        if unquantized:
            return Refusal(f"{listed(unquantized, 1)}: unquantized, and Nunchaku has quantized weights there")
        scheme, rank = branch
        return Declaration(None, metadata(self.model.transformer, scheme, grown((rank,), (RANKS,))[0], layers))

    def _unquantized(self, layers: Collection[str], plain: Collection[str]) -> list[str]:
        """Modules that Nunchaku would look for among the quantized ones; refiners only where some are quantized."""
        refined = any(REFINER in module for module in layers)
        modules = {name.removesuffix(".weight") for name in plain if name.endswith(".weight")}
        return sorted(m for m in modules if self.model.in_nunchaku(m) and (refined or REFINER not in m))


def metadata(transformer: str, scheme: Scheme, rank: int, modules: Collection[str]) -> dict[str, str]:
    """What Nunchaku's files say of themselves beside the model's `config`, without the optional comfy_config.

    transformer   diffusers' class
    scheme        of the file's W4A4 layers; `rank` of their low-rank branches
    modules       names of the quantized linears
    """
    fp4 = scheme is SVDQUANT_NVFP4
    side = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": scheme.group}
    note: dict[str, Any] = {
        "method": "svdquant",
        "weight": side | {"scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None},
        "activation": side | {"scale_dtype": "fp8_e4m3_nan" if fp4 else None},
        "rank": rank,
    }
    if transformer == ZIMAGE:
        note["skip_refiners"] = not any(REFINER in module for module in modules)
    return {"model_class": MODEL_CLASS[transformer], "quantization_config": json.dumps(note)}
