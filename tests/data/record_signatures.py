#!/usr/bin/env python3
"""Write the signatures of the library functions that backends call: tests/data/signatures.json.

This development tool reads the libraries' sources, because importing them needs a GPU:

    pip download --no-deps humming-kernels flashinfer-python, and unpack each wheel into a folder
    python tests/data/record_signatures.py humming-kernels=FOLDER \\
        flashinfer-python=FOLDER nunchaku=FOLDER

A folder without a dist-info (Nunchaku's repository) needs its version: nunchaku=FOLDER@1.2.0.
Each function is recorded as the text between the parentheses of its definition.
"""

import ast
import json
import sys
from pathlib import Path

RECORD = Path(__file__).resolve().parent / "signatures.json"
FUNCTIONS = {
    "flashinfer-python": {
        "flashinfer.nvfp4_quantize": "flashinfer/quantization/fp4_quantization.py",
        "flashinfer.mm_fp4": "flashinfer/gemm/gemm_base.py",
        "flashinfer.svdquant_linear": "flashinfer/gemm/gemm_svdquant.py",
    },
    "humming-kernels": {
        "humming.transform.prepare_layer_config": "humming/transform.py",
        "humming.transform.transform_humming_tensors": "humming/transform.py",
        "humming.ops.humming_gemm": "humming/ops/gemm.py",
    },
    "nunchaku": {
        "nunchaku.ops.quantize.svdq_quantize_w4a4_act_fuse_lora_cuda": "nunchaku/ops/quantize.py",
        "nunchaku.ops.gemm.svdq_gemm_w4a4_cuda": "nunchaku/ops/gemm.py",
    },
}
"""{distribution: {what we import: the file that defines it}}"""


def signature(source: Path, name: str) -> str:
    """Return the parameters of a top-level function, without types, with defaults as `...`."""
    (found,) = [
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    arguments = found.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(...) for default in arguments.kw_defaults]
    return ast.unparse(arguments)


def version(folder: Path) -> str:
    (metadata,) = folder.glob("*.dist-info/METADATA")
    return next(
        line.split()[1] for line in metadata.read_text().splitlines() if line.startswith("Version:")
    )


def record(distribution: str, folder: Path, stated: str) -> dict[str, object]:
    functions = {
        path: signature(folder / file, path.rpartition(".")[2])
        for path, file in FUNCTIONS[distribution].items()
    }
    return {"version": stated or version(folder), "functions": functions}


if __name__ == "__main__":
    results = {}
    for argument in sorted(sys.argv[1:]):
        distribution, _, place = argument.partition("=")
        folder, _, stated = place.partition("@")
        results[distribution] = record(distribution, Path(folder), stated)
    RECORD.write_text(json.dumps(results, indent=1) + "\n")
