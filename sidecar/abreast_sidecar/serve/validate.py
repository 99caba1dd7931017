"""Checks of requests. Each function raises ArgumentError, which names the field and describes a valid value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from abreast.v1 import rollout_pb2
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.rollout.guard import GUARD_RULE_NAMES, GuardPolicy, GuardRule
from abreast_sidecar.rollout.ramp import RampPlan
from abreast_sidecar.serve.convert import from_message, read_fields
from abreast_sidecar.stats.verdict import Budget
from abreast_sidecar.store.reader import PageRequest
from abreast_sidecar.store.records import SETTABLE_STATUSES, StatusChange, Window
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT, AuditNote, TrafficChange, to_fixed_point

R = TypeVar("R")

PAIR_ID_PATTERN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MAX_NAME_CHARS = 300
MAX_ACTOR_CHARS = 200
MAX_REASON_CHARS = 2000
MAX_PAGE_TOKEN_CHARS = 4000
DEFAULT_WAIT_S = 1.0
MAX_WAIT_S = 10.0
MAX_ID = 2**63 - 1
SHARE_UNITS = {"new_share": TOTAL_WEIGHT, "sample_safe": MILLION, "sample_unsafe": MILLION, "baseline_share": MILLION}


@contextmanager
def argument_errors(prefix: str = "") -> Iterator[None]:
    """Turn a record's ValueError, which begins with the name of a field, into ArgumentError."""
    try:
        yield
    except ValueError as error:
        raise ArgumentError(f"{prefix}{error}") from error


def check_text(name: str, value: str, max_chars: int = MAX_NAME_CHARS) -> str:
    if len(value) > max_chars:
        raise ArgumentError(f"{name} must have at most {max_chars} characters, got {len(value)}")
    if "\x00" in value:
        raise ArgumentError(f"{name} must not contain a NUL character")
    return value


def check_pair_id(value: str) -> str:
    identifier = value.strip().lower()
    if not PAIR_ID_PATTERN.fullmatch(identifier):
        raise ArgumentError(
            f"id must be the id of a pair, as in the response header x-abreast-pair, got {value[:80]!r}"
        )
    return identifier


def check_finding_id(field: str, value: int, *, minimum: int = 1) -> int:
    if value < minimum:
        raise ArgumentError(f"{field} must be the id of a finding from ListFindings, got {value}")
    return value


def parse_time(name: str, value: Timestamp) -> datetime:
    with argument_errors(f"{name} must be a time from year 1 to 9999: "):
        return value.ToDatetime(tzinfo=UTC)


def parse_window(request: Any) -> Window:
    """Read the field `window`."""
    with argument_errors("window."):
        window = from_message(Window, request.window)
    if window.start is not None and window.end is not None and window.end < window.start:
        raise ArgumentError(
            f"window.end must not be before window.start, got {window.end:%FT%TZ} before {window.start:%FT%TZ}"
        )
    return window


def parse_page(request: Any) -> PageRequest:
    """Read the fields `page_size` and `page_token`."""
    token = check_text("page_token", request.page_token, MAX_PAGE_TOKEN_CHARS)
    return PageRequest.from_request(request.page_size, token)


def parse_filter(filter_type: type[R], request: Any) -> R:
    """Read the fields of a filter, with `window` and `method`."""
    for field, value in request.ListFields():
        if isinstance(value, str) and field.name != "page_token":
            check_text(field.name, value)
    with argument_errors():
        return from_message(filter_type, request, window=parse_window(request), method=request.method.upper())


def parse_budget(message: Any) -> Budget:
    """Read the field `budget`."""
    with argument_errors("budget."):
        return from_message(Budget, message.budget)


def parse_wait(request: Any) -> float:
    """Read the field `wait`, in seconds."""
    if not request.HasField("wait"):
        return DEFAULT_WAIT_S
    wait_s: float = request.wait.seconds + request.wait.nanos / 1e9
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise ArgumentError(f"wait must be 0 to {MAX_WAIT_S:g} s, got {wait_s:g} s")
    return wait_s


def parse_actor(request: Any, peer: str) -> str:
    """Read the field `actor`. If it is empty, the caller's address is the actor."""
    return check_text("actor", request.actor.strip(), MAX_ACTOR_CHARS) or f"someone at {peer}"


def parse_note(request: Any, peer: str) -> AuditNote:
    """Read the fields `actor` and `reason`."""
    return AuditNote(parse_actor(request, peer), check_text("reason", request.reason.strip(), MAX_REASON_CHARS))


def parse_status_change(request: Any, peer: str) -> StatusChange:
    """Read a SetFindingStatusRequest."""
    note = parse_note(request, peer)
    with argument_errors():
        change = from_message(StatusChange, request, actor=note.actor, reason=note.reason)
    if change.status not in SETTABLE_STATUSES:
        raise ArgumentError(f"status must be one of {', '.join(SETTABLE_STATUSES)}, got {change.status or 'none'}")
    if not change.reason:
        raise ArgumentError("reason must not be empty: the finding's history shows it")
    release = check_text("release", change.release.strip())
    if release and change.status != "fixed":
        raise ArgumentError(f"release must be empty unless the status is fixed, got status {change.status}")
    return replace(change, release=release)


def parse_traffic_change(request: Any) -> TrafficChange:
    """Read an UpdateTrafficRequest."""
    shares = {
        name: to_fixed_point(name, getattr(request, name), unit)
        for name, unit in SHARE_UNITS.items()
        if request.HasField(name)
    }
    if not shares:
        raise ArgumentError(f"set at least one of {', '.join(SHARE_UNITS)}")
    return TrafficChange("update", **shares)


def parse_policy_change(policy: rollout_pb2.GuardPolicy) -> Callable[[GuardPolicy], GuardPolicy]:
    """Return a function that applies the fields that are set. The function raises ArgumentError too."""
    with argument_errors("policy."):
        changes = read_fields(GuardPolicy, policy, skip=GUARD_RULE_NAMES)
        rule_changes = {
            name: read_fields(GuardRule, getattr(policy, name)) for name in GUARD_RULE_NAMES if policy.HasField(name)
        }
    if not changes and not any(rule_changes.values()):
        raise ArgumentError("set at least one field of policy")

    def apply(before: GuardPolicy) -> GuardPolicy:
        with argument_errors("policy."):
            rules: dict[str, Any] = {
                name: replace(before.rule(name), **fields) for name, fields in rule_changes.items()
            }
            return replace(before, **changes, **rules)

    return apply


def parse_plan(plan: rollout_pb2.RampPlan) -> RampPlan:
    steps = tuple(to_fixed_point("plan.steps", share, TOTAL_WEIGHT) for share in plan.steps)
    with argument_errors("plan."):
        return from_message(RampPlan, plan, steps=steps)
