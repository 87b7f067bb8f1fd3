"""Write Nunchaku's merged single file: fragment order, fused layers, Nunchaku's names."""

import json
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from mezzotint.errors import join_names
from mezzotint.families.nunchaku_names import NunchakuNames
from mezzotint.formats.writers.svdquant import (
    FusedLayerWriter,
    common_scheme_and_rank,
    nunchaku_tensors,
)
from mezzotint.formats.writers.writer import CannotStore, Declaration, ModelInfo, Pieces, Writer
from mezzotint.layouts.nunchaku import RANKS
from mezzotint.layouts.part_layouts import round_up_shape
from mezzotint.schemes import SVDQUANT_NVFP4, Scheme


class NunchakuTarget:
    name = "nunchaku"
    title = "Nunchaku single file"
    file = True

    def writer(self, model: ModelInfo) -> Writer:
        return NunchakuWriter(model, False, partial(nunchaku_tensors, v1=model.family.nunchaku.v1))


TARGET = NunchakuTarget()


class NunchakuWriter(FusedLayerWriter):
    name = NunchakuTarget.name
    title = NunchakuTarget.title

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        branch = common_scheme_and_rank(layers, "Nunchaku")
        if isinstance(branch, CannotStore):
            return branch
        if "_class_name" not in self.model.config:
            return CannotStore(
                "no model configuration was found, which Nunchaku's file needs; --base names one"
            )
        unquantized = self._unquantized(layers, plain)
        if unquantized:
            return CannotStore(
                f"{join_names(unquantized, 1)}: unquantized, and Nunchaku needs quantized weights"
            )
        scheme, rank = branch
        return Declaration(
            None,
            metadata(
                self.model.family.nunchaku, scheme, round_up_shape((rank,), (RANKS,))[0], layers
            ),
        )

    def _unquantized(self, layers: Collection[str], plain: Collection[str]) -> list[str]:
        """Return the unquantized modules that Nunchaku expects to be quantized.

        The modules of skippable blocks count only if one of them is quantized.
        """
        names = self.model.family.nunchaku
        modules = {name.removesuffix(".weight") for name in plain if name.endswith(".weight")}
        skipped = names.skippable if skips_blocks(names, layers) else None
        return sorted(m for m in modules if names.quantizes(m) and not (skipped and skipped in m))


def skips_blocks(names: NunchakuNames, modules: Collection[str]) -> bool:
    """Return whether all skippable blocks are unquantized; `modules` are the quantized ones."""
    return names.skippable is not None and not any(names.skippable in m for m in modules)


def metadata(
    names: NunchakuNames, scheme: Scheme, rank: int, modules: Collection[str]
) -> dict[str, str]:
    """Return the metadata of Nunchaku's file, except `config` and the optional `comfy_config`.

    scheme    scheme of the W4A4 layers
    rank      rank of their low-rank branches
    modules   names of the quantized linears
    """
    fp4 = scheme is SVDQUANT_NVFP4
    side = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": scheme.group}
    config: dict[str, Any] = {
        "method": "svdquant",
        "weight": side | {"scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None},
        "activation": side | {"scale_dtype": "fp8_e4m3_nan" if fp4 else None},
        "rank": rank,
    }
    if names.skippable is not None:
        config["skip_refiners"] = skips_blocks(names, modules)
    return {"model_class": names.model_class, "quantization_config": json.dumps(config)}
