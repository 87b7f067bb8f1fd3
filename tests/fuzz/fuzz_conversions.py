"""Convert real checkpoints that were changed: what is written is what `load` would accept, and the same numbers.

Each file is changed as `fuzz_checkpoints.py` does it, and converted without a base. A conversion may succeed only where
the file's own model accepts every tensor, and the output stands for the very numbers that the input stands for.
"""

import json
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.command import run_from_command_line
from fuzz.fuzz_checkpoints import mutate
from mezzotint.checkpoint import Checkpoint
from mezzotint.conversion import convert
from mezzotint.errors import MezzotintError
from mezzotint.loading import plan

TARGETS = ("bf16", "mezzotint")
PROGRESS = 500
"""After how many files the counts are printed."""


def fuzz(sources: list[Path], folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Convert `number` changed files; any error not of Mezzotint's own, and any lie, passes through."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    for index in range(number):
        source = chance.choice(sources)
        file = folder / "changed.safetensors"
        file.write_bytes(
            mutate(source.read_bytes(), chance) if index >= len(sources) else source.read_bytes()
        )
        declared = _lay_config(source, folder, chance.random() < 0.5)
        counts[
            try_one(
                file,
                _true_model(source) if declared else None,
                folder / "out",
                chance.choice(TARGETS),
            )
        ] += 1
        if index % PROGRESS == PROGRESS - 1:
            print(index + 1, dict(sorted(counts.items())), file=sys.stderr, flush=True)
    return {"files": number, "sources": len(sources), **dict(sorted(counts.items()))}


def try_one(file: Path, model: nn.Module | None, output: Path, to: str) -> str:
    """Convert one file and compare; returns "converted" or the name of the error.

    model   the one that the file's tensors were made from, None where that is not known
    """
    try:
        convert(file, output, to=to, overwrite=True)
    except MezzotintError as error:
        return type(error).__name__
    source, written = Checkpoint.open(file), Checkpoint.open(output)
    accepted = plan(source, model if model is not None else source.model()).checkpoint
    plan(written, source.model() if model is None else model)
    compare(
        values_of(accepted),
        values_of(written),
        torch.bfloat16 if to == "bf16" else None,
        accepted.linears,
    )
    return "converted"


def values_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """{tensor of the model: what the checkpoint says it is}"""
    values = {name: checkpoint.tensor(name) for name in checkpoint.plain}
    for module in checkpoint.linears:
        values[f"{module}.weight"] = checkpoint.weight(module)
        if (bias := checkpoint.bias(module)) is not None:
            values[f"{module}.bias"] = bias
    return values


def compare(
    read: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    rounded: torch.dtype | None,
    layers: Any,
) -> None:
    """Assert that both are the same numbers, NaN included; layers that were decoded are rounded once."""
    assert read.keys() == written.keys()
    for name, value in read.items():
        layer, _, _ = name.rpartition(".")
        own, other = value.float(), written[name].float()
        exact = torch.equal(own.nan_to_num(7.0), other.nan_to_num(7.0))
        once = layer in layers and (rounded or written[name].dtype) is torch.bfloat16
        assert exact or (
            once and torch.equal(own.bfloat16().float().nan_to_num(7.0), other.nan_to_num(7.0))
        ), name


def _lay_config(source: Path, folder: Path, beside: bool) -> bool:
    """Whether the source's config.json is laid beside the file: where it says how that is quantized, or `beside` does.

    Without it, a file that has lost an optional layer is a whole model of the family that never had that layer.
    """
    config, own = folder / "config.json", source.with_name("config.json")
    config.unlink(missing_ok=True)
    if own.is_file() and (beside or "quantization_config" in json.loads(own.read_text())):
        shutil.copy(own, config)
    return config.is_file()


@cache
def _true_model(source: Path) -> nn.Module | None:
    """The model that a source was made from, by its own configuration or by the shapes of its tensors."""
    try:
        return Checkpoint.open(source).model()
    except MezzotintError:
        return None


def main() -> None:
    warnings.simplefilter("ignore")
    run_from_command_line(__doc__, "changed checkpoints, converted", fuzz, number=10_000)


if __name__ == "__main__":
    main()
