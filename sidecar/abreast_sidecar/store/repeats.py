"""Does a version say again what it said in one of the last pairs that showed a finding?

A value that is fresh in every answer of old and always the same in new's differs as often as noise does. What tells them
apart is one version's values, one after the other. Each worker remembers the last few of each finding: as many as there
may be hosts that take turns, each of which says its name.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from abreast_sidecar.compare import Difference
from abreast_sidecar.compare.evidence import get_values

MAX_TRACKED_VALUE_CHARS = 200  # characters of a value that is remembered
MAX_TRACKED_FINDINGS = 2000  # findings
TRACKED_VALUES = 32  # values of each version


class RepeatCounts(NamedTuple):
    """Add 0 or 1 to each counter: there was a pair before, and a version repeated a recent value."""

    repeat_checks: int
    old_repeats: int
    new_repeats: int


NO_REPEATS = RepeatCounts(0, 0, 0)


class RepeatTracker:
    def __init__(self) -> None:
        self._recent_values: dict[int, tuple[deque[Any], deque[Any]]] = {}

    def observe(self, finding: int, difference: Difference) -> RepeatCounts:
        if difference.kind != "changed":
            return NO_REPEATS
        old, new = get_values(difference)
        if not _is_trackable(old) or not _is_trackable(new):
            return NO_REPEATS
        olds, news = self._recent_values.get(finding) or self._start_tracking(finding)
        counts = RepeatCounts(1, int(old in olds), int(new in news)) if olds else NO_REPEATS
        olds.append(old)
        news.append(new)
        return counts

    def _start_tracking(self, finding: int) -> tuple[deque[Any], deque[Any]]:
        if len(self._recent_values) >= MAX_TRACKED_FINDINGS:
            self._recent_values.clear()
        recent: tuple[deque[Any], deque[Any]] = deque(maxlen=TRACKED_VALUES), deque(maxlen=TRACKED_VALUES)
        self._recent_values[finding] = recent
        return recent

    def clear(self) -> None:
        self._recent_values.clear()


def _is_trackable(value: Any) -> bool:
    return (type(value) is str and len(value) <= MAX_TRACKED_VALUE_CHARS) or type(value) in {int, float}
