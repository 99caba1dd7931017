"""Brings the ledger's schema up to this code: migrations/NNNN_name.sql, forward only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast_sidecar.errors import LedgerError, SchemaError
from abreast_sidecar.store.database import statement

LOCK = 0x616272656173  # any number that others don't use for pg_advisory_xact_lock
CONNECT_TIMEOUT = 5  # seconds
FILE = re.compile(r"(\d{4})_(\w+)\.sql")


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    sql: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.sql).hexdigest()


@cache
def migrations() -> tuple[Migration, ...]:
    """All that this code has, in order."""
    folder = resources.files("abreast_sidecar.store") / "migrations"
    found = [(FILE.fullmatch(file.name), file) for file in folder.iterdir()]
    return tuple(
        sorted(
            (Migration(int(match[1]), match[2], file.read_bytes()) for match, file in found if match),
            key=lambda migration: migration.version,
        )
    )


async def migrate(conninfo: str, wanted: Sequence[Migration] | None = None) -> int:
    """Return the schema's version. Any number may run at once.

    Raise SchemaError for a database that this code must not touch, LedgerError when Postgres can't be reached or
    refuses.
    """
    wanted = migrations() if wanted is None else wanted
    try:
        async with await AsyncConnection.connect(
            conninfo, connect_timeout=CONNECT_TIMEOUT, prepare_threshold=None
        ) as connection:
            where = f"{connection.info.host}:{connection.info.port}/{connection.info.dbname}"
            _check_encoding(connection.info.parameter_status("server_encoding") or "", where)
            await connection.execute("select pg_advisory_xact_lock(%s)", (LOCK,))
            done = await _done(connection)
            _check(done, wanted, where)
            for migration in wanted[len(done) :]:
                await _apply(connection, migration)
    except psycopg.OperationalError as error:
        raise LedgerError(
            f"postgres can't be reached, check ABREAST_POSTGRES_URL and the server: {str(error).strip()}"
        ) from error
    except psycopg.Error as error:
        raise LedgerError(f"postgres refuses to change the ledger's schema: {str(error).strip()}") from error
    return wanted[-1].version if wanted else 0


async def _done(connection: AsyncConnection[TupleRow]) -> list[TupleRow]:
    await connection.execute(statement("migration_table"))
    return await (await connection.execute(statement("migrations_done"))).fetchall()


def _check_encoding(encoding: str, where: str) -> None:
    """What people send is Unicode: another encoding would refuse some of it."""
    if encoding != "UTF8":
        raise SchemaError(
            f"the database at {where} has the encoding {encoding}: name one in ABREAST_POSTGRES_URL that was made with "
            "encoding 'UTF8'"
        )


def _check(done: Sequence[TupleRow], wanted: Sequence[Migration], where: str) -> None:
    if len(done) > len(wanted):
        raise SchemaError(
            f"the ledger at {where} has schema version {done[-1][0]}, this code knows {len(wanted)}: "
            "run the newer abreast, or name another database in ABREAST_POSTGRES_URL"
        )
    for (version, name, digest), migration in zip(done, wanted, strict=False):
        if version != migration.version or digest != migration.digest:
            raise SchemaError(
                f"the ledger at {where} was made with another {version:04d}_{name}.sql than this code has: "
                "run the abreast that made it, or name another database in ABREAST_POSTGRES_URL"
            )


async def _apply(connection: AsyncConnection[TupleRow], migration: Migration) -> None:
    await connection.execute(migration.sql)
    added = {"version": migration.version, "name": migration.name, "digest": migration.digest}
    await connection.execute(statement("migration_add"), added)
