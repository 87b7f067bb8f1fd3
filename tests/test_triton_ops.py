"""Our Triton kernels in Triton's interpreter, on the CPU, against their definitions.

The interpreter rounds to FP8 and multiplies BF16 matrices otherwise than a GPU does: what is written out here is exact
in FP8, and low-rank branches are left to tests/test_gpu.py.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.kernels.cuda.product import activated
from mezzotint.kernels.expand import expand, expand_by_definition
from mezzotint.schemes import NVFP4, SVDQUANT_INT4
from mezzotint.schemes.rounding import expand_e2m1, expand_nibbles
from mezzotint.speed.attention_layers import norm_rope_by_definition
from mezzotint.speed.rounded_products import activation_round_by_definition
from mezzotint.tensor import PLAIN, QuantTensor

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the kernels themselves")
E2M1, SIGNED, UNSIGNED = 0, 1, 2
GROUP = {E2M1: 16, SIGNED: 64, UNSIGNED: 64}


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    for name in ("expand", "gemv", "rope", "round"):
        importlib.import_module(f"mezzotint.kernels.triton_ops.{name}")


def decoded(codes: Tensor, kind: int) -> Tensor:
    if kind == E2M1:
        return expand_e2m1(codes)
    values = expand_nibbles(codes).to(torch.int16)
    return ((values ^ 8) - 8 if kind == SIGNED else values).float()


@pytest.mark.parametrize("kind", [E2M1, SIGNED, UNSIGNED], ids=["e2m1", "signed", "unsigned"])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("rows", "groups"), [(8, 1), (5, 3), (21, 70)])
def test_a_product_with_few_rows_is_its_definition(kind: int, vectors: int, rows: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    group, columns = GROUP[kind], groups * GROUP[kind]
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    block = (torch.rand(rows, groups, generator=generator) + 0.1).to(
        torch.float8_e4m3fn if kind == E2M1 else torch.bfloat16
    )
    zero = torch.randn(rows, groups, generator=generator).bfloat16() if kind == UNSIGNED else None
    factor = torch.rand(rows, generator=generator) + 0.5
    x = torch.randn(vectors, columns, generator=generator)
    weight = decoded(codes, kind).reshape(rows, groups, group) * block.float()[..., None]
    weight = (weight if zero is None else weight + zero.float()[..., None]).flatten(1) * factor[:, None]
    got = torch.ops.mezzotint.gemv4(x, codes, block, zero, factor, kind, group)
    torch.testing.assert_close(got, x @ weight.t(), rtol=1e-5, atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 40), seed=st.integers(0, 99), smooth=st.booleans())
def test_a_matrix_is_written_out_as_its_definition_says(rows: int, blocks: int, seed: int, smooth: bool) -> None:
    """Scales and columns are powers of two, so that every number is one that FP8 has."""
    generator = torch.Generator().manual_seed(seed)
    for scheme, kind in ((NVFP4, E2M1), (SVDQUANT_INT4, SIGNED)):
        groups, columns = blocks, blocks * scheme.group
        parts = {
            "codes": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator),
            "block_scale": powers((rows, groups), generator).to(
                torch.float8_e4m3fn if kind == E2M1 else torch.bfloat16
            ),
        }
        ready = {"factor": powers((rows,), generator), "scale": torch.ones(rows)}
        if smooth:
            ready["column"] = powers((columns,), generator)
        weight = QuantTensor(scheme, PLAIN, (rows, columns), parts, True, ready)
        assert torch.equal(expand(weight).float(), expand_by_definition(weight).float())


def powers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.exp2(torch.randint(-1, 2, shape, generator=generator).float())


@pytest.mark.parametrize("heads", [3, 8, 12])
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_norm_and_rotation_are_their_definition(heads: int, with_text: bool, width: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    tokens, before = 7 + 4 * with_text, 4 * with_text
    x = torch.randn(2, tokens, 3 * heads, width, generator=generator)[:, :, : 2 * heads]
    weights = [torch.rand(width, generator=generator) + 0.5 for _ in range(4)]
    angles = torch.randn(1, tokens, width // 2, generator=generator)
    text_weights = weights[2:] if with_text else (None, None)
    arguments = (x, *weights[:2], *text_weights, before, angles.cos(), angles.sin(), 1e-6, False)
    got = torch.ops.mezzotint.norm_rope(*arguments)
    torch.testing.assert_close(got, norm_rope_by_definition(*arguments), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 300),
    before=st.integers(0, 90),
    seed=st.integers(0, 99),
    activation=st.sampled_from(["gelu", "swiglu"]),
)
def test_an_activation_is_rounded_by_row_as_its_definition_says(
    rows: int, columns: int, before: int, seed: int, activation: str
) -> None:
    """To half of itself at worst: the interpreter loses the carry where rounding reaches a power of two."""
    generator = torch.Generator().manual_seed(seed)
    columns *= 2 if activation == "swiglu" else 1
    x = torch.randn(rows, columns + 3, generator=generator)[:, :columns] * 3
    beside = torch.randn(rows, before, generator=generator) if before else None
    codes, scale = torch.ops.mezzotint.activation_round(x, beside, activation)
    _expected, own = activation_round_by_definition(x, beside, activation)
    torch.testing.assert_close(scale, own)
    y = activated(x, activation)
    y = y if beside is None else torch.cat((beside, y), 1)
    assert bool(((codes.float() * scale - y).abs() <= 0.51 * y.abs() + scale * 2**-9).all())


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """As far as a machine without a GPU can tell; the interpreter takes what the compiler refuses."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    command = [sys.executable, "-W", "ignore", str(script)]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    folder = Path(str(importlib.import_module("mezzotint.kernels.triton_ops").__file__)).parent
    sources = [path.read_text() for path in folder.glob("*.py")]
    launched = {name for source in sources for name in re.findall(r"(_\w+)\)?\[", source) if f"def {name}(" in source}
    assert {line.split()[0] for line in run.stdout.splitlines()} == launched
