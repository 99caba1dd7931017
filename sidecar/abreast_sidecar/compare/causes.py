"""One cause, one difference: what follows from another difference of the same answer is not said again."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from abreast_sidecar.compare.difference import Difference

IMPACTS_BY_SEVERITY = ("additive", "value", "breaking")
NO_CONTENT_STATUSES = frozenset({204, 205})  # statuses whose answers have no content


def drop_consequences(differences: Sequence[Difference], old: int, new: int) -> list[Difference]:
    """The differences of two answers with statuses `old` and `new`, without those that others of them explain.

    An answer that has no content by its status has neither body nor type: the status is the cause, and as grave as what
    is gone. A body that is another thing altogether, or gone, has another type.
    """
    whole_body = next(
        (difference for difference in differences if difference.part == "body" and not difference.path), None
    )
    if whole_body is None:
        return list(differences)
    remaining = [
        difference
        for difference in differences
        if (difference.part, difference.path) != ("header", "content-type")
    ]
    if whole_body.kind in {"added", "removed"} and (old in NO_CONTENT_STATUSES) != (
        new in NO_CONTENT_STATUSES
    ):
        remaining = [difference for difference in remaining if difference is not whole_body]
        return [
            _raise_impact(difference, whole_body) if difference.part == "status" else difference
            for difference in remaining
        ]
    return remaining if whole_body.kind in {"added", "removed", "type"} else list(differences)


def _raise_impact(cause: Difference, effect: Difference) -> Difference:
    return replace(cause, impact=max(cause.impact, effect.impact, key=IMPACTS_BY_SEVERITY.index))
