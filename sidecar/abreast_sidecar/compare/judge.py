"""From the captures of one request to its outcome. Never raises: what can't be compared has an outcome of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abreast.capture import Capture
from abreast_sidecar.compare.body import body_differences
from abreast_sidecar.compare.difference import Difference, Judgement, Outcome, Rules
from abreast_sidecar.compare.headers import first, header_differences
from abreast_sidecar.compare.path import route_of

ERROR = 500
TOO_MANY_REQUESTS = 429
UNAVAILABLE = 503
NOT_MODIFIED = 304
NOT_FOUND = 404
CONDITIONS = frozenset({"if-none-match", "if-modified-since", "if-match", "if-unmodified-since", "if-range"})
NO_ROUTE = "(no route)"  # unknown paths are one endpoint, however many a scanner tries

_LIVE_FIRST = {"live": 0, "shadow": 1, "baseline": 2}


@dataclass(frozen=True, slots=True)
class Sides:
    old: Capture | None
    new: Capture | None
    baseline: Capture | None


def judge(captures: Sequence[Capture], rules: Rules, *, swept: bool = False) -> Judgement:
    """Judge one pair's captures, of which there is at least one.

    `swept`: the pair was given up before all its copies were there.
    """
    sides = choose(captures)
    method, route = endpoint(sides)
    noise, compared = _noise(sides, rules)
    outcome, reason, differences = _verdict(sides, rules, swept=swept)
    return Judgement(
        outcome=outcome,
        method=method,
        route=route,
        old=sides.old,
        new=sides.new,
        baseline=sides.baseline,
        differences=tuple(differences),
        noise=tuple(noise),
        baseline_compared=compared,
        reason=reason,
    )


def choose(captures: Sequence[Capture]) -> Sides:
    """The first answers of each version, live before shadow; a further one of old is baseline."""
    ordered = sorted(captures, key=lambda capture: (capture.attempt, _LIVE_FIRST[capture.role]))
    olds = [capture for capture in ordered if capture.version == "old"]
    news = [capture for capture in ordered if capture.version == "new"]
    return Sides(
        old=olds[0] if olds else None,
        new=news[0] if news else None,
        baseline=olds[1] if len(olds) > 1 else None,
    )


def endpoint(sides: Sides) -> tuple[str, str]:
    """Method and route; old's name for it, so that a renamed parameter is no new endpoint."""
    known = [side for side in (sides.old, sides.new) if side is not None]
    named = next((side for side in known if side.request.route), known[0])
    if not named.request.route and all(side.answer.status == NOT_FOUND for side in known):
        return named.request.method, NO_ROUTE
    return named.request.method, route_of(named.request.route, named.request.path)


def _noise(sides: Sides, rules: Rules) -> tuple[list[Difference], bool]:
    old, again = sides.old, sides.baseline
    if old is None or again is None or not _comparable(old, again):
        return [], False
    return _differences(old, again, rules), True


def _verdict(sides: Sides, rules: Rules, *, swept: bool) -> tuple[Outcome, str, list[Difference]]:
    old, new = sides.old, sides.new
    if old is None:
        return "only_new", "no capture of old arrived in time", []
    if new is None:
        return _without_new(sides, swept=swept)
    if (old.client_left and not old.complete) or (new.client_left and not new.complete):
        return "aborted", "the client left before the answer was whole", []
    if _sheds(old) != _sheds(new):
        return "shed", f"{'old' if _sheds(old) else 'new'} was shedding load", []
    if _conditional(old) and NOT_MODIFIED in {status(old), status(new)} and status(old) != status(new):
        return "not_compared", "a conditional request: validators belong to one build", []
    found = _differences(old, new, rules)
    if any(difference.part == "body" for difference in found) and not _held(old, new):
        return "oversize", "a body is longer than what is captured; only its digest was compared", found
    return ("mismatch" if found else "match"), "", found


def _without_new(sides: Sides, *, swept: bool) -> tuple[Outcome, str, list[Difference]]:
    """Joined without new: it was out and old answered both, or an attempt at it left no capture."""
    if not swept and sides.old is not None and sides.baseline is not None:
        if max(sides.old.attempt, sides.baseline.attempt) == 1:
            return "baseline_only", "new was out: old got all copies", []
        return "only_old", "new did not answer, and the request was tried again on old", []
    return "only_old", "no capture of new arrived in time", []


def _comparable(one: Capture, other: Capture) -> bool:
    cut = any(side.client_left and not side.complete for side in (one, other))
    return not cut and _sheds(one) == _sheds(other)


def status(capture: Capture) -> int:
    """What the client was told: a server answers 500 for an application that raised before it began."""
    return capture.answer.status or ERROR


def _sheds(capture: Capture) -> bool:
    code = status(capture)
    return code == TOO_MANY_REQUESTS or (
        code == UNAVAILABLE and bool(first(capture.answer.headers, "retry-after"))
    )


def _conditional(capture: Capture) -> bool:
    return any(name in CONDITIONS for name, _ in capture.request.headers)


def _held(old: Capture, new: Capture) -> bool:
    return old.answer.body.whole and new.answer.body.whole


def _differences(old: Capture, new: Capture, rules: Rules) -> list[Difference]:
    found = []
    if status(old) != status(new):
        found.append(_status(old, new))
        if status(old) // 100 != status(new) // 100:
            return found  # the rest follows from it: one cause, one finding
    if old.complete != new.complete:
        return [*found, _unfinished(old, new)]
    found += header_differences(old.answer.headers, new.answer.headers, rules.volatile_headers)
    if old.request.method != "HEAD":
        found += body_differences(old.answer, new.answer, rules)
    return found[: rules.max_differences]


def _status(old: Capture, new: Capture) -> Difference:
    before, after = status(old), status(new)
    return Difference(
        part="status",
        path=f"{before}->{after}",
        place="",
        kind="changed",
        impact="breaking" if before // 100 != after // 100 else "value",
        old=str(before),
        new=str(after),
    )


def _unfinished(old: Capture, new: Capture) -> Difference:
    """One side's answer broke off in the middle."""
    return Difference(
        part="error",
        path="unfinished",
        place="",
        kind="removed" if old.complete else "added",
        impact="breaking" if old.complete else "value",
        old=_state(old),
        new=_state(new),
    )


def _state(capture: Capture) -> str:
    if capture.complete:
        return '"complete"'
    return f'"broken off by {capture.raised or "the application"}"'
