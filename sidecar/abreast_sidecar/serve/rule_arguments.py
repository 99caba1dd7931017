"""Rules in requests and responses: validation of requests, and conversion of stored rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from abreast.v1 import rule_pb2 as pb
from abreast_sidecar.compare.rule_document import (
    MAX_RULES,
    RuleError,
    dict_to_message,
    message_to_dict,
    rule_from_dict,
    rule_to_dict,
)
from abreast_sidecar.compare.rules import Rule
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.rules.attribution import FindingRef
from abreast_sidecar.rules.preview import RulePreview, narrow_to_finding
from abreast_sidecar.serve import validate
from abreast_sidecar.serve.convert import to_message
from abreast_sidecar.store.rules import RuleDraft, StoredRule

SCOPE_FIELDS = ("part", "path", "header", "status")


def parse_source(request: pb.ApplyRulesRequest) -> str:
    source_name = validate.check_text("source", request.source.strip())
    if not source_name:
        raise ArgumentError("source must name the origin of the rules, such as the name of a file")
    return source_name


def parse_rule(rule_message: pb.Rule, extra_fields: Any = None) -> Rule:
    """Convert and check a rule. Values of `extra_fields` apply to fields that are not set. Raise ArgumentError."""
    try:
        parsed_rule = rule_from_dict({**(extra_fields or {}), **message_to_dict(rule_message)})
    except RuleError as error:
        raise ArgumentError(str(error)) from error
    if parsed_rule.part == "latency" or parsed_rule.kind == "slower":
        raise ArgumentError("a rule can't explain latency: set the budget max_slower of the verdict instead")
    return replace(parsed_rule, owner="", reason="", name=parsed_rule.name or _build_rule_name(parsed_rule))


def parse_narrowed_rule(rule_message: pb.Rule, finding: FindingRef) -> Rule:
    """Convert a rule for a finding. The finding supplies the fields that are not set."""
    is_unscoped = not any(getattr(rule_message, name) for name in SCOPE_FIELDS)
    requested_rule = parse_rule(rule_message, {"part": finding.part, **_path_fields(finding)} if is_unscoped else None)
    narrowed_rule = narrow_to_finding(
        replace(requested_rule, part=None, path="") if is_unscoped else requested_rule, finding
    )
    return narrowed_rule if rule_message.name else replace(narrowed_rule, name=_build_rule_name(narrowed_rule))


def _path_fields(finding: FindingRef) -> dict[str, str]:
    return {"path": finding.path} if finding.part == "body" and finding.path else {}


def _build_rule_name(named_rule: Rule) -> str:
    """Build a name such as `ignore $.meta.id, GET /products/{id}`."""
    fields = rule_to_dict(replace(named_rule, name="", owner="", reason=""))
    action = fields.pop("action")
    return f"{action} {', '.join(str(value) for value in fields.values())}"[:300]


def parse_draft(rule_message: pb.Rule, parsed_rule: Rule, source: str = "") -> RuleDraft:
    """Check owner, reason and expiry, which every stored rule needs."""
    for name, description in (("owner", "who answers for the rule"), ("reason", "why the difference is known")):
        if not getattr(rule_message, name).strip():
            raise ArgumentError(f"{name} must state {description}")
    if not rule_message.HasField("expire_time"):
        raise ArgumentError("expire_time must be set: a rule that nobody reviews hides regressions")
    expires = validate.parse_time("expire_time", rule_message.expire_time)
    if expires <= datetime.now(UTC):
        raise ArgumentError(f"expire_time must be in the future, got {expires:%FT%TZ}")
    owner, reason = rule_message.owner.strip(), rule_message.reason.strip()
    return RuleDraft(parsed_rule, owner, reason, expires, source)


def parse_drafts(rule_messages: Iterable[pb.Rule], source: str) -> list[RuleDraft]:
    """Convert the rules of one source, with unique names."""
    message_list = list(rule_messages)
    if len(message_list) > MAX_RULES:
        raise ArgumentError(f"rules must have at most {MAX_RULES} entries, got {len(message_list)}")
    drafts_by_name: dict[str, RuleDraft] = {}
    for index, rule_message in enumerate(message_list):
        try:
            rule_draft = parse_draft(rule_message, parse_rule(rule_message), source)
        except ArgumentError as error:
            raise ArgumentError(f"rule {rule_message.name or index + 1}: {error}") from error
        if rule_draft.rule.name in drafts_by_name:
            raise ArgumentError(f"two rules are named {rule_draft.rule.name!r}")
        drafts_by_name[rule_draft.rule.name] = rule_draft
    return list(drafts_by_name.values())


def to_rule_message(plain_rule: Rule) -> pb.Rule:
    return dict_to_message(rule_to_dict(plain_rule), pb.Rule())


def to_draft_message(rule_draft: RuleDraft) -> pb.Rule:
    rule_message = to_rule_message(rule_draft.rule)
    rule_message.owner, rule_message.reason = rule_draft.owner, rule_draft.reason
    rule_message.source = rule_draft.source
    rule_message.expire_time.FromDatetime(rule_draft.expires_at)
    return rule_message


def to_stored_rule_message(stored_rule: StoredRule) -> pb.Rule:
    rule_message = to_draft_message(stored_rule.draft)
    rule_message.id = stored_rule.id
    rule_message.creator, rule_message.deleter = stored_rule.created_by, stored_rule.ended_by
    rule_message.create_time.FromDatetime(stored_rule.created_at)
    rule_message.state = pb.RULE_STATE_IN_FORCE
    if stored_rule.ended_at is not None:
        rule_message.end_time.FromDatetime(stored_rule.ended_at)
        rule_message.state = pb.RULE_STATE_EXPIRED if stored_rule.is_expired else pb.RULE_STATE_DELETED
    rule_message.reapplied, rule_message.pairs = stored_rule.is_applied, stored_rule.pairs
    rule_message.undetermined_pairs = stored_rule.undetermined_pairs
    rule_message.findings.extend(pb.ExplainedFinding(**finding._asdict()) for finding in stored_rule.findings)
    return rule_message


def to_hidden_finding_message(rule_preview: RulePreview) -> pb.HiddenFinding:
    return to_message(pb.HiddenFinding, rule_preview)
