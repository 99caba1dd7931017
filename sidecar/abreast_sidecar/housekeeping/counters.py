"""Sums that go on when the counter behind them starts anew. Pure."""

from __future__ import annotations

from collections.abc import Mapping

Counts = Mapping[str, int]


def carried_on(
    base: Counts, last: Counts, now: Counts, *, same_life: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """(base, sums): `base` is what former lives counted, `last` what the last known life had when it was last seen.

    With a new life all that was last seen becomes part of the base.
    """
    if not same_life:
        base = {name: base.get(name, 0) + last.get(name, 0) for name in base.keys() | last.keys()}
    return dict(base), {name: base.get(name, 0) + now.get(name, 0) for name in base.keys() | now.keys()}


def fell(last: Counts, now: Counts) -> bool:
    """A counter only falls when its life is a new one."""
    return any(now.get(name, 0) < value for name, value in last.items())
