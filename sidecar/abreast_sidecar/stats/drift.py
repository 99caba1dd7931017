"""Was a difference drift of state? Decided from both versions' first responses and a later recheck. Pure.

It proves little that a difference is gone in the recheck: a version that is wrong in a third of its responses is mostly
right the next time. A difference is drift only if old's side shows that the state moved:

- both responses of the recheck agree in that place, and in status;
- old's response changed in all places of that difference, to the value that new had first: new was ahead by a moment.
  A number may have moved on, if new's first value lies between old's first value and old's later value.

A random failure stays a finding, because old never has the wrong value. An error of new is never drift, nor is a
difference between responses that were not compared in full.

Limitations: a wrong value that old happens to return a moment later counts as drift, such as that of a version that
bypasses a cache and is always ahead. If old answered first and new is behind, the difference stays a finding.
"""

from __future__ import annotations

from typing import Any

import orjson

from abreast_sidecar.compare.json_diff import MAX_DIFFERENCES_PER_PATH
from abreast_sidecar.compare.model import ComparisonResult, Difference
from abreast_sidecar.compare.pair import INTERNAL_SERVER_ERROR, TOO_MANY_REQUESTS, get_status

TRUNCATION_MARK = "…"  # ends a truncated value
COMPARED_OUTCOMES = frozenset({"match", "mismatch"})

Place = tuple[str, str, str]  # part, path, kind


def find_state_drift(
    original: ComparisonResult, old_change: ComparisonResult, recheck: ComparisonResult
) -> list[Place]:
    """Return the differences of `original` that were drift.

    `original` and `recheck` compare old with new, `old_change` compares old's first response with its later one.
    """
    if (
        original.outcome != "mismatch"
        or original.new is None
        or not {recheck.outcome, old_change.outcome} <= COMPARED_OUTCOMES
    ):
        return []
    original_status = get_status(original.new)
    if original_status >= INTERNAL_SERVER_ERROR or original_status == TOO_MANY_REQUESTS:
        return []
    if recheck.old is None or recheck.new is None or get_status(recheck.old) != get_status(recheck.new):
        return []
    remaining = {difference.place for difference in recheck.differences}
    old_changes = {(difference.place, difference.exact_path): difference for difference in old_change.differences}
    groups: dict[Place, list[Difference]] = {}
    for difference in original.differences:
        groups.setdefault(difference.place, []).append(difference)
    return [
        place
        for place, differences in groups.items()
        if place not in remaining
        and place[0] != "error"
        and len(differences) < MAX_DIFFERENCES_PER_PATH
        and all(
            (change := old_changes.get((place, difference.exact_path))) is not None
            and _has_old_caught_up(difference, change)
            for difference in differences
        )
    ]


def _has_old_caught_up(difference: Difference, change: Difference) -> bool:
    """Return True if old's later value equals new's first one, or is a number beyond it in the same direction."""
    if TRUNCATION_MARK in {(difference.new or "")[-1:], (change.new or "")[-1:]}:
        return False
    if difference.new == change.new:
        return True
    old, new, current = (_parse_number(text) for text in (difference.old, difference.new, change.new))
    return old is not None and new is not None and current is not None and (old < new < current or current < new < old)


def _parse_number(text: str | None) -> float | None:
    try:
        value: Any = orjson.loads(text or "null")
    except orjson.JSONDecodeError:
        return None
    return value if type(value) in {int, float} else None
