"""The layers that a conversion encodes in another scheme, and why it keeps others."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.checkpoint.encoded_layers import EncodedLayers
from mezzotint.conversion.planning import match_globs
from mezzotint.errors import BadRequest, require_known
from mezzotint.families.building import block_linears
from mezzotint.formats.writers.gguf import GGUFTarget
from mezzotint.formats.writers.writer import Target
from mezzotint.schemes import BF16, Scheme, encoders


@dataclass(frozen=True)
class AddedError:
    """The largest and the mean relative error |W - source| / |source| that encoding added.

    layer   the layer with the largest error
    """

    mean: float
    largest: float
    layer: str

    @classmethod
    def of(cls, errors: Mapping[str, float]) -> "AddedError | None":
        """Return the summary of {layer: error}, or None if no layer was encoded."""
        if not errors:
            return None
        worst = max(errors, key=lambda layer: errors[layer])
        return cls(sum(errors.values()) / len(errors), errors[worst], worst)


def scheme_of(name: str | None, target: Target) -> Scheme | None:
    """Return the scheme to encode layers in, or None to keep their schemes.

    name     value of `--scheme`; a target such as gguf-q8_0 has its own scheme
    Raises   BadRequest if there is no such scheme, or the target has another one, or none
    """
    encoder = target.encoder if isinstance(target, GGUFTarget) else None
    if name is None:
        return encoder
    require_known("scheme", name, encoders())
    if encoder is not None and encoder.name != name:
        raise BadRequest(
            f"--to {target.name} writes {encoder.title}, and --scheme is {name}",
            "use --to gguf for another scheme.",
        )
    if target.name == "bf16":
        raise BadRequest(
            f"--to bf16 writes unquantized layers, and --scheme is {name}",
            "name another target, or leave out --scheme.",
        )
    return encoders()[name]


def encodable_modules(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """Return the modules that a scheme applies to.

    These are the layers that the checkpoint has quantized. If it has none, they are the linear
    layers of the model's repeated blocks.
    """
    quantized = [m for m in checkpoint.linears if checkpoint.scheme(m) is not BF16]
    if quantized:
        return [module for module in quantized if module not in checkpoint.unquantized]
    known = {*checkpoint.linears, *(name.removesuffix(".weight") for name in checkpoint.plain)}
    linears = block_linears(model) & known
    return [name for name, _ in model.named_modules() if name in linears]


@dataclass(frozen=True)
class LayerChoice:
    """How a conversion writes the layers of a checkpoint.

    layers        the quantized layers, and those to encode
    unquantized   the quantized layers to write unquantized
    kept          {layer that was to be encoded: why it stays as it is}
    """

    layers: EncodedLayers
    unquantized: Collection[str]
    kept: Mapping[str, str]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        model: nn.Module,
        scheme: Scheme | None,
        keep_bf16: Sequence[str],
    ) -> "LayerChoice":
        """Choose the layers to encode in a scheme; those that are in it stay as they are.

        model       the checkpoint's, on the meta device
        keep_bf16   globs on the names of layers to write unquantized
        Raises      BadRequest for a glob that matches no layer
        """
        modules = [] if scheme is None else encodable_modules(checkpoint, model)
        bf16 = match_globs(dict.fromkeys((*checkpoint.linears, *modules)), keep_bf16)
        in_scheme = {m for m in checkpoint.linears if checkpoint.scheme(m) is scheme}
        schemes = {m: scheme for m in modules if scheme and m not in bf16 and m not in in_scheme}
        kept = dict(_unfit(EncodedLayers(checkpoint, schemes)))
        fit = {module: scheme for module, scheme in schemes.items() if module not in kept}
        return cls(EncodedLayers(checkpoint, fit), bf16 & checkpoint.linears.keys(), kept)


def _unfit(layers: EncodedLayers) -> Iterator[tuple[str, str]]:
    """Yield (layer, reason) of the layers whose shape the scheme cannot hold."""
    for module, scheme in layers.schemes.items():
        columns = sum(piece.shape[1] for piece in layers.stored_outline(module).pieces)
        if columns % scheme.group:
            yield (
                module,
                f"has {columns:,} input features, and {scheme.title} needs a multiple of "
                f"{scheme.group}",
            )
