"""Write the recipes from which Mezzotint rebuilds the quantized copies of the built-in model.

    PYTHONPATH=src python -m demo_model.pack_copies FOLDER

FOLDER is the output of demo_model/quantize.py. Each recipe is rebuilt and compared before it is
accepted.
"""

import hashlib
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

import mezzotint_demo
from mezzotint.builtin import QUANTIZED
from mezzotint.builtin.copies import WEIGHTS, CopyRecipe, rebuild

KEPT = ("input_scale", "weight_scale", "weight_scale_2", "comfy_quant")


def pack(folder: Path, name: str) -> None:
    """Write the recipe of one copy.

    Raises  BrokenFile if the copy cannot be rebuilt from its recipe
    """
    single = folder / f"{name}.safetensors"
    file = single if single.exists() else folder / name / WEIGHTS
    content, tensors = file.read_bytes(), load_file(file)
    # NVFP4 block scales can be computed. They are the only weight_scale with more than one value.
    kept = {
        key: value.clone()
        for key, value in tensors.items()
        if key.rpartition(".")[2] in KEPT and (value.ndim < 2 or key.endswith("comfy_quant"))
    }
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = {
        "header": content[8:end].decode(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    if file != single:
        metadata["config"] = (folder / name / "config.json").read_text()
    recipe = mezzotint_demo.COPIES / f"{name}.safetensors"
    save_file(kept, recipe, metadata)
    rebuild(CopyRecipe.read(recipe), mezzotint_demo.PIPELINE / "transformer")
    print(f"{recipe}: {recipe.stat().st_size:,} bytes for {len(content):,}")


if __name__ == "__main__":
    for copy in QUANTIZED:
        pack(Path(sys.argv[1]), copy)
