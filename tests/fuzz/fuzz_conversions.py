"""Convert mutated real checkpoints, and check that `load` accepts the output with equal values.

Each file is mutated as in `fuzz_checkpoints.py` and converted without a base. A conversion may only
succeed if the file's own model accepts every tensor and the output has the values of the input.
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
    """Convert `number` mutated files; raise errors of other classes and wrong outputs."""
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
    """Assert equal values, NaN included; dequantized layers may be rounded once."""
    assert read.keys() == written.keys()
    for name, value in read.items():
        layer, _, _ = name.rpartition(".")
        expected, found = value.float(), written[name].float()
        exact = torch.equal(expected.nan_to_num(7.0), found.nan_to_num(7.0))
        once = layer in layers and (rounded or written[name].dtype) is torch.bfloat16
        assert exact or (
            once and torch.equal(expected.bfloat16().float().nan_to_num(7.0), found.nan_to_num(7.0))
        ), name


def _lay_config(source: Path, folder: Path, with_config: bool) -> bool:
    """Copy the source's config.json next to the file, and return whether it is there.

    It is copied if it declares the quantization, or if `with_config` is set.

    Without it, a file that lost an optional layer is a valid model that never had that layer.
    """
    config, stored = folder / "config.json", source.with_name("config.json")
    config.unlink(missing_ok=True)
    if stored.is_file() and (
        with_config or "quantization_config" in json.loads(stored.read_text())
    ):
        shutil.copy(stored, config)
    return config.is_file()


@cache
def _true_model(source: Path) -> nn.Module | None:
    """Return the model of a source, by its configuration or by the shapes of its tensors."""
    try:
        return Checkpoint.open(source).model()
    except MezzotintError:
        return None


def main() -> None:
    warnings.simplefilter("ignore")
    run_from_command_line(__doc__, "changed checkpoints, converted", fuzz, number=10_000)


if __name__ == "__main__":
    main()
