"""Our Triton kernels in Triton's interpreter, on the CPU, against their references.

The interpreter rounds to FP8 and multiplies BF16 matrices in another way than a GPU. So the results
here are exact in FP8, and low-rank branches are left to the GPU tests.
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

from mezzotint.kernels import ops
from mezzotint.kernels.fp8_weight import dequant_fp8
from mezzotint.kernels.ops.code_kinds import E2M1, SIGNED, UNSIGNED
from mezzotint.kernels.ops.dequant_fp8.reference import dequant_fp8_reference
from mezzotint.kernels.ops.gemv.reference import gemv4_reference
from mezzotint.kernels.ops.norm_rope.reference import norm_rope_reference
from mezzotint.kernels.ops.quantize_activation.reference import (
    activation_quantize_reference,
    apply_activation,
)
from mezzotint.schemes import NVFP4, SVDQUANT_INT4
from mezzotint.tensor import PLAIN, QuantTensor

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu/test_gpu.py runs the kernels themselves"
)
OPS = Path(ops.__path__[0])
GROUP = {E2M1: 16, SIGNED: 64, UNSIGNED: 64}


@pytest.fixture(autouse=True, scope="module")
def _register_ops() -> None:
    for name in ("dequant_fp8", "gemv", "norm_rope", "quantize_activation"):
        importlib.import_module(f"mezzotint.kernels.ops.{name}.op")


@pytest.mark.parametrize("kind", [E2M1, SIGNED, UNSIGNED], ids=["e2m1", "signed", "unsigned"])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("rows", "groups"), [(8, 1), (5, 3), (21, 70)])
def test_gemv_equals_its_reference(kind: int, vectors: int, rows: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    group, columns = GROUP[kind], groups * GROUP[kind]
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    block = (torch.rand(rows, groups, generator=generator) + 0.1).to(
        torch.float8_e4m3fn if kind == E2M1 else torch.bfloat16
    )
    zero = torch.randn(rows, groups, generator=generator).bfloat16() if kind == UNSIGNED else None
    factor = torch.rand(rows, generator=generator) + 0.5
    x = torch.randn(vectors, columns, generator=generator)
    arguments = (x, codes, block, zero, factor, kind, group)
    got = torch.ops.mezzotint.gemv4(*arguments)
    torch.testing.assert_close(got, gemv4_reference(*arguments), rtol=1e-5, atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 40),
    seed=st.integers(0, 99),
    smooth=st.booleans(),
)
def test_dequant_fp8_equals_its_reference(rows: int, blocks: int, seed: int, smooth: bool) -> None:
    """Scales and columns are powers of two, so that every number is exact in FP8."""
    generator = torch.Generator().manual_seed(seed)
    for scheme, kind in ((NVFP4, E2M1), (SVDQUANT_INT4, SIGNED)):
        groups, columns = blocks, blocks * scheme.group
        parts = {
            "codes": torch.randint(
                0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator
            ),
            "block_scale": powers((rows, groups), generator).to(
                torch.float8_e4m3fn if kind == E2M1 else torch.bfloat16
            ),
        }
        prepared = {"factor": powers((rows,), generator), "scale": torch.ones(rows)}
        if smooth:
            prepared["column"] = powers((columns,), generator)
        weight = QuantTensor(scheme, PLAIN, (rows, columns), parts, True, prepared)
        assert torch.equal(dequant_fp8(weight).float(), dequant_fp8_reference(weight).float())


def powers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.exp2(torch.randint(-1, 2, shape, generator=generator).float())


@pytest.mark.parametrize("heads", [3, 8, 12])
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_norm_rope_equals_its_reference(heads: int, with_text: bool, width: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    tokens, text_tokens = 7 + 4 * with_text, 4 * with_text
    x = torch.randn(2, tokens, 3 * heads, width, generator=generator)[:, :, : 2 * heads]
    weights = [torch.rand(width, generator=generator) + 0.5 for _ in range(4)]
    angles = torch.randn(1, tokens, width // 2, generator=generator)
    text_weights = weights[2:] if with_text else (None, None)
    cos, sin = angles.cos(), angles.sin()
    arguments = (x, *weights[:2], *text_weights, text_tokens, cos, sin, 1e-6, False)
    got = torch.ops.mezzotint.norm_rope(*arguments)
    torch.testing.assert_close(got, norm_rope_reference(*arguments), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 300),
    prefix_columns=st.integers(0, 90),
    seed=st.integers(0, 99),
    activation=st.sampled_from(["gelu", "swiglu"]),
)
def test_activation_quantize_equals_its_reference(
    rows: int, columns: int, prefix_columns: int, seed: int, activation: str
) -> None:
    """The interpreter may round a number to half of itself.

    It loses the carry if rounding reaches a power of two.
    """
    generator = torch.Generator().manual_seed(seed)
    columns *= 2 if activation == "swiglu" else 1
    x = torch.randn(rows, columns + 3, generator=generator)[:, :columns] * 3
    prefix = torch.randn(rows, prefix_columns, generator=generator) if prefix_columns else None
    codes, scale = torch.ops.mezzotint.activation_quantize(x, prefix, activation)
    _codes, expected_scale = activation_quantize_reference(x, prefix, activation)
    torch.testing.assert_close(scale, expected_scale)
    y = apply_activation(x, activation)
    y = y if prefix is None else torch.cat((prefix, y), 1)
    assert bool(((codes.float() * scale - y).abs() <= 0.51 * y.abs() + scale * 2**-9).all())


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """The interpreter accepts code that the compiler refuses."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support/compile_triton.py"
    command = [sys.executable, "-W", "ignore", str(script)]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    launched = {
        name
        for file in OPS.glob("*/op.py")
        for name in re.findall(r"\b(_\w+_kernel)\)?\[", file.read_text())
    }
    assert launched
    assert {line.split()[0] for line in run.stdout.splitlines()} == launched


@pytest.mark.parametrize("file", sorted(OPS.glob("*/kernel.py")), ids=lambda file: file.parent.name)
def test_every_triton_op_has_a_reference_and_a_schema(file: Path) -> None:
    assert (file.parent / "op.py").is_file()
    source = (file.parent / "reference.py").read_text()
    assert "_reference(" in source
    assert "triton" not in source, "references run where Triton is not installed"
