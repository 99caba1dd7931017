"""What requests say of rules, checked; and rules as messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from abreast.v1 import common_pb2
from abreast.v1 import rule_pb2 as pb
from abreast_sidecar.compare import Rule
from abreast_sidecar.compare.rules_file import MAX_RULES, RuleError, fields_of, from_fields
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.rejudge.places import Known
from abreast_sidecar.rejudge.preview import Hides, fitted
from abreast_sidecar.rule_messages import fields_of as said_by
from abreast_sidecar.rule_messages import message_of
from abreast_sidecar.serve import arguments, messages, values
from abreast_sidecar.store.rules import Draft, StoredRule

WIDE = ("part", "path", "header", "status")


def actor(request: Any, peer: str) -> str:
    return arguments.text("actor", request.actor.strip(), arguments.ACTOR_LIMIT) or f"someone at {peer}"


def source(request: pb.ApplyRulesRequest) -> str:
    found = arguments.text("source", request.source.strip())
    if not found:
        raise ArgumentError("source must say whose rules these are, such as the file's name")
    return found


def rule(given: pb.Rule, extra: Any = None) -> Rule:
    """Raise ArgumentError, which names the field and says what is wanted."""
    try:
        found = from_fields({**(extra or {}), **said_by(given)})
    except (RuleError, ValueError) as error:
        raise ArgumentError(str(error)) from error
    if found.part == "latency" or found.kind == "slower":
        raise ArgumentError(
            "rules are not for times: the verdict's budget (max_slower) says how much slower new may be"
        )
    return replace(found, owner="", reason="", name=found.name or _named(found))


def fitted_rule(given: pb.Rule, known: Known) -> Rule:
    """With what it leaves out taken from the finding that it is made for."""
    bare = not any(getattr(given, name) for name in WIDE)
    asked = rule(given, {"part": known.part, **_path(known)} if bare else None)
    found = fitted(replace(asked, part=None, path="") if bare else asked, known)
    return found if given.name else replace(found, name=_named(found))


def _path(known: Known) -> dict[str, str]:
    return {"path": known.path} if known.part == "body" and known.path else {}


def _named(found: Rule) -> str:
    """Such as `ignore $.meta.id, GET /products/{id}`."""
    fields = fields_of(replace(found, name="", owner="", reason=""))
    action = fields.pop("action")
    return f"{action} {', '.join(str(value) for value in fields.values())}"[:300]


def draft(given: pb.Rule, made: Rule, source: str = "") -> Draft:
    """With who, why and until when, which every rule must have."""
    for name, what in (("owner", "who answers for the rule"), ("reason", "why the difference is known")):
        if not getattr(given, name).strip():
            raise ArgumentError(f"{name} must say {what}")
    if not given.HasField("expire_time"):
        raise ArgumentError(
            "expire_time must say until when the rule holds: one that nobody looks at again hides regressions"
        )
    expires = arguments.moment("expire_time", given.expire_time)
    if expires <= datetime.now(UTC):
        raise ArgumentError(f"expire_time must lie in the future, got {expires:%FT%TZ}")
    owner, reason = given.owner.strip(), given.reason.strip()
    return Draft(made, owner, reason, expires, source)


def drafts(given: Iterable[pb.Rule], source: str) -> list[Draft]:
    """Of one source."""
    listed = list(given)
    if len(listed) > MAX_RULES:
        raise ArgumentError(f"rules must be at most {MAX_RULES}, got {len(listed)}")
    made: dict[str, Draft] = {}
    for place, one in enumerate(listed):
        try:
            found = draft(one, rule(one), source)
        except ArgumentError as error:
            raise ArgumentError(f"rule {one.name or place + 1}: {error}") from error
        if found.rule.name in made:
            raise ArgumentError(f"two rules are named {found.rule.name!r}")
        made[found.rule.name] = found
    return list(made.values())


def spec(found: Rule) -> pb.Rule:
    return message_of(fields_of(found))


def spec_of(found: Draft) -> pb.Rule:
    made = spec(found.rule)
    made.owner, made.reason, made.source = found.owner, found.reason, found.source
    made.expire_time.FromDatetime(found.expires)
    return made


def message(found: StoredRule) -> pb.Rule:
    made = spec_of(found.draft)
    made.id, made.creator, made.ender = found.id, found.created_by, found.ended_by
    made.create_time.FromDatetime(found.created_at)
    made.state = pb.RULE_STATE_IN_FORCE
    if found.ended_at is not None:
        made.end_time.FromDatetime(found.ended_at)
        made.state = pb.RULE_STATE_EXPIRED if found.expired else pb.RULE_STATE_DELETED
    made.rejudged, made.pairs, made.unknown = found.rejudged, found.pairs, found.unknown
    made.findings.extend(pb.ExplainedFinding(**one._asdict()) for one in found.findings)
    return made


def hidden(found: Hides) -> pb.HiddenFinding:
    known = found.known
    return pb.HiddenFinding(
        finding_id=known.id,
        endpoint=common_pb2.Endpoint(service=known.service, method=known.method, route=known.route),
        part=values.number(messages.PART, known.part),  # type: ignore[arg-type]  # an int is one
        path=known.path,
        kind=values.number(messages.KIND, known.kind),  # type: ignore[arg-type]  # an int is one
        confirmed=known.status == "confirmed",
        pairs=found.pairs,
        exact=found.exact,
        examples=found.examples,
        hidden_examples=found.hidden,
    )
