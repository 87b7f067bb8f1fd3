"""Golden files of quantization tools: a tiny FLUX.1 and single layers, each with the tool's values.

The generator of a tool, tests/data/TOOL/make.py, quantizes with the tool itself and calls `write`.
Tests read what it wrote, without the tool.

layers/              tensors of single layers, LAYER.weight and what the tool stores beside it
layers.json          {LAYER: [dtype, SHA-256]} of the matrix that the tool itself decodes
model/               a diffusers folder with the linears of all blocks quantized
model.json           {module: [dtype, SHA-256]}, likewise
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint.checkpoint import Checkpoint
from mezzotint.families.building import build_meta_model
from mezzotint.formats import StoredLinear, detect_format, read_header
from mezzotint.loading import Placement, load, plan

BATCH = 100
"""Random matrices that are written to one file."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY_FLUX = {
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "in_channels": 16,
    "joint_attention_dim": 32,
    "num_attention_heads": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "pooled_projection_dim": 16,
}


@dataclass(frozen=True)
class ToolLayer:
    """What a tool makes of one matrix.

    tensors   {suffix behind the layer's name, such as "weight": stored tensor}
    truth     the matrix that the tool decodes, in the tool's dtype
    entries   {suffix behind the layer's name: entry in the metadata of the file}
    """

    tensors: Mapping[str, Tensor]
    truth: Tensor
    entries: Mapping[str, str] = field(default_factory=dict)


Quantize = Callable[[Tensor], ToolLayer]
Entries = dict[str, str]


@dataclass(frozen=True)
class ToolFile:
    """What a tool writes around its tensors.

    quantization          quantization_config of the model's config.json, or None
    layers_quantization   that of the single layers
    metadata              {weight: entry} of all layers -> metadata of the file, or None
    """

    quantization: Mapping[str, Any] | None = None
    layers_quantization: Mapping[str, Any] | None = None
    metadata: Callable[[Entries], Entries] | None = None

    def metadata_of(self, layers: Mapping[str, ToolLayer]) -> Entries | None:
        """Return the metadata of a file with these layers."""
        entries = {
            f"{name}.{suffix}": text
            for name, layer in layers.items()
            for suffix, text in layer.entries.items()
        }
        return None if self.metadata is None else self.metadata(entries)


def tiny_flux(seed: int = 0, **changes: Any) -> nn.Module:
    """Return a FLUX.1 of 32 columns with random weights, in BF16."""
    torch.manual_seed(seed)
    return diffusers.FluxTransformer2DModel(**TINY_FLUX | changes).bfloat16()


def block_linears(model: nn.Module) -> dict[str, Tensor]:
    """Return {module: weight} of the linears in the blocks."""
    return {
        name: layer.weight.detach()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "blocks." in name
    }


def with_layers(model: nn.Module, layers: Mapping[str, ToolLayer]) -> dict[str, Tensor]:
    """Return the model's tensors, with the weights of some linears as a tool stores them."""
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    for module, layer in layers.items():
        del stored[f"{module}.weight"]
        stored |= {f"{module}.{suffix}": value for suffix, value in layer.tensors.items()}
    return {name: value.contiguous() for name, value in stored.items()}


def save_model(
    folder: Path,
    model: nn.Module,
    layers: Mapping[str, ToolLayer],
    quantization: Mapping[str, Any] | None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a diffusers folder. `quantization` is its quantization_config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(with_layers(model, layers), folder / WEIGHTS, metadata)
    config = json.loads(model.to_json_string())
    config |= {} if quantization is None else {"quantization_config": dict(quantization)}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return folder


def fingerprint(matrix: Tensor) -> list[str]:
    """Return the dtype and the SHA-256 of a matrix whose zeros have no sign."""
    raw = (matrix + 0.0).contiguous().view(torch.uint8).numpy().tobytes()
    return [str(matrix.dtype).removeprefix("torch."), hashlib.sha256(raw).hexdigest()]


def write(
    folder: Path, layers: Mapping[str, ToolLayer], quantize: Quantize, around: ToolFile
) -> None:
    """Write the golden files of a tool: `layers`, and a model whose layers are `quantize`d."""
    _save_layers(folder / "layers", layers, around)
    _write_prints(folder / "layers.json", layers)
    model = tiny_flux()
    quantized = {name: quantize(weight) for name, weight in block_linears(model).items()}
    metadata = around.metadata_of(quantized)
    save_model(folder / "model", model, quantized, around.quantization, metadata)
    _write_prints(folder / "model.json", quantized)


def _save_layers(folder: Path, layers: Mapping[str, ToolLayer], around: ToolFile) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{name}.{suffix}": value.contiguous()
        for name, layer in layers.items()
        for suffix, value in layer.tensors.items()
    }
    save_file(tensors, folder / WEIGHTS, around.metadata_of(layers))
    if around.layers_quantization is not None:
        declared = {"quantization_config": around.layers_quantization}
        text = json.dumps(declared, indent=1, sort_keys=True)
        (folder / "config.json").write_text(text + "\n")


def _write_prints(file: Path, layers: Mapping[str, ToolLayer]) -> None:
    prints = {name: fingerprint(layer.truth) for name, layer in sorted(layers.items())}
    file.write_text(json.dumps(prints, indent=1) + "\n")


def assert_fingerprints(file: Path, found: Mapping[str, Tensor]) -> None:
    """Check that float32 matrices have the tool's bits, in the tool's dtype."""
    prints = json.loads(file.read_text())
    assert found.keys() == prints.keys()
    for name, (dtype, digest) in prints.items():
        assert fingerprint(found[name].to(getattr(torch, dtype))) == [dtype, digest], name


def decode(linear: StoredLinear, header: Any) -> Tensor:
    """Return a layer's weights, float32 [out, in]."""
    linear.check(header)
    weight = linear.to_plain(linear.read(header))
    return weight.scheme.dequantize(weight.parts)


def decoded_layers(path: Path, tensor: str = "") -> dict[str, Tensor]:
    """Return {layer: weights} of a file or folder, whatever model it belongs to.

    tensor   name of a stored tensor, to decode only the layer that it belongs to; "" for all
    """
    header = read_header(path)
    linears = detect_format(header).format.contents(header).linears
    return {
        name: decode(linear, header)
        for name, linear in linears.items()
        if not tensor or tensor.startswith(f"{name}.")
    }


def rewrite(file: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file again with other tensors and the metadata that it had."""
    save_file(tensors, file, dict(metadata) or None)


def loaded_model(path: Path, activations: str = "bf16") -> nn.Module:
    """Return the model of a diffusers folder, loaded in float32."""
    checkpoint = Checkpoint.open(path)
    config = checkpoint.header.config
    model = build_meta_model(config["_class_name"], config)
    load(plan(checkpoint, model, activations), model, Placement(torch.device("cpu")), torch.float32)
    return model


def flux_inputs() -> dict[str, Tensor]:
    """Return inputs of `tiny_flux`."""
    random = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    ids = torch.zeros(4, 3)
    ids[:, 1], ids[:, 2] = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    return {
        "hidden_states": noise(1, 4, 16),
        "encoder_hidden_states": noise(1, 3, 32),
        "pooled_projections": noise(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(3, 3),
    }


def dequantized_model(checkpoint: Checkpoint) -> nn.Module:
    """Return an ordinary model with the checkpoint's decoded weights, in float32."""
    model = diffusers.FluxTransformer2DModel.from_config(checkpoint.header.config).float()
    weights = {name: checkpoint.tensor(name) for name in checkpoint.plain}
    for module in checkpoint.modules:
        weights[f"{module}.weight"] = checkpoint.weight(module)
        if (bias := checkpoint.bias(module)) is not None:
            weights[f"{module}.bias"] = bias
    model.load_state_dict(weights)
    return model


def assert_same_outputs(first: nn.Module, second: nn.Module, tolerance: float = 1e-5) -> None:
    """Check that two models agree on `flux_inputs`, in the Frobenius norm."""
    with torch.no_grad():
        ours, theirs = (model(**flux_inputs(), return_dict=False)[0] for model in (first, second))
    assert torch.linalg.norm(ours - theirs) <= tolerance * torch.linalg.norm(theirs)


def random_matrices(count: int, multiple: int = 2, seed: int = 0) -> Iterator[Tensor]:
    """Yield matrices of random size and spread; some have rows of zeros and outliers.

    multiple   of the number of columns
    """
    random = torch.Generator().manual_seed(seed)
    for number in range(count):
        rows = int(torch.randint(1, 40, (), generator=random))
        columns = multiple * int(
            torch.randint(1, 150 // min(multiple, 75) + 1, (), generator=random)
        )
        matrix = torch.randn(rows, columns, generator=random)
        if number % 5 == 1 and rows > 1:  # A matrix of zeros alone has no scale.
            matrix[int(torch.randint(rows, (), generator=random))] = 0
        if number % 5 == 2:
            matrix[0, 0] = 1e4
        if number % 5 == 3:
            matrix *= torch.logspace(-6, 4, rows)[:, None]
        if number % 5 == 4:
            matrix *= 10.0 ** int(torch.randint(-8, 5, (), generator=random))
        yield matrix


def compare(
    variants: Mapping[str, Quantize], count: int, multiple: int, around: ToolFile
) -> dict[str, int]:
    """Return {variant: matrices of `count` that we do not decode to the tool's bits}."""
    differing = dict.fromkeys(variants, 0)
    with tempfile.TemporaryDirectory() as folder:
        for name, quantize in variants.items():
            matrices = enumerate(random_matrices(count, multiple))
            while batch := dict(islice(matrices, BATCH)):
                layers = {f"layer{number}": quantize(matrix) for number, matrix in batch.items()}
                _save_layers(Path(folder), layers, around)
                ours = decoded_layers(Path(folder))
                differing[name] += sum(_differs(ours[n], each.truth) for n, each in layers.items())
            print(name, differing[name], flush=True)
    return differing


def _differs(ours: Tensor, truth: Tensor) -> bool:
    # torchao turns rows of zeros into NaN in FP8.
    rounded = ours.to(truth.dtype)
    return not bool(((rounded == truth) | (rounded.isnan() & truth.isnan())).all())


def run(
    folder: Path,
    layers: Callable[[], Mapping[str, ToolLayer]],
    quantize: Quantize,
    variants: Mapping[str, Quantize],
    around: ToolFile,
    multiple: int = 2,
) -> None:
    """Write the golden files, or with `--compare N` decode N random matrices of each variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--compare", type=int, metavar="N")
    number = parser.parse_args().compare
    if number:
        print(compare(variants, number, multiple, around))
    else:
        write(folder, layers(), quantize, around)
