"""Flow shift: how far a scheduler moves its sigmas towards noise.

Source: https://arxiv.org/abs/2403.03206, section 5.3.2.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from mezzotint.errors import BadRequest

ENTRIES = ("flow_shift", "shift")
"""Names of the setting in configurations of diffusers' schedulers (UniPC, FlowMatchEuler)."""
HINT = "leave out flow_shift (--flow-shift)."


def flow_shift_entry(scheduler: type[Any], config: Mapping[str, Any]) -> str:
    """Return the configuration entry that holds a scheduler's flow shift.

    Raises  BadRequest if the scheduler has none, or would ignore it
    """
    parameters = inspect.signature(scheduler.__init__).parameters
    entry = next((entry for entry in ENTRIES if entry in parameters), None)
    if entry is None or (entry == "flow_shift" and not config.get("use_flow_sigmas")):
        raise BadRequest(f"{scheduler.__name__} has no flow shift", HINT)
    if config.get("use_dynamic_shifting"):
        raise BadRequest(
            f"{scheduler.__name__} computes its flow shift from the size of the image", HINT
        )
    return entry


def with_flow_shift(pipe: DiffusionPipeline, flow_shift: float | None) -> DiffusionPipeline:
    """Return the pipeline, or a shallow copy with this flow shift. Raises BadRequest.

    The copy leaves the scheduler of the pipeline unchanged for other requests and threads.
    """
    if flow_shift is None:
        return pipe
    scheduler = pipe.scheduler
    entry = flow_shift_entry(type(scheduler), scheduler.config)
    shifted = copy.copy(pipe)
    shifted.scheduler = type(scheduler).from_config(scheduler.config, **{entry: flow_shift})
    return shifted
