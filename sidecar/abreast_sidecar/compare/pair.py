"""The outcome of a pair from the captures of one request. A pair that can't be compared has an outcome too.

Effects of one kind and key are compared in order. The order between kinds and keys means nothing: concurrent code may
run effects in any order.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import json
from msgspec.structs import replace

from abreast.protocol.capture import HASH_PREFIX, Answer, Body, Capture, Headers
from abreast_sidecar.compare.body import (
    MASKED_HASH,
    PARTIAL_CONTENT,
    BodyResult,
    IdentityLookup,
    compare_bodies,
    compare_truncated,
    describe_unlisted,
    is_same_content,
)
from abreast_sidecar.compare.endpoints import ResolvedEndpoint, resolve_endpoint
from abreast_sidecar.compare.headers import diff_expiry, diff_headers, diff_trailers, diff_validators, get_header
from abreast_sidecar.compare.json_diff import DifferenceClassifier, JsonDiff, match_elements
from abreast_sidecar.compare.model import ComparisonResult, Difference, Impact, Kind, Outcome, RenderedValues
from abreast_sidecar.compare.rules import CompareOptions, RuleScope, RuleSet
from abreast_sidecar.compare.values import render_value
from abreast_sidecar.compare.volatile import StartTimes, classify_anomalies, expand_embedded, is_explained_by_shape

OK = 200
NOT_MODIFIED = 304
PRECONDITION_FAILED = 412
TOO_MANY_REQUESTS = 429
INTERNAL_SERVER_ERROR = 500
SERVICE_UNAVAILABLE = 503
CONDITIONAL_HEADERS = frozenset({"if-none-match", "if-modified-since", "if-match", "if-unmodified-since", "if-range"})
RANGE_CONDITION_HEADERS = frozenset({"if-range"})
CLIENT_LEFT_NOTE = "the client disconnected before the answer was complete"
STILL_RUNNING_NOTE = "the answer was not finished when it was captured"
BOTH_BROKE_OFF_NOTE = "both answers broke off"
EFFECTS_DROPPED_NOTE = "a capture has more effects than its limit: only the first ones were compared"
_ROLE_ORDER = {"live": 0, "shadow": 1, "baseline": 2}
IMPACTS_BY_SEVERITY = ("additive", "value", "breaking")
GRPC_STATUS_PATH = "trailer grpc-status"
NO_CONTENT_STATUSES = frozenset({204, 205})

# The statuses of HTTP with the meaning of the codes of gRPC, from google/rpc/code.proto. Other codes are errors.
STATUS_BY_GRPC_CODE = {
    "0": OK, "1": 499, "2": 500, "3": 400, "4": 504, "5": 404, "6": 409, "7": 403, "8": 429, "9": 400, "10": 409,
    "11": 400, "12": 501, "13": 500, "14": 503, "15": 500, "16": 401,
}  # fmt: skip

EffectName = tuple[str, str]  # kind and key
_ComparedRows = tuple[Headers, Headers, tuple[dict[str, Any], ...]]
_HASH = re.compile(HASH_PREFIX + "[0-9a-f]{8}:[0-9a-f]{32}")


def drop_consequences(differences: Sequence[Difference], old: int, new: int) -> list[Difference]:
    """Remove differences that follow from another difference. `old` and `new` are the statuses.

    A status without content explains a missing body and a missing content type, and takes over the impact of the body. So
    does another status of a gRPC call.
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
    if whole_body.kind in {"added", "removed"}:
        causes = {("header", GRPC_STATUS_PATH)}
        if (old in NO_CONTENT_STATUSES) != (new in NO_CONTENT_STATUSES):
            causes.add(("status", f"{old}->{new}"))
        if any((difference.part, difference.path) in causes for difference in remaining):
            return [
                replace(difference, impact=max(difference.impact, whole_body.impact, key=IMPACTS_BY_SEVERITY.index))
                if (difference.part, difference.path) in causes
                else difference
                for difference in remaining
                if difference is not whole_body
            ]
    return remaining if whole_body.kind in {"added", "removed", "type"} else list(differences)


class PairSides(NamedTuple):
    old: Capture | None
    new: Capture | None
    baseline: Capture | None


def compare_pair(
    captures: Sequence[Capture],
    options: CompareOptions,
    *,
    timed_out: bool = False,
    endpoint: ResolvedEndpoint | None = None,
) -> ComparisonResult:
    """Compare the captures of one request, at least one.

    `timed_out`: the pair expired before all captures arrived. `endpoint`: that of a stored pair.
    """
    sides = assign_sides(_mask_incomparable_hashes(captures))
    method, route, source = endpoint or resolve_endpoint([side for side in sides[:2] if side], options.templates)
    rule_set = options.rule_set.for_scope(make_rule_scope(sides, f"{method} {route}")) if options.rule_set else None
    baseline = sides.baseline
    noise: Sequence[Difference] = ()
    first, second = (sides.old, baseline) if baseline and baseline.version == "old" else (baseline, sides.new)
    if is_baseline_compared := first is not None and second is not None and _is_comparable(first, second):
        noise = _compare_answers(first, second, options, rule_set).differences
        noise = rule_set.explain(noise) if rule_set else noise
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
        failed_over=_has_failed_over(captures),
        reason=pair_outcome.reason,
        route_source=source,
    )


def _mask_incomparable_hashes(captures: Sequence[Capture]) -> Sequence[Capture]:
    """Make the hashes of secrets equal if the services hashed them with different keys, for example after a rotation."""
    if len({capture.redaction_key_id for capture in captures}) < 2:
        return captures
    return [_mask_hashes(capture) for capture in captures]


def _mask_hashes(capture: Capture) -> Capture:
    """Replace the hashes in the parts of a capture that are compared."""
    answer, body = capture.answer, capture.answer.body
    rows = json.encode((answer.headers, answer.trailers, capture.effects)).decode()
    headers, trailers, effects = json.decode(_HASH.sub(MASKED_HASH, rows), type=_ComparedRows)
    content = _HASH.sub(MASKED_HASH, body.content.decode("latin-1")).encode("latin-1")
    masked_body = Body(content, body.length, _HASH.sub(MASKED_HASH, body.digest))
    return replace(capture, answer=Answer(answer.status, headers, masked_body, trailers), effects=effects)


def make_rule_scope(sides: PairSides, endpoint: str) -> RuleScope:
    old, new = sides.old, sides.new
    service = next((side.service for side in (new, old, sides.baseline) if side), "")
    statuses = get_status(old) if old else 0, get_status(new) if new else 0
    return RuleScope(service, endpoint, old.release if old else "", new.release if new else "", statuses)


def assign_sides(captures: Sequence[Capture]) -> PairSides:
    """Take the first response of each version, live before shadow. A second copy is the baseline.

    Without one, a second response of old is the baseline: old got all copies, or a failed request again.
    """
    if len(captures) == 2 and captures[0].version != captures[1].version:
        first, second = captures
        return PairSides(first, second, None) if first.version == "old" else PairSides(second, first, None)
    ordered = sorted(captures, key=lambda capture: (capture.attempt, _ROLE_ORDER[capture.role]))
    old_captures = [capture for capture in ordered if capture.version == "old"]
    new_captures = [capture for capture in ordered if capture.version == "new"]
    old, new = (next(iter(group), None) for group in (old_captures, new_captures))
    others = [*new_captures[1:], *old_captures[1:]]
    copies = [capture for capture in others if capture.role == "baseline"]
    return PairSides(old, new, next(iter(copies or others), None))


def _has_failed_over(captures: Sequence[Capture]) -> bool:
    """Check whether the user's request failed on new and old answered it. Old also has a copy of such a request."""
    if all(capture.attempt == 1 for capture in captures):  # nearly all pairs
        return False
    old_captures = [capture for capture in captures if capture.version == "old"]
    is_routed_to_new = any(capture.role == "shadow" for capture in old_captures) and not any(
        capture.version == "new" and capture.role == "shadow" for capture in captures
    )
    return is_routed_to_new and any(capture.role == "live" and capture.attempt > 1 for capture in old_captures)


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
        if new is not None and _explains_missing_copy(new):
            return PairOutcome("aborted", CLIENT_LEFT_NOTE)
        return PairOutcome("only_new", "no capture of old arrived in time")
    if new is None:
        return _without_new(sides, timed_out=timed_out)
    if _is_interrupted(old, new) and (_has_no_response(old) or _has_no_response(new)):
        return PairOutcome("aborted", CLIENT_LEFT_NOTE)
    if reason := old.invalid_reason or new.invalid_reason:
        return PairOutcome("not_compared", reason)
    if _is_load_shed(old) != _is_load_shed(new):
        return PairOutcome("shed", f"{'old' if _is_load_shed(old) else 'new'} was shedding load")
    condition_headers = _conditional_headers(get_status(old), get_status(new))
    if condition_headers and any(name in condition_headers for name, _ in old.request.headers):
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
        reason = result.note or "only the digest of a body was compared, because it was not captured as a whole"
        return PairOutcome("oversize", reason, differences, explained)
    if result.is_unreadable and not differences:
        return PairOutcome("not_compared", result.note, differences, explained)
    return PairOutcome("mismatch" if differences else "match", result.note, differences, explained)


def _without_new(sides: PairSides, *, timed_out: bool) -> PairOutcome:
    """Distinguish a baseline-only pair from a pair that lost the capture of new."""
    captures = [side for side in (sides.old, sides.baseline) if side is not None]
    if any(_explains_missing_copy(side) for side in captures):
        return PairOutcome("aborted", CLIENT_LEFT_NOTE)
    if any(side.attempt > 1 for side in captures):
        return PairOutcome("only_old", "new did not answer, and Envoy retried the request on old")
    if sides.old and sides.baseline and (not timed_out or {"live", "shadow"} == {side.role for side in captures}):
        return PairOutcome("baseline_only", "new receives no copies: old got all of them")
    return PairOutcome("only_old", "no capture of new arrived in time")


def _has_client_left(capture: Capture) -> bool:
    """Detect a disconnect of the user. Envoy ends a copy after a timeout, which is no disconnect."""
    return capture.role == "live" and capture.client_left and not capture.complete


def _explains_missing_copy(capture: Capture) -> bool:
    """Detect a user who left. Envoy sends copies once the live response begins, so a user who left before has none.

    The application may complete its response all the same.
    """
    return capture.role == "live" and capture.client_left


def _is_interrupted(capture: Capture, other: Capture) -> bool:
    """Tell whether one response may be shorter for reasons other than the version: a disconnect or the capture deadline."""
    return (
        capture.truncated_by_deadline
        or other.truncated_by_deadline
        or _has_client_left(capture)
        or _has_client_left(other)
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
    """Return the status for the client: the server sends 500 if the application raises before it responds."""
    return capture.answer.status or INTERNAL_SERVER_ERROR


def get_ledger_status(answer: Answer) -> int:
    """Return the status for counts of errors. A gRPC call has the status 200 although it fails."""
    for name, value in answer.trailers:
        if name == "grpc-status" and answer.status == OK:
            return STATUS_BY_GRPC_CODE.get(value, INTERNAL_SERVER_ERROR)
    return answer.status


def _is_load_shed(capture: Capture) -> bool:
    code = get_status(capture)
    return code == TOO_MANY_REQUESTS or (
        code == SERVICE_UNAVAILABLE and bool(get_header(capture.answer.headers, "retry-after"))
    )


def _compare_answers(old: Capture, new: Capture, options: CompareOptions, rule_set: RuleSet | None) -> BodyResult:
    result = _compare_captures(old, new, options, rule_set)
    if not result.differences:
        return result
    start_times = old.started_at, new.started_at
    differences = classify_anomalies(expand_embedded(result.differences, start_times), start_times)
    return result._replace(differences=differences)


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
        kind: Kind = "removed" if _is_broken_off(new) else "added"
        impact = "breaking" if _is_broken_off(new) else "value"
        ends = RenderedValues("", _describe_end(old), _describe_end(new))
        return [*differences, Difference("error", "unfinished", kind, impact, ends)], True
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
        differences += diff_expiry(before.headers, after.headers, (old.started_at, new.started_at))
    identity_lookup = rule_set.find_identity_field if rule_set and rule_set.keyed_by_rules else None
    classify = _make_classifier((old.started_at, new.started_at), rule_set)
    effects_result = BodyResult([])
    is_interrupted = _is_interrupted(old, new)
    if not is_interrupted:
        if before.trailers or after.trailers:
            differences += diff_trailers(before.trailers, after.trailers, options.volatile_headers)
        effects_result = diff_effects(old, new, options.max_differences, identity_lookup, classify)
        differences += effects_result.differences
    if old.request.method == "HEAD":
        return effects_result._replace(differences=differences)
    if _is_broken_off(old) or _is_broken_off(new):
        body_result = _compare_partial(old, new, options, identity_lookup, classify)
    else:
        body_result = compare_bodies(before, after, options, identity_lookup, classify)
    if (old.effects_dropped or new.effects_dropped) and not is_interrupted:
        body_result = body_result._replace(note=EFFECTS_DROPPED_NOTE, is_unreadable=True)
    if effects_result.note:
        is_partial = body_result.is_partial or effects_result.is_partial
        body_result = body_result.with_note(effects_result.note)._replace(is_partial=is_partial)
    if not differences:
        return body_result
    primary_differences = drop_consequences([*differences, *body_result.differences], get_status(old), get_status(new))
    return body_result._replace(differences=primary_differences)


def _make_classifier(start_times: StartTimes, rule_set: RuleSet | None) -> DifferenceClassifier:
    def classify(difference: Difference) -> Hashable:
        (classified,) = classify_anomalies([difference], start_times)
        (explained,) = rule_set.explain([classified]) if rule_set else (classified,)
        is_volatile = is_explained_by_shape([classified], start_times[0])
        return classified.kind, classified.impact, explained.explained_by, is_volatile

    return classify


def _compare_partial(
    old: Capture,
    new: Capture,
    options: CompareOptions,
    identity_lookup: IdentityLookup | None,
    classify: DifferenceClassifier,
) -> BodyResult:
    """Compare responses of which at least one broke off."""
    before, after = old.answer, new.answer
    if not (old.client_left or new.client_left) and is_same_content(before.body, after.body):
        return BodyResult([])
    truncation = (_is_broken_off(old), _is_broken_off(new))
    truncated_result = compare_truncated(before, after, truncation, options, identity_lookup, classify)
    if _has_client_left(old) or _has_client_left(new):
        cause = CLIENT_LEFT_NOTE
    else:
        cause = STILL_RUNNING_NOTE if _is_interrupted(old, new) else BOTH_BROKE_OFF_NOTE
    note = f"{cause}: compared were status, headers, {truncated_result.compared_part}"
    return BodyResult(truncated_result.differences, note, is_partial=True)


def _has_no_response(capture: Capture) -> bool:
    """Tell whether Envoy ended the request before the application answered."""
    return capture.answer.status == 0 and capture.client_left


def _is_broken_off(capture: Capture) -> bool:
    """Tell whether the response is shorter than announced."""
    if not capture.complete:
        return True
    if capture.request.method == "HEAD" or capture.answer.status in {204, NOT_MODIFIED}:
        return False
    text = get_header(capture.answer.headers, "content-length")
    return text.isdecimal() and text.isascii() and int(text[:18]) > capture.answer.body.length


def _is_hung(old: Capture, new: Capture) -> bool:
    """Tell whether one response still runs after more than twice the total time of the other."""
    running, other = (old, new) if old.truncated_by_deadline else (new, old)
    return running.truncated_by_deadline and other.complete and running.total_us > 2 * other.total_us


def _describe_end(capture: Capture) -> str:
    if not _is_broken_off(capture):
        return '"complete"'
    if capture.truncated_by_deadline:
        return render_value("not finished")
    return render_value(f"broken off by {capture.exception or 'the application'}")


def diff_effects(
    old: Capture,
    new: Capture,
    limit: int,
    identity_lookup: IdentityLookup | None = None,
    classify: DifferenceClassifier | None = None,
) -> BodyResult:
    """Compare effects: as a whole at `email.send`, by their payloads at `email.send.$.to`."""
    if not (old.effects or new.effects):
        return BodyResult([])
    before, after = _group_effects(old), _group_effects(new)
    differences: list[Difference] = []
    notes: list[str] = []
    is_partial = False
    for name in before | after:
        old_effects, new_effects = before.get(name, []), after.get(name, [])
        if old_effects == new_effects:
            continue
        matching = match_elements(old_effects, new_effects)
        differences += [
            _whole_effect_difference(name, "removed", old_effects[index], None) for index in matching.removed
        ]
        differences += [_whole_effect_difference(name, "added", None, new_effects[index]) for index in matching.added]
        if matching.is_reordered:
            differences.append(_whole_effect_difference(name, "order", old_effects, new_effects))
        diff = JsonDiff(limit, root=f"{name[0]}.$", part="effect", identity_lookup=identity_lookup, classify=classify)
        for index, new_index in matching.pairs:
            diff.compare(old_effects[index], new_effects[new_index])
        differences += diff.differences
        is_partial = is_partial or diff.omitted_count > 0
        notes += [f"effect {name[0]}: {note}" for note in describe_unlisted(diff)]
    return BodyResult(differences, "; ".join(notes), is_partial=is_partial)


def _group_effects(capture: Capture) -> dict[EffectName, list[Any]]:
    groups: dict[EffectName, list[Any]] = {}
    for effect in capture.effects:
        if not effect.get("note"):
            name = str(effect.get("kind", "")), str(effect.get("key", ""))
            groups.setdefault(name, []).append(describe_effect(effect))
    return groups


def describe_effect(effect: Mapping[str, Any]) -> Any:
    """Return the payload, or its digest if it is too long. Failures don't count: a shadow does not run effects."""
    if "digest" in effect:
        return {"digest": effect["digest"], "length": effect.get("length", 0)}
    return effect.get("payload")


def _whole_effect_difference(name: EffectName, kind: Kind, old: Any, new: Any) -> Difference:
    """Describe an effect on one side only. A missing effect is breaking: it may be an email that nobody gets."""
    path, key = name
    old_text = None if kind == "added" else render_value(old)
    new_text = None if kind == "removed" else render_value(new)
    location = RenderedValues(f"{path}[{key}]" if key else path, old_text, new_text)
    return Difference("effect", path, kind, "breaking" if kind == "removed" else "value", location)
