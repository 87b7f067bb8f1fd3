"""A pipeline's own `sampling.json`: settings that stand above those that the model's makers recommend."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.bounded_json import read_object
from mezzotint.errors import BrokenFile
from mezzotint.hub import AnyPath
from mezzotint.pipeline_index import first_fault

SAMPLING_FILE = "sampling.json"
SMALLEST, LARGEST = 16, 8192
"""Pixels of a side, as `--size` takes them."""
Side = Annotated[int, Field(ge=SMALLEST, le=LARGEST)]


class SamplingFile(BaseModel):
    """The entries of the file, all optional; see `families.Sampling`. The bounds are those of the command line."""

    model_config = ConfigDict(strict=True, extra="forbid")
    size: Side | None = None
    width: Side | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    max_sequence_length: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=10_000)] | None = None
    fps: Annotated[int, Field(ge=1, le=240)] | None = None


def read_sampling(file: AnyPath) -> dict[str, int | float]:
    """The settings that are given in a sampling.json. Raises BrokenFile, which names the entry that cannot be."""
    try:
        given = SamplingFile.model_validate(read_object(file))
    except ValidationError as error:
        known = ", ".join(SamplingFile.model_fields)
        raise BrokenFile(f"{file}: {first_fault(error)}", f"the entries are {known}.") from error
    settings: dict[str, int | float] = given.model_dump(exclude_none=True)
    return settings
