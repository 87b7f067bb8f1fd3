"""Mezzotint reads, explains, runs and verifies quantized diffusion transformers.

>>> import mezzotint
>>> pipe = mezzotint.load("demo", transformer="demo-nvfp4")
>>> result = mezzotint.generate(pipe, ["a large red circle on a blue background"])
>>> result.images[0].save("circle.png")
>>> mezzotint.open("demo-nvfp4").report.family
'FLUX.1'

Importing this package also lets diffusers' own `from_pretrained` read ModelOpt exports. PyTorch and
diffusers are imported when a name of this package is first used.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mezzotint._import_hook import on_import
from mezzotint._version import VERSION

if TYPE_CHECKING:
    from mezzotint.checkpoint import Checkpoint as Checkpoint
    from mezzotint.checkpoint import inspect as inspect
    from mezzotint.checkpoint import open as open
    from mezzotint.conversion import ConvertReport as ConvertReport
    from mezzotint.conversion import convert as convert
    from mezzotint.errors import MezzotintError as MezzotintError
    from mezzotint.families import Sampling as Sampling
    from mezzotint.fast import FastTransformer as FastTransformer
    from mezzotint.fast import SpeedReport as SpeedReport
    from mezzotint.fast import speed_up as speed_up
    from mezzotint.generation.cancel import CancelToken as CancelToken
    from mezzotint.generation.generate import generate as generate
    from mezzotint.generation.generate import generate_stream as generate_stream
    from mezzotint.generation.pipeline import LoadedPipeline as LoadedPipeline
    from mezzotint.generation.pipeline import load as load
    from mezzotint.generation.pipeline import load_pipeline as load_pipeline
    from mezzotint.generation.request import Request as Request
    from mezzotint.generation.result import GenerationResult as GenerationResult
    from mezzotint.generation.source import PipelineSource as PipelineSource
    from mezzotint.generation.step_schedule import StepSchedule as StepSchedule
    from mezzotint.inspection import InspectReport as InspectReport
    from mezzotint.loading import LoadReport as LoadReport
    from mezzotint.nn import QuantLinear as QuantLinear
    from mezzotint.nn import use_backend as use_backend
    from mezzotint.quality.compare import Comparison as Comparison
    from mezzotint.quality.compare import compare as compare
    from mezzotint.quality.diagnose import Diagnosis as Diagnosis
    from mezzotint.quality.diagnose import diagnose as diagnose
    from mezzotint.verification import VerifyReport as VerifyReport
    from mezzotint.verification import verify as verify

__version__ = VERSION
_MODULES = {
    "CancelToken": "generation.cancel",
    "Checkpoint": "checkpoint",
    "Comparison": "quality.compare",
    "ConvertReport": "conversion",
    "Diagnosis": "quality.diagnose",
    "GenerationResult": "generation.result",
    "InspectReport": "inspection",
    "FastTransformer": "fast",
    "LoadReport": "loading",
    "LoadedPipeline": "generation.pipeline",
    "MezzotintError": "errors",
    "PipelineSource": "generation.source",
    "QuantLinear": "nn",
    "Request": "generation.request",
    "Sampling": "families",
    "SpeedReport": "fast",
    "StepSchedule": "generation.step_schedule",
    "VerifyReport": "verification",
    "compare": "quality.compare",
    "convert": "conversion",
    "diagnose": "quality.diagnose",
    "generate": "generation.generate",
    "generate_stream": "generation.generate",
    "inspect": "checkpoint",
    "load": "generation.pipeline",
    "load_pipeline": "generation.pipeline",
    "open": "checkpoint",
    "speed_up": "fast",
    "use_backend": "nn",
    "verify": "verification",
}
"""{public name: its module}: the public API. Type checkers read the imports above; a test
compares the two."""
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mezzotint.{_MODULES[name]}"), name)


def _register_with_diffusers(_auto: ModuleType) -> None:
    """Import the quantizer, which registers itself; its own import may have triggered this."""
    importlib.import_module("mezzotint.integrations.diffusers")


on_import("diffusers.quantizers.auto", _register_with_diffusers)
