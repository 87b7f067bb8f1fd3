"""One file can add a container with a block type, its format and its scheme."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mezzotint
from mezzotint import containers, formats, schemes
from mezzotint.checkpoint import Checkpoint
from mezzotint.containers import BlockType, TensorInfo
from mezzotint.errors import MissingTensor
from mezzotint.families.building import build_meta_model
from mezzotint.formats import read_header
from mezzotint.loading import Placement, load, plan
from support.checkpoint_edits import WEIGHTS
from support.plugin_packages import install_plugin

# The blocks are those of GGUF's Q8_0: a float16 scale and 32 signed bytes.
# Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, block_q8_0
STUB = """
import json
import torch
from mezzotint.containers import BlockType, ContainerHeader, TensorInfo
from mezzotint.formats import Match, NoMatch, StoredLinear
from mezzotint.formats.contents import classify_tensors
from mezzotint.schemes import Part, Scheme
from mezzotint.schemes.scheme import COMMON_PARTS
from mezzotint.tensor import PLAIN

MAGIC = b"GGUF"
Q8_0 = BlockType("Q8_0", 32, 34)
DTYPES = {"Q8_0": Q8_0, "BF16": torch.bfloat16}


def read_bytes(file, start, end):
    with file.open("rb") as stream:
        stream.seek(start)
        return bytearray(stream.read(end - start))


class Stub:
    name, title, suffixes = "stub", "a stub of GGUF", (".gguf",)

    def sniff(self, path):
        with path.open("rb") as stream:
            return stream.read(4) == MAGIC

    def read(self, path):
        with path.open("rb") as stream:
            stream.seek(4)
            length = int.from_bytes(stream.read(4), "little")
            entries = json.loads(stream.read(length))
        tensors = {
            name: TensorInfo(
                name, DTYPES[dtype], tuple(shape), path, 8 + length + start, 8 + length + end,
                read_bytes,
            )
            for name, (dtype, shape, start, end) in entries.items()
        }
        return ContainerHeader(tensors, {"stub.version": "1"})


def decode(parts):
    blocks = parts["codes"].unflatten(1, (-1, Q8_0.block_bytes))
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].view(torch.int8).float() * scales).flatten(1)


def shapes(rows, columns):
    return (Q8_0.packed_shape((rows, columns)),)


SCHEME = Scheme(
    name="stub_q8_0",
    title="Q8_0 (stub)",
    bits=8,
    usual_error=0.01,
    parts={"codes": Part((torch.uint8,), shapes, "quantized blocks", rows=True)},
    decode=decode,
    optional=COMMON_PARTS,
    group=32,
)


class StubFormat:
    name, title = "stub_blocks", "a model in blocks (stub)"

    def detect(self, header):
        blocks = [info for info in header.tensors.values() if isinstance(info.dtype, BlockType)]
        return Match(f"{len(blocks)} block tensors") if blocks else NoMatch("no block tensors")

    def contents(self, header):
        linears = {}
        for name, info in header.tensors.items():
            if isinstance(info.dtype, BlockType):
                module = name.removesuffix(".weight")
                keys = {"codes": name}
                keys |= {"bias": f"{module}.bias"} if f"{module}.bias" in header.tensors else {}
                linears[module] = StoredLinear(module, SCHEME, PLAIN, info.shape, keys)
        return classify_tensors(header, linears, {})


CONTAINER, FORMAT = Stub(), StubFormat()
"""
GROUPS = {"containers": "CONTAINER", "readers": "FORMAT", "schemes": "SCHEME"}
LAYER = "transformer_blocks.0.attn.to_q"
Q8_0 = BlockType("Q8_0", 32, 34)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the stub: one file that declares a container, a format and a scheme."""
    package = tmp_path / "package"
    package.mkdir()
    value = "stub_gguf:CONTAINER"
    install_plugin(package, monkeypatch, "mezzotint.containers", value, STUB)
    entry_points = "".join(
        f"[mezzotint.{group}]\nstub_gguf = stub_gguf:{name}\n" for group, name in GROUPS.items()
    )
    (package / "stub_gguf-1.0.dist-info/entry_points.txt").write_text(entry_points)
    registries = (containers.containers, formats.formats, schemes.schemes)
    for registry in registries:
        registry.cache_clear()
    yield
    for registry in registries:
        registry.cache_clear()


def to_blocks(weight: Tensor) -> Tensor:
    """Return a matrix as rows of Q8_0 blocks, uint8 [out, in / 32 * 34]."""
    groups = weight.float().unflatten(1, (-1, Q8_0.block_elements))
    scales = (groups.abs().amax(2, keepdim=True) / 127).half()
    codes = (groups / scales.float()).round().clamp(-127, 127).to(torch.int8)
    blocks = torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], dim=2)
    return blocks.flatten(1)


def is_quantized(name: str, tensor: Tensor) -> bool:
    return name.startswith("transformer_blocks") and tensor.ndim == 2


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file that the stub reads; matrices of blocks are quantized."""
    entries, data = {}, b""
    for name, tensor in tensors.items():
        quantized = is_quantized(name, tensor)
        stored = to_blocks(tensor) if quantized else tensor.bfloat16()
        raw = bytes(stored.contiguous().view(torch.uint8).flatten().tolist())
        dtype = "Q8_0" if quantized else "BF16"
        entries[name] = (dtype, list(tensor.shape), len(data), len(data) + len(raw))
        data += raw
    text = json.dumps(entries).encode()
    file.write_bytes(b"GGUF" + len(text).to_bytes(4, "little") + text + data)


@pytest.fixture
def base(data: Path) -> dict[str, Tensor]:
    return load_file(data / "base/flux1" / WEIGHTS)


@pytest.fixture
def model(stub: None, data: Path, tmp_path: Path, base: dict[str, Tensor]) -> Path:
    """A component's folder whose weights are in the stub's container."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "model.gguf", base)
    (folder / "config.json").write_text((data / "base/flux1/config.json").read_text())
    return folder


def test_containers_are_discovered() -> None:
    assert list(containers.containers()) == ["safetensors", "torch_zip"]
    assert containers.checkpoint_suffixes() == (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def test_first_bytes_decide_and_not_the_name(data: Path, tmp_path: Path) -> None:
    weights = (data / "base/flux1" / WEIGHTS).read_bytes()
    (tmp_path / "weights.pt").write_bytes(weights)
    torch.save({"a": {"b": torch.ones(2)}}, tmp_path / "state.safetensors")
    assert read_header(tmp_path / "weights.pt").tensors
    assert list(read_header(tmp_path / "state.safetensors").tensors) == ["a.b"]


def test_plugin_container_is_inspected(model: Path) -> None:
    report = mezzotint.inspect(model)
    assert (report.problems, report.unplaced) == ((), ())
    assert (report.format, report.family) == ("a model in blocks (stub)", "FLUX.1")
    assert report.schemes().keys() == {"stub_q8_0"}
    layer = next(layer for layer in report.layers if layer.module == LAYER)
    rows, columns = layer.shape
    assert layer.nbytes == rows * columns // 32 * 34 + 2 * rows
    assert report.stored_bytes == sum(info.nbytes for info in read_header(model).tensors.values())


def test_plugin_blocks_are_decoded(model: Path, base: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint.open(model)
    decoded, weight = checkpoint.weight(LAYER), base[f"{LAYER}.weight"].float()
    assert (decoded - weight).norm() < 0.01 * weight.norm()
    assert torch.equal(checkpoint.bias(LAYER), base[f"{LAYER}.bias"].float())
    rows = checkpoint.contents.linears[LAYER].read_rows(checkpoint.header, 3, 9)
    assert torch.equal(rows.scheme.decode(rows.parts), decoded[3:9])


def test_plugin_model_is_planned_and_loaded(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    network = build_meta_model("FluxTransformer2DModel", checkpoint.header.config)
    load(plan(checkpoint, network), network, Placement(torch.device("cpu")), torch.bfloat16)
    layer = network.get_submodule(LAYER)
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.float() @ checkpoint.weight(LAYER).T + checkpoint.bias(LAYER)
    torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=2e-2)


def test_plugin_file_is_verified(model: Path) -> None:
    assert mezzotint.verify(model).exit_code == 0


def test_blocks_without_their_format_are_not_taken_for_bytes(model: Path) -> None:
    header = read_header(model)
    answers = [form.detect(header) for form in formats.formats().values()]
    assert sum(isinstance(answer, formats.Match) for answer in answers) == 1


def test_malformed_blocks_name_the_tensor(model: Path, base: dict[str, Tensor]) -> None:
    del base[f"{LAYER}.bias"]
    write(model / "model.gguf", base)
    checkpoint = Checkpoint.open(model)
    network = build_meta_model("FluxTransformer2DModel", checkpoint.header.config)
    with pytest.raises(MissingTensor, match=r"to_q\.bias"):
        plan(checkpoint, network)


def test_block_tensor_has_a_logical_and_a_stored_shape(tmp_path: Path) -> None:
    info = TensorInfo("a", Q8_0, (4, 64), tmp_path / "a", 0, 4 * 68)
    assert (info.storage_dtype, info.storage_shape) == (torch.uint8, (4, 68))
    assert info.to_meta().shape == (4, 68)
    assert (info.slice_rows(1, 3).start, info.slice_rows(1, 3).nbytes) == (68, 136)
    assert info.first(10).nbytes == 10
