"""Arguments of a pipeline call, and clear errors for settings that the pipeline would ignore."""

import inspect
from collections.abc import Mapping
from typing import Any

from mezzotint.errors import BadRequest
from mezzotint.families import Family, Sampling

PARAMETERS = {
    "negative_prompt": "negative_prompt",
    "true_cfg_scale": "true_cfg_scale",
    "guidance_2": "guidance_scale_2",
}
"""{field of Sampling: parameter of a diffusers pipeline}"""
HINTS = {
    "negative_prompt": "leave out negative_prompt (--negative-prompt).",
    "true_cfg_scale": "leave out true_cfg_scale (--true-cfg).",
    "guidance_2": "leave out guidance_2 (--guidance-2).",
}
"""{field of Sampling: hint}; the field may come from the API, sampling.json or the option"""
GUIDANCE_THRESHOLDS = {"ZImagePipeline": 0.0}
"""{pipeline: guidance above which it uses the negative prompt}; others compare with 1."""


def call_arguments(
    pipeline: type[Any], config: Mapping[str, Any], family: Family, sampling: Sampling
) -> dict[str, Any]:
    """Return the settings as keyword arguments for one prompt.

    pipeline   diffusers class
    config     of the pipeline, or the entries of its model_index.json
    Raises     BadRequest for a setting that the pipeline does not take or would ignore
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    for field, parameter in PARAMETERS.items():
        if getattr(sampling, field) is not None and parameter not in parameters:
            raise BadRequest(f"{pipeline.__name__} takes no {parameter}", HINTS[field])
    if sampling.guidance_2 is not None and config.get("boundary_ratio") is None:
        raise BadRequest(
            "guidance_2 is for a second transformer, and this pipeline has only one",
            HINTS["guidance_2"],
        )
    arguments = family.pipeline_arguments(sampling, 1) | _guidance_arguments(sampling)
    _check_negative_prompt(pipeline.__name__, arguments, sampling)
    if "max_area" in parameters:
        # FluxKontextPipeline resizes to max_area, which is 1024 x 1024 unless it is passed.
        arguments["max_area"] = arguments["height"] * arguments["width"]
    return arguments


def _guidance_arguments(sampling: Sampling) -> dict[str, Any]:
    arguments = {
        parameter: getattr(sampling, field)
        for field, parameter in PARAMETERS.items()
        if getattr(sampling, field) is not None
    }
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]]
    elif "true_cfg_scale" in arguments:
        # Flux ignores true_cfg_scale without a negative prompt; Qwen-Image's own is " ".
        arguments["negative_prompt"] = [" "]
    return arguments


def _check_negative_prompt(pipeline: str, arguments: Mapping[str, Any], sampling: Sampling) -> None:
    """Raise BadRequest for a negative prompt that the guidance is too low to use."""
    if sampling.negative_prompt is None:
        return
    # Flux has an embedded guidance_scale as well, which does not use the negative prompt.
    is_true_cfg = "true_cfg_scale" in arguments or pipeline.startswith("Flux")
    name, default = ("true_cfg_scale", 1.0) if is_true_cfg else ("guidance_scale", 0.0)
    scale, threshold = arguments.get(name, default), GUIDANCE_THRESHOLDS.get(pipeline, 1.0)
    if scale <= threshold:
        setting = "true_cfg_scale (--true-cfg)" if is_true_cfg else "guidance (--guidance)"
        raise BadRequest(
            f"{pipeline} ignores the negative prompt, because its {name} is {scale:g}",
            f"give {setting} a value above {threshold:g}, or {HINTS['negative_prompt']}",
        )
