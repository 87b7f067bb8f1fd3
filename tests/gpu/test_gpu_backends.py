"""Every backend that can run on this GPU with the installed libraries: `pytest -m gpu -s FILE`.

Backends that pass may be added to VERIFIED (kernels/verified.py). Backends that cannot run are
skipped, with their reason.
"""

from functools import cache

import pytest
import torch

from mezzotint.kernels import (
    QUANTIZED_ACTIVATIONS,
    Cannot,
    Target,
    WeightSpec,
    best_device,
    get_backend,
)
from mezzotint.nn import QuantLinear
from mezzotint.tensor import QuantTensor
from support.backend_cases import BF16_INPUT, RUNS, all_forms, expected, sample
from support.errors_of import relative_error

pytestmark = pytest.mark.gpu
forms = cache(all_forms)
CALLS = [
    pytest.param((3072, 3072), 4608, False, id="one linear of FLUX.1"),
    pytest.param((3072, 3072), 4608, True, id="the same compiled"),
    pytest.param((9216, 3072), 1, False, id="one row"),
    pytest.param((3072, 6144), 77, False, id="rows that fill no tile"),
]


@pytest.mark.parametrize(("shape", "rows", "compiled"), CALLS)
@pytest.mark.parametrize(("backend", "name"), RUNS)
def test_a_backend_that_can_run_here_agrees_with_reference(
    backend: str, name: str, shape: tuple[int, int], rows: int, compiled: bool
) -> None:
    """5e-3 if the input is not quantized, 1e-2 if it is quantized to 4 bits.

    Weights and output are rounded to BF16, 1.7e-3 each, and sums are in another order. With 4-bit
    inputs, kernels may round ties between two codes either way.
    """
    weight: QuantTensor = forms(*shape)[name].to(best_device())
    answer = get_backend(backend).can(
        WeightSpec.of(weight), Target.of(best_device()), QUANTIZED_ACTIVATIONS
    )
    if isinstance(answer, Cannot):
        pytest.skip(f"{backend} {answer.reason}")
    torch.compiler.reset()
    layer = QuantLinear(weight, backend_name=backend)
    x = sample(rows, shape[1]).to(best_device())
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    error = relative_error(y, expected(backend, weight, x))
    print(
        f"{backend}, {name} {shape}, {rows} rows, compiled={compiled}: relative error {error:.2e}"
    )
    assert error <= (5e-3 if backend in BF16_INPUT else 1e-2)
