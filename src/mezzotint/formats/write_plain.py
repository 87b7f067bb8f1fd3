"""Writing unquantized diffusers components: every quantized layer is decoded before it comes here."""

from collections.abc import Collection, Mapping

from mezzotint.formats.writing import Declaration, DiffusersNames, Pieces, Refusal, Written


class PlainWriter(DiffusersNames):
    name = "bf16"
    title = "unquantized BF16"
    file = False

    def layer(self, group: Mapping[str, Pieces]) -> Written | Refusal:
        return Refusal("is quantized")

    def declare(self, layers: Mapping[str, Pieces], plain: Collection[str]) -> Declaration | Refusal:
        return Declaration()


TARGET = PlainWriter()
