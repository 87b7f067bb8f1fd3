"""Write GGUF files under the makers' names, as ComfyUI-GGUF's converter does.

Layers in GGUF's blocks are written as they are. `conversion.gguf_output` joins fused layers.
Source: https://github.com/city96/ComfyUI-GGUF/blob/795e4515/tools/convert.py
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mezzotint.formats.readers.gguf import ARCHITECTURE
from mezzotint.formats.writers.writer import (
    CannotStore,
    Declaration,
    DiffusersLayerWriter,
    ModelInfo,
    Pieces,
    StoredTensors,
    check_parts,
    check_single_piece,
)
from mezzotint.schemes import Scheme

TITLE = "GGUF"
PLACES = {"codes": ".weight", "bias": ".bias"}
ARCHITECTURES = {
    "flux1": "flux",
    "flux2": "flux",
    "qwenimage": "qwen_image",
    "wan": "wan",
    "zimage": "lumina2",
}
"""{family: the architecture by which ComfyUI-GGUF knows it}"""


@dataclass(frozen=True)
class GGUFTarget:
    """A GGUF file.

    encoder   the scheme that layers are encoded in; None to leave them as they are
    """

    name: str = "gguf"
    title: str = "GGUF"
    encoder: Scheme | None = None
    file: bool = True
    suffix: str = ".gguf"

    def writer(self, model: ModelInfo) -> "GGUFWriter":
        return GGUFWriter(self.name, self.title, model)


TARGET = GGUFTarget()


@dataclass(frozen=True)
class GGUFWriter(DiffusersLayerWriter):
    """Names each tensor as diffusers does; see `conversion.gguf_output` for the makers' names."""

    name: str
    title: str
    model: ModelInfo

    def layer(self, group: Mapping[str, Pieces]) -> StoredTensors | CannotStore:
        ((module, pieces),) = group.items()
        return (
            check_single_piece(pieces, TITLE)
            or _check_scheme(pieces[0].scheme)
            or check_parts(pieces[0], PLACES, TITLE)
            or StoredTensors(
                {module + PLACES[part]: value for part, value in pieces[0].parts.items()}
            )
        )

    def declare(
        self, layers: Mapping[str, Pieces], plain: Collection[str]
    ) -> Declaration | CannotStore:
        family = self.model.family
        if family.name not in ARCHITECTURES:
            return CannotStore(f"is {family.title}, for which GGUF has no known architecture")
        return Declaration(None, {ARCHITECTURE: ARCHITECTURES[family.name]})


def _check_scheme(scheme: Scheme) -> CannotStore | None:
    if scheme.name.startswith("gguf_"):
        return None
    return CannotStore(f"is {scheme.title}, and GGUF stores its own block types")
