"""GGUF's block schemes against gguf-py 0.19; tests/data/gguf/make.py wrote the numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mezzotint.containers.gguf_types import BLOCKS
from mezzotint.errors import BadScale, ShapeMismatch
from mezzotint.schemes import Scheme, schemes

SCHEMES = {name: scheme for name, scheme in schemes().items() if name.startswith("gguf_")}
TYPES = {
    f"gguf_{block.name.lower()}": block
    for block in BLOCKS.values()
    if f"gguf_{block.name.lower()}" in SCHEMES
}
ENCODED = [name for name, scheme in SCHEMES.items() if scheme.encode is not None]


@pytest.fixture
def golden(data: Path) -> dict[str, Tensor]:
    return load_file(data / "gguf/blocks.safetensors")


def title(scheme: str) -> str:
    return TYPES[scheme].name


def random_blocks(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return blocks of random bytes whose scales are finite."""
    chance = torch.Generator().manual_seed(seed)
    (shape,) = scheme.part("codes").shapes(rows, columns)
    codes = torch.randint(0, 256, shape, generator=chance, dtype=torch.uint8)
    # Without the exponent's highest bit, no float16 number is infinite.
    return codes & 0xBF


def test_twelve_types_are_read() -> None:
    assert sorted(map(title, SCHEMES)) == sorted(
        [
            *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
        ]
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_gguf_blocks_have_the_size_that_the_container_states(name: str) -> None:
    scheme, block = SCHEMES[name], TYPES[name]
    assert scheme.group == block.block_elements
    assert scheme.part("codes").shapes(3, 2 * scheme.group) == ((3, 2 * block.block_bytes),)


@pytest.mark.parametrize("name", SCHEMES)
def test_gguf_blocks_decode_to_the_tools_numbers(name: str, golden: dict[str, Tensor]) -> None:
    """Bit for bit in float32; half of the blocks are random bytes, with NaN and infinite scales."""
    decoded = SCHEMES[name].decode({"codes": golden[f"{title(name)}.random"]})
    expected = golden[f"{title(name)}.decoded"]
    assert torch.equal(decoded.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(decoded[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("name", ENCODED)
def test_gguf_blocks_are_encoded_to_the_tools_bytes(name: str, golden: dict[str, Tensor]) -> None:
    encoded = SCHEMES[name].encode(golden["weights"])
    assert torch.equal(encoded["codes"], golden[f"{title(name)}.encoded"])


@pytest.mark.parametrize("name", ENCODED)
def test_gguf_errors_of_random_weights_are_usual(name: str) -> None:
    scheme = SCHEMES[name]
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    decoded = scheme.decode(scheme.encode(weight))
    assert (decoded - weight).norm() < scheme.usual_error / 2 * weight.norm()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_gguf_block_with_a_scale_that_is_not_finite_is_refused(name: str) -> None:
    scheme = SCHEMES[name]
    codes = random_blocks(scheme, 2, 2 * scheme.group)
    scheme.check_values("codes", codes, "here")
    finite = codes.clone()
    found = 0
    for byte in range(codes.shape[1] - 1):
        codes = finite.clone()
        codes[1, byte : byte + 2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
        try:
            scheme.check_values("codes", codes, "here")
        except BadScale:
            found += 1
    # One or two scales in each of the two blocks; a byte can also become the upper half of one.
    assert found in (2, 4)


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_of_gguf_blocks_that_are_not_whole_are_refused(name: str) -> None:
    scheme = SCHEMES[name]
    with pytest.raises(ShapeMismatch):
        scheme.check_part("codes", (2, 17), torch.uint8, (2, scheme.group), "here")
    with pytest.raises(ShapeMismatch):
        scheme.check_part("codes", (2, 18), torch.uint8, (2, scheme.group + 2), "here")
