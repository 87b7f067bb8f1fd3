"""Small transformers whose modulation is computed in advance."""

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mezzotint.families import families
from mezzotint.fast.passes.compile_blocks import compile_blocks
from mezzotint.fast.passes.precomputed_modulation import precompute_modulation
from support import tiny_pipelines as tiny

TINY = {"flux1": tiny.flux1, "zimage": tiny.zimage, "qwenimage": tiny.qwenimage}


ROWS = ("num_layers", "num_single_layers", "n_layers")
"""Entries of config.json with the number of blocks of a row."""


GRAPHS = {"flux1": 3, "flux2": 2, "zimage": 3, "qwenimage": 1}
"""{family: compiled graphs of its blocks in PyTorch 2.13, for three blocks or more in each row}"""


SCHEDULE = SimpleNamespace(timesteps=torch.linspace(1000, 100, 10))
"""The part of a scheduler that precomputed modulation reads."""


@cache
def tiny_config(name: str) -> tuple[Any, dict[str, Any]]:
    """Return the class and the configuration of a family's tiny transformer."""
    made = getattr(tiny, name)().transformer
    return type(made), dict(made.config)


def transformer(name: str, blocks: int | None = None) -> Any:
    """Return a family's tiny transformer with random weights.

    blocks   number of blocks in each row, or None for the tiny model's
    """
    torch.manual_seed(0)
    transformer_class, config = tiny_config(name)
    rows = {row: blocks for row in ROWS if row in config} if blocks else {}
    model = transformer_class(**config | rows).float().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1)
    return model


def arguments(name: str, model: nn.Module, batch: int = 1) -> dict[str, Any]:
    family = families()[name]
    inputs = family.example_inputs(
        model.config, family.sampling({}, {}).replace(height=64), batch
    ) | {"return_dict": False}
    if "cap_feats" in inputs:  # the tiny model has positions for 128 tokens
        inputs["cap_feats"] = [text[:16] for text in inputs["cap_feats"]]
    return inputs


@torch.no_grad()
def result(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)[0]
    return output if isinstance(output, Tensor) else torch.stack(output)


def count_graphs(
    name: str, blocks: int, precompute: bool, prepare: Callable[[Any], None] = lambda _model: None
) -> int:
    """Count the compiled graphs of a model that `prepare` changed, and check its results."""
    torch._dynamo.reset()
    plain = transformer(name, blocks)
    model = copy.deepcopy(plain)
    prepare(model)
    counter = CompileCounterWithBackend("eager")  # Dynamo makes the graphs
    compile_blocks(model, fullgraph=True, backend=counter)
    if precompute:
        assert precompute_modulation(model, SCHEDULE) > 0
    for _ in range(2):
        inputs = arguments(name, plain)
        torch.testing.assert_close(
            result(model, inputs), result(plain, inputs), rtol=1e-4, atol=1e-4
        )
    return int(counter.frame_count)
