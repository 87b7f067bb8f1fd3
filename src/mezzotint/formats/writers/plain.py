"""Write unquantized diffusers components; conversion decodes every quantized layer first."""

from collections.abc import Collection, Mapping

from mezzotint.formats.writers.writer import (
    CannotStore,
    Declaration,
    DiffusersLayerWriter,
    Pieces,
    StoredTensors,
)


class PlainWriter(DiffusersLayerWriter):
    name = "bf16"
    title = "unquantized BF16"
    file = False

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        return CannotStore("is quantized")

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        return Declaration()


TARGET = PlainWriter()
