"""One cause, one difference: what follows from another difference of the same answer is not said again."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from abreast_sidecar.compare.difference import Difference

GRAVITY = ("additive", "value", "breaking")
EMPTY = frozenset({204, 205})  # statuses whose answers have no content


def causes(found: Sequence[Difference], old: int, new: int) -> list[Difference]:
    """The differences of two answers with statuses `old` and `new`, without those that others of them explain.

    An answer that has no content by its status has neither body nor type: the status is the cause, and as grave as what
    is gone. A body that is another thing altogether, or gone, has another type.
    """
    body = next((one for one in found if one.part == "body" and not one.path), None)
    if body is None:
        return list(found)
    left = [one for one in found if (one.part, one.path) != ("header", "content-type")]
    if body.kind in {"added", "removed"} and (old in EMPTY) != (new in EMPTY):
        left = [one for one in left if one is not body]
        return [_as_grave(one, body) if one.part == "status" else one for one in left]
    return left if body.kind in {"added", "removed", "type"} else list(found)


def _as_grave(cause: Difference, effect: Difference) -> Difference:
    return replace(cause, impact=max(cause.impact, effect.impact, key=GRAVITY.index))
