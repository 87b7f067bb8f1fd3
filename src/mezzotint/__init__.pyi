"""The public API: one list, read by type checkers and, at import, by lazy_loader."""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import inspect as inspect
from .checkpoint import open as open
from .checkpoint.file_component import ComponentReport as ComponentReport
from .checkpoint.file_component import inspect_component as inspect_component
from .conversion import ConvertReport as ConvertReport
from .conversion import convert as convert
from .conversion.extraction import ExtractReport as ExtractReport
from .conversion.extraction import extract_component as extract_component
from .errors import MezzotintError as MezzotintError
from .families import Sampling as Sampling
from .fast import FastTransformer as FastTransformer
from .fast import SpeedReport as SpeedReport
from .fast import speed_up as speed_up
from .generation.cancel import CancelToken as CancelToken
from .generation.generate import generate as generate
from .generation.generate import generate_stream as generate_stream
from .generation.pipeline import LoadedPipeline as LoadedPipeline
from .generation.pipeline import load as load
from .generation.pipeline import load_pipeline as load_pipeline
from .generation.request import Request as Request
from .generation.result import GenerationResult as GenerationResult
from .generation.source import PipelineSource as PipelineSource
from .generation.step_schedule import StepSchedule as StepSchedule
from .inspection import InspectReport as InspectReport
from .loading import LoadReport as LoadReport
from .nn import QuantLinear as QuantLinear
from .nn import use_backend as use_backend
from .quality.compare import Comparison as Comparison
from .quality.compare import compare as compare
from .quality.diagnose import Diagnosis as Diagnosis
from .quality.diagnose import diagnose as diagnose
from .verification import VerifyReport as VerifyReport
from .verification import verify as verify

__version__: str
