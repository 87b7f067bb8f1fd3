"""Generate one image in 4 bits, and show how each layer runs."""

import sys

import mezzotint

pipe = mezzotint.load("demo", transformer="demo-nvfp4", device="cpu")
print(pipe.load_report)
result = mezzotint.generate(pipe, ["a large red circle on a blue background"], seeds=[0])
result.images[0].save(sys.argv[1] if len(sys.argv) > 1 else "circle.png")
