"""Writing row-major SVDQuant as vLLM-Omni reads it: a component folder whose vectors, too, lie row by row."""

import json
from collections.abc import Collection, Mapping

from mezzotint.formats.svdquant_order import ROWS
from mezzotint.formats.svdquant_writer import FusedNames, row_major_tensors, the_one_branch
from mezzotint.formats.writing import Declaration, Model, Pieces, Refusal, Writer
from mezzotint.schemes import SVDQUANT_NVFP4

CONVERSION = {"tool": "mezzotint", "layout": ROWS, "vectors": ROWS}
"""What the file says of itself in the metadata entry `conversion`, as JSON."""


NOT_CONVERTED = ["lm_head"]
"""What vLLM-Omni needs to find in `modules_to_not_convert`: the head of a text encoder, which no transformer has."""


class RowMajorTarget:
    name = "row-major"
    title = "row-major SVDQuant"
    file = False

    def writer(self, model: Model) -> Writer:
        return RowMajorWriter(model, True, row_major_tensors)


TARGET = RowMajorTarget()


class RowMajorWriter(FusedNames):
    name = RowMajorTarget.name
    title = RowMajorTarget.title

    def declare(self, layers: Mapping[str, Pieces], plain: Collection[str]) -> Declaration | Refusal:
        branch = the_one_branch(layers, "a row-major file")
        if isinstance(branch, Refusal):
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
