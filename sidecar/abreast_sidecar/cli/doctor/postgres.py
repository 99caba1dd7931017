"""Is the ledger there, and of this code's schema?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import psycopg

from abreast_sidecar.cli.doctor.check import Check, CheckFactory, UnreachableError, mask_password
from abreast_sidecar.client.output import format_bytes, format_quantity, format_seconds

CLOCK_CHECKS = CheckFactory("clocks")
MAX_CLOCK_OFFSET_S = 2.0  # seconds


def check_clocks(clock_offsets_s: Mapping[str, float]) -> Iterator[Check]:
    """`ahead`: by how many seconds each clock is ahead of this machine's."""
    deviations_s = {name: value for name, value in clock_offsets_s.items() if abs(value) > MAX_CLOCK_OFFSET_S}
    if not clock_offsets_s:
        return
    if not deviations_s:
        max_offset_s = max(abs(value) for value in clock_offsets_s.values())
        yield CLOCK_CHECKS.ok(
            "agree", f"{', '.join(clock_offsets_s)} within {format_seconds(max(max_offset_s, 0.001))} of this machine's"
        )
    for name, value in deviations_s.items():
        observation = f"{name}'s is {format_seconds(abs(value))} {'ahead of' if value > 0 else 'behind'} this machine's"
        yield CLOCK_CHECKS.warn(
            name, observation, "synchronise the clocks (chrony, ntpd): times of requests will look odd"
        )


POSTGRES_CHECKS = CheckFactory("Postgres")
POSTGRES_TIMEOUT_S = 3  # seconds
MIN_POSTGRES_VERSION_NUM = 150_000  # server_version_num
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
    """By `ahead` seconds its clock is ahead of this machine's; `schema` is 0 before `abreast migrate`."""

    url: str
    version_num: int
    version: str
    clock_offset_s: float
    database_bytes: int
    schema_version: int = 0
    findings: int = 0
    pairs: int = 0
    outdated: bool = False  # it holds a ledger that this code can't upgrade


def read_postgres_facts(url: str) -> PostgresFacts:
    try:
        with psycopg.connect(url, connect_timeout=POSTGRES_TIMEOUT_S, prepare_threshold=None) as connection:
            connection.execute(
                f"set local statement_timeout = '{POSTGRES_TIMEOUT_S}s'".encode()
            )  # poolers take no options
            version_num, version, server_time_s, database_bytes, has_migrations, outdated = connection.execute(
                SERVER_FACTS_QUERY
            ).fetchone() or (0, "", 0.0, 0, False, False)
            clock_offset_s = server_time_s - time.time()
            schema_version, findings, pairs = (
                has_migrations and connection.execute(LEDGER_FACTS_QUERY).fetchone()
            ) or (0, 0, 0)
            return PostgresFacts(
                mask_password(url),
                version_num,
                version,
                clock_offset_s,
                database_bytes,
                schema_version,
                findings,
                pairs,
                outdated,
            )
    except psycopg.Error as error:
        raise UnreachableError(" ".join(str(error).split()).lower() or type(error).__name__) from error


def check_postgres(facts: PostgresFacts, expected_version: int) -> Iterator[Check]:
    """Compare with `wanted`, the newest schema version of this code."""
    observation = f"Postgres {facts.version.split()[0]} at {facts.url}, {format_bytes(facts.database_bytes)}"
    if facts.version_num < MIN_POSTGRES_VERSION_NUM:
        yield POSTGRES_CHECKS.fail("version", observation, "Abreast needs Postgres 15 or newer")
    else:
        yield POSTGRES_CHECKS.ok("version", observation)
    if facts.outdated:
        observation = "holds a ledger that this Abreast can't upgrade"
        yield POSTGRES_CHECKS.fail("schema", observation, "create a new database and name it in ABREAST_POSTGRES_URL")
    elif facts.schema_version < expected_version:
        observation = (
            f"at version {facts.schema_version} of {expected_version}" if facts.schema_version else "no schema yet"
        )
        yield POSTGRES_CHECKS.fail("schema", observation, "start the sidecar, or run: abreast migrate")
    elif facts.schema_version > expected_version:
        observation = f"at version {facts.schema_version}, newer than this code's {expected_version}"
        yield POSTGRES_CHECKS.fail("schema", observation, "use the newer release of Abreast that made it")
    else:
        yield POSTGRES_CHECKS.ok("schema", f"at version {facts.schema_version}, up to date")
    if facts.schema_version:
        yield POSTGRES_CHECKS.ok(
            "ledger", f"{format_quantity(facts.pairs, 'pair')} and {format_quantity(facts.findings, 'finding')} written"
        )
