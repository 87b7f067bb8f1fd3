"""Gates: limits that a candidate must meet. The package has three profiles; users write TOML files.

    max_bits_per_weight = 10.0    # resident bits of the quantized layers, including scales
    min_quantized_share = 0.5     # quantized share of the weights of all linear layers
    max_unit_input_scales = 0     # static input scales that are exactly 1, the default value
    max_wrong_weights = 0         # layers with a larger weight error than quantization causes

    [limits.latent_cosine_last]
    min = 0.99                    # limit on the mean over all images; use max for a distance
    max_drift = 0.5               # position on the noise floor, 0 to 1

A limit fails if its metric could not be computed, for example LPIPS without its weights. A limit
with `optional = true` is skipped instead, and the report says so. The profiles use this for metrics
that need optional packages.
"""

import math
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mezzotint.builtin import DATA
from mezzotint.errors import BadRequest
from mezzotint.quality.metrics.image import METRICS
from mezzotint.quality.resident import Resident
from mezzotint.quality.weights import WeightCheck

PROFILES = {path.stem: path for path in sorted((DATA / "gates").glob("*.toml"))}
WEIGHT_LIMITS = (
    "max_bits_per_weight",
    "min_quantized_share",
    "max_unit_input_scales",
    "max_wrong_weights",
)
KINDS = ("min", "max", "max_drift")
FIELDS = f"a gate has {', '.join(WEIGHT_LIMITS)}, all numbers, and tables [limits.METRIC]"
MAX_8_BIT, MAX_4_BIT = 12.0, 7.0
"""Largest resident bits per weight, in the quantized layers, for the default profile of 8-bit and
4-bit candidates. Scales and low-rank branches make both larger than the nominal bits."""


@dataclass(frozen=True)
class Limit:
    """One limit on one metric; `kind` is one of KINDS.

    optional   skip the limit, instead of failing, if the metric cannot be computed
    """

    metric: str
    kind: str
    value: float
    optional: bool = False

    def failure(self, value: float | None, drift: float | None) -> str | None:
        """Return why the limit is exceeded, or None."""
        metric = METRICS[self.metric]
        is_drift = self.kind == "max_drift"
        actual, digits = (drift, 2) if is_drift else (value, metric.digits)
        name = f"{'drift of' if is_drift else 'mean'} {metric.title}"
        if actual is None:
            return f"{name} could not be computed, and the gate requires {self}"
        if (actual < self.value) if self.kind == "min" else (actual > self.value):
            return f"{name} is {actual:.{digits}f}, and the gate requires {self}"
        return None

    def __str__(self) -> str:
        return f"{'at least' if self.kind == 'min' else 'at most'} {self.value:g}"


@dataclass(frozen=True)
class Gate:
    """The limits for a candidate; None means no limit.

    skipped   metrics whose optional limits were skipped, because they could not be computed
    """

    name: str
    limits: tuple[Limit, ...]
    max_bits_per_weight: float | None = None
    min_quantized_share: float | None = None
    max_unit_input_scales: int | None = None
    max_wrong_weights: int | None = None
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def without(self, missing: Collection[str]) -> "Gate":
        """Return the gate without its optional limits on metrics that could not be computed."""
        skipped = [limit for limit in self.limits if limit.optional and limit.metric in missing]
        limits = tuple(limit for limit in self.limits if limit not in skipped)
        return replace(
            self, limits=limits, skipped=tuple(dict.fromkeys(limit.metric for limit in skipped))
        )

    def reasons(
        self,
        metrics: Mapping[str, float | None],
        drift: Mapping[str, float | None],
        resident: Resident,
        weights: WeightCheck | None,
    ) -> Iterator[str]:
        """Yield the reasons why a candidate fails. Yield nothing if it passes."""
        yield from self._resident_reasons(resident)
        if self.max_wrong_weights is not None:
            yield from _wrong_weights(weights, self.max_wrong_weights)
        for limit in self.limits:
            reason = limit.failure(metrics.get(limit.metric), drift.get(limit.metric))
            if reason is not None:
                yield reason

    def _resident_reasons(self, resident: Resident) -> Iterator[str]:
        bits, share = resident.quantized_bits, resident.quantized_share
        if self.max_bits_per_weight is not None and bits > self.max_bits_per_weight:
            yield (
                f"{bits:.1f} bits per weight are resident, "
                f"and the gate allows at most {self.max_bits_per_weight:g}"
            )
        if self.min_quantized_share is not None and share < self.min_quantized_share:
            yield (
                f"{share:.0%} of the linear layers' weights are resident quantized, "
                f"and the gate requires at least {self.min_quantized_share:.0%}"
            )
        ones, max_ones = resident.unit_input_scales, self.max_unit_input_scales
        if max_ones is not None and ones > max_ones:
            yield (
                f"{ones} input scales are exactly 1, the default for a missing scale, "
                f"and the gate allows at most {max_ones}"
            )


def _wrong_weights(weights: WeightCheck | None, limit: int) -> Iterator[str]:
    if weights is None:
        yield (
            "the weights cannot be compared with the reference's, which differ in name or shape, "
            f"and the gate allows at most {limit} wrong weights"
        )
    elif weights.worst is not None and weights.wrong > limit:
        worst = weights.worst
        yield (
            f"{weights.wrong} of {weights.checked} weights differ from the reference's "
            f"by more than quantization error, most of all {worst.module} "
            f"(relative error {worst.error:.2g}, usual up to {worst.usual:g}), "
            f"and the gate allows at most {limit}; `mezzotint diagnose` finds the cause"
        )


def read_gate(source: str) -> Gate:
    """Read a gate by profile name or from a TOML file.

    Raises  BadRequest if the file does not exist or its content is not a gate
    """
    path = PROFILES.get(source, Path(source))
    if not path.is_file():
        raise BadRequest(
            f"--gate is {source!r}, and this file does not exist",
            f"the profiles are: {', '.join(PROFILES)}.",
        )
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: is not TOML: {error}") from error
    limits = tuple(_limits(path, entries.pop("limits", {})))
    resident = {name: entries.pop(name) for name in WEIGHT_LIMITS if name in entries}
    invalid = [*entries, *(name for name, value in resident.items() if not _is_number(value))]
    if invalid:
        raise BadRequest(f"{path}: {invalid[0]}: {FIELDS}")
    if not limits and not resident:
        raise BadRequest(f"{path}: has no limit, so every candidate would pass", f"{FIELDS}.")
    return Gate(path.stem, limits, **resident)


def _is_number(value: object) -> bool:
    """Return whether a TOML value is a usable limit. Booleans and NaN are not."""
    return isinstance(value, float | int) and not isinstance(value, bool) and not math.isnan(value)


def _limits(path: Path, tables: object) -> Iterator[Limit]:
    if not isinstance(tables, dict):
        raise BadRequest(f"{path}: limits = {tables!r}", f"{FIELDS}.")
    for metric, table in tables.items():
        if metric not in METRICS:
            raise BadRequest(
                f"{path}: there is no metric {metric}", f"the metrics are: {', '.join(METRICS)}."
            )
        if not isinstance(table, dict):
            raise BadRequest(
                f"{path}: {metric} = {table!r}",
                f"write a table: [limits.{metric}] with min = ... below it.",
            )
        optional = table.pop("optional", False)
        if not isinstance(optional, bool):
            raise BadRequest(
                f"{path}: {metric}: optional = {optional!r}", "optional is true or false."
            )
        for kind, value in table.items():
            if kind not in KINDS or not _is_number(value):
                raise BadRequest(
                    f"{path}: {metric}: {kind} = {value!r}",
                    f"the limits are numbers: {', '.join(KINDS)}; optional is true or false.",
                )
            yield Limit(metric, kind, float(value), optional)


def profile_for(quantized_bits: float, claims: Sequence[str]) -> str:
    """Return the default profile of a candidate.

    The resident bits decide. A candidate that is resident in BF16 is judged by what it claims to
    be, so that a checkpoint that lost its quantization fails.
    """
    if quantized_bits <= MAX_4_BIT:
        return "w4"
    if quantized_bits <= MAX_8_BIT:
        return "fp8"
    if not claims:
        return "strict"
    return "w4" if any("4" in claim for claim in claims) else "fp8"
