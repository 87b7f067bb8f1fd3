"""Table of the backends that each GPU would use, as `can` of every backend answers."""

from collections.abc import Iterator
from dataclasses import replace

from mezzotint.kernels import (
    GPU_GENERATIONS,
    QUANTIZED_ACTIVATIONS,
    Backend,
    Can,
    Target,
    WeightSpec,
    all_backends,
    select,
)
from mezzotint.kernels.backends.dequantize import BACKEND as DEQUANTIZE
from mezzotint.kernels.backends.reference import BACKEND as REFERENCE
from mezzotint.kernels.backends.weight_only import BACKEND as WEIGHT_ONLY
from mezzotint.kernels.verified import is_verified
from mezzotint.schemes import (
    AWQ_W4A16,
    CODEBOOK4,
    FP8,
    INT8,
    INT_GROUPS,
    MXFP8,
    SVDQUANT_INT4,
    SVDQUANT_NVFP4,
    W4A8,
    Scheme,
    schemes,
)
from support import four_bit_weights as four_bits

BEGIN = "<!-- what select answers with every library installed: pytest --readme -->\n"
SHAPE = (256, 384)


def spec(scheme: Scheme, *optional: str, dynamic: bool = True) -> WeightSpec:
    """Return a layer's outline with the scheme's required parts and some of its optional ones."""
    parts = {name: scheme.part(name).shapes(*SHAPE)[0] for name in (*scheme.parts, *optional)}
    return WeightSpec(scheme, SHAPE, parts, dynamic)


def groups_of_64(scheme: Scheme) -> WeightSpec:
    """Return the outline of a layer in groups, whose size its parts show."""
    parts = {name: scheme.part(name).shapes(*SHAPE)[0] for name in scheme.parts}
    return WeightSpec(scheme, SHAPE, parts | {"block_scale": (SHAPE[0], SHAPE[1] // 64)}, True)


def rotated(scheme: Scheme) -> WeightSpec:
    """Return the outline of a layer whose inputs are rotated in groups of 64."""
    layer = spec(scheme)
    return replace(layer, parts={**layer.parts, "rotation": (64, 64)})


SMOOTHED = ("smooth", "proj_down", "proj_up")
ROWS = {
    "FP8": spec(FP8, "input_scale"),
    "NVFP4": WeightSpec.of(four_bits.nvfp4(*SHAPE)),
    "NVFP4, inputs in BF16": spec(four_bits.NVFP4, dynamic=False),
    "SVDQuant INT4": spec(SVDQUANT_INT4, *SMOOTHED),
    "SVDQuant NVFP4": spec(SVDQUANT_NVFP4, *SMOOTHED),
    "AWQ W4A16": spec(AWQ_W4A16),
    "MXFP8": spec(MXFP8),
    "INT8": spec(INT8),
    "INT8 ConvRot": rotated(INT8),
    "W4A8 ConvRot": rotated(W4A8),
    "GGUF blocks": spec(schemes()["gguf_q8_0"]),
    "NF4 or FP4": groups_of_64(CODEBOOK4),
    "INT2 to INT8 in groups": groups_of_64(INT_GROUPS[4]),
}
COLUMNS = {"CPU": Target("cpu"), **GPU_GENERATIONS}


def able(weight: WeightSpec, target: Target) -> Iterator[Backend]:
    """Yield the selected backend, then its successors; universal ones only if selected."""
    chosen = select(weight, target).backend
    yield chosen
    for backend in sorted(all_backends().values(), key=lambda one: -one.priority):
        if backend not in (chosen, DEQUANTIZE, WEIGHT_ONLY, REFERENCE) and isinstance(
            backend.can(weight, target, QUANTIZED_ACTIVATIONS), Can
        ):
            yield backend


def table() -> str:
    """Markdown: a row for each scheme, a column for each kind of device."""
    heads = [
        name if target.capability is None else f"{name} ({target})"
        for name, target in COLUMNS.items()
    ]
    lines = [f"| scheme | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for row, weight in ROWS.items():
        cells = (
            ", ".join(_cell(weight, target, backend) for backend in able(weight, target))
            for target in COLUMNS.values()
        )
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(weight: WeightSpec, target: Target, backend: Backend) -> str:
    verified = is_verified(weight.scheme.name, str(target), backend.name)
    return f"**{backend.name}**" if verified else backend.name
