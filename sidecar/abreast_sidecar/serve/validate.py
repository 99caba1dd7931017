"""Checks of requests. Each function raises ArgumentError, which names the field and describes a valid value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from abreast.v1 import access_pb2, rollout_pb2, rule_pb2
from abreast_sidecar.compare.rule_document import MAX_RULES, RuleError, message_to_dict, rule_from_dict, rule_to_dict
from abreast_sidecar.compare.rules import Rule
from abreast_sidecar.envoy.sampling import SampleRule
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.rollout.guard import GUARD_RULE_NAMES, GuardPolicy, GuardRule
from abreast_sidecar.rollout.ramp import RampPlan
from abreast_sidecar.rules.attribution import FindingRef
from abreast_sidecar.rules.preview import narrow_to_finding
from abreast_sidecar.serve.convert import from_message, read_fields
from abreast_sidecar.serve.proto import name_enum_number
from abreast_sidecar.stats.verdict import Budget
from abreast_sidecar.store.access import RESERVED_NAMES, Scope, TokenDraft
from abreast_sidecar.store.reader import PageRequest
from abreast_sidecar.store.records import SETTABLE_STATUSES, StatusChange, Window
from abreast_sidecar.store.rules import RuleDraft
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT, AuditNote, Drill, TrafficChange, to_fixed_point

R = TypeVar("R")

PAIR_ID_PATTERN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TOKEN_NAME_PATTERN = re.compile(r"[\w.@-]{1,100}", re.ASCII)
MAX_NAME_CHARS = 300
MAX_ACTOR_CHARS = 200
MAX_REASON_CHARS = 2000
MAX_PAGE_TOKEN_CHARS = 4000
DEFAULT_WAIT_S = 1.0
MAX_WAIT_S = 10.0
MIN_BUDGET_RATE, MIN_BUDGET_CONFIDENCE = 1e-6, 0.5
MAX_ID = 2**63 - 1
MAX_CLOCK_SKEW = timedelta(minutes=1)  # between a caller and this machine
RULE_SCOPE_FIELDS = ("part", "path", "header", "status")
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
            f"id must be the UUID of a pair, from the response header x-abreast-pair or `abreast pairs`, got {value[:80]!r}"
        )
    return identifier


def check_finding_id(field: str, value: int, *, minimum: int = 1) -> int:
    if value < minimum:
        raise ArgumentError(f"{field} must be the id of a finding from ListFindings, got {value}")
    return value


def parse_window(request: Any) -> Window:
    """Read the field `window`."""
    with argument_errors("window."):
        window = from_message(Window, request.window)
    if window.start is not None and window.start > datetime.now(UTC) + MAX_CLOCK_SKEW:
        raise ArgumentError(f"window.start must not be in the future, got {window.start:%FT%TZ}")
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
        return check_budget(from_message(Budget, message.budget))


def check_budget(budget: Budget) -> Budget:
    """Raise ValueError for a budget that no number of pairs can meet, or that makes a verdict a guess."""
    for name in ("max_mismatch", "max_error"):
        if getattr(budget, name) < MIN_BUDGET_RATE:
            raise ValueError(
                f"{name} must be at least {MIN_BUDGET_RATE:g}, got {getattr(budget, name):g}: "
                "no number of pairs proves a lower rate"
            )
    if budget.confidence < MIN_BUDGET_CONFIDENCE:
        raise ValueError(
            f"confidence must be at least {MIN_BUDGET_CONFIDENCE:g}, got {budget.confidence:g}: "
            "below it, a verdict is a guess"
        )
    return budget


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
    """Read an UpdateTrafficRequest. The caller resolves the names of `rule_shares`."""
    shares = {
        name: to_fixed_point(name, getattr(request, name), unit)
        for name, unit in SHARE_UNITS.items()
        if request.HasField(name)
    }
    rule_shares = {
        name: to_fixed_point(f"rule_shares[{name!r}]", share, MILLION) for name, share in request.rule_shares.items()
    }
    if not shares and not rule_shares:
        raise ArgumentError(f"set at least one of {', '.join(SHARE_UNITS)} and rule_shares")
    change = TrafficChange("update", **shares, rule_shares=rule_shares)
    return replace(change, expected_version=parse_expected_version(request))


def resolve_rule_shares(
    rule_shares: Mapping[str, int], rules: Sequence[SampleRule], set_names: Iterable[str]
) -> dict[str, int]:
    """Return the shares by the names of rules. A key is a name or a condition. `set_names` already have a share."""
    names = {name: name for name in set_names}
    names |= {key: rule.name for rule in rules for key in (rule.condition, rule.name)}
    for key in rule_shares:
        if key not in names:
            known = ", ".join(rule.name for rule in rules) or "none; add one with abreast envoy render --sample"
            raise ArgumentError(
                f"rule_shares must name rules of the connected Envoys, got {key[:MAX_NAME_CHARS]!r}: they have {known}"
            )
    return {names[key]: share for key, share in rule_shares.items()}


def parse_expected_version(request: Any) -> int | None:
    """Read the field `expected_version`; None if it is not set."""
    return request.expected_version if request.HasField("expected_version") else None


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


def parse_drill(request: Any) -> Drill:
    """Read a StartDrillRequest."""
    part = to_fixed_point("share", request.share, MILLION)
    with argument_errors():
        return Drill(
            part,
            request.delay.ToTimedelta().total_seconds(),
            request.duration.ToTimedelta().total_seconds(),
            by_header=request.by_header,
        )


def parse_plan(plan: rollout_pb2.RampPlan) -> RampPlan:
    steps = tuple(to_fixed_point("plan.steps", share, TOTAL_WEIGHT) for share in plan.steps)
    with argument_errors("plan."):
        ramp_plan = from_message(RampPlan, plan, steps=steps)
    with argument_errors("plan.budget."):
        check_budget(ramp_plan.budget)
    return ramp_plan


def parse_rule(message: rule_pb2.Rule, extra_fields: Mapping[str, str] | None = None) -> Rule:
    """Convert and check a rule. Values of `extra_fields` apply to fields that are not set. Raise ArgumentError."""
    try:
        rule = rule_from_dict({**(extra_fields or {}), **message_to_dict(message)})
    except RuleError as error:
        raise ArgumentError(str(error)) from error
    if rule.part == "latency" or rule.kind == "slower":
        raise ArgumentError("a rule can't explain latency: set the budget max_slower of the verdict instead")
    return replace(rule, owner="", reason="", name=rule.name or _build_rule_name(rule))


def parse_narrowed_rule(message: rule_pb2.Rule, finding: FindingRef) -> Rule:
    """Convert a rule for a finding. The finding supplies the fields that are not set."""
    if any(getattr(message, name) for name in RULE_SCOPE_FIELDS):
        rule = parse_rule(message)
    else:
        path = {"path": finding.path} if finding.part == "body" and finding.path else {}
        rule = replace(parse_rule(message, {"part": finding.part, **path}), part=None, path="")
    rule = narrow_to_finding(rule, finding)
    return rule if message.name else replace(rule, name=_build_rule_name(rule))


def _build_rule_name(rule: Rule) -> str:
    """Build a name such as `ignore $.meta.id, GET /products/{id}`."""
    fields = rule_to_dict(replace(rule, name="", owner="", reason=""))
    action = fields.pop("action")
    return f"{action} {', '.join(map(str, fields.values()))}"[:MAX_NAME_CHARS]


def parse_draft(message: rule_pb2.Rule, rule: Rule, source: str = "") -> RuleDraft:
    """Check owner, reason and expiry, which every stored rule needs."""
    for name, description in (("owner", "who answers for the rule"), ("reason", "why the difference is known")):
        if not getattr(message, name).strip():
            raise ArgumentError(f"{name} must state {description}")
    if not message.HasField("expire_time"):
        raise ArgumentError("expire_time must be set: a rule that nobody reviews hides regressions")
    with argument_errors("expire_time must be a time from year 1 to 9999: "):
        expires_at = message.expire_time.ToDatetime(tzinfo=UTC)
    if expires_at <= datetime.now(UTC):
        raise ArgumentError(f"expire_time must be in the future, got {expires_at:%FT%TZ}")
    return RuleDraft(rule, message.owner.strip(), message.reason.strip(), expires_at, source)


def parse_drafts(request: rule_pb2.ApplyRulesRequest) -> tuple[str, list[RuleDraft]]:
    """Return the source of an ApplyRulesRequest, and its rules, which have unique names."""
    source = check_text("source", request.source.strip())
    if not source:
        raise ArgumentError("source must name the origin of the rules, such as the name of a file")
    if len(request.rules) > MAX_RULES:
        raise ArgumentError(f"rules must have at most {MAX_RULES} entries, got {len(request.rules)}")
    drafts: dict[str, RuleDraft] = {}  # by name
    for index, message in enumerate(request.rules):
        try:
            draft = parse_draft(message, parse_rule(message), source)
        except ArgumentError as error:
            raise ArgumentError(f"rule {message.name or index + 1}: {error}") from error
        if draft.rule.name in drafts:
            raise ArgumentError(f"two rules are named {draft.rule.name!r}")
        drafts[draft.rule.name] = draft
    return source, list(drafts.values())


def parse_token(request: access_pb2.CreateTokenRequest, peer: str) -> TokenDraft:
    if not TOKEN_NAME_PATTERN.fullmatch(request.name) or request.name in RESERVED_NAMES:
        raise ArgumentError(
            f"name must be 1 to 100 letters, digits or any of ._@- other than {', '.join(sorted(RESERVED_NAMES))}, "
            f"got {request.name[:100]!r}"
        )
    scopes = [name_enum_number(access_pb2.Scope.DESCRIPTOR, number) for number in request.scopes]
    if not scopes or "" in scopes:
        raise ArgumentError(f"scopes must be at least one of {', '.join(Scope)}")
    for service in request.services:
        if not check_text("services", service):
            raise ArgumentError("services must be names of services, without empty text")
    if request.node and Scope.ENVOY not in scopes:
        raise ArgumentError("node must be empty unless the token has the scope envoy")
    with argument_errors("expire_time must be a time from year 1 to 9999: "):
        expire_time = request.expire_time.ToDatetime(tzinfo=UTC) if request.HasField("expire_time") else None
    if expire_time is not None and expire_time <= datetime.now(UTC):
        raise ArgumentError(f"expire_time must be in the future, got {expire_time:%FT%TZ}")
    services = sorted(set(request.services))
    node, creator = check_text("node", request.node), parse_actor(request, peer)
    return TokenDraft(request.name, sorted(set(scopes)), services, node, expire_time, creator)
