"""Was a difference drift of state? Told from both versions' answers then and a little later. Pure.

That a difference is gone when both are asked again says little: a version that is wrong in a third of its answers mostly
isn't the next time. So a difference is drift only where the state is seen to have moved, on old's side:

- both answers now agree in that place, in status too;
- old's answer has changed in all places of that difference, and to what new said then: new was ahead by a moment. A number
  may have gone on, if what new said lies between what old said then and what it says now.

A random failure stays a finding: its wrong value is no value of old's, then or now. An error of new is never drift, nor is
anything of which not all was compared. What it can't tell: a wrong answer that happens to be what old says a moment
later, as with a version that reads past a cache and is always ahead. New behind old (it answered first) stays a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from abreast_sidecar.compare.json_diff import MAX_DIFFERENCES_PER_PATH
from abreast_sidecar.compare.model import ComparisonResult, Difference
from abreast_sidecar.compare.pair import INTERNAL_SERVER_ERROR, TOO_MANY_REQUESTS, get_status

TRUNCATION_MARK = "…"  # ends a value of which only the beginning is known
COMPARED_OUTCOMES = frozenset({"match", "mismatch"})

DifferenceKey = tuple[str, str, str]  # part, path, kind


def find_state_drift(
    original: ComparisonResult, old_change: ComparisonResult, recheck: ComparisonResult
) -> list[DifferenceKey]:
    """Of `then` (old against new), what was drift. `moved`: old then against old now; `now`: both now."""
    if (
        not _is_recheckable(original)
        or recheck.outcome not in COMPARED_OUTCOMES
        or old_change.outcome not in COMPARED_OUTCOMES
    ):
        return []
    if recheck.old is None or recheck.new is None or get_status(recheck.old) != get_status(recheck.new):
        return []
    remaining = {_make_key(difference) for difference in recheck.differences}
    old_changes = {(_make_key(difference), difference.exact_path): difference for difference in old_change.differences}
    return [
        key
        for key, differences in _group_by_key(original.differences).items()
        if key not in remaining
        and key[0] != "error"
        and len(differences) < MAX_DIFFERENCES_PER_PATH
        and _all_changed_in_old(differences, old_changes)
    ]


def _is_recheckable(original: ComparisonResult) -> bool:
    return original.outcome == "mismatch" and original.new is not None and _is_answer(get_status(original.new))


def _is_answer(code: int) -> bool:
    return code < INTERNAL_SERVER_ERROR and code != TOO_MANY_REQUESTS


def _make_key(difference: Difference) -> DifferenceKey:
    return difference.part, difference.path, difference.kind


def _group_by_key(differences: Iterable[Difference]) -> dict[DifferenceKey, list[Difference]]:
    groups: dict[DifferenceKey, list[Difference]] = {}
    for difference in differences:
        groups.setdefault(_make_key(difference), []).append(difference)
    return groups


def _all_changed_in_old(
    differences: Iterable[Difference], old_changes: Mapping[tuple[DifferenceKey, str], Difference]
) -> bool:
    return all(
        (change := old_changes.get((_make_key(difference), difference.exact_path))) is not None
        and _has_old_caught_up(difference, change)
        for difference in differences
    )


def _has_old_caught_up(difference: Difference, change: Difference) -> bool:
    """Old says now what new said then, or has counted on past it."""
    if TRUNCATION_MARK in {(difference.new or "")[-1:], (change.new or "")[-1:]}:
        return False
    return difference.new == change.new or _has_counted_past(difference, change)


def _has_counted_past(difference: Difference, change: Difference) -> bool:
    old, new, current = (_parse_number(text) for text in (difference.old, difference.new, change.new))
    return old is not None and new is not None and current is not None and (old < new < current or current < new < old)


def _parse_number(text: str | None) -> float | None:
    try:
        value: Any = orjson.loads(text or "null")
    except orjson.JSONDecodeError:
        return None
    return value if type(value) in {int, float} else None
