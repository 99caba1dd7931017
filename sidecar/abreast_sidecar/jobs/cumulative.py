"""Cumulative counters of sources that start again from 0: Envoy processes, Redis shards."""

from __future__ import annotations

from collections.abc import Mapping

CounterValues = Mapping[str, int]


def continue_counters(
    base: CounterValues, previous: CounterValues, current: CounterValues, *, is_same_life: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the new base and the totals.

    `base` has the counts of former lives, and `previous` the last reading. In a new life, the last reading joins the base.
    """
    if not is_same_life:
        base = {name: base.get(name, 0) + previous.get(name, 0) for name in base.keys() | previous.keys()}
    return dict(base), {name: base.get(name, 0) + current.get(name, 0) for name in base.keys() | current.keys()}


def was_reset(previous: CounterValues, current: CounterValues) -> bool:
    """Check whether a counter is less than before: then this is a new life."""
    return any(current.get(name, 0) < value for name, value in previous.items())
