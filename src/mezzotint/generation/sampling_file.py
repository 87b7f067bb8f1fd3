"""A pipeline's `sampling.json`: settings that override those of its family."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.errors import BrokenFile
from mezzotint.generation.pipeline_index import first_fault
from mezzotint.hub import AnyPath
from mezzotint.untrusted.json import read_object

SAMPLING_FILE = "sampling.json"
MIN_SIDE, MAX_SIDE = 16, 8192
"""Limits of a side in pixels, the same as for `--size`."""
MAX_PROMPT = 10_000
"""Limit of a negative prompt in characters, far more than any text encoder reads."""
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE)]
Scale = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


class SamplingFile(BaseModel):
    """The entries: the fields of `families.Sampling`, all optional."""

    model_config = ConfigDict(strict=True, extra="forbid")
    height: Side | None = None
    width: Side | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: Scale | None = None
    guidance_2: Scale | None = None
    true_cfg_scale: Scale | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = None
    flow_shift: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    max_sequence_length: Annotated[int, Field(ge=1, le=4096)] | None = None
    num_frames: Annotated[int, Field(ge=1, le=10_000)] | None = None
    fps: Annotated[int, Field(ge=1, le=240)] | None = None


def read_sampling(file: AnyPath) -> dict[str, int | float | str]:
    """Return the settings in a sampling.json. Raises BrokenFile, which names an invalid entry."""
    try:
        given = SamplingFile.model_validate(read_object(file))
    except ValidationError as error:
        known = ", ".join(SamplingFile.model_fields)
        raise BrokenFile(f"{file}: {first_fault(error)}", f"the entries are {known}.") from error
    settings: dict[str, int | float | str] = given.model_dump(exclude_none=True)
    return settings
