"""Write row-major SVDQuant as a component folder, for vLLM-Omni; its vectors are plain, too.

`formats.readers.row_major` describes the tensors.
"""

import json
from collections.abc import Collection, Mapping

from mezzotint.formats.detection.svdquant_order import ROWS
from mezzotint.formats.writers.svdquant import (
    FusedLayerWriter,
    common_scheme_and_rank,
    row_major_tensors,
)
from mezzotint.formats.writers.writer import CannotStore, Declaration, ModelInfo, Pieces, Writer
from mezzotint.schemes import SVDQUANT_NVFP4

CONVERSION = {"tool": "mezzotint", "layout": ROWS, "vectors": ROWS}
"""The value of the metadata entry `conversion`, which declares the order of codes and vectors."""
NOT_CONVERTED = ["lm_head"]
"""vLLM-Omni requires this entry, although a transformer has no language-model head."""


class RowMajorTarget:
    name = "row-major"
    title = "row-major SVDQuant"
    file = False

    def writer(self, model: ModelInfo) -> Writer:
        return RowMajorWriter(model, True, row_major_tensors)


TARGET = RowMajorTarget()


class RowMajorWriter(FusedLayerWriter):
    name = RowMajorTarget.name
    title = RowMajorTarget.title

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        branch = common_scheme_and_rank(layers, "a row-major file")
        if isinstance(branch, CannotStore):
            return branch
        scheme, rank = branch
        quantization = {
            "quant_method": "svdquant",
            "rank": rank,
            "precision": "nvfp4" if scheme is SVDQUANT_NVFP4 else "int4",
            "act_unsigned": False,
            "modules_to_not_convert": NOT_CONVERTED,
        }
        return Declaration(quantization, {"conversion": json.dumps(CONVERSION)})
