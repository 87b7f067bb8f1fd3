"""Time and memory of a run, as they appear in the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from mezzotint.costs import Percentiles
from mezzotint.quality.compare.runs import ImageRequest, Run


def cost(run: Run, requests: Sequence[ImageRequest]) -> dict[str, Any]:
    """Return times in seconds, as percentiles over images or steps, and memory in bytes."""
    times = [run.stage_times(request) for request in requests]
    return {
        "load_seconds": run.info["load_seconds"],
        "seconds_per_image": _percentiles([image.total for image in times]),
        "seconds_per_step": _percentiles([step for image in times for step in image.steps]),
        "stages": {
            "encode": _percentiles([image.encode for image in times]),
            "denoise": _percentiles([sum(image.steps) for image in times]),
            "decode": _percentiles([image.decode for image in times]),
        },
        "resident_bytes": run.info["resident"]["pipeline_bytes"],
        "activation_bytes": _activations(run.info["memory"]),
        "memory": run.info["memory"],
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return vars(Percentiles.of(values))


def _activations(memory: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the peak memory of generation beyond the loaded weights.

    PyTorch's figure is preferred; the driver's figure is used where PyTorch reports none.
    """
    loaded, generated = memory
    for baseline, peak in (("allocated", "peak_allocated"), ("driver", "driver")):
        if loaded[baseline] is not None and generated[peak] is not None:
            return max(0, int(generated[peak] - loaded[baseline]))
    return None
