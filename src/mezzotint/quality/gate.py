"""Limits that a candidate must keep: three profiles that come with the package, and TOML files of the user's.

    max_bits_per_weight = 10.0       # of the quantized layers as they are resident, scales counted
    min_quantized_share = 0.5        # of the weights of all linear layers; the others are kept in BF16
    max_unit_input_scales = 0        # static input scales that are exactly 1: a default, not a calibration
    max_wrong_weights = 0            # layers farther from the reference's weights than rounding takes them

    [limits.latent_cosine_last]
    min = 0.99                       # of the mean over all pictures; max for a distance
    max_drift = 0.5                  # relative to the noise floor: 0 the reference with other kernels, 1 another seed

A limit on a metric that could not be computed here (LPIPS without its weights) fails: a gate is not silently skipped.
One with `optional = true` is then left out, and the report says so: the profiles have it for optional packages.
"""

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mezzotint.builtin import DATA
from mezzotint.errors import BadRequest
from mezzotint.quality.metrics import METRICS
from mezzotint.quality.resident import Resident
from mezzotint.quality.weights import Weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILES = {path.stem: path for path in sorted((DATA / "gates").glob("*.toml"))}
COUNTED = ("max_bits_per_weight", "min_quantized_share", "max_unit_input_scales", "max_wrong_weights")
KINDS = ("min", "max", "max_drift")
NAMES = f"a gate has {', '.join(COUNTED)}, all numbers, and tables [limits.METRIC]"
EIGHT_BITS, FOUR_BITS = 12.0, 7.0
"""Resident bits a weight, of the quantized layers, up to which a candidate is held to the profile of 8 and of 4 bits,
where none is named."""


@dataclass(frozen=True)
class Limit:
    """One bound on one metric; `kind` is one of KINDS.

    optional   left out where the metric cannot be computed; without it, the candidate then fails
    """

    metric: str
    kind: str
    bound: float
    optional: bool = False

    def broken_by(self, value: float | None, drift: float | None) -> str | None:
        """Why the limit is not kept, or None if it is."""
        metric = METRICS[self.metric]
        relative = self.kind == "max_drift"
        found, digits = (drift, 2) if relative else (value, metric.digits)
        what = f"{'drift of' if relative else 'mean'} {metric.title}"
        if found is None:
            return f"{what} could not be computed, and the gate asks for {self}"
        if (found < self.bound) if self.kind == "min" else (found > self.bound):
            return f"{what} is {found:.{digits}f}, and the gate asks for {self}"
        return None

    def __str__(self) -> str:
        return f"{'at least' if self.kind == 'min' else 'at most'} {self.bound:g}"


@dataclass(frozen=True)
class Gate:
    """What a candidate must keep; None for no limit.

    skipped   metrics whose optional limits are left out, because they could not be computed
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
        """Return the gate less its optional limits on metrics that could not be computed."""
        left_out = [limit for limit in self.limits if limit.optional and limit.metric in missing]
        limits = tuple(limit for limit in self.limits if limit not in left_out)
        return replace(self, limits=limits, skipped=tuple(dict.fromkeys(limit.metric for limit in left_out)))

    def reasons(
        self,
        metrics: Mapping[str, float | None],
        drift: Mapping[str, float | None],
        held: Resident,
        weights: Weights | None,
    ) -> Iterator[str]:
        """Why a candidate fails, what is resident first; nothing if it passes."""
        yield from self._not_resident(held)
        if self.max_wrong_weights is not None:
            yield from _wrong_weights(weights, self.max_wrong_weights)
        for limit in self.limits:
            reason = limit.broken_by(metrics.get(limit.metric), drift.get(limit.metric))
            if reason is not None:
                yield reason

    def _not_resident(self, held: Resident) -> Iterator[str]:
        if self.max_bits_per_weight is not None and held.quantized_bits > self.max_bits_per_weight:
            yield (
                f"{held.quantized_bits:.1f} bits a weight are resident, and the gate asks for at most "
                f"{self.max_bits_per_weight:g}"
            )
        if self.min_quantized_share is not None and held.quantized_share < self.min_quantized_share:
            yield (
                f"{held.quantized_share:.0%} of the linear layers' weights are resident quantized, and the gate asks "
                f"for at least {self.min_quantized_share:.0%}"
            )
        if self.max_unit_input_scales is not None and held.unit_input_scales > self.max_unit_input_scales:
            yield (
                f"input scales of exactly 1, the default where one is missing: {held.unit_input_scales}, and the gate "
                f"asks for at most {self.max_unit_input_scales}"
            )


def _wrong_weights(weights: Weights | None, most: int) -> Iterator[str]:
    asked = f"and the gate asks for at most {most} wrong ones"
    if weights is None:
        yield f"the weights cannot be held against the reference's, which have other names or shapes, {asked}"
    elif weights.worst is not None and weights.wrong > most:
        worst = weights.worst
        yield (
            f"{weights.wrong} of {weights.checked} weights are farther from the reference's than rounding takes them, "
            f"the farthest {worst.module} (relative error {worst.error:.2g}, usual up to {worst.usual:g}), {asked}; "
            "`mezzotint diagnose` looks for the cause"
        )


def read_gate(source: str) -> Gate:
    """The gate of a profile's name or a TOML file.

    Raises  BadRequest if there is none, or it says what no gate can
    """
    path = PROFILES.get(source, Path(source))
    if not path.is_file():
        raise BadRequest(
            f"--gate is {source!r}, and no such file is there", f"the profiles are: {', '.join(PROFILES)}."
        )
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: is not TOML: {error}") from error
    limits = tuple(_limits(path, entries.pop("limits", {})))
    resident = {name: entries.pop(name) for name in COUNTED if name in entries}
    wrong = [*entries, *(name for name, value in resident.items() if not _is_number(value))]
    if wrong:
        raise BadRequest(f"{path}: {wrong[0]}: {NAMES}")
    if not limits and not resident:
        raise BadRequest(f"{path}: has no limit, and every candidate would pass", f"{NAMES}.")
    return Gate(path.stem, limits, **resident)


def _is_number(value: object) -> bool:
    """TOML's true and false are none, and against nan nothing could be held."""
    return isinstance(value, float | int) and not isinstance(value, bool) and not math.isnan(value)


def _limits(path: Path, tables: object) -> Iterator[Limit]:
    if not isinstance(tables, dict):
        raise BadRequest(f"{path}: limits = {tables!r}", f"{NAMES}.")
    for metric, bounds in tables.items():
        if metric not in METRICS:
            raise BadRequest(f"{path}: there is no metric {metric}", f"there are: {', '.join(METRICS)}.")
        if not isinstance(bounds, dict):
            raise BadRequest(
                f"{path}: {metric} = {bounds!r}", f"write a table: [limits.{metric}] and min = ... under it."
            )
        optional = bounds.pop("optional", False)
        if not isinstance(optional, bool):
            raise BadRequest(f"{path}: {metric}: optional = {optional!r}", "it is true or false.")
        for kind, bound in bounds.items():
            if kind not in KINDS or not _is_number(bound):
                raise BadRequest(
                    f"{path}: {metric}: {kind} = {bound!r}",
                    f"the limits are numbers: {', '.join(KINDS)}; optional is true or false.",
                )
            yield Limit(metric, kind, float(bound), optional)


def profile_for(quantized_bits: float, claims: Sequence[str]) -> str:
    """The profile of a candidate where none is named: by what it claims to be, or else by what is resident."""
    if quantized_bits <= FOUR_BITS:
        return "w4"
    if quantized_bits <= EIGHT_BITS:
        return "fp8"
    if not claims:
        return "strict"
    return "w4" if any("4" in claim for claim in claims) else "fp8"
