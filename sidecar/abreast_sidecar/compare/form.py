"""A changed value that does not even look like the other: what noise at a place must not hide.

Such a difference is of a kind of its own, so that counts tell it from what varies there by itself:

- `format`: one side is empty text, or one is a UUID, hash, token, timestamp, address, … and the other is not, or is one of
  another length, zone or version.
- `range`: one side is the present moment by its own service's clock and the other is not; numbers of which one is negative
  or a thousand times the other; texts of which one is ten times as long.

Whether that is a defect is not said here: random texts may be of any length, and then copies of old show it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from msgspec.structs import replace

from abreast_sidecar.compare.difference import Difference, Impact
from abreast_sidecar.compare.evidence import values
from abreast_sidecar.compare.explain import moment
from abreast_sidecar.compare.shape import Shape, shape

NOW = 300.0  # s around the start of a request: caches, and time that passes meanwhile
FAR = 1000.0  # times as much
LONGER = 10  # times as long
SHORT = 4  # characters: shorter texts have no length to speak of
# Not looked at: lines of plain text are empty or not as they please, cookies are compared by their attributes.
UNFORMED = ("lines[", "set-cookie[")

_FORMED = frozenset(
    {
        "uuid", "ulid", "trace", "hash", "hex", "token", "base64", "jwt", "timestamp", "unix", "unix text", "date",
        "time", "ip", "email", "url", "prefixed",
    }
)  # fmt: skip
_MOMENTS = frozenset({"timestamp", "unix", "unix text"})
_NUMBERS = frozenset({"integer", "float"})
_TEXTS = frozenset({"text", "word", "path"})

Form = Literal["format", "range"]
Starts = tuple[float, float]  # when both versions began, each by its own clock, in seconds of Unix time


def told(differences: Iterable[Difference], starts: Starts) -> list[Difference]:
    """The same differences, those of another format or range as such."""
    return [_told(one, starts) if one.kind == "changed" else one for one in differences]


def _told(one: Difference, starts: Starts) -> Difference:
    if one.part in {"status", "error"} or one.path.startswith(UNFORMED):
        return one
    old, new = values(one)
    found = form(old, new, starts)
    if found is None:
        return one
    kind, impact = found
    return replace(one, kind=kind, impact=impact)


def form(old: Any, new: Any, starts: Starts) -> tuple[Form, Impact] | None:
    """What sets two values of one JSON type apart beyond that they differ."""
    before, after = shape(old), shape(new)
    if before != after and (found := _other_format(before, after)) is not None:
        return found
    return ("range", "value") if _apart(old, new, before, after, starts) else None


def _other_format(before: Shape, after: Shape) -> tuple[Form, Impact] | None:
    kinds = {before.kind, after.kind}
    if len(kinds) == 1:
        return ("format", "value") if kinds <= _FORMED and kinds != {"url"} else None
    if "empty" not in kinds and not kinds & _FORMED:
        return None
    return "format", "breaking" if after.kind == "empty" or before.kind in _FORMED else "value"


def _apart(old: Any, new: Any, before: Shape, after: Shape, starts: Starts) -> bool:
    if before == after and before.kind in _MOMENTS:
        return _now(old, before, starts[0]) != _now(new, after, starts[1])
    kinds = {before.kind, after.kind}
    return (kinds <= _NUMBERS and _far(old, new)) or (kinds <= _TEXTS and _longer(old, new))


def _now(value: Any, found: Shape, start: float) -> bool:
    at = moment(value, found)
    return at is not None and abs(at - start) <= NOW


def _far(old: float, new: float) -> bool:
    if not old or not new:
        return False
    return (old < 0) != (new < 0) or not abs(new) < abs(old) * FAR or not abs(old) < abs(new) * FAR


def _longer(old: str, new: str) -> bool:
    short, long = sorted((len(old), len(new)))
    return long >= LONGER * max(short, SHORT)
