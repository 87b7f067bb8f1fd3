"""Mezzotint reads, explains, runs and verifies quantized diffusion transformers.

>>> import mezzotint
>>> pipe = mezzotint.load("demo", transformer="demo-nvfp4")
>>> result = mezzotint.generate(pipe, ["a large red circle on a blue background"])
>>> result.images[0].save("circle.png")
>>> mezzotint.open("demo-nvfp4").report.family
'FLUX.1'

Importing this package also lets diffusers' own `from_pretrained` read ModelOpt exports. PyTorch and
diffusers are imported when a name of this package is first used. `__init__.pyi` lists the names.
"""

import importlib
from types import ModuleType

import lazy_loader

from mezzotint._import_hook import on_import
from mezzotint._version import VERSION

__version__ = VERSION
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register_with_diffusers(_auto: ModuleType) -> None:
    """Import the quantizer, which registers itself; its own import may have triggered this."""
    importlib.import_module("mezzotint.integrations.diffusers")


on_import("diffusers.quantizers.auto", _register_with_diffusers)
