"""Write GGUF files with gguf-py 0.19, and what it decodes and encodes.

PYTHONPATH=src:tests python tests/data/gguf/make.py    (needs `pip install gguf==0.19`)

blocks.safetensors   random blocks of each type and their numbers; matrices and their blocks
wan.gguf             a tiny Wan as ComfyUI-GGUF's convert.py and fix_5d_tensors.py leave it: 1-D
                     and small tensors, modulations and the 5-D patch embedding in F32
field.gguf           the file of the field case "gguf_wan"
truth.json           {file: {tensor: SHA-256 of its numbers as float32, row by row}}
"""

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.numpy import save_file

from support.modelopt_exporter import in_original_names
from support.original_names import TO_ORIGINAL

HERE = Path(__file__).parent
Types = gguf.GGMLQuantizationType
READ = [
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
]
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Where the float16 scales of a block begin; in others at 0, and at 2 the minimum."""
HAS_MINIMUM = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
ENCODED = READ[:5]
SMALL = 1024
"""Elements of tensors that stay in F32."""


def random_blocks(name: str, rows: int, columns: int, chance: np.random.Generator) -> np.ndarray:
    """Return random blocks, uint8 [rows, bytes of a row], whose scales are small and finite."""
    elements, size = gguf.GGML_QUANT_SIZES[Types[name]]
    blocks = chance.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
    for start in SCALES.get(name, (0, 2) if name in HAS_MINIMUM else (0,)):
        scales = chance.uniform(0.0001, 0.001, blocks.shape[:2]).astype(np.float16)
        blocks[..., start : start + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def extreme_weights(chance: np.random.Generator) -> np.ndarray:
    """Return [8, 96]: rows of usual, tiny, huge, zero, equal and tied numbers, and one outlier."""
    weights = chance.standard_normal((8, 96)).astype(np.float32)
    weights[1] *= 1e-6
    weights[2] *= 3e4
    weights[3] = 0
    weights[4] = weights[4, 0]
    weights[5] = np.round(weights[5] * 2) / 2
    weights[6, ::2] = -weights[6, 1::2]
    weights[7, 40] = 100
    return weights


def make_blocks(chance: np.random.Generator) -> None:
    tensors = {}
    for name in READ:
        elements, size = gguf.GGML_QUANT_SIZES[Types[name]]
        blocks = chance.integers(0, 256, (3, 2 * size if elements == 32 else size), dtype=np.uint8)
        tensors[f"{name}.random"] = np.concatenate(
            [random_blocks(name, 3, blocks.shape[1] // size * elements, chance), blocks]
        )
        numbers = gguf.quants.dequantize(tensors[f"{name}.random"], Types[name])
        # NaN has many bit patterns, so that it is marked by one.
        tensors[f"{name}.decoded"] = np.where(np.isnan(numbers), np.float32(np.nan), numbers)
    weights = extreme_weights(chance)
    tensors["weights"] = weights
    for name in ENCODED:
        tensors[f"{name}.encoded"] = gguf.quants.quantize(weights, Types[name])
    save_file(tensors, HERE / "blocks.safetensors")


def tiny_wan() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=256,
        num_layers=2,
    )
    named = in_original_names(model.state_dict(), TO_ORIGINAL["wan2.2"])
    return {name: value.numpy() for name, value in named.items()}


def make_wan(chance: np.random.Generator) -> None:
    writer = gguf.GGUFWriter(HERE / "wan.gguf", "wan")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_float32("test.number", 0.5)
    writer.add_bool("test.flag", True)
    small, large = READ[:5] + READ[10:11], READ[5:10] + READ[11:]
    for number, (name, weight) in enumerate(tiny_wan().items()):
        in_block = name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2
        if in_block and weight.size > SMALL // 2:
            kinds = large if weight.shape[1] % 256 == 0 else small
            kind = kinds[number % len(kinds)]
            blocks = (
                gguf.quants.quantize(weight, Types[kind])
                if kind in ENCODED
                else random_blocks(kind, *weight.shape, chance)
            )
            writer.add_tensor(name, blocks, raw_dtype=Types[kind])
        elif weight.ndim == 2 and weight.size > SMALL:
            blocks = gguf.quants.quantize(weight, Types.BF16)
            writer.add_tensor(name, blocks, raw_dtype=Types.BF16)
        else:
            writer.add_tensor(name, weight)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_field(chance: np.random.Generator) -> None:
    """Write the file of shared/field/gguf_wan/make.py."""
    writer = gguf.GGUFWriter(HERE / "field.gguf", "wan")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    layers = {"self_attn.q": "Q8_0", "self_attn.k": "Q4_0", "ffn.0": "Q5_1"}
    for layer, kind in layers.items():
        weight = chance.standard_normal((64, 64)).astype(np.float32)
        blocks = gguf.quants.quantize(weight, Types[kind])
        writer.add_tensor(f"blocks.0.{layer}.weight", blocks, raw_dtype=Types[kind])
    modulation = chance.standard_normal((1, 6, 64)).astype(np.float16)
    writer.add_tensor("blocks.0.modulation", modulation)
    finish(writer)


def truth(file: Path) -> dict[str, str]:
    return {
        tensor.name: hashlib.sha256(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("<f4").tobytes()
        ).hexdigest()
        for tensor in gguf.GGUFReader(file).tensors
    }


def main() -> None:
    make_blocks(np.random.default_rng(1))
    make_wan(np.random.default_rng(2))
    make_field(np.random.default_rng(0))
    files = [HERE / "wan.gguf", HERE / "field.gguf"]
    text = json.dumps({file.name: truth(file) for file in files}, indent=1)
    (HERE / "truth.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
