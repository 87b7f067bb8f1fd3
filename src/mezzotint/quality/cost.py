"""What a run cost, as a report says it: seconds of its pictures, steps and stages, and memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from mezzotint.costs import Spread
from mezzotint.quality.runs import Run, Shot


def cost(run: Run, shots: Sequence[Shot]) -> dict[str, Any]:
    """What a run cost; times are spreads over the pictures or steps, the first picture of each session left out."""
    laps = [run.laps(shot) for shot in shots]
    return {
        "load_seconds": run.facts["load_seconds"],
        "seconds_per_picture": _spread([lap.total for lap in laps]),
        "seconds_per_step": _spread([step for lap in laps for step in lap.steps]),
        "stages": {
            "encode": _spread([lap.encode for lap in laps]),
            "denoise": _spread([sum(lap.steps) for lap in laps]),
            "decode": _spread([lap.decode for lap in laps]),
        },
        "resident_bytes": run.facts["resident"]["pipeline_bytes"],
        "activation_bytes": _activations(run.facts["memory"]),
        "memory": run.facts["memory"],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return vars(Spread.of(values))


def _activations(memory: Sequence[Mapping[str, Any]]) -> int | None:
    """The largest that painting needed beyond what was loaded, by PyTorch's count or else the driver's."""
    loaded, painted = memory
    for before, after in (("allocated", "peak_allocated"), ("driver", "driver")):
        if loaded[before] is not None and painted[after] is not None:
            return max(0, int(painted[after] - loaded[before]))
    return None
