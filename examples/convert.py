"""Convert a ModelOpt export to a ComfyUI file, and verify the result."""

import sys
from pathlib import Path

import mezzotint

output = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-nvfp4.safetensors")
report = mezzotint.convert("demo-nvfp4", output, to="comfy")
print(report.output, report.transforms or "lossless")
print("exit code", mezzotint.verify(output).exit_code)
