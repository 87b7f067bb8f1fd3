"""Scale tiles and nibble order: golden files, NVIDIA's documented offsets, partial tiles."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mezzotint.layouts import convert, from_tiles, swap_nibbles, to_tiles
from mezzotint.schemes import NVFP4
from mezzotint.schemes.minifloats import unpack_e2m1
from mezzotint.tensor import PLAIN, Layout, QuantTensor

COMFY = Layout("high_first", "tiles_128x4")


@pytest.mark.parametrize(
    ("row", "column", "offset"),
    [
        (0, 0, 0),
        (0, 3, 3),
        (0, 4, 512),
        (1, 0, 16),
        (32, 0, 4),
        (96, 0, 12),
        (127, 3, 511),
        (128, 0, 1024),
    ],
)
def test_offsets_of_scale_tiles(row: int, column: int, offset: int) -> None:
    scales = torch.zeros(256, 8, dtype=torch.uint8)
    scales[row, column] = 1
    assert to_tiles(scales).flatten().nonzero().item() == offset


@pytest.mark.parametrize("size", ["128x4", "256x8", "384x8", "96x6"])
def test_scale_tiles_equal_torchao_and_comfy_kitchen(data: Path, size: str) -> None:
    golden = load_file(data / "layouts/layouts.safetensors")
    before, after = golden[f"swizzle128x4.{size}.before"], golden[f"swizzle128x4.{size}.after_2d"]
    assert torch.equal(to_tiles(before), after)
    assert torch.equal(from_tiles(after, *before.shape), before)


def test_nibbles_equal_comfy_kitchen(data: Path) -> None:
    golden = load_file(data / "layouts/layouts.safetensors")
    low, high = golden["e2m1.packed_low_first"], golden["e2m1.packed_high_first"]
    assert torch.equal(swap_nibbles(low), high)
    assert torch.equal(unpack_e2m1(low), golden["e2m1.values"])


@given(
    st.integers(1, 300),
    st.integers(1, 12),
    st.sampled_from([PLAIN, COMFY, Layout("low_first", "tiles_128x4")]),
)
def test_conversion_to_a_layout_and_back_is_exact(rows: int, groups: int, layout: Layout) -> None:
    random = torch.Generator().manual_seed(rows * 13 + groups)
    parts = {
        "codes": torch.randint(0, 256, (rows, groups * 8), generator=random, dtype=torch.uint8),
        "block_scale": torch.randint(
            0, 127, (rows, groups), generator=random, dtype=torch.uint8
        ).view(torch.float8_e4m3fn),
        "global_scale": torch.tensor(0.5),
    }
    tensor = QuantTensor(NVFP4, PLAIN, (rows, groups * 16), parts)
    back = convert(convert(tensor, layout), PLAIN)
    assert torch.equal(back.parts["codes"], parts["codes"])
    assert torch.equal(
        back.parts["block_scale"].view(torch.uint8), parts["block_scale"].view(torch.uint8)
    )
