"""Nunchaku's names, at full size and at sizes that need padding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.containers import TensorInfo
from mezzotint.errors import ShapeMismatch, Unsupported
from mezzotint.families import families
from mezzotint.families.building import build_meta_model
from mezzotint.formats import Header
from mezzotint.formats.writers.svdquant import fuse_stored_linear, nunchaku_tensors
from mezzotint.loading import plan
from mezzotint.schemes import AWQ_W4A16, SVDQUANT_INT4, SVDQUANT_NVFP4, Scheme
from mezzotint.tensor import PLAIN, QuantTensor

NAMES = {
    "flux1": ("FluxTransformer2DModel", (".norm1.linear", ".norm1_context.linear", ".norm.linear")),
    "qwenimage": ("QwenImageTransformer2DModel", ("img_mod.1", "txt_mod.1")),
    "zimage": ("ZImageTransformer2DModel", ()),
}
BLOCKS = (
    "transformer_blocks.",
    "single_transformer_blocks.",
    "layers.",
    "noise_refiner.",
    "context_refiner.",
)


def linears(model: nn.Module, family: str) -> dict[str, Scheme]:
    """{module: scheme} of the linears that Nunchaku quantizes."""
    awq = NAMES[family][1]
    return {
        name: AWQ_W4A16 if name.endswith(awq or ("?",)) else SVDQUANT_INT4
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(BLOCKS) and "adaLN" not in name
    }


def full_size_header(model: nn.Module, family: str) -> Header:
    """The header of a Nunchaku file of this model, made from its names and shapes."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    chosen = linears(model, family)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    split = {
        module for module in chosen if module.startswith("single") and module.endswith("proj_out")
    }
    for stored, members in families()[family].nunchaku.stored_layers(chosen).items():
        rows = sum(shapes[f"{module}.weight"][0] for module, _ in members)
        module, piece = members[0]
        columns = shapes[f"{module}.weight"][1]
        if module in split:
            columns = rows if piece == 0 else columns - rows
        if chosen[module] is AWQ_W4A16:
            entries[f"{stored}.qweight"] = (torch.int32, (rows // 4, columns // 2))
            for suffix in ("wscales", "wzeros"):
                entries[f"{stored}.{suffix}"] = (torch.bfloat16, (columns // 64, rows))
        else:
            down, up, smooth = (
                ("lora_down", "lora_up", "smooth") if family == "flux1" else DOWN_UP_SMOOTH
            )
            entries[f"{stored}.qweight"] = (torch.int8, (rows, columns // 2))
            entries[f"{stored}.wscales"] = (torch.bfloat16, (columns // 64, rows))
            entries[f"{stored}.{smooth}"] = (torch.bfloat16, (columns,))
            entries[f"{stored}.{down}"] = (torch.bfloat16, (columns, 128))
            entries[f"{stored}.{up}"] = (torch.bfloat16, (rows, 128))
        if f"{module}.bias" in shapes:
            entries[f"{stored}.bias"] = (torch.bfloat16, (rows,))
    for name, shape in shapes.items():
        if name.rpartition(".")[0] not in chosen:
            entries[families()[family].nunchaku.stored_tensor(name)] = (torch.bfloat16, shape)
    file = Path("full-size.safetensors")
    tensors = {
        name: TensorInfo(name, dtype, shape, file, 0, 0) for name, (dtype, shape) in entries.items()
    }
    return Header(file, (file,), tensors, {"quantization_config": '{"method": "svdquant"}'})


DOWN_UP_SMOOTH = ("proj_down", "proj_up", "smooth_factor")


@pytest.mark.parametrize(
    ("family", "quantized"), [("flux1", 304 + 76), ("qwenimage", 480 + 120), ("zimage", 34 * 4)]
)
def test_every_key_of_a_full_size_model_has_one_place(family: str, quantized: int) -> None:
    model = build_meta_model(NAMES[family][0], {})
    checkpoint = Checkpoint.of(full_size_header(model, family))
    assert len(checkpoint.contents.linears) == quantized
    assert checkpoint.family.name == family
    plan(checkpoint, model)
    shifted = {
        name for name, linear in checkpoint.contents.linears.items() if linear.implied_values
    }
    assert len(shifted) == {"flux1": 2 * 19 + 38, "qwenimage": 2 * 60, "zimage": 0}[family]


def weight(
    scheme: Scheme, rows: int, columns: int, seed: int, shared: dict[str, Tensor]
) -> QuantTensor:
    random = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, columns // scheme.group, generator=random)
    parts = {
        "codes": torch.randint(0, 256, (rows, columns // 2), generator=random, dtype=torch.uint8),
        "block_scale": scale.to(
            torch.float8_e4m3fn if scheme is SVDQUANT_NVFP4 else torch.bfloat16
        ),
        "bias": torch.randn(rows, generator=random).bfloat16(),
    }
    if scheme is AWQ_W4A16:
        parts["block_zero"] = (-7 * parts["block_scale"]).bfloat16()
        return QuantTensor(scheme, PLAIN, (rows, columns), parts)
    parts["proj_up"] = torch.randn(rows, 16, generator=random).bfloat16()
    if scheme is SVDQUANT_NVFP4:
        parts["channel_scale"] = torch.full((rows,), 0.5 + seed).bfloat16()
    return QuantTensor(scheme, PLAIN, (rows, columns), parts | shared)


def branch(columns: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    smooth = 0.5 + torch.rand(columns, generator=random)
    return {
        "smooth": smooth.bfloat16(),
        "proj_down": torch.randn(16, columns, generator=random).bfloat16(),
    }


@pytest.mark.parametrize("scheme", [SVDQUANT_INT4, SVDQUANT_NVFP4], ids=["int4", "nvfp4"])
@pytest.mark.parametrize("width", [192, 128])
def test_a_qwen_image_file_is_split_and_its_padding_cut(
    tmp_path: Path, scheme: Scheme, width: int
) -> None:
    """A width of 192 is stored as 256, in each of q, k and v."""
    names = dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), (width, width))
    names |= dict.fromkeys(("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), (width, width))
    shapes = {f"transformer_blocks.0.attn.{m}": shape for m, shape in names.items()}
    for mlp in ("img_mlp", "txt_mlp"):
        shapes[f"transformer_blocks.0.{mlp}.net.0.proj"] = (4 * width, width)
        shapes[f"transformer_blocks.0.{mlp}.net.2"] = (width, 4 * width)
    tensors: dict[str, Tensor] = {
        "img_in.weight": torch.zeros(width, 64),
        "txt_norm.weight": torch.zeros(64),
    }
    wanted: dict[str, QuantTensor] = {}
    for stored, members in families()["qwenimage"].nunchaku.stored_layers(shapes).items():
        columns = shapes[members[0][0]][1]
        shared = branch(columns, seed=len(wanted))
        shift = (
            {"shift": torch.tensor(0.171875)}
            if stored.endswith("net.2") and scheme is SVDQUANT_INT4
            else {}
        )
        for i, (module, _) in enumerate(members):
            wanted[module] = weight(scheme, *shapes[module], seed=i, shared=shared | shift)
        tensors |= nunchaku_tensors(
            stored, fuse_stored_linear([wanted[module] for module, _ in members]), v1=False
        )
    for mod in ("img_mod.1", "txt_mod.1"):
        module = f"transformer_blocks.0.{mod}"
        wanted[module] = weight(AWQ_W4A16, 6 * width, width, 7, {})
        tensors |= nunchaku_tensors(module, wanted[module], v1=False)
    save_file(
        tensors, tmp_path / "a.safetensors", {"quantization_config": '{"method": "svdquant"}'}
    )
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert tensors["transformer_blocks.0.attn.to_qkv.qweight"].shape[0] == 3 * (
        256 if width == 192 else 128
    )
    assert checkpoint.family.name == "qwenimage"
    assert checkpoint.modules == sorted(wanted)
    for module, tensor in wanted.items():
        (piece,) = checkpoint.read(module)
        assert piece.shape == tensor.shape
        assert checkpoint.linear_shapes(module) == {
            "weight": tensor.shape,
            "bias": (tensor.shape[0],),
        }
        for name, part in tensor.parts.items():
            if (name, tensor.scheme) != ("bias", AWQ_W4A16):
                assert torch.equal(piece.parts[name].float(), part.float()), f"{module}.{name}"


def test_the_one_in_the_scales_of_a_modulation_layer_is_taken_out(tmp_path: Path) -> None:
    layer = weight(AWQ_W4A16, 6 * 128, 128, 1, {})
    stored = nunchaku_tensors("transformer_blocks.0.img_mod.1", layer, v1=False)
    splits = stored["transformer_blocks.0.img_mod.1.bias"].view(128, 6)
    bias = layer.parts["bias"].view(6, 128)
    for i in range(6):
        assert torch.equal(splits[:, i], (bias[i].float() + (i in (1, 4))).bfloat16()), i


def test_a_fused_layer_that_is_not_whole_is_refused() -> None:
    modules = [f"transformer_blocks.0.attn.{m}" for m in ("to_q", "to_k")]
    with pytest.raises(Unsupported, match=r"attn\.to_v is not quantized"):
        families()["flux1"].nunchaku.stored_layers(modules)


def test_layers_that_are_smoothed_apart_cannot_be_fused() -> None:
    parts = [weight(SVDQUANT_INT4, 128, 128, i, branch(128, seed=i)) for i in range(3)]
    with pytest.raises(ShapeMismatch, match="their smooth differ"):
        fuse_stored_linear(parts)


def test_both_spellings_of_flux_mean_the_same() -> None:
    def targets(*names: str) -> dict[str, list[str]]:
        shapes = {f"single_transformer_blocks.3.{name}.weight": (128, 128) for name in names}
        return {
            name: [piece.source for piece in p]
            for name, p in families()["flux1"].nunchaku.naming(shapes).items()
        }

    v1, v2 = (
        targets("qkv_proj", "mlp_fc2", "out_proj"),
        targets("attn.to_qkv", "mlp_fc2", "attn.to_out"),
    )
    assert v1.keys() == v2.keys()
    out = "single_transformer_blocks.3.proj_out.weight"
    assert [source.split(".")[2] for source in v1[out]] == ["out_proj", "mlp_fc2"]
    assert [source.split(".", 2)[2] for source in v2[out]] == [
        "attn.to_out.weight",
        "mlp_fc2.weight",
    ]


def test_an_input_that_ends_inside_a_group_cannot_be_cut() -> None:
    with pytest.raises(ShapeMismatch, match="cannot be cut to 96"):
        weight(SVDQUANT_INT4, 128, 128, 0, branch(128, 0)).first_columns(96)
