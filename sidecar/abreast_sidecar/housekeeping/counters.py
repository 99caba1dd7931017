"""Sums that go on when the counter behind them starts anew. Pure."""

from __future__ import annotations

from collections.abc import Mapping

CounterValues = Mapping[str, int]


def continue_counters(
    base: CounterValues, previous: CounterValues, current: CounterValues, *, is_same_life: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """(base, sums): `base` is what former lives counted, `last` what the last known life had when it was last seen.

    With a new life all that was last seen becomes part of the base.
    """
    if not is_same_life:
        base = {name: base.get(name, 0) + previous.get(name, 0) for name in base.keys() | previous.keys()}
    return dict(base), {
        name: base.get(name, 0) + current.get(name, 0) for name in base.keys() | current.keys()
    }


def was_reset(previous: CounterValues, current: CounterValues) -> bool:
    """A counter only falls when its life is a new one."""
    return any(current.get(name, 0) < value for name, value in previous.items())
