"""Rules in Postgres. A rule is immutable: a change ends it and adds another one. Each change makes a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
from psycopg.types.json import Jsonb

from abreast_sidecar.compare.rule_document import RuleError, rule_from_dict, rule_to_dict
from abreast_sidecar.compare.rules import Rule, RuleSet
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.store.database import Connection, Database, Row, load_statement

RULES_CHANNEL = "abreast_rules"  # NOTIFY; the payload is the version
MAX_ACTIVE_RULES = 1000
MAX_RULE_FINDINGS = 20  # findings per listed rule
EXPIRY_ACTOR = "abreast"  # the actor that ends expired rules
SEPARATE_COLUMNS = ("name", "owner", "reason", "expires")  # not part of the definition


class VersionedRules(NamedTuple):
    """The active rules at a version. The name of each rule is its id."""

    version: int
    rules: RuleSet


class ExplainedFinding(NamedTuple):
    finding_id: int
    pairs: int  # explained by the rule
    undetermined_pairs: int  # older than the rule, without stored answers


@dataclass(frozen=True, slots=True)
class RuleDraft:
    """A rule before it is stored."""

    rule: Rule  # with its name
    owner: str
    reason: str
    expires_at: datetime
    source: str = ""

    @property
    def definition(self) -> dict[str, Any]:
        return {name: value for name, value in rule_to_dict(self.rule).items() if name not in SEPARATE_COLUMNS}


@dataclass(frozen=True, slots=True)
class StoredRule:
    id: int
    draft: RuleDraft
    created_at: datetime
    created_by: str
    ended_at: datetime | None = None
    ended_by: str = ""
    is_expired: bool = False
    is_applied: bool = False  # stored pairs are evaluated with the rule
    pairs: int = 0
    undetermined_pairs: int = 0
    findings: tuple[ExplainedFinding, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleFilter:
    source: str | None = None
    finding_id: int = 0
    include_expired: bool = True
    include_ended: bool = False


ALL_RULES = RuleFilter()


class RuleStore:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def get_active(self) -> VersionedRules:
        return parse_active_rules(await self.database.fetch_all("rules_in_force"))

    async def list_rules(
        self,
        criteria: RuleFilter = ALL_RULES,
        *,
        ids: Sequence[int] | None = None,
        after_id: int | None = None,
        limit: int,
    ) -> Sequence[StoredRule]:
        """List rules in the order of ids. A rule with one of `ids` is included if it has ended, too."""
        parameters = {
            "ids": None if ids is None else list(ids),
            "source": criteria.source,
            "finding_id": criteria.finding_id,
            "include_expired": criteria.include_expired,
            "include_ended": criteria.include_ended or ids is not None,
            "after_id": after_id,
            "limit": limit,
            "max_findings": MAX_RULE_FINDINGS,
        }
        return [parse_stored_rule(row) for row in await self.database.fetch_all("rules_list", parameters)]

    async def get(self, rule_id: int) -> StoredRule:
        matches = await self.list_rules(ids=[rule_id], limit=1)
        if not matches:
            raise NotFoundError(f"there is no rule {rule_id}; list the rules with `abreast rules list`")
        return matches[0]

    async def replace_rules(self, drafts: Sequence[RuleDraft], ended_ids: Sequence[int], actor: str) -> list[int]:
        """End rules and add others in one transaction. Return the ids of the added rules."""
        if not drafts and not ended_ids:
            return []
        async with self.database.connection() as connection, connection.transaction():
            version = await create_version(connection)
            await _end_rules(connection, ended_ids, version, actor)
            await _check_capacity(connection, len(drafts))
            return [await _add_rule(connection, draft, version, actor) for draft in drafts]

    async def delete(self, rule_id: int, actor: str) -> StoredRule:
        """End a rule. A rule that has ended stays unchanged. Raise NotFoundError."""
        await self.get(rule_id)
        await self.replace_rules([], [rule_id], actor)
        return await self.get(rule_id)


async def create_version(connection: Connection) -> int:
    row = await (await connection.execute(load_statement("rules_version_next"))).fetchone()
    assert row is not None
    return int(row["version"])


async def end_expired_rules(connection: Connection) -> int:
    """Return the number of rules that ended in this call."""
    parameters = {"sidecar_time": datetime.now(UTC)}
    due = await (await connection.execute(load_statement("rules_expired"), parameters)).fetchall()
    if not due:
        return 0
    async with connection.transaction():
        return await _end_rules(connection, [row["id"] for row in due], await create_version(connection), EXPIRY_ACTOR)


async def _end_rules(connection: Connection, ids: Sequence[int], version: int, actor: str) -> int:
    cursor = await connection.execute(
        load_statement("rules_end"), {"ids": list(ids), "version": version, "actor": actor}
    )
    return cursor.rowcount


async def _check_capacity(connection: Connection, added_count: int) -> None:
    active = parse_active_rules(await (await connection.execute(load_statement("rules_in_force"))).fetchall())
    if len(active.rules.rules) + added_count > MAX_ACTIVE_RULES:
        raise ArgumentError(f"at most {MAX_ACTIVE_RULES} rules can be active; delete some (abreast rules list)")


async def _add_rule(connection: Connection, draft: RuleDraft, version: int, actor: str) -> int:
    parameters = {
        "source": draft.source,
        "name": draft.rule.name,
        "definition": Jsonb(draft.definition),
        "owner": draft.owner,
        "reason": draft.reason,
        "expires": draft.expires_at,
        "actor": actor,
        "version": version,
    }
    try:
        row = await (await connection.execute(load_statement("rule_add"), parameters)).fetchone()
    except psycopg.errors.UniqueViolation:
        raise ArgumentError(
            f"a rule named {draft.rule.name!r} is active; delete it first, or choose another name"
        ) from None
    assert row is not None
    return int(row["id"])


def parse_active_rules(rows: Sequence[Row]) -> VersionedRules:
    rules = [parse_rule(row["id"], row["definition"]) for row in rows if row["id"] is not None]
    return VersionedRules(rows[0]["version"], RuleSet(tuple(rules)))


def parse_rule(rule_id: int, definition: Mapping[str, Any]) -> Rule:
    """Read a stored definition. Raise LedgerError if another version of abreast wrote a rule that this one can't read."""
    try:
        return replace(rule_from_dict(definition), name=str(rule_id))
    except RuleError as error:
        raise LedgerError(f"rule {rule_id} can't be read by this version of abreast: {error}") from error


def describe_waiver(rows: Sequence[Row], service: str, endpoint: str, release: str) -> str:
    """Describe the waiver of an endpoint, or return an empty text if it has no waiver."""
    for row in rows:
        rule = parse_rule(row["id"], row["definition"])
        if rule.applies_to(service, endpoint) and rule.applies_to_release(release):
            return f"waived by rule {row['id']} of {row['owner']} until {row['expires']:%Y-%m-%d}: {row['reason']}"
    return ""


def parse_stored_rule(row: Row) -> StoredRule:
    rule = replace(parse_rule(row["id"], row["definition"]), name=row["name"])
    return StoredRule(
        id=row["id"],
        draft=RuleDraft(rule, row["owner"], row["reason"], row["expires"], row["source"]),
        created_at=row["created_at"],
        created_by=row["created_by"],
        ended_at=row["ended_at"],
        ended_by=row["ended_by"] or "",
        is_expired=row["expired"],
        is_applied=row["reapplied"],
        pairs=row["pairs"],
        undetermined_pairs=row["unknown"],
        findings=tuple(ExplainedFinding(*values) for values in row["findings"]),
    )
