"""Mutated, truncated or enormous headers: rejected, or accepted if safetensors accepts them too."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from fuzz import (
    fuzz_checkpoints,
    fuzz_conversions,
    fuzz_gguf,
    fuzz_headers,
    fuzz_torch_zip,
    hostile,
)
from mezzotint.containers import gguf
from mezzotint.containers import safetensors as limits
from mezzotint.errors import BrokenFile, MezzotintError
from mezzotint.formats import read_header
from support import gguf_files
from support.checkpoint_edits import WEIGHTS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "C64", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 2**63), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
        "more": JSON,
    },
)


def write(file: Path, text: bytes, data: bytes = b"") -> Path:
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def test_mutated_headers(tmp_path: Path) -> None:
    """Three thousand of them; `tests/fuzz/fuzz_headers.py` has tried a million."""
    result = fuzz_headers.fuzz(tmp_path / "a.safetensors", 3000, seed=1)
    assert result["accepted"] > 100
    assert result["refused"] > 1000


def test_mutated_gguf_headers(tmp_path: Path) -> None:
    """Three thousand of them; `tests/fuzz/fuzz_gguf.py` tries a million."""
    result = fuzz_gguf.fuzz(tmp_path / "a.gguf", 3000, seed=1)
    assert result["accepted"] > 100
    assert result["refused"] > 1000


def test_mutated_files_of_torch_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three thousand of them; `tests/fuzz/fuzz_torch_zip.py` tries a million."""
    monkeypatch.chdir(tmp_path)
    result = fuzz_torch_zip.fuzz(tmp_path / "a.pt", 3000, seed=3)
    assert result["accepted"] > 100
    assert result["refused"] > 1000


def test_a_thousand_truncations_of_a_file_of_torch_save_are_refused(tmp_path: Path) -> None:
    torch.save({f"layer.{i}.weight": torch.ones(8, 8) for i in range(9)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    points = {len(content) * i // 1100 for i in range(1100)}
    assert len(points) >= 1000
    for length in points:
        (tmp_path / "a.pt").write_bytes(content[:length])
        with pytest.raises(MezzotintError):
            read_header(tmp_path / "a.pt")


def test_two_sizes_of_one_uncompressed_entry_are_refused(tmp_path: Path) -> None:
    """Fuzzing found that zipfile reserves the larger one: 3 GB for a file of 1 KB."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    directory = content.index(b"PK\1\2")
    content[directory + 20 : directory + 24] = (3 * 2**30).to_bytes(4, "little")
    (tmp_path / "a.pt").write_bytes(content)
    with hostile.bounded_memory(), pytest.raises(BrokenFile, match="states two sizes for one"):
        read_header(tmp_path / "a.pt")


def test_no_gguf_header_takes_more_than_300_mb(tmp_path: Path) -> None:
    """Measured in a process of its own, by the kernel's high-water mark."""
    keys, texts = gguf.MAX_KEYS, gguf.MAX_VALUES // gguf.MAX_KEPT - 1
    empty = struct.pack("<IIQ", 9, 8, gguf.MAX_KEPT) + bytes(8 * gguf.MAX_KEPT)
    worst = {
        "keys": (keys, b"".join(gguf_files.entry(f"{i:x}", "x" * 100) for i in range(keys))),
        "arrays": (texts, b"".join(gguf_files.text(f"{i:x}") + empty for i in range(texts))),
        "text": (1, gguf_files.entry("a", "\1" * (gguf.MAX_TEXT - 1))),
    }
    files = []
    for name, (count, entries) in worst.items():
        files.append(tmp_path / f"{name}.gguf")
        header = struct.pack("<4sIQQ", b"GGUF", 3, 0, count) + entries
        files[-1].write_bytes(gguf_files.padded(header))
    code = (
        "import sys; from pathlib import Path; from fuzz.fuzz_gguf import accepts\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line.split()[1] for line in lines if 'VmHWM' in line)) * 1024\n"
        "before = peak()\n"
        "assert all([accepts(Path(file)) for file in sys.argv[1:]])\n"
        "print(peak() - before)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, env=environment
    )
    assert int(done.stdout) < hostile.MEMORY, done.stderr


def test_changed_checkpoints_are_read_or_refused(data: Path, tmp_path: Path) -> None:
    """A hundred; `tests/fuzz/fuzz_checkpoints.py` has tried thousands."""
    names = [
        "bfl_flux2dev_nvfp4",
        "comfy_qwenimage_mixed_nvfp4_fp8",
        "modelopt_flux1_nvfp4",
        "nunchaku_flux1_int4_r32",
    ]
    sources = [next((data / name / "checkpoint").glob("*.safetensors")) for name in names]
    result = fuzz_checkpoints.fuzz(sources, tmp_path, 100, seed=1)
    assert result["read"] > 10
    assert result["incomplete"] > 10


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    entries=st.dictionaries(st.text(max_size=4), FIELDS | JSON, max_size=3), size=st.integers(0, 40)
)
def test_headers_of_any_shape(tmp_path: Path, entries: dict[str, object], size: int) -> None:
    file = write(tmp_path / "a.safetensors", json.dumps(entries).encode(), bytes(size))
    fuzz_headers.accepts(file)


def test_a_thousand_truncations_of_a_real_file_are_refused(nvfp4: Path, tmp_path: Path) -> None:
    content = (nvfp4 / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    points = {*range(12), *range(header - 50, header + 50), len(content) - 1}
    points |= {i * len(content) // 900 for i in range(900)}
    assert len(points) >= 1000
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    for length in sorted(points, reverse=True):
        with file.open("r+b") as stream:
            stream.truncate(length)
        with pytest.raises(BrokenFile):
            read_header(file)
        with pytest.raises((SafetensorError, OSError, ValueError)), safe_open(file, framework="pt"):
            pass


def keys(number: int) -> bytes:
    return b"{" + b",".join(b'"%x":1' % i for i in range(number)) + b"}"


def lists(number: int) -> bytes:
    return b'{"a":[' + b",".join(b"[]" for _ in range(number)) + b"]}"


def metadata(number: int) -> bytes:
    return b'{"__metadata__":{' + b",".join(b'"%x":"%x"' % (i, i) for i in range(number)) + b"}}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bytes(limits.MAX_HEADER_BYTES + 1), "over the limit"),
        (lambda: keys(limits.MAX_TENSORS + 1), "over the limit"),
        (lambda: lists(limits.MAX_ITEMS + 2), "lists more than"),
        (lambda: b"{" * limits.MAX_HEADER_BYTES, "lists more than"),
        (lambda: b'{"a":' + b"[" * 10**6, "not valid JSON"),
        (lambda: b'{"a":' + b"9" * 10**6 + b"}", "not valid JSON"),
        (lambda: b'{"a":NaN}', "not a JSON number"),
        (lambda: b'{"a":-0}', "-0 is not a count"),
        (lambda: b'{"\\ud800":1}', "not valid JSON"),
        (lambda: b' {"a":1}', "begin with a brace"),
        (lambda: '{"a":1}'.encode("utf-16"), "begin with a brace"),
    ],
)
def test_headers_made_to_hurt(tmp_path: Path, make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(BrokenFile, match=message):
        read_header(write(tmp_path / "a.safetensors", make()))


def test_no_header_takes_more_than_300_mb(tmp_path: Path) -> None:
    """Measured in a process of its own, by the kernel's high-water mark."""
    worst = {
        keys: limits.MAX_FIELDS - 1,
        lists: limits.MAX_ITEMS - 1,
        metadata: limits.MAX_FIELDS - 1,
    }
    files = [write(tmp_path / make.__name__, make(number)) for make, number in worst.items()]
    code = (
        "import sys; from pathlib import Path; from fuzz.fuzz_headers import accepts\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line.split()[1] for line in lines if 'VmHWM' in line)) * 1024\n"
        "before = peak()\n"
        "for file in sys.argv[1:]: accepts(Path(file))\n"
        "print(peak() - before)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, env=environment
    )
    assert int(done.stdout) < hostile.MEMORY, done.stderr


def test_changed_checkpoints_are_converted_to_the_same_numbers_or_refused(
    data: Path, tmp_path: Path
) -> None:
    """Thirty; `tests/fuzz/fuzz_conversions.py` tries thousands."""
    names = ["bfl_flux2dev_nvfp4", "comfy_qwenimage_mixed_nvfp4_fp8", "modelopt_flux1_nvfp4"]
    sources = [next((data / name / "checkpoint").glob("*.safetensors")) for name in names]
    result = fuzz_conversions.fuzz(sources, tmp_path, 30, seed=1)
    assert result["converted"] >= len(names)
    assert result["MissingTensor"] > 0


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_ten_thousand_changed_checkpoints_are_converted_to_the_same_numbers_or_refused(
    data: Path, tmp_path: Path
) -> None:
    files = sorted(data.glob("*/checkpoint/**/*.safetensors"))
    sources = [file for file in files if not file.parts[-3].startswith("broken")]
    assert fuzz_conversions.fuzz(sources, tmp_path, 10_000, seed=0)["converted"] > 100
