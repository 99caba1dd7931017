"""Does a version say again what it said in one of the last pairs that showed a finding?

A value that is fresh in every answer of old and always the same in new's differs as often as noise does. What tells them
apart is one version's values, one after the other. Each worker remembers the last few of each finding: as many as there
may be hosts that take turns, each of which says its name.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from abreast_sidecar.compare import Difference
from abreast_sidecar.compare.evidence import values

LONGEST = 200  # characters of a value that is remembered
MOST = 2000  # findings
LAST = 32  # values of each version


class Turn(NamedTuple):
    """Add 0 or 1 to each counter: there was a pair before, and a version repeated a recent value."""

    repeat_checks: int
    old_repeats: int
    new_repeats: int


NONE = Turn(0, 0, 0)


class Repeats:
    def __init__(self) -> None:
        self._last: dict[int, tuple[deque[Any], deque[Any]]] = {}

    def turn(self, finding: int, difference: Difference) -> Turn:
        if difference.kind != "changed":
            return NONE
        old, new = values(difference)
        if not _plain(old) or not _plain(new):
            return NONE
        olds, news = self._last.get(finding) or self._begin(finding)
        turn = Turn(1, int(old in olds), int(new in news)) if olds else NONE
        olds.append(old)
        news.append(new)
        return turn

    def _begin(self, finding: int) -> tuple[deque[Any], deque[Any]]:
        if len(self._last) >= MOST:
            self._last.clear()
        made: tuple[deque[Any], deque[Any]] = deque(maxlen=LAST), deque(maxlen=LAST)
        self._last[finding] = made
        return made

    def clear(self) -> None:
        self._last.clear()


def _plain(value: Any) -> bool:
    return (type(value) is str and len(value) <= LONGEST) or type(value) in {int, float}
