"""Read Nunchaku Lite: SVDQuant and AWQ layers in Nunchaku's byte order, under diffusers' names.

The tensors of a layer are those of Nunchaku's second version; see `svdquant.py`. Nothing else is
Nunchaku's: no layers are fused, no input is shifted after a GELU, and AWQ layers keep the order of
their rows and their bias.

config.json has quant_method nunchaku_lite and the names of the layers. A file alone may have the
runtime manifest that diffuse-compressor puts into its header instead.
Sources: diffusers 0.42 (quantizers/nunchaku), https://github.com/rootonchair/diffuse-compressor
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mezzotint.errors import CheckpointError, MissingTensor, UnknownFormat, UnreadFormat
from mezzotint.formats.contents import Contents, Match, NoMatch, StoredLinear, classify_tensors
from mezzotint.formats.header import Header
from mezzotint.formats.readers.mezzotint import quantization_config
from mezzotint.formats.readers.svdquant import (
    NUNCHAKU_LAYOUT,
    QWEIGHT,
    V2,
    quantized_modules,
    ranks,
    scheme_of,
    stored_linear,
)
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.untrusted.escaping import shown
from mezzotint.untrusted.json import parse_object
from mezzotint.untrusted.schema import Entries, validated

METHOD, MANIFEST, SCHEMA = "nunchaku_lite", "runtime_manifest", "nunchaku_lite.runtime_manifest"
SCHEMES: Mapping[tuple[str, str], Scheme] = {
    ("svdq_w4a4", "int4"): SVDQUANT_INT4,
    ("svdq_w4a4", "nvfp4"): SVDQUANT_NVFP4,
    ("svdq_w4a4", "fp4"): SVDQUANT_NVFP4,
    ("awq_w4a16", "int4"): AWQ_W4A16,
}
"""{(operation, precision): scheme}"""


class Targets(Entries):
    """The layers of one operation in config.json."""

    precision: str
    targets: list[str]


class Declared(Entries):
    """The entries of quantization_config."""

    svdq_w4a4: Targets | None = None
    awq_w4a16: Targets | None = None


class Target(Entries):
    """One layer of a manifest, and the modules of the model that it replaces."""

    nunchaku_op: str
    precision: str
    checkpoint_prefix: str
    source_modules: list[str]


class Manifest(Entries):
    """The manifest in the header of a single file."""

    targets: list[Target]
    structural_patches: list[Any] | dict[str, Any] | None = None


@dataclass(frozen=True)
class Declaration:
    """What a file says of itself: {layer: (operation, precision)}."""

    where: str
    layers: Mapping[str, tuple[str, str]]


class NunchakuLite:
    name = "nunchaku_lite"
    title = "Nunchaku Lite"

    def detect(self, header: Header) -> Match | NoMatch:
        if quantization_config(header).get("quant_method") == METHOD:
            return Match(f"config.json: quant_method {METHOD}", certain=True)
        if _manifest(header):
            return Match(f"{MANIFEST} in the header", certain=True)
        return NoMatch(f"no quant_method {METHOD} in config.json, and no {MANIFEST} in the header")

    def contents(self, header: Header) -> Contents:
        declaration = _declaration(header)
        modules = quantized_modules(header)
        if differing := sorted(declaration.layers.keys() ^ modules.keys()):
            raise _contradiction(header, declaration, differing[0])
        linears = {m: _linear(header, m, declaration) for m in declaration.layers}
        counts = Counter(linear.scheme.title for linear in linears.values())
        said = ", ".join(f"{count} layers {title}" for title, count in counts.items())
        found = classify_tensors(header, linears, {})
        return replace(found, evidence=(f"{said}; {ranks(header)}",))


FORMAT = NunchakuLite()


def _manifest(header: Header) -> Mapping[str, Any]:
    """Return the manifest in the header, {} if there is none."""
    text = header.metadata.get("quantization_config", "")
    if SCHEMA not in text:
        return {}
    found = parse_object(text, f"{header.path}: quantization_config in the header").get(MANIFEST)
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else {}


def _declaration(header: Header) -> Declaration:
    """Return the layers that config.json or the manifest lists. Raises UnreadFormat."""
    if manifest := _manifest(header):
        where = f"{header.path}: {MANIFEST} in the header"
        return Declaration(where, _layers_of_manifest(validated(Manifest, manifest, where), where))
    where = f"{header.path}: quantization_config of config.json"
    declared = validated(Declared, quantization_config(header), where)
    sections = {"svdq_w4a4": declared.svdq_w4a4, "awq_w4a16": declared.awq_w4a16}
    layers = {
        module: (operation, section.precision)
        for operation, section in sections.items()
        if section is not None
        for module in section.targets
    }
    return Declaration(where, layers)


def _layers_of_manifest(manifest: Manifest, where: str) -> dict[str, tuple[str, str]]:
    if manifest.structural_patches:
        raise UnreadFormat(f"{where} changes the structure of the model, which is not read")
    for target in manifest.targets:
        if target.source_modules != [target.checkpoint_prefix]:
            raise UnreadFormat(
                f"{where} fuses {shown(target.source_modules)} into "
                f"{shown(target.checkpoint_prefix)}, which is not read"
            )
    return {t.checkpoint_prefix: (t.nunchaku_op, t.precision) for t in manifest.targets}


def _contradiction(header: Header, declaration: Declaration, module: str) -> CheckpointError:
    """Return the error for a layer that is declared or stored, and not both."""
    if module in declaration.layers:
        return MissingTensor(
            f"{declaration.where} lists {shown(module)}, and {module}{QWEIGHT} is not there",
            "export or download the file again.",
        )
    return UnknownFormat(
        f"{header.path}: {module}{QWEIGHT} is there, and {declaration.where} does not list it",
        "restore the config.json that came with these weights.",
    )


def _linear(header: Header, module: str, declaration: Declaration) -> StoredLinear:
    scheme, said = scheme_of(header, module), declaration.layers[module]
    if SCHEMES.get(said) is not scheme:
        raise UnknownFormat(
            f"{declaration.where} says that {module} is {shown(' '.join(said))}, and its tensors "
            f"are {scheme.title}",
            "restore the config.json that came with these weights.",
        )
    layout = NUNCHAKU_LAYOUT[scheme.name]
    if scheme is not AWQ_W4A16:
        # Nunchaku shifts the inputs of some layers; here the bias includes the shift already.
        return replace(stored_linear(header, module, layout), implied_values={})
    rows, half = (*header.tensors[module + QWEIGHT].shape, 0, 0)[:2]
    keys = {part: module + V2[part] for part in AWQ_W4A16.parts}
    if module + V2["bias"] in header.tensors:
        keys["bias"] = module + V2["bias"]
    return StoredLinear(module, AWQ_W4A16, layout, (rows * 4, half * 2), keys)
