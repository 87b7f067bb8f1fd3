"""The passes of `speed_up`, one file each. A file is found by its attribute PASS."""

from collections.abc import Sequence
from functools import cache
from graphlib import TopologicalSorter

from mezzotint.discover import collect
from mezzotint.fast.fast_pass import Pass


@cache
def ordered_passes() -> Sequence[Pass]:
    """Return all passes, each one after those that it names in `after`. Raises CycleError.

    Passes that do not depend on each other run in the order of their names.
    """
    passes = collect(__name__, "PASS")
    order = TopologicalSorter({name: sorted(made.after) for name, made in passes.items()})
    return [passes[name] for name in order.static_order()]
