"""The rules in Postgres. A rule is never changed: it is ended, and another begins; each change is a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
from psycopg.types.json import Jsonb

from abreast_sidecar.compare import Rule, RuleSet
from abreast_sidecar.compare.rules_file import RuleError, fields_of, from_fields
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.store.database import Connection, Database, Row, statement

CHANNEL = "abreast_rules"  # NOTIFY; the payload is the version
MAX_IN_FORCE = 1000
MOST_FINDINGS = 20  # that a listing names of a rule
EXPIRED = "abreast"  # who ended a rule that expired
APART = ("name", "owner", "reason", "expires")  # columns of their own


class InForce(NamedTuple):
    """The rules at a version. Each is named by its id."""

    version: int
    rules: RuleSet


class Hidden(NamedTuple):
    finding_id: int
    pairs: int  # that the rule explains
    unknown: int  # that were judged before the rule, and whose answers are not kept


@dataclass(frozen=True, slots=True)
class Draft:
    """A rule as somebody wants it."""

    rule: Rule  # with its name
    owner: str
    reason: str
    expires: datetime
    source: str = ""

    @property
    def definition(self) -> dict[str, Any]:
        return {name: value for name, value in fields_of(self.rule).items() if name not in APART}


@dataclass(frozen=True, slots=True)
class StoredRule:
    id: int
    draft: Draft
    created_at: datetime
    created_by: str
    ended_at: datetime | None = None
    ended_by: str = ""
    expired: bool = False
    rejudged: bool = False  # what is stored is judged accordingly
    pairs: int = 0
    unknown: int = 0
    findings: tuple[Hidden, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleFilter:
    source: str | None = None
    finding_id: int = 0
    include_expired: bool = True
    include_ended: bool = False


ALL = RuleFilter()


class RuleStore:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def in_force(self) -> InForce:
        return of_rows(await self.database.rows("rules_in_force"))

    async def listed(
        self,
        wanted: RuleFilter = ALL,
        *,
        ids: Sequence[int] | None = None,
        after: int | None = None,
        limit: int,
    ) -> Sequence[StoredRule]:
        """By id; those with `ids` whether they hold or not."""
        asked = {
            "ids": None if ids is None else list(ids),
            "source": wanted.source,
            "finding_id": wanted.finding_id,
            "include_expired": wanted.include_expired,
            "include_ended": wanted.include_ended or ids is not None,
            "after_id": after,
            "limit": limit,
            "max_findings": MOST_FINDINGS,
        }
        return [stored(row) for row in await self.database.rows("rules_list", asked)]

    async def get(self, number: int) -> StoredRule:
        found = await self.listed(ids=[number], limit=1)
        if not found:
            raise NotFoundError(f"there is no rule {number}; `abreast rules list` names those that there are")
        return found[0]

    async def change(self, drafts: Sequence[Draft], ended: Sequence[int], actor: str) -> list[int]:
        """End some rules and begin others, together. Return the ids of those that began."""
        if not drafts and not ended:
            return []
        async with self.database.connection() as connection, connection.transaction():
            version = await next_version(connection)
            await _end(connection, ended, version, actor)
            await _check_room(connection, len(drafts))
            return [await _add(connection, draft, version, actor) for draft in drafts]

    async def delete(self, number: int, actor: str) -> StoredRule:
        """Raise NotFoundError for one that there never was. One that ended before stays as it is."""
        await self.get(number)
        await self.change([], [number], actor)
        return await self.get(number)


async def next_version(connection: Connection) -> int:
    row = await (await connection.execute(statement("rules_version_next"))).fetchone()
    assert row is not None
    return int(row["version"])


async def end_expired(connection: Connection) -> int:
    """Return how many rules ended now."""
    own = {"sidecar_time": datetime.now(UTC)}
    due = await (await connection.execute(statement("rules_expired"), own)).fetchall()
    if not due:
        return 0
    async with connection.transaction():
        return await _end(connection, [row["id"] for row in due], await next_version(connection), EXPIRED)


async def _end(connection: Connection, ids: Sequence[int], version: int, actor: str) -> int:
    cursor = await connection.execute(
        statement("rules_end"), {"ids": list(ids), "version": version, "actor": actor}
    )
    return cursor.rowcount


async def _check_room(connection: Connection, more: int) -> None:
    held = of_rows(await (await connection.execute(statement("rules_in_force"))).fetchall())
    if len(held.rules.rules) + more > MAX_IN_FORCE:
        raise ArgumentError(
            f"at most {MAX_IN_FORCE} rules may hold at once; delete some (abreast rules list)"
        )


async def _add(connection: Connection, draft: Draft, version: int, actor: str) -> int:
    given = {
        "source": draft.source,
        "name": draft.rule.name,
        "definition": Jsonb(draft.definition),
        "owner": draft.owner,
        "reason": draft.reason,
        "expires": draft.expires,
        "actor": actor,
        "version": version,
    }
    try:
        row = await (await connection.execute(statement("rule_add"), given)).fetchone()
    except psycopg.errors.UniqueViolation:
        raise ArgumentError(
            f"a rule named {draft.rule.name!r} holds already; delete it first, or choose another name"
        ) from None
    assert row is not None
    return int(row["id"])


def of_rows(rows: Sequence[Row]) -> InForce:
    found = [named(row["id"], row["definition"]) for row in rows if row["id"] is not None]
    return InForce(rows[0]["version"], RuleSet(tuple(found)))


def named(number: int, definition: Mapping[str, Any]) -> Rule:
    """Raise LedgerError for one that another version of abreast wrote and this one can't read."""
    try:
        return replace(from_fields(definition), name=str(number))
    except RuleError as error:
        raise LedgerError(f"rule {number} can't be read by this version of abreast: {error}") from error


def waived(rows: Sequence[Row], service: str, endpoint: str, release: str) -> str:
    """Who waives the coverage of an endpoint, and why; empty where nobody does."""
    for row in rows:
        rule = named(row["id"], row["definition"])
        if rule.applies_to(service, endpoint) and rule.applies_to_release(release):
            return f"waived by rule {row['id']} of {row['owner']} until {row['expires']:%Y-%m-%d}: {row['reason']}"
    return ""


def stored(row: Row) -> StoredRule:
    rule = replace(named(row["id"], row["definition"]), name=row["name"])
    return StoredRule(
        id=row["id"],
        draft=Draft(rule, row["owner"], row["reason"], row["expires"], row["source"]),
        created_at=row["created_at"],
        created_by=row["created_by"],
        ended_at=row["ended_at"],
        ended_by=row["ended_by"] or "",
        expired=row["expired"],
        rejudged=row["reapplied"],
        pairs=row["pairs"],
        unknown=row["unknown"],
        findings=tuple(Hidden(*found) for found in row["findings"]),
    )
