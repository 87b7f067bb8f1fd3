"""The life of a quantized layer: what moving it costs, and who selects its backend."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from mezzotint.kernels import Target
from mezzotint.kernels.backends.dequant_fp8 import DequantFP8
from mezzotint.kernels.backends.reference import Reference
from mezzotint.kernels.backends.weight_only import WeightOnly
from mezzotint.kernels.ops.dequant_fp8.reference import prepare_scales
from mezzotint.nn import PREPARED_PREFIX, QuantLinear, use_backend
from mezzotint.tensor import Layout, QuantTensor
from support.quant_tensors import fp8_tensor, nvfp4_tensor

GPU, CPU = torch.device("cuda"), torch.device("cpu")
TILES = Layout("low_first", "tiles_128x4")


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backends whose `prepare` was called, and a GPU on which `dequant_fp8` is the best one."""
    calls: list[str] = []
    for backend, prepare in (
        (Reference, lambda _weight: {}),
        (WeightOnly, lambda _weight: {}),
        (DequantFP8, prepare_scales),
    ):

        def counted(self: Any, weight: QuantTensor, prepare: Any = prepare) -> Mapping[str, Tensor]:
            calls.append(self.name)
            ready: Mapping[str, Tensor] = prepare(weight)
            return ready

        monkeypatch.setattr(backend, "prepare", counted)
    monkeypatch.setattr("mezzotint.kernels.requirements.find_spec", lambda name: name)
    of = Target.of
    monkeypatch.setattr(
        Target,
        "of",
        staticmethod(
            lambda device: Target("cuda", (8, 9)) if device.type == "cuda" else of(device)
        ),
    )
    return calls


def arrive(layer: QuantLinear, device: torch.device) -> None:
    """Do what `.to(device)` does once the tensors are there; here they stay on the CPU."""
    layer._update_backends(device)


def test_moving_back_and_forth_prepares_once(prepared: list[str]) -> None:
    layer = QuantLinear(nvfp4_tensor(64, 64))
    x = torch.randn(3, 64)
    expected = layer(x)
    prepared.clear()
    arrive(layer, GPU)
    best = layer.arranged_for
    buffers = dict(layer.named_buffers())
    assert prepared == [best] == [DequantFP8.name]
    assert any(name.startswith(PREPARED_PREFIX) for name in buffers)
    for device in (CPU, GPU, CPU, GPU):
        arrive(layer, device)
    assert prepared == [best]
    assert all(value is buffers[name] for name, value in layer.named_buffers())
    arrive(layer, CPU)
    assert torch.equal(layer(x), expected), (
        "called where it is parked, it runs on the CPU's backend"
    )
    assert layer.selection.backend.name == "reference"
    arrive(layer, GPU)
    assert prepared.count(best) == 1


def test_another_arrangement_is_read_where_the_layer_is_parked(
    prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DequantFP8, "weight_layout", TILES)
    monkeypatch.setattr(DequantFP8, "prepare", lambda *_: {})
    layer = QuantLinear(nvfp4_tensor(64, 64))
    x, before = torch.randn(3, 64), layer.dequantize()
    expected = layer(x)
    arrive(layer, GPU)
    arrive(layer, CPU)
    assert layer.layout == TILES, "no second arrangement is kept"
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.dequantize(), before)


def test_casts_and_moves_to_where_it_is_prepare_nothing(prepared: list[str]) -> None:
    layer = QuantLinear(fp8_tensor())
    prepared.clear()
    scale = layer.weight_scale
    layer.to(torch.float16).to("cpu").to(device="cpu").cpu()
    assert prepared == []
    assert layer.weight_scale.dtype == scale.dtype
    assert layer.weight.dtype == torch.float16


def test_a_backend_override_prepares_once_while_it_is_open(prepared: list[str]) -> None:
    layer = QuantLinear(nvfp4_tensor(64, 64))
    x = torch.randn(3, 64)
    prepared.clear()
    with use_backend(layer, "weight_only"):
        outputs = [layer(x) for _ in range(3)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert prepared == ["weight_only"]
    assert not layer.preparations, "nothing stays in memory"


def test_tensors_that_hooks_assign_select_the_backend_anew(prepared: list[str]) -> None:
    """accelerate assigns buffers one by one, and never calls `.to()`: here they arrive on meta."""
    layer = QuantLinear(nvfp4_tensor(64, 64))
    arrive(layer, GPU)
    prepared.clear()
    assert layer.selection.backend.name == "reference", "the tensors are on the CPU"
    for name, buffer in list(layer._buffers.items()):
        layer._buffers[name] = buffer.to("meta")  # type: ignore[union-attr]
    assert layer.backends.device_type == "cpu"
    layer(torch.empty(3, 64, device="meta"))
    assert layer.backends.device_type == "meta"
    assert prepared == ["reference"]


def test_a_layer_offloaded_by_accelerate_computes_the_same() -> None:
    model = nn.Sequential(QuantLinear(fp8_tensor(64, 64)), QuantLinear(nvfp4_tensor(64, 64)))
    x = torch.randn(3, 64)
    expected = model(x)
    cpu_offload(model, CPU, offload_buffers=True)
    assert all(buffer.is_meta for buffer in model.buffers())
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert all(buffer.is_meta for buffer in model.buffers())


@pytest.mark.gpu
def test_the_second_move_to_the_gpu_costs_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 5 GB/s or more; pinned memory is not needed for that."""
    layer = QuantLinear(nvfp4_tensor(12288, 12288)).to("cuda")
    expected = layer(torch.ones(1, 12288, device="cuda").bfloat16())
    size = sum(buffer.nbytes for buffer in layer.buffers())
    layer.to("cpu")
    backend = type(layer.backends.selection.backend)
    for cls in {backend, DequantFP8}:
        monkeypatch.setattr(cls, "prepare", lambda *_: pytest.fail("prepared again"))
    monkeypatch.setattr("mezzotint.layouts.convert", lambda *_: pytest.fail("arranged again"))
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        layer.to("cuda")
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
        assert torch.equal(layer(torch.ones(1, 12288, device="cuda").bfloat16()), expected)
        layer.to("cpu")
    assert size / min(seconds) >= 5e9
