"""Is the ledger there, and of this code's schema?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg

from abreast_sidecar.cli.checks.check import Check, Part, UnreachableError, without_password
from abreast_sidecar.cli.humane import counted, size

POSTGRES = Part("Postgres")
TIMEOUT = 3  # seconds
OLDEST = 150_000  # server_version_num
FACTS = (
    "select current_setting('server_version_num')::int, current_setting('server_version'),"
    " extract(epoch from clock_timestamp())::float8, pg_database_size(current_database())::bigint,"
    " to_regclass('abreast.schema_version') is not null, to_regclass('abreast.migration') is not null"
)
LEDGER = (
    "select coalesce(max(version), 0)::int, (select count(*)::bigint from abreast.finding),"
    " (select coalesce(sum(pairs), 0)::bigint from abreast.outcome_count) from abreast.schema_version"
)


@dataclass(frozen=True)
class PostgresFacts:
    """By `ahead` seconds its clock is ahead of this machine's; `schema` is 0 before `abreast migrate`."""

    url: str
    number: int
    version: str
    ahead: float
    size: int
    schema: int = 0
    findings: int = 0
    pairs: int = 0
    outdated: bool = False  # it holds a ledger that this code can't upgrade


def look(url: str) -> PostgresFacts:
    try:
        with psycopg.connect(url, connect_timeout=TIMEOUT, prepare_threshold=None) as connection:
            connection.execute(
                f"set local statement_timeout = '{TIMEOUT}s'".encode()
            )  # poolers take no options
            number, version, now, held, migrated, outdated = connection.execute(FACTS).fetchone() or (
                0,
                "",
                0.0,
                0,
                False,
                False,
            )
            ahead = now - time.time()
            schema, findings, pairs = (migrated and connection.execute(LEDGER).fetchone()) or (0, 0, 0)
            return PostgresFacts(
                without_password(url), number, version, ahead, held, schema, findings, pairs, outdated
            )
    except psycopg.Error as error:
        raise UnreachableError(" ".join(str(error).split()).lower() or type(error).__name__) from error


def judge(facts: PostgresFacts, wanted: int) -> Iterator[Check]:
    """Compare with `wanted`, the newest schema version of this code."""
    found = f"Postgres {facts.version.split()[0]} at {facts.url}, {size(facts.size)}"
    if facts.number < OLDEST:
        yield POSTGRES.fail("version", found, "Abreast needs Postgres 15 or newer")
    else:
        yield POSTGRES.ok("version", found)
    if facts.outdated:
        found = "holds a ledger that this Abreast can't upgrade"
        yield POSTGRES.fail("schema", found, "create a new database and name it in ABREAST_POSTGRES_URL")
    elif facts.schema < wanted:
        found = f"at version {facts.schema} of {wanted}" if facts.schema else "no schema yet"
        yield POSTGRES.fail("schema", found, "start the sidecar, or run: abreast migrate")
    elif facts.schema > wanted:
        found = f"at version {facts.schema}, newer than this code's {wanted}"
        yield POSTGRES.fail("schema", found, "use the newer release of Abreast that made it")
    else:
        yield POSTGRES.ok("schema", f"at version {facts.schema}, up to date")
    if facts.schema:
        yield POSTGRES.ok(
            "ledger", f"{counted(facts.pairs, 'pair')} and {counted(facts.findings, 'finding')} written"
        )
