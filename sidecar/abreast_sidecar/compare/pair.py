"""The outcome of a pair from the captures of one request. A pair that can't be compared has an outcome too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.body import BodyResult, IdentityLookup, compare_bodies, compare_truncated, is_same_content
from abreast_sidecar.compare.effects import EFFECTS_DROPPED_NOTE, diff_effects
from abreast_sidecar.compare.headers import diff_headers, diff_trailers, diff_validators, get_header
from abreast_sidecar.compare.model import ComparisonResult, Difference, Impact, Kind, Outcome, normalise_route
from abreast_sidecar.compare.rules import CompareOptions, RuleScope, RuleSet
from abreast_sidecar.compare.values import render_value
from abreast_sidecar.compare.volatile import classify_anomalies

INTERNAL_SERVER_ERROR = 500
TOO_MANY_REQUESTS = 429
SERVICE_UNAVAILABLE = 503
OK = 200
PARTIAL_CONTENT = 206
NOT_MODIFIED = 304
PRECONDITION_FAILED = 412
NOT_FOUND = 404
CONDITIONAL_HEADERS = frozenset({"if-none-match", "if-modified-since", "if-match", "if-unmodified-since", "if-range"})
RANGE_CONDITION_HEADERS = frozenset({"if-range"})
NO_ROUTE = "(no route)"  # one endpoint for all unknown paths, which scanners try by the thousand
CLIENT_LEFT_NOTE = "the client disconnected before the answer was complete"
STILL_RUNNING_NOTE = "the answer was not finished when it was captured"
BOTH_BROKE_OFF_NOTE = "both answers broke off"
_ROLE_ORDER = {"live": 0, "shadow": 1, "baseline": 2}
IMPACTS_BY_SEVERITY = ("additive", "value", "breaking")
NO_CONTENT_STATUSES = frozenset({204, 205})


def drop_consequences(differences: Sequence[Difference], old: int, new: int) -> list[Difference]:
    """Remove differences that follow from another difference. `old` and `new` are the statuses.

    A status without content explains a missing body and a missing content type, and takes over the impact of the body.
    A body that is missing or of another type explains another content type.
    """
    whole_body = next(
        (difference for difference in differences if difference.part == "body" and not difference.path), None
    )
    if whole_body is None:
        return list(differences)
    remaining = [
        difference for difference in differences if (difference.part, difference.path) != ("header", "content-type")
    ]
    if whole_body.kind in {"added", "removed"} and (old in NO_CONTENT_STATUSES) != (new in NO_CONTENT_STATUSES):
        remaining = [difference for difference in remaining if difference is not whole_body]
        return [
            _raise_impact(difference, whole_body) if difference.part == "status" else difference
            for difference in remaining
        ]
    return remaining if whole_body.kind in {"added", "removed", "type"} else list(differences)


def _raise_impact(cause: Difference, effect: Difference) -> Difference:
    return replace(cause, impact=max(cause.impact, effect.impact, key=IMPACTS_BY_SEVERITY.index))


class PairSides(NamedTuple):
    old: Capture | None
    new: Capture | None
    baseline: Capture | None


def compare_pair(captures: Sequence[Capture], options: CompareOptions, *, timed_out: bool = False) -> ComparisonResult:
    """Compare the captures of one request, at least one.

    `timed_out`: the pair expired before all captures arrived.
    """
    sides = assign_sides(captures)
    method, route = resolve_endpoint(sides)
    rule_set = options.rule_set.for_scope(make_rule_scope(sides, f"{method} {route}")) if options.rule_set else None
    noise, is_baseline_compared = _compare_baseline(sides, options, rule_set)
    pair_outcome = _determine_outcome(sides, options, rule_set, timed_out=timed_out)
    return ComparisonResult(
        outcome=pair_outcome.outcome,
        method=method,
        route=route,
        old=sides.old,
        new=sides.new,
        baseline=sides.baseline,
        differences=tuple(pair_outcome.differences),
        explained_differences=tuple(pair_outcome.explained),
        noise=tuple([difference for difference in noise if not difference.explained_by]),
        explained_noise=tuple([difference for difference in noise if difference.explained_by]),
        baseline_compared=is_baseline_compared,
        reason=pair_outcome.reason,
    )


def make_rule_scope(sides: PairSides, endpoint: str) -> RuleScope:
    old, new = sides.old, sides.new
    capture = new or old or sides.baseline
    return RuleScope(
        service=capture.service if capture else "",
        endpoint=endpoint,
        old_release=old.release if old else "",
        new_release=new.release if new else "",
        statuses=(get_status(old) if old else 0, get_status(new) if new else 0),
    )


def assign_sides(captures: Sequence[Capture]) -> PairSides:
    """Take the first answer of each version, live before shadow. A second answer of old is the baseline."""
    if len(captures) == 2 and captures[0].version != captures[1].version:
        old, new = captures if captures[0].version == "old" else (captures[1], captures[0])
        return PairSides(old, new, None)
    ordered = sorted(captures, key=lambda capture: (capture.attempt, _ROLE_ORDER[capture.role]))
    olds = [capture for capture in ordered if capture.version == "old"]
    news = [capture for capture in ordered if capture.version == "new"]
    return PairSides(
        old=olds[0] if olds else None, new=news[0] if news else None, baseline=olds[1] if len(olds) > 1 else None
    )


def resolve_endpoint(sides: PairSides) -> tuple[str, str]:
    """Return method and route. The route of old counts, so that a renamed parameter makes no new endpoint."""
    captures = [side for side in (sides.old, sides.new) if side is not None]
    for side in captures:
        if side.request.route:
            return side.request.method, normalise_route(side.request.route, side.request.path)
    request = captures[0].request
    if all(side.answer.status == NOT_FOUND for side in captures):
        return request.method, NO_ROUTE
    return request.method, normalise_route("", request.path)


def _compare_baseline(
    sides: PairSides, options: CompareOptions, rule_set: RuleSet | None
) -> tuple[list[Difference], bool]:
    old, baseline = sides.old, sides.baseline
    if old is None or baseline is None or not _is_comparable(old, baseline):
        return [], False
    differences = _compare_answers(old, baseline, options, rule_set).differences
    return rule_set.explain(differences) if rule_set else differences, True


class PairOutcome(NamedTuple):
    outcome: Outcome
    reason: str = ""
    differences: Sequence[Difference] = ()
    explained: Sequence[Difference] = ()


def _determine_outcome(
    sides: PairSides, options: CompareOptions, rule_set: RuleSet | None, *, timed_out: bool
) -> PairOutcome:
    old, new = sides.old, sides.new
    if old is None:
        return PairOutcome("only_new", "no capture of old arrived in time")
    if new is None:
        return _without_new(sides, timed_out=timed_out)
    if _is_interrupted(old, new) and (_has_no_response(old) or _has_no_response(new)):
        return PairOutcome("aborted", CLIENT_LEFT_NOTE)
    if reason := old.invalid_reason or new.invalid_reason:
        return PairOutcome("not_compared", reason)
    if _is_load_shed(old) != _is_load_shed(new):
        return PairOutcome("shed", f"{'old' if _is_load_shed(old) else 'new'} was shedding load")
    if (condition_headers := _conditional_headers(get_status(old), get_status(new))) and _has_any_header(
        old, condition_headers
    ):
        return PairOutcome("not_compared", "a conditional request: validators belong to one build")
    return _classify(old, new, _compare_answers(old, new, options, rule_set), rule_set)


def _classify(old: Capture, new: Capture, result: BodyResult, rule_set: RuleSet | None) -> PairOutcome:
    differences, explained = result.differences, []
    if not differences and not (result.is_unreadable or result.is_partial):
        return PairOutcome("match", result.note)
    if rule_set and differences:
        marked_differences = rule_set.explain(differences)
        differences = [difference for difference in marked_differences if not difference.explained_by]
        explained = [difference for difference in marked_differences if difference.explained_by]
    if result.is_partial:
        return PairOutcome("partial", result.note, differences, explained)
    is_truncated = result.is_too_large or not (old.answer.body.is_complete and new.answer.body.is_complete)
    if is_truncated and any(difference.part == "body" for difference in differences):
        reason = result.note or "a body is longer than what is captured; only its digest was compared"
        return PairOutcome("oversize", reason, differences, explained)
    if result.is_unreadable and not differences:
        return PairOutcome("not_compared", result.note, differences, explained)
    return PairOutcome("mismatch" if differences else "match", result.note, differences, explained)


def _without_new(sides: PairSides, *, timed_out: bool) -> PairOutcome:
    """Distinguish a baseline-only pair from a pair that lost the capture of new."""
    captures = [side for side in (sides.old, sides.baseline) if side is not None]
    if any(side.attempt > 1 for side in captures):
        return PairOutcome("only_old", "new did not answer, and Envoy retried the request on old")
    if not timed_out and len(captures) > 1:
        return PairOutcome("baseline_only", "new receives no copies: old got all of them")
    return PairOutcome("only_old", "no capture of new arrived in time")


def _has_client_left(capture: Capture) -> bool:
    """Detect a disconnect of the user. Envoy ends a copy after a timeout, which is no disconnect."""
    return capture.role == "live" and capture.client_left and not capture.complete


def _is_interrupted(capture: Capture, other: Capture) -> bool:
    """Tell whether one answer may be shorter for reasons other than the version: a disconnect or the capture deadline."""
    return (
        _has_client_left(capture)
        or _has_client_left(other)
        or capture.truncated_by_deadline
        or other.truncated_by_deadline
    )


def _conditional_headers(code: int, other_code: int) -> frozenset[str]:
    """Return the request headers that explain these two statuses: their validators belong to one build."""
    if code == other_code:
        return frozenset()
    if {code // 100, other_code // 100} == {2, 3} and NOT_MODIFIED in (code, other_code):
        return CONDITIONAL_HEADERS
    if {code // 100, other_code // 100} <= {2, 3, 4} and PRECONDITION_FAILED in (code, other_code):
        return CONDITIONAL_HEADERS
    return RANGE_CONDITION_HEADERS if {code, other_code} == {OK, PARTIAL_CONTENT} else frozenset()


def _is_comparable(capture: Capture, other: Capture) -> bool:
    if capture.invalid_reason or other.invalid_reason:
        return False
    if _is_interrupted(capture, other) and (_has_no_response(capture) or _has_no_response(other)):
        return False
    return _is_load_shed(capture) == _is_load_shed(other)


def get_status(capture: Capture) -> int:
    """Return the status for the client: the server sends 500 if the application raises before it answers."""
    return capture.answer.status or INTERNAL_SERVER_ERROR


def _is_load_shed(capture: Capture) -> bool:
    code = get_status(capture)
    return code == TOO_MANY_REQUESTS or (
        code == SERVICE_UNAVAILABLE and bool(get_header(capture.answer.headers, "retry-after"))
    )


def _has_any_header(capture: Capture, names: frozenset[str]) -> bool:
    return any(name in names for name, _ in capture.request.headers)


def _compare_answers(old: Capture, new: Capture, options: CompareOptions, rule_set: RuleSet | None) -> BodyResult:
    result = _compare_captures(old, new, options, rule_set)
    if not result.differences:
        return result
    return result._replace(differences=classify_anomalies(result.differences, (old.started_at, new.started_at)))


def _compare_start(old: Capture, new: Capture) -> tuple[list[Difference], bool]:
    """Compare how both answered. The flag is True if all other differences would follow from the returned ones."""
    if _has_no_response(old) != _has_no_response(new):
        before, after = (None if _has_no_response(side) else get_status(side) for side in (old, new))
        impact: Impact = "breaking" if _has_no_response(new) else "value"
        return [Difference.from_values("error", "no answer", before, after, impact)], True
    differences, old_status, new_status = [], get_status(old), get_status(new)
    is_interrupted = _is_interrupted(old, new)
    if old_status != new_status:
        is_same_class = old_status // 100 == new_status // 100
        impact = "value" if is_same_class else "breaking"
        path = f"{old_status}->{new_status}"
        differences.append(Difference.from_values("status", path, old_status, new_status, impact))
        if not is_same_class:
            return differences, True
    if _is_broken_off(old) != _is_broken_off(new) and (not is_interrupted or _is_hung(old, new)):
        return [*differences, _unfinished_difference(old, new)], True
    if old.exception != new.exception and not is_interrupted:
        exceptions = old.exception or None, new.exception or None
        differences.append(Difference.from_values("error", "raised", *exceptions, "value"))
    return differences, False


def _compare_captures(old: Capture, new: Capture, options: CompareOptions, rule_set: RuleSet | None) -> BodyResult:
    differences, is_complete = _compare_start(old, new)
    if is_complete:
        return BodyResult(differences)
    before, after = old.answer, new.answer
    differences += diff_headers(before.headers, after.headers, options.volatile_headers, old.request)
    if get_status(old) == get_status(new):
        differences += diff_validators(before.headers, after.headers)
    identity_lookup = rule_set.find_identity_field if rule_set and rule_set.keyed_by_rules else None
    is_interrupted = _is_interrupted(old, new)
    if not is_interrupted:
        if before.trailers or after.trailers:
            differences += diff_trailers(before.trailers, after.trailers, options.volatile_headers)
        differences += diff_effects(old, new, options.max_differences, identity_lookup)
    if old.request.method == "HEAD":
        return BodyResult(differences[: options.max_differences])
    if _is_broken_off(old) or _is_broken_off(new):
        body_result = _compare_partial(old, new, options, identity_lookup)
    else:
        body_result = compare_bodies(before, after, options, identity_lookup)
    if (old.effects_dropped or new.effects_dropped) and not is_interrupted:
        body_result = body_result._replace(note=EFFECTS_DROPPED_NOTE, is_unreadable=True)
    if not differences:
        return body_result
    primary_differences = drop_consequences([*differences, *body_result.differences], get_status(old), get_status(new))
    return body_result._replace(differences=primary_differences[: options.max_differences])


def _compare_partial(
    old: Capture, new: Capture, options: CompareOptions, identity_lookup: IdentityLookup | None
) -> BodyResult:
    """Compare answers of which at least one broke off."""
    before, after = old.answer, new.answer
    if not (old.client_left or new.client_left) and is_same_content(before.body, after.body):
        return BodyResult([])
    truncation = (_is_broken_off(old), _is_broken_off(new))
    truncated_result = compare_truncated(before, after, truncation, options, identity_lookup)
    cause = (
        CLIENT_LEFT_NOTE
        if _has_client_left(old) or _has_client_left(new)
        else STILL_RUNNING_NOTE
        if _is_interrupted(old, new)
        else BOTH_BROKE_OFF_NOTE
    )
    note = f"{cause}: compared were status, headers, {truncated_result.compared_part}"
    return BodyResult(truncated_result.differences, note, is_partial=True)


def _has_no_response(capture: Capture) -> bool:
    """Tell whether Envoy ended the request before the application answered."""
    return capture.answer.status == 0 and capture.client_left


def _unfinished_difference(old: Capture, new: Capture) -> Difference:
    """Describe an answer that broke off on one side only."""
    kind: Kind = "removed" if _is_broken_off(new) else "added"
    impact: Impact = "breaking" if _is_broken_off(new) else "value"
    return Difference.from_text("error", "unfinished", "", kind, impact, _describe_end(old), _describe_end(new))


def _is_broken_off(capture: Capture) -> bool:
    """Tell whether the answer is shorter than announced."""
    if not capture.complete:
        return True
    if capture.request.method == "HEAD" or capture.answer.status in {204, NOT_MODIFIED}:
        return False
    content_length = get_header(capture.answer.headers, "content-length")
    return (
        content_length.isdecimal()
        and content_length.isascii()
        and int(content_length[:18]) > capture.answer.body.length
    )


def _is_hung(old: Capture, new: Capture) -> bool:
    """Tell whether one answer still runs after more than twice the total time of the other."""
    running, other = (old, new) if old.truncated_by_deadline else (new, old)
    return running.truncated_by_deadline and other.complete and running.total_us > 2 * other.total_us


def _describe_end(capture: Capture) -> str:
    if not _is_broken_off(capture):
        return '"complete"'
    if capture.truncated_by_deadline:
        return render_value("not finished")
    return render_value(f"broken off by {capture.exception or 'the application'}")
