"""Checks of Postgres: its version, and the ledger and its schema."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg

from abreast_sidecar.cli.doctor import Check, CheckFactory, UnreachableError, mask_password
from abreast_sidecar.client.output import format_bytes, format_quantity

POSTGRES_CHECKS = CheckFactory("Postgres")
POSTGRES_TIMEOUT_S = 3
MIN_POSTGRES_VERSION_NUM = 150_000
SERVER_FACTS_QUERY = (
    "select current_setting('server_version_num')::int, current_setting('server_version'),"
    " extract(epoch from clock_timestamp())::float8, pg_database_size(current_database())::bigint,"
    " to_regclass('abreast.schema_version') is not null, to_regclass('abreast.migration') is not null"
)
LEDGER_FACTS_QUERY = (
    "select coalesce(max(version), 0)::int, (select count(*)::bigint from abreast.finding),"
    " (select coalesce(sum(pairs), 0)::bigint from abreast.outcome_count) from abreast.schema_version"
)


@dataclass(frozen=True)
class PostgresFacts:
    """`schema_version` is 0 before `abreast migrate`. A positive `clock_offset_s` is ahead of this machine."""

    url: str
    version_num: int
    version: str
    clock_offset_s: float
    database_bytes: int
    schema_version: int = 0
    findings: int = 0
    pairs: int = 0
    outdated: bool = False  # holds a ledger that this code can't upgrade


def read_postgres_facts(url: str) -> PostgresFacts:
    try:
        with psycopg.connect(url, connect_timeout=POSTGRES_TIMEOUT_S, prepare_threshold=None) as connection:
            # a connection pooler would refuse this as an option of the connection
            connection.execute(f"set local statement_timeout = '{POSTGRES_TIMEOUT_S}s'".encode())
            row = connection.execute(SERVER_FACTS_QUERY).fetchone()
            version_num, version, server_time_s, database_bytes, has_schema, is_outdated = row or (0, "", 0, 0, 0, 0)
            clock_offset_s = server_time_s - time.time()
            ledger_row = connection.execute(LEDGER_FACTS_QUERY).fetchone() if has_schema else None
    except psycopg.Error as error:
        raise UnreachableError(" ".join(str(error).split()).lower() or type(error).__name__) from error
    schema_version, findings, pairs = ledger_row or (0, 0, 0)
    return PostgresFacts(
        mask_password(url),
        version_num,
        version,
        clock_offset_s,
        database_bytes,
        schema_version,
        findings,
        pairs,
        is_outdated,
    )


def check_postgres(facts: PostgresFacts, expected_version: int) -> Iterator[Check]:
    """Check against `expected_version`, the newest schema version of this code."""
    observation = f"Postgres {facts.version.split()[0]} at {facts.url}, {format_bytes(facts.database_bytes)}"
    if facts.version_num < MIN_POSTGRES_VERSION_NUM:
        yield POSTGRES_CHECKS.fail("version", observation, "Abreast needs Postgres 15 or newer")
    else:
        yield POSTGRES_CHECKS.ok("version", observation)
    if facts.outdated:
        observation = "contains a ledger that this Abreast can't upgrade"
        yield POSTGRES_CHECKS.fail("schema", observation, "create a new database and set it in ABREAST_POSTGRES_URL")
    elif facts.schema_version < expected_version:
        observation = (
            f"at version {facts.schema_version} of {expected_version}" if facts.schema_version else "no schema yet"
        )
        yield POSTGRES_CHECKS.fail("schema", observation, "start the sidecar, or run: abreast migrate")
    elif facts.schema_version > expected_version:
        observation = f"at version {facts.schema_version}, newer than this code's {expected_version}"
        yield POSTGRES_CHECKS.fail("schema", observation, "use the newer release of Abreast that created it")
    else:
        yield POSTGRES_CHECKS.ok("schema", f"at version {facts.schema_version}, up to date")
    if facts.schema_version:
        totals = f"{format_quantity(facts.pairs, 'pair')} and {format_quantity(facts.findings, 'finding')}"
        yield POSTGRES_CHECKS.ok("ledger", totals)
