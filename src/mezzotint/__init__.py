"""Mezzotint: quantized diffusion transformers, recognised, explained, run, and proved against BF16.

>>> import mezzotint
>>> pipe = mezzotint.load("demo", transformer="demo-nvfp4")
>>> mezzotint.paint(pipe, ["a large red circle on a blue background"]).images[0].save("circle.png")
>>> mezzotint.open("demo-nvfp4").report.family
'FLUX.1'

Importing this package also lets diffusers' own `from_pretrained` read ModelOpt exports. Nothing heavy is imported until
something here is used.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mezzotint._import_hook import when_imported
from mezzotint._version import VERSION

if TYPE_CHECKING:
    from mezzotint.checkpoint import Checkpoint, inspect, open
    from mezzotint.converting import ConvertReport, convert
    from mezzotint.errors import MezzotintError
    from mezzotint.inspection import Report
    from mezzotint.loading import LoadReport
    from mezzotint.nn import QuantLinear, use_backend
    from mezzotint.painting import paint
    from mezzotint.pipelines import load
    from mezzotint.quality.comparison import compare
    from mezzotint.quality.diagnosis import diagnose
    from mezzotint.schedule import StepSchedule
    from mezzotint.speed import SpeedReport, speed_up
    from mezzotint.verifying import VerifyReport, verify

__version__ = VERSION
__all__ = [
    "Checkpoint",
    "ConvertReport",
    "LoadReport",
    "MezzotintError",
    "QuantLinear",
    "Report",
    "SpeedReport",
    "StepSchedule",
    "VerifyReport",
    "compare",
    "convert",
    "diagnose",
    "inspect",
    "load",
    "open",
    "paint",
    "speed_up",
    "use_backend",
    "verify",
]

_HOME = {
    "Checkpoint": "checkpoint",
    "ConvertReport": "converting",
    "LoadReport": "loading",
    "MezzotintError": "errors",
    "QuantLinear": "nn",
    "Report": "inspection",
    "SpeedReport": "speed",
    "StepSchedule": "schedule",
    "VerifyReport": "verifying",
    "compare": "quality.comparison",
    "convert": "converting",
    "diagnose": "quality.diagnosis",
    "inspect": "checkpoint",
    "load": "pipelines",
    "open": "checkpoint",
    "paint": "painting",
    "speed_up": "speed",
    "use_backend": "nn",
    "verify": "verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mezzotint.{_HOME[name]}"), name)


def _join_diffusers(_auto: ModuleType) -> None:
    """Import the quantizer, which registers itself: it may be its own import that has led here."""
    importlib.import_module("mezzotint.diffusers_quantizer")


when_imported("diffusers.quantizers.auto", _join_diffusers)
