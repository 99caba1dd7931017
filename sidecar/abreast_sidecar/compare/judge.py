"""From the captures of one request to its outcome. Never raises: what can't be compared has an outcome of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from abreast.capture import Capture
from abreast_sidecar.compare.beginning import compare_beginnings
from abreast_sidecar.compare.body import BodyResult, Keyed, compare_bodies, same_bytes
from abreast_sidecar.compare.causes import causes
from abreast_sidecar.compare.difference import Difference, Judgement, Kind, Outcome, Rules
from abreast_sidecar.compare.effects import TOO_MANY, effect_differences
from abreast_sidecar.compare.form import told as told_by_form
from abreast_sidecar.compare.headers import (
    first,
    header_differences,
    trailer_differences,
    validator_differences,
)
from abreast_sidecar.compare.path import route_of
from abreast_sidecar.compare.rules import RuleSet, Subject
from abreast_sidecar.compare.value import shown

ERROR = 500
TOO_MANY_REQUESTS = 429
UNAVAILABLE = 503
OK = 200
PARTIAL_CONTENT = 206
NOT_MODIFIED = 304
PRECONDITION_FAILED = 412
NOT_FOUND = 404
CONDITIONS = frozenset({"if-none-match", "if-modified-since", "if-match", "if-unmodified-since", "if-range"})
RANGE_CONDITIONS = frozenset({"if-range"})
NO_ROUTE = "(no route)"  # unknown paths are one endpoint, however many a scanner tries

LEFT = "the client left before the answer was whole"
GOES_ON = "the answer still went on when it was captured"
BROKEN = "both answers broke off"

_LIVE_FIRST = {"live": 0, "shadow": 1, "baseline": 2}


class Sides(NamedTuple):
    old: Capture | None
    new: Capture | None
    baseline: Capture | None


def judge(captures: Sequence[Capture], rules: Rules, *, swept: bool = False) -> Judgement:
    """Judge one pair's captures, of which there is at least one.

    `swept`: the pair was given up before all its copies were there.
    """
    sides = choose(captures)
    method, route = endpoint(sides)
    declared = rules.declared.of(subject(sides, f"{method} {route}")) if rules.declared else None
    noise, compared = _noise(sides, rules, declared)
    verdict = _verdict(sides, rules, declared, swept=swept)
    return Judgement(
        outcome=verdict.outcome,
        method=method,
        route=route,
        old=sides.old,
        new=sides.new,
        baseline=sides.baseline,
        differences=tuple(verdict.differences),
        explained=tuple(verdict.explained),
        noise=tuple([one for one in noise if not one.explained_by]),
        noise_explained=tuple([one for one in noise if one.explained_by]),
        baseline_compared=compared,
        reason=verdict.reason,
    )


def subject(sides: Sides, endpoint: str) -> Subject:
    """What rules may be limited to."""
    old, new = sides.old, sides.new
    known = new or old or sides.baseline
    return Subject(
        service=known.service if known else "",
        endpoint=endpoint,
        old_release=old.release if old else "",
        new_release=new.release if new else "",
        statuses=(status(old) if old else 0, status(new) if new else 0),
    )


def choose(captures: Sequence[Capture]) -> Sides:
    """The first answers of each version, live before shadow; a further one of old is baseline."""
    if len(captures) == 2 and captures[0].version != captures[1].version:
        old, new = captures if captures[0].version == "old" else (captures[1], captures[0])
        return Sides(old, new, None)
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
    for side in known:
        if side.request.route:
            return side.request.method, route_of(side.request.route, side.request.path)
    asked = known[0].request
    if all(side.answer.status == NOT_FOUND for side in known):
        return asked.method, NO_ROUTE
    return asked.method, route_of("", asked.path)


def _noise(sides: Sides, rules: Rules, declared: RuleSet | None) -> tuple[list[Difference], bool]:
    old, again = sides.old, sides.baseline
    if old is None or again is None or not _comparable(old, again):
        return [], False
    found = _differences(old, again, rules, declared).differences
    return declared.explain(found) if declared else found, True


class Verdict(NamedTuple):
    outcome: Outcome
    reason: str = ""
    differences: Sequence[Difference] = ()
    explained: Sequence[Difference] = ()


def _verdict(sides: Sides, rules: Rules, declared: RuleSet | None, *, swept: bool) -> Verdict:
    old, new = sides.old, sides.new
    if old is None:
        return Verdict("only_new", "no capture of old arrived in time")
    if new is None:
        return _without_new(sides, swept=swept)
    if _parted(old, new) and (_silent(old) or _silent(new)):
        return Verdict("aborted", LEFT)
    if disturbed := old.disturbed or new.disturbed:
        return Verdict("not_compared", disturbed)
    if _sheds(old) != _sheds(new):
        return Verdict("shed", f"{'old' if _sheds(old) else 'new'} was shedding load")
    if (settles := _conditions(status(old), status(new))) and _asks(old, settles):
        return Verdict("not_compared", "a conditional request: validators belong to one build")
    return _weighed(old, new, _differences(old, new, rules, declared), declared)


def _weighed(old: Capture, new: Capture, found: BodyResult, declared: RuleSet | None) -> Verdict:
    differences, explained = found.differences, []
    if not differences and not (found.unreadable or found.partial):
        return Verdict("match", found.note)
    if declared and differences:
        told = declared.explain(differences)
        differences = [difference for difference in told if not difference.explained_by]
        explained = [difference for difference in told if difference.explained_by]
    if found.partial:
        return Verdict("partial", found.note, differences, explained)
    cut = found.too_large or not (old.answer.body.whole and new.answer.body.whole)
    if cut and any(difference.part == "body" for difference in differences):
        reason = found.note or "a body is longer than what is captured; only its digest was compared"
        return Verdict("oversize", reason, differences, explained)
    if found.unreadable and not differences:
        return Verdict("not_compared", found.note, differences, explained)
    return Verdict("mismatch" if differences else "match", found.note, differences, explained)


def _without_new(sides: Sides, *, swept: bool) -> Verdict:
    """New was out and old answered all copies, or an attempt at new left no capture."""
    known = [side for side in (sides.old, sides.baseline) if side is not None]
    if any(side.attempt > 1 for side in known):
        return Verdict("only_old", "new did not answer, and the request was tried again on old")
    if not swept and len(known) > 1:
        return Verdict("baseline_only", "new was out: old got all copies")
    return Verdict("only_old", "no capture of new arrived in time")


def _left(capture: Capture) -> bool:
    """The user left. Where a copy was cut short, it was Envoy that had waited long enough."""
    return capture.role == "live" and capture.client_left and not capture.complete


def _parted(one: Capture, other: Capture) -> bool:
    """Where the user left before the end, or was still there, the other answer is longer for no reason of its own."""
    return _left(one) or _left(other) or one.going_on or other.going_on


def _conditions(one: int, other: int) -> frozenset[str]:
    """The request headers that make such a pair of statuses say nothing but whether a validator was known."""
    if one == other:
        return frozenset()
    if {one // 100, other // 100} == {2, 3} and NOT_MODIFIED in (one, other):
        return CONDITIONS
    if {one // 100, other // 100} <= {2, 3, 4} and PRECONDITION_FAILED in (one, other):
        return CONDITIONS
    return RANGE_CONDITIONS if {one, other} == {OK, PARTIAL_CONTENT} else frozenset()


def _comparable(one: Capture, other: Capture) -> bool:
    if one.disturbed or other.disturbed:
        return False
    if _parted(one, other) and (_silent(one) or _silent(other)):
        return False
    return _sheds(one) == _sheds(other)


def status(capture: Capture) -> int:
    """What the client was told: a server answers 500 for an application that raised before it began."""
    return capture.answer.status or ERROR


def _sheds(capture: Capture) -> bool:
    code = status(capture)
    return code == TOO_MANY_REQUESTS or (
        code == UNAVAILABLE and bool(first(capture.answer.headers, "retry-after"))
    )


def _asks(capture: Capture, conditions: frozenset[str]) -> bool:
    return any(name in conditions for name, _ in capture.request.headers)


def _differences(old: Capture, new: Capture, rules: Rules, declared: RuleSet | None) -> BodyResult:
    found = _found(old, new, rules, declared)
    if not found.differences:
        return found
    return found._replace(differences=told_by_form(found.differences, (old.started, new.started)))


def _beginning(old: Capture, new: Capture) -> tuple[list[Difference], bool]:
    """How both answered, and whether the rest follows from it: one cause, one finding."""
    if _silent(old) != _silent(new):
        return [_unanswered(old, new)], True
    found, was, now = [], status(old), status(new)
    parted = _parted(old, new)
    if was != now:
        found.append(_status(old, new))
        if was // 100 != now // 100:
            return found, True
    if _broken_off(old) != _broken_off(new) and (not parted or _hangs(old, new)):
        return [*found, _unfinished(old, new)], True
    if old.raised != new.raised and not parted:
        found.append(_raised(old, new))
    return found, False


def _found(old: Capture, new: Capture, rules: Rules, declared: RuleSet | None) -> BodyResult:
    found, is_all = _beginning(old, new)
    if is_all:
        return BodyResult(found)
    before, after = old.answer, new.answer
    found += header_differences(before.headers, after.headers, rules.volatile_headers, old.request)
    if status(old) == status(new):
        found += validator_differences(before.headers, after.headers)
    keyed = declared.identity if declared and declared.keyed else None
    parted = _parted(old, new)
    if not parted:
        if before.trailers or after.trailers:
            found += trailer_differences(before.trailers, after.trailers, rules.volatile_headers)
        found += effect_differences(old, new, rules.max_differences, keyed)
    if old.request.method == "HEAD":
        return BodyResult(found[: rules.max_differences])
    if _broken_off(old) or _broken_off(new):
        bodies = _begun(old, new, rules, keyed)
    else:
        bodies = compare_bodies(before, after, rules, keyed)
    if (old.effects_dropped or new.effects_dropped) and not parted:
        bodies = bodies._replace(note=TOO_MANY, unreadable=True)
    if not found:
        return bodies
    told = causes([*found, *bodies.differences], status(old), status(new))
    return bodies._replace(differences=told[: rules.max_differences])


def _begun(old: Capture, new: Capture, rules: Rules, keyed: Keyed | None) -> BodyResult:
    """At least one was cut; both at the same place only where no client had anything to do with it."""
    before, after = old.answer, new.answer
    if not (old.client_left or new.client_left) and same_bytes(before.body, after.body):
        return BodyResult([])
    cut = (_broken_off(old), _broken_off(new))
    bodies = compare_beginnings(before, after, cut, rules, keyed)
    why = LEFT if _left(old) or _left(new) else GOES_ON if _parted(old, new) else BROKEN
    said = f"{why}: compared were status, headers, {bodies.said}"
    return BodyResult(bodies.differences, said, partial=True)


def _silent(capture: Capture) -> bool:
    """It had not begun to answer when Envoy cut it off."""
    return capture.answer.status == 0 and capture.client_left


def _unanswered(old: Capture, new: Capture) -> Difference:
    new_only = _silent(new)
    return Difference.told(
        part="error",
        path="no answer",
        place="",
        kind="removed" if new_only else "added",
        impact="breaking" if new_only else "value",
        old=None if _silent(old) else str(status(old)),
        new=None if new_only else str(status(new)),
    )


def _broken_off(capture: Capture) -> bool:
    """Less came than was promised."""
    if not capture.complete:
        return True
    if capture.request.method == "HEAD" or capture.answer.status in {204, NOT_MODIFIED}:
        return False
    promised = first(capture.answer.headers, "content-length")
    return promised.isdecimal() and promised.isascii() and int(promised[:18]) > capture.answer.body.length


def _hangs(old: Capture, new: Capture) -> bool:
    """One goes on for more than twice as long as the other took in all: it is no stream that merely ends a little later."""
    going, other = (old, new) if old.going_on else (new, old)
    return going.going_on and other.complete and going.total_us > 2 * other.total_us


def _status(old: Capture, new: Capture) -> Difference:
    before, after = status(old), status(new)
    return Difference.told(
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
    new_only = _broken_off(new)
    return Difference.told(
        part="error",
        path="unfinished",
        place="",
        kind="removed" if new_only else "added",
        impact="breaking" if new_only else "value",
        old=_state(old),
        new=_state(new),
    )


def _state(capture: Capture) -> str:
    if not _broken_off(capture):
        return '"complete"'
    if capture.going_on:
        return shown("still going on")
    return shown(f"broken off by {capture.raised or 'the application'}")


def _raised(old: Capture, new: Capture) -> Difference:
    """An application raised, whatever the client was told."""
    kind: Kind = "changed" if old.raised and new.raised else "removed" if old.raised else "added"
    return Difference.told(
        part="error",
        path="raised",
        place="",
        kind=kind,
        impact="value",
        old=shown(old.raised) if old.raised else None,
        new=shown(new.raised) if new.raised else None,
    )
