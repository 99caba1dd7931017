"""Stores rules in Postgres. Rules are immutable: a change ends one and begins another, and each change is a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
from psycopg.types.json import Jsonb

from abreast_sidecar.compare.endpoints import NO_TEMPLATES, EndpointTemplates, Template
from abreast_sidecar.compare.rule_document import RuleError, rule_from_dict, rule_to_dict
from abreast_sidecar.compare.rules import CompareOptions, Rule, RuleSet
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.store.database import Connection, Database, Row, execute, fetch_row, fetch_rows
from abreast_sidecar.store.records import from_row

RULES_CHANNEL = "abreast_rules"  # NOTIFY; the payload is the version
MAX_ACTIVE_RULES = 1000
MAX_RULE_FINDINGS = 20  # per rule in a listing
EXPIRY_ACTOR = "abreast"  # ends expired rules
SEPARATE_COLUMNS = ("name", "owner", "reason", "expires")  # fields of a rule that are columns


class VersionedRules(NamedTuple):
    """The rules in force at a version, and the templates of endpoints. The name of each rule is its id."""

    version: int
    rules: RuleSet
    templates: EndpointTemplates = NO_TEMPLATES

    def apply(self, options: CompareOptions) -> CompareOptions:
        return replace(options, rule_set=self.rules, templates=self.templates)


class ExplainedFinding(NamedTuple):
    finding_id: int
    pairs: int  # explained by the rule
    undetermined_pairs: int  # pairs from before the rule without stored captures


@dataclass(frozen=True, slots=True)
class RuleDraft:
    """A rule to begin."""

    rule: Rule
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
    is_applied: bool = False  # stored pairs reflect the rule, or its end
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
        """Read the rules and the templates. Templates may be of a later version; a writer checks the version."""
        async with self.database.connection() as connection:
            active = parse_active_rules(await fetch_rows(connection, "rules_in_force"))
            return active._replace(templates=await read_templates(connection))

    async def list_rules(
        self,
        criteria: RuleFilter = ALL_RULES,
        *,
        ids: Sequence[int] | None = None,
        after_id: int | None = None,
        limit: int,
    ) -> Sequence[StoredRule]:
        """List rules by id. With `ids`, list these rules even if they have ended."""
        parameters = {
            **asdict(criteria),
            "include_ended": criteria.include_ended or ids is not None,
            "ids": None if ids is None else list(ids),
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
        """End some rules and begin others in one version. Return the ids of the new rules."""
        if not drafts and not ended_ids:
            return []
        async with self.database.connection() as connection, connection.transaction():
            version = await _create_version(connection)
            await _end_rules(connection, ended_ids, version, actor)
            active = parse_active_rules(await fetch_rows(connection, "rules_in_force"))
            if len(active.rules.rules) + len(drafts) > MAX_ACTIVE_RULES:
                raise ArgumentError(f"at most {MAX_ACTIVE_RULES} rules can be active; delete some (abreast rules list)")
            return [await _add_rule(connection, draft, version, actor) for draft in drafts]

    async def delete(self, rule_id: int, actor: str) -> StoredRule:
        """End the rule, unless it has ended before. Raise NotFoundError for an unknown rule."""
        await self.get(rule_id)
        await self.replace_rules([], [rule_id], actor)
        return await self.get(rule_id)


async def end_expired_rules(connection: Connection) -> int:
    """End expired rules, and return their number."""
    expired = await fetch_rows(connection, "rules_expired", {"sidecar_time": datetime.now(UTC)})
    if not expired:
        return 0
    async with connection.transaction():
        version = await _create_version(connection)
        return await _end_rules(connection, [row["id"] for row in expired], version, EXPIRY_ACTOR)


async def _create_version(connection: Connection) -> int:
    return int((await fetch_row(connection, "rules_version_next"))["version"])


async def _end_rules(connection: Connection, ids: Sequence[int], version: int, actor: str) -> int:
    cursor = await execute(connection, "rules_end", {"ids": list(ids), "version": version, "actor": actor})
    return cursor.rowcount


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
        return int((await fetch_row(connection, "rule_add", parameters))["id"])
    except psycopg.errors.UniqueViolation:
        raise ArgumentError(
            f"a rule named {draft.rule.name!r} is active; delete it first, or choose another name"
        ) from None


async def read_templates(connection: Connection) -> EndpointTemplates:
    rows = await fetch_rows(connection, "templates_read")
    return EndpointTemplates.from_templates(Template(**row) for row in rows)


def parse_active_rules(rows: Sequence[Row]) -> VersionedRules:
    rules = [parse_rule(row["id"], row["definition"]) for row in rows if row["id"] is not None]
    return VersionedRules(rows[0]["version"], RuleSet(tuple(rules)))


def parse_rule(rule_id: int, definition: Mapping[str, Any]) -> Rule:
    """Return a stored rule. Raise LedgerError if another version of abreast wrote it and this one can't read it."""
    try:
        return replace(rule_from_dict(definition), name=str(rule_id))
    except RuleError as error:
        raise LedgerError(f"rule {rule_id} can't be read by this version of abreast: {error}") from error


def describe_waiver(rows: Sequence[Row], service: str, endpoint: str, release: str) -> str:
    """Describe the rule that waives the coverage of an endpoint; return empty text without such a rule."""
    for row in rows:
        rule = parse_rule(row["id"], row["definition"])
        if rule.applies_to(service, endpoint) and rule.applies_to_release(release):
            return f"waived by rule {row['id']} of {row['owner']} until {row['expires']:%Y-%m-%d}: {row['reason']}"
    return ""


def parse_stored_rule(row: Row) -> StoredRule:
    rule = replace(parse_rule(row["id"], row["definition"]), name=row["name"])
    draft = RuleDraft(rule, row["owner"], row["reason"], row["expires"], row["source"])
    findings = tuple(ExplainedFinding(*counts) for counts in row["findings"])
    return from_row(StoredRule, row, draft=draft, findings=findings)
