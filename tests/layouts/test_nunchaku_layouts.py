"""Nunchaku's fragments and AWQ's words against files that DeepCompressor and tinychat packed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mezzotint.layouts import convert, nunchaku, plain_shape
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.tensor import PLAIN, Layout, QuantTensor

Change = Callable[[Tensor], Tensor]
INT4 = Layout("fragments", "fragments", "fragments", "fragments")
NVFP4 = Layout("fragments", "micro_fragments", "fragments", "fragments")
AWQ = Layout("awq_words", "awq_groups")
ROWS = Layout("low_first_int8", "by_group", "fragments", "down_by_column")


def packed_low_first(codes: Tensor) -> Tensor:
    return codes[:, ::2] | codes[:, 1::2] << 4


@pytest.mark.parametrize(
    ("name", "pack", "unpack"),
    [
        ("nunchaku.qweight.256x128", nunchaku.to_code_fragments, nunchaku.from_code_fragments),
        ("awq.qweight.128x64", nunchaku.to_awq_words, nunchaku.from_awq_words),
        ("awq.qweight.192x128", nunchaku.to_awq_words, nunchaku.from_awq_words),
    ],
)
def test_codes_equal_the_real_packers(data: Path, name: str, pack: Change, unpack: Change) -> None:
    golden = load_file(data / "layouts/layouts.safetensors")
    codes, packed = packed_low_first(golden[f"{name}.codes"]), golden[f"{name}.packed"]
    assert pack(codes).dtype == packed.dtype
    assert torch.equal(pack(codes), packed)
    assert torch.equal(unpack(packed), codes)


@pytest.mark.parametrize(
    ("name", "pack", "unpack"),
    [
        ("wscales16.256x2", nunchaku.to_vector_fragments, nunchaku.from_vector_fragments),
        ("microscales.256x8", nunchaku.to_micro_fragments, nunchaku.from_micro_fragments),
        ("up.256x16", nunchaku.to_up_fragments, nunchaku.from_up_fragments),
        ("up.256x32", nunchaku.to_up_fragments, nunchaku.from_up_fragments),
        ("down.16x128", nunchaku.to_down_fragments, nunchaku.from_down_fragments),
        ("down.32x128", nunchaku.to_down_fragments, nunchaku.from_down_fragments),
    ],
)
def test_scales_and_low_rank_equal_the_real_packer(
    data: Path, name: str, pack: Change, unpack: Change
) -> None:
    golden = load_file(data / "layouts/layouts.safetensors")
    before, after = golden[f"nunchaku.{name}.before"], golden[f"nunchaku.{name}.after"]
    assert torch.equal(pack(before), after)
    assert torch.equal(unpack(after), before)


def test_vectors_equal_the_real_packer(data: Path) -> None:
    golden = load_file(data / "layouts/layouts.safetensors")
    before, after = golden["nunchaku.vector.256.before"], golden["nunchaku.vector.256.after"]
    parts = {"bias": before}
    stored = convert(QuantTensor(SVDQUANT_INT4, PLAIN, (256, 128), parts), INT4)
    assert torch.equal(stored.parts["bias"], after)


def test_sixteen_rows_are_stored_in_thread_order() -> None:
    stored = nunchaku.to_vector_fragments(torch.arange(128).unsqueeze(1)).flatten()
    assert stored[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


def test_scales_are_stored_by_tile_not_by_group() -> None:
    """The stored shape [G, N] is nominal: group 1 of the first 128 rows follows their group 0."""
    scales = torch.zeros(256, 2)
    scales[0, 1] = 1
    assert nunchaku.to_vector_fragments(scales).flatten().nonzero().item() == 128


def weight(scheme: Scheme, rows: int, columns: int, rank: int = 16) -> QuantTensor:
    random = torch.Generator().manual_seed(rows + columns)
    halves = {
        name: torch.rand(shape, generator=random).bfloat16()
        for name, shape in {
            "bias": (rows,),
            "smooth": (columns,),
            "proj_down": (rank, columns),
            "proj_up": (rows, rank),
        }.items()
    }
    scale = torch.rand(rows, columns // scheme.group, generator=random)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=random, dtype=torch.uint8)
    block_scale = scale.to(torch.float8_e4m3fn if scheme is SVDQUANT_NVFP4 else torch.bfloat16)
    return QuantTensor(
        scheme, PLAIN, (rows, columns), {"codes": codes, "block_scale": block_scale, **halves}
    )


def awq_weight(rows: int, columns: int) -> QuantTensor:
    parts = dict(weight(AWQ_W4A16, rows, columns).parts)
    parts = {name: parts[name] for name in ("codes", "block_scale", "bias")}
    return QuantTensor(
        AWQ_W4A16, PLAIN, (rows, columns), parts | {"block_zero": -7 * parts["block_scale"]}
    )


@pytest.mark.parametrize(
    ("tensor", "layout"),
    [
        (weight(SVDQUANT_INT4, 256, 384), INT4),
        (weight(SVDQUANT_NVFP4, 128, 256), NVFP4),
        (weight(SVDQUANT_INT4, 200, 192), INT4),
        (weight(SVDQUANT_NVFP4, 72, 48), NVFP4),
        (weight(SVDQUANT_NVFP4, 256, 128), ROWS),
        (awq_weight(36, 192), AWQ),
    ],
    ids=["int4", "nvfp4", "int4 padded", "nvfp4 padded", "rows", "awq"],
)
def test_conversion_to_a_layout_and_back_keeps_every_part(
    tensor: QuantTensor, layout: Layout
) -> None:
    stored = convert(tensor, layout)
    for name, part in stored.parts.items():
        plain = plain_shape(tensor.scheme, layout, name, tensor.shape, tuple(part.shape))
        assert plain == tensor.parts[name].shape, name
    back = convert(stored, PLAIN)
    for name, part in tensor.parts.items():
        assert back.parts[name].dtype == part.dtype
        assert torch.equal(back.parts[name].float(), part.float()), name


def test_padding_is_neutral() -> None:
    stored = convert(weight(SVDQUANT_INT4, 200, 192), INT4)
    padded = convert(QuantTensor(SVDQUANT_INT4, INT4, (256, 256), stored.parts), PLAIN).parts
    assert padded["codes"][200:].eq(0).all()
    assert padded["codes"][:, 96:].eq(0).all()
    assert padded["proj_up"][200:].eq(0).all()
    assert padded["proj_down"][:, 192:].eq(0).all()
    for name in ("block_scale", "bias"):
        assert padded[name][200:].eq(1).all()
    assert padded["smooth"][192:].eq(1).all()


def test_part_of_another_layout_has_no_plain_shape() -> None:
    assert plain_shape(SVDQUANT_INT4, INT4, "block_scale", (256, 128), (256, 2)) is None
    assert plain_shape(SVDQUANT_INT4, INT4, "proj_down", (256, 128), (32, 128)) is None


def test_layout_as_text() -> None:
    assert str(PLAIN) == "codes low first, scales row major"
    assert (
        str(NVFP4)
        == "codes fragments, scales micro fragments, vectors fragments, low rank fragments"
    )
