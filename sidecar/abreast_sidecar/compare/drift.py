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

from abreast_sidecar.compare.difference import Difference, Judgement
from abreast_sidecar.compare.document import PER_PATH
from abreast_sidecar.compare.judge import ERROR, TOO_MANY_REQUESTS, status

CUT = "…"  # ends a value of which only the beginning is known
COMPARED = frozenset({"match", "mismatch"})

Key = tuple[str, str, str]  # part, path, kind


def drifted(then: Judgement, moved: Judgement, now: Judgement) -> list[Key]:
    """Of `then` (old against new), what was drift. `moved`: old then against old now; `now`: both now."""
    if not _askable(then) or now.outcome not in COMPARED or moved.outcome not in COMPARED:
        return []
    if now.old is None or now.new is None or status(now.old) != status(now.new):
        return []
    left = {_key(one) for one in now.differences}
    later = {(_key(one), one.place): one for one in moved.differences}
    return [
        key
        for key, shown in _by_key(then.differences).items()
        if key not in left and key[0] != "error" and len(shown) < PER_PATH and _all_moved(shown, later)
    ]


def _askable(then: Judgement) -> bool:
    return then.outcome == "mismatch" and then.new is not None and _answered(status(then.new))


def _answered(code: int) -> bool:
    return code < ERROR and code != TOO_MANY_REQUESTS


def _key(one: Difference) -> Key:
    return one.part, one.path, one.kind


def _by_key(differences: Iterable[Difference]) -> dict[Key, list[Difference]]:
    found: dict[Key, list[Difference]] = {}
    for one in differences:
        found.setdefault(_key(one), []).append(one)
    return found


def _all_moved(shown: Iterable[Difference], later: Mapping[tuple[Key, str], Difference]) -> bool:
    return all(
        (found := later.get((_key(one), one.place))) is not None and _said_by_old(one, found) for one in shown
    )


def _said_by_old(one: Difference, later: Difference) -> bool:
    """Old says now what new said then, or has counted on past it."""
    if CUT in {(one.new or "")[-1:], (later.new or "")[-1:]}:
        return False
    return one.new == later.new or _passed(one, later)


def _passed(one: Difference, later: Difference) -> bool:
    old, new, now = (_number(text) for text in (one.old, one.new, later.new))
    return old is not None and new is not None and now is not None and (old < new < now or now < new < old)


def _number(text: str | None) -> float | None:
    try:
        value: Any = orjson.loads(text or "null")
    except orjson.JSONDecodeError:
        return None
    return value if type(value) in {int, float} else None
