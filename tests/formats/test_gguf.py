"""GGUF files: of the tool, of other converters, hostile and contradictory ones.

tests/data/gguf/make.py wrote wan.gguf and field.gguf with gguf-py 0.19, and hashed what the tool
decodes.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mezzotint
from conftest import RecordSupport
from mezzotint.checkpoint import Checkpoint
from mezzotint.containers import TensorInfo, read_container
from mezzotint.containers.gguf import ORIGINAL_SHAPE
from mezzotint.errors import (
    BadScale,
    CheckpointError,
    NotACheckpoint,
    UnknownFormat,
    UnreadFormat,
    Unsupported,
)
from mezzotint.families import family_of
from mezzotint.families.original_names import original_layout
from mezzotint.formats import Match, detect_format, formats, read_header
from mezzotint.loading import Placement, load, plan
from mezzotint.nn import quant_linears
from support import gguf_files
from support.gguf_files import Stored
from support.header_fixtures import MODELS, expand, read_fixture

LAYER = "blocks.0.attn1.to_q"
CPU = Placement(torch.device("cpu"))


@pytest.fixture
def wan(data: Path, tmp_path: Path) -> Path:
    """A writable copy of the tool's file."""
    return Path(shutil.copy(data / "gguf/wan.gguf", tmp_path / "wan.gguf"))


def stored(file: Path) -> dict[str, Stored]:
    """Return the tensors of a file, to write them again with changes."""
    return {name: of(info) for name, info in read_container(file).tensors.items()}


def of(info: TensorInfo) -> Stored:
    raw = bytes(info.read().reshape(-1).view(torch.uint8).tolist())
    return Stored(gguf_files.NUMBER_OF[str(info.dtype)], info.shape[::-1], raw)


def rewritten(
    file: Path, change: Callable[[dict[str, Stored]], object], architecture: str | None = "wan"
) -> Path:
    """Change a file's tensors and architecture in place."""
    tensors = stored(file)
    change(tensors)
    said = {} if architecture is None else {"general.architecture": architecture}
    return gguf_files.write(file, tensors, said)


def nothing(_tensors: object) -> None:
    pass


def tensor_bytes(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(info.dtype), info.shape, of(info).data)
        for name, info in read_container(file).tensors.items()
    }


def decoded_hashes(file: Path) -> dict[str, str]:
    """Return {tensor: SHA-256 of its float32 numbers}, as Mezzotint decodes them."""
    header = read_header(file)
    contents = detect_format(header).format.contents(header)
    numbers: dict[str, Tensor] = {name: header.tensors[name].read() for name in contents.plain}
    for name, linear in contents.linears.items():
        linear.check(header)
        stored_linear = linear.read(header)
        numbers[f"{name}.weight"] = linear.scheme.decode(stored_linear.parts)
        if "bias" in stored_linear.parts:
            numbers[f"{name}.bias"] = stored_linear.parts["bias"]
    return {
        name: hashlib.sha256(value.float().numpy().tobytes()).hexdigest()
        for name, value in numbers.items()
    }


@pytest.mark.parametrize("name", ["wan.gguf", "field.gguf"])
def test_gguf_files_decode_to_the_tools_numbers(data: Path, name: str) -> None:
    """Bit for bit in float32."""
    truth = json.loads((data / "gguf/truth.json").read_text())[name]
    assert decoded_hashes(data / "gguf" / name) == truth


def test_the_field_case_gguf_wan_is_read_and_named_as_incomplete(data: Path) -> None:
    """Four tensors of a Wan: the file is read; as a model, it is refused by name."""
    file = data / "gguf/field.gguf"
    header = read_header(file)
    detected = detect_format(header)
    contents = detected.format.contents(header)
    schemes = {name: linear.scheme.title for name, linear in contents.linears.items()}
    assert (detected.format.name, detected.evidence) == (
        "gguf",
        "GGUF version 3 with architecture wan",
    )
    assert schemes == {
        "blocks.0.self_attn.q": "GGUF Q8_0",
        "blocks.0.self_attn.k": "GGUF Q4_0",
        "blocks.0.ffn.0": "GGUF Q5_1",
    }
    assert contents.plain == ("blocks.0.modulation",)
    with pytest.raises(UnreadFormat, match="no model family known here"):
        mezzotint.inspect(file)


def test_a_gguf_file_of_the_tool_is_inspected(wan: Path, record_support: RecordSupport) -> None:
    report = mezzotint.inspect(wan)
    assert (report.format, report.family) == ("GGUF", "Wan 2.2")
    assert (report.problems, report.unplaced) == ((), ())
    assert len(report.schemes()) == 8
    assert report.schemes()["gguf_q8_0"] == 4
    assert mezzotint.verify(wan).exit_code == 0
    record_support("golden", Checkpoint.open(wan))


def test_a_gguf_model_stays_packed_and_computes_with_the_tools_numbers(wan: Path) -> None:
    checkpoint = Checkpoint.open(wan)
    model, reference = (_fresh(checkpoint) for _ in range(2))
    load(plan(checkpoint, model), model, CPU, torch.float32)
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.plain}
    for module in checkpoint.modules:
        state[f"{module}.weight"] = checkpoint.weight(module)
        if (bias := checkpoint.bias(module)) is not None:
            state[f"{module}.bias"] = bias
    reference.load_state_dict(state, assign=True)
    layers = quant_linears(model)
    assert sorted(layers) == checkpoint.modules
    in_file = read_header(wan).tensors
    packed = sum(
        layer.quant_weight.parts["codes"].nbytes
        for name in layers
        for layer in layers[name].sublayers
    )
    assert packed == sum(
        info.nbytes for info in in_file.values() if info.shape != info.storage_shape
    )
    chance = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8, generator=chance),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=chance),
    }
    with torch.no_grad():
        ours, theirs = (net(**given, return_dict=False)[0] for net in (model, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _fresh(checkpoint: Checkpoint) -> torch.nn.Module:
    from mezzotint.families.building import build_meta_model

    config = checkpoint.family.config(checkpoint.sources)
    model = build_meta_model(checkpoint.family.transformer_class, config)
    return model.eval()


@pytest.mark.parametrize(
    ("architecture", "error", "message"),
    [
        (
            "flux",
            UnknownFormat,
            "general.architecture is flux, and its tensors are those of Wan 2.2",
        ),
        ("lumina2", UnknownFormat, "general.architecture is lumina2"),
        ("hyvid", UnreadFormat, "hyvid, of HunyuanVideo, which is not read"),
        ("ltxv", UnreadFormat, "ltxv, of LTX-Video, which is not read"),
        ("sdxl", UnreadFormat, "of Stable Diffusion XL"),
        ("t5encoder", UnreadFormat, "a text encoder"),
        ("qwen3vl", UnreadFormat, "a text encoder"),
    ],
)
def test_an_architecture_that_contradicts_the_tensors_is_refused(
    wan: Path, architecture: str, error: type[CheckpointError], message: str
) -> None:
    with pytest.raises(error, match=message):
        mezzotint.inspect(rewritten(wan, nothing, architecture))


@pytest.mark.parametrize("architecture", [None, "pig", "cow", "wan", "something new"])
def test_tensors_decide_where_the_architecture_says_nothing(
    wan: Path, architecture: str | None
) -> None:
    """stable-diffusion.cpp writes none, and gguf-connector a word that names no model."""
    assert mezzotint.inspect(rewritten(wan, nothing, architecture)).family == "Wan 2.2"


def test_gguf_types_that_are_not_read_are_refused_by_name(wan: Path) -> None:
    name = "blocks.0.ffn.2.weight"
    for kind, type_name, size in ((16, "IQ2_XXS", 66), (39, "MXFP4", 17 * 8), (34, "TQ1_0", 54)):

        def change(tensors: dict[str, Stored], kind: int = kind, size: int = size) -> None:
            tensors[name] = Stored(kind, (256, 32), bytes(32 * size))

        rewritten(wan, change)
        with pytest.raises(UnreadFormat, match=f"{name} is {type_name}, a type of GGUF"):
            mezzotint.inspect(wan)


def test_a_part_of_a_split_gguf_file_is_named(wan: Path) -> None:
    gguf_files.write(wan, stored(wan), {"split.no": 1, "split.count": 3})
    with pytest.raises(UnreadFormat, match="is part 2 of 3 of a split GGUF file"):
        mezzotint.inspect(wan)


def test_an_unquantized_gguf_file_is_gguf_too(wan: Path) -> None:
    def change(tensors: dict[str, Stored]) -> None:
        checkpoint = Checkpoint.open(wan)
        for name, linear in checkpoint.contents.linears.items():
            weight = linear.scheme.decode(linear.read(checkpoint.header).parts)
            tensors[f"{name}.weight"] = gguf_files.numbers(weight.half())

    rewritten(wan, change)
    header = read_header(wan)
    matches = [f.name for f in formats().values() if isinstance(f.detect(header), Match)]
    assert matches == ["gguf"]
    assert mezzotint.inspect(wan).problems == ()


def test_names_of_gguf_files_may_have_a_prefix(wan: Path) -> None:
    """stable-diffusion.cpp writes the prefix."""

    def change(tensors: dict[str, Stored]) -> None:
        for name in list(tensors):
            tensors[f"model.diffusion_model.{name}"] = tensors.pop(name)

    before = Checkpoint.open(wan).weight(LAYER)
    after = Checkpoint.open(rewritten(wan, change, None))
    assert after.report.problems == ()
    assert torch.equal(after.weight(LAYER), before)


def test_axes_that_ggml_joins_or_drops_are_restored(wan: Path) -> None:
    """llama-quantize drops leading axes of length 1; stable-diffusion.cpp joins two of five."""
    names = ("patch_embedding.weight", "scale_shift_table", "blocks.1.scale_shift_table")
    before = {name: Checkpoint.open(wan).tensor(name) for name in names}

    def change(tensors: dict[str, Stored]) -> None:
        for name in [name for name in tensors if name.endswith("modulation")]:
            own = tensors[name]
            assert own.sides[-1] == 1
            tensors[name] = Stored(own.kind, own.sides[:-1], own.data)
        own = tensors["patch_embedding.weight"]
        *kernel, inputs, outputs = own.sides
        tensors["patch_embedding.weight"] = Stored(own.kind, [*kernel, inputs * outputs], own.data)

    after = Checkpoint.open(rewritten(wan, change, None))
    assert after.report.problems == ()
    placed = after.placed(after.model())
    assert all(torch.equal(placed.tensor(name), before[name]) for name in names)


def test_blocks_of_what_is_no_matrix_are_decoded(wan: Path, tmp_path: Path, data: Path) -> None:
    """A convolution, a parameter, and a matrix reshaped to rows of whole blocks are decoded."""
    tensors = stored(wan)
    weights = {name: info.read() for name, info in read_container(wan).tensors.items()}
    chance = torch.Generator().manual_seed(0)
    values = torch.randn(weights["patch_embedding.weight"].shape, generator=chance)
    tensors["patch_embedding.weight"] = gguf_files.blocks(values.reshape(-1, 32))
    modulation = weights["blocks.0.modulation"]
    tensors["blocks.0.modulation"] = gguf_files.blocks(modulation)
    said = {
        "general.architecture": "wan",
        f"{ORIGINAL_SHAPE}patch_embedding.weight": list(values.shape),
    }
    file = gguf_files.write(tmp_path / "packed.gguf", tensors, said)
    checkpoint = Checkpoint.open(file)
    assert checkpoint.report.problems == ()
    placed = checkpoint.placed(checkpoint.model())
    for name, exact in (
        ("patch_embedding.weight", values),
        ("blocks.0.scale_shift_table", modulation),
    ):
        decoded = placed.tensor(name)
        assert (decoded.shape, decoded.dtype) == (exact.shape, torch.float32)
        assert (decoded - exact).norm() < 0.01 * exact.norm()
    assert mezzotint.verify(file).exit_code == 0
    report = mezzotint.convert(file, tmp_path / "mz")
    assert report.transforms == {"decoded from blocks to float32": 2}
    assert torch.equal(
        Checkpoint.open(tmp_path / "mz").tensor("patch_embedding.weight"),
        placed.tensor("patch_embedding.weight"),
    )


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q.weight", "blocks.0.modulation"])
def test_a_gguf_scale_that_is_not_finite_is_refused_by_every_command(
    wan: Path, tmp_path: Path, name: str
) -> None:
    def change(tensors: dict[str, Stored]) -> None:
        own = tensors[name]
        shape = own.sides[::-1]
        values = gguf_files.blocks(torch.ones(shape).float())
        tensors[name] = Stored(values.kind, own.sides, values.data[:-34] + b"\0\x7c" + bytes(32))

    rewritten(wan, change)
    checkpoint = Checkpoint.open(wan)
    network = _fresh(checkpoint)
    with pytest.raises(BadScale, match=name):
        load(plan(checkpoint, network), network, CPU, torch.bfloat16)
    assert mezzotint.verify(wan).exit_code == 2
    for to in ("mezzotint", "bf16", "gguf"):
        with pytest.raises(BadScale, match=name):
            mezzotint.convert(wan, tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


def test_a_bias_in_blocks_is_decoded(wan: Path) -> None:
    name = "blocks.0.self_attn.q.bias"
    values = torch.linspace(-1, 1, 32)

    def change(tensors: dict[str, Stored]) -> None:
        own = gguf_files.blocks(values[None])
        tensors[name] = Stored(own.kind, (32,), own.data)

    checkpoint = Checkpoint.open(rewritten(wan, change))
    assert checkpoint.report.problems == ()
    model = _fresh(checkpoint)
    load(plan(checkpoint, model), model, CPU, torch.float32)
    layer = quant_linears(model)[LAYER]
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias, values, rtol=0.01, atol=0.01)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ checkpoint.weight(LAYER).T + layer.bias)


def test_a_configuration_may_declare_gguf(wan: Path) -> None:
    said = {"quantization_config": {"quant_method": "gguf", "compute_dtype": "bfloat16"}}
    (wan.parent / "config.json").write_text(json.dumps(said))
    assert mezzotint.inspect(wan).problems == ()


def test_safetensors_files_come_before_a_gguf_file_in_the_folder(wan: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    header = read_header(tmp_path)
    assert list(header.tensors) == ["a"]
    (tmp_path / "model.safetensors").unlink()
    assert read_header(tmp_path).files == (wan,)
    shutil.copy(wan, tmp_path / "second.gguf")
    with pytest.raises(NotACheckpoint, match="2 weight files"):
        read_header(tmp_path)


def test_gguf_to_mezzotint_to_gguf_keeps_every_byte(wan: Path, tmp_path: Path) -> None:
    there = mezzotint.convert(wan, tmp_path / "mz")
    back = mezzotint.convert(tmp_path / "mz", tmp_path / "back", to="gguf")
    assert (there.transforms, back.transforms) == ({}, {})
    assert back.output == tmp_path / "back.gguf"
    assert list(tensor_bytes(back.output).items()) == list(tensor_bytes(wan).items())
    metadata = read_container(back.output).metadata
    assert json.loads(metadata["general.architecture"]) == "wan"
    assert json.loads(metadata["general.quantization_version"]) == 2
    again = mezzotint.convert(wan, tmp_path / "again.gguf", to="gguf")
    assert tensor_bytes(again.output) == tensor_bytes(wan)
    mezzotint.convert(tmp_path / "mz", tmp_path / "back", to="gguf", overwrite=True)


def test_a_gguf_file_as_bf16_has_its_rounded_numbers(wan: Path, tmp_path: Path) -> None:
    report = mezzotint.convert(wan, tmp_path / "bf16", to="bf16")
    assert report.transforms == {"decoded to BF16": len(Checkpoint.open(wan).modules)}
    expected = Checkpoint.open(wan).weight(LAYER).bfloat16()
    assert torch.equal(Checkpoint.open(tmp_path / "bf16").tensor(f"{LAYER}.weight"), expected)


@pytest.mark.parametrize("model", MODELS)
def test_makers_names_are_those_of_the_published_files(model: str) -> None:
    fixture = read_fixture(model)
    diffusers, original = expand(fixture["diffusers"]), expand(fixture["original"])
    layout = original_layout(family_of(diffusers, model), diffusers)
    prefix = "model.diffusion_model."
    expected = {name.removeprefix(prefix): shape for name, shape in original.items()}
    expected.pop("norm_final.weight", None)  # of Z-Image, which no model uses
    assert {name: shape for name, (shape, _) in layout.items()} == expected


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_an_unquantized_model_is_written_in_gguf_blocks(
    data: Path, tmp_path: Path, kind: str
) -> None:
    base = data / "base/flux1"
    report = mezzotint.convert(base, tmp_path / "made", to=f"gguf-{kind.lower()}")
    written = Checkpoint.open(report.output)
    assert written.report.problems == ()
    assert report.transforms == {f"rounded to GGUF {kind}": len(written.modules)}
    assert written.header.config["_class_name"] == "FluxTransformer2DModel"
    weights = load_file(base / "diffusion_pytorch_model.safetensors")
    assert {f"{module}.weight" for module in written.modules} == {
        name
        for name, value in weights.items()
        if "blocks." in name and name.endswith(".weight") and value.ndim == 2
    }
    for module in written.modules:
        weight = weights[f"{module}.weight"]
        encoded = written.read(module)[0].scheme.encode(weight)
        assert torch.equal(written.parts(module)["codes"], encoded["codes"])
    for name in written.plain:
        assert torch.equal(written.tensor(name).float(), weights[name].float())


def test_an_unquantized_model_in_gguf_keeps_its_numbers(data: Path, tmp_path: Path) -> None:
    base = data / "base/flux1"
    report = mezzotint.convert(base, tmp_path / "made.gguf", to="gguf")
    written, before = Checkpoint.open(report.output), Checkpoint.open(base)
    assert report.transforms == {}
    assert set(written.plain) == set(before.plain)
    for name in written.plain:
        assert torch.equal(written.tensor(name).float(), before.tensor(name).float())
    tensors = read_container(report.output).tensors
    assert "double_blocks.0.img_attn.qkv.weight" in tensors
    # Converters keep vectors in F32.
    assert tensors["double_blocks.0.img_attn.qkv.bias"].dtype == torch.float32


def test_blocks_of_another_type_are_encoded_again(data: Path, tmp_path: Path) -> None:
    mezzotint.convert(data / "base/flux1", tmp_path / "q8.gguf", to="gguf-q8_0")
    report = mezzotint.convert(tmp_path / "q8.gguf", tmp_path / "q4", to="gguf-q4_0")
    assert report.transforms == {"rounded to GGUF Q4_0": len(report.errors)}
    assert report.layers == {"gguf_q4_0": len(report.errors)}
    same = mezzotint.convert(tmp_path / "q8.gguf", tmp_path / "same", to="gguf", scheme="gguf_q4_0")
    assert tensor_bytes(same.output) == tensor_bytes(report.output)
    again = mezzotint.convert(tmp_path / "q8.gguf", tmp_path / "again", to="gguf-q8_0")
    assert (again.transforms, again.errors) == ({}, {})
    assert tensor_bytes(again.output) == tensor_bytes(tmp_path / "q8.gguf")


def test_what_gguf_cannot_hold_is_refused(nvfp4: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="is NVFP4, and GGUF stores its own block types"):
        mezzotint.convert(nvfp4, tmp_path / "x", to="gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_layers_of_several_types_cannot_be_joined(wan: Path, tmp_path: Path, nvfp4: Path) -> None:
    """Queries, keys and values of FLUX.1 are one tensor in GGUF."""
    source = tmp_path / "flux"
    mezzotint.convert(
        Path(__file__).parents[1] / "data/base/flux1", tmp_path / "q8.gguf", to="gguf-q8_0"
    )
    mezzotint.convert(tmp_path / "q8.gguf", source, keep_bf16=["transformer_blocks.0.attn.to_q"])
    with pytest.raises(Unsupported, match=r"img_attn\.qkv\.weight joins"):
        mezzotint.convert(source, tmp_path / "back", to="gguf")
