"""Time and memory measurements, on the CPU."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from mezzotint.costs import Percentiles, memory, reset_peak_memory, resident_bytes, time_stages

CPU = torch.device("cpu")
MIB = 2**20


def test_a_spread_is_numpys_percentiles() -> None:
    spread = Percentiles.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (spread.median, spread.count) == (3.0, 5)
    assert (spread.p10, spread.p90) == (pytest.approx(1.4), pytest.approx(7.6))


def test_laps_are_the_stages_of_a_generation() -> None:
    transformer = nn.Identity()
    with time_stages(CPU, [transformer]) as clock:
        time.sleep(0.03)
        for step in range(2):
            transformer(transformer(torch.zeros(1)))  # twice a step, as with guidance
            time.sleep(0.01)
            clock.on_step(step, None)
        time.sleep(0.02)
    laps = clock.stages
    assert len(laps.steps) == 2
    assert laps.encode >= 0.03
    assert all(step >= 0.01 for step in laps.steps)
    assert laps.decode >= 0.02
    assert laps.total == pytest.approx(laps.encode + sum(laps.steps) + laps.decode)
    assert not transformer._forward_pre_hooks


def test_resident_bytes_count_each_tensor_once() -> None:
    linear = nn.Linear(4, 8)
    linear.register_buffer("scale", torch.ones(3, dtype=torch.float16))
    assert resident_bytes([linear, nn.Sequential(linear)]) == {
        "float16": 6,
        "float32": (4 * 8 + 8) * 4,
    }


def test_the_largest_resident_set_is_found_and_forgotten() -> None:
    reset_peak_memory(CPU)
    before = memory(CPU, "before")
    assert before.driver is not None, before.driver_source
    block = np.ones(96 * MIB, dtype=np.uint8)
    del block
    peak = memory(CPU, "after").driver
    reset_peak_memory(CPU)
    after = memory(CPU, "forgotten").driver
    assert peak is not None
    assert after is not None
    assert peak - before.driver > 90 * MIB
    assert peak - after > 60 * MIB
    assert before.peak_allocated is None
