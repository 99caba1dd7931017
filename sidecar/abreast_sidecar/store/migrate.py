"""Creates and upgrades the ledger's schema: schema.sql is version 1, migrations/NNNN_name.sql are later ones, forward only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

from abreast_sidecar.errors import LedgerError, SchemaError
from abreast_sidecar.store.database import ClosingConnection, execute

MIGRATION_LOCK_KEY = 0x616272656173  # any number that others don't use for pg_advisory_xact_lock
MIGRATION_CONNECT_TIMEOUT_S = 5
FILE_PATTERN = re.compile(r"(\d{4})_(\w+)\.sql")
WRITER_GRANTS = (
    "grant usage on schema abreast to {role}",
    "grant select, insert, update, delete on all tables in schema abreast to {role}",
    "revoke insert, update, delete on abreast.schema_version from {role}",
    "grant execute on all functions in schema abreast to {role}",
)
READER_GRANTS = (
    "grant usage on schema abreast to {role}",
    "grant select on all tables in schema abreast to {role}",
    "revoke all on abreast.token, abreast.control_key, abreast.webhook_receiver, abreast.webhook_delivery from {role}",
)
NEW_DATABASE = "create a new database and name it in ABREAST_POSTGRES_URL"


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    sql: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.sql).hexdigest()

    @property
    def file(self) -> str:
        return "schema.sql" if self.version == 1 else f"{self.version:04d}_{self.name}.sql"


@cache
def load_migrations() -> tuple[Migration, ...]:
    """Return schema.sql and all later migrations, in order."""
    folder = resources.files("abreast_sidecar.store")
    schema = Migration(1, "schema", (folder / "schema.sql").read_bytes())
    later = folder / "migrations"
    files = [(FILE_PATTERN.fullmatch(file.name), file) for file in later.iterdir()] if later.is_dir() else []
    matches = [Migration(int(match[1]), match[2], file.read_bytes()) for match, file in files if match]
    return (schema, *sorted(matches, key=lambda migration: migration.version))


async def migrate(
    conninfo: str, target: Sequence[Migration] | None = None, *, writer: str = "", reader: str = ""
) -> int:
    """Apply missing migrations in one transaction and return the schema's version. Several processes may run it at once.

    `writer` and `reader` name roles that get the rights of a sidecar and of reports. Raise SchemaError for a database that this code must not touch, LedgerError when Postgres can't be reached or
    refuses.
    """
    target = load_migrations() if target is None else target
    try:
        async with await ClosingConnection[TupleRow].connect(
            conninfo, connect_timeout=MIGRATION_CONNECT_TIMEOUT_S, prepare_threshold=None
        ) as connection:
            location = f"{connection.info.host}:{connection.info.port}/{connection.info.dbname}"
            encoding = connection.info.parameter_status("server_encoding")
            if encoding != "UTF8":  # others can't hold all of Unicode
                raise SchemaError(
                    f"the database at {location} has the encoding {encoding}: name one in ABREAST_POSTGRES_URL that was "
                    "made with encoding 'UTF8'"
                )
            await connection.execute("select pg_advisory_xact_lock(%s)", (MIGRATION_LOCK_KEY,))
            applied = await _read_applied(connection, location)
            _check_history(applied, target, location)
            for migration in target[len(applied) :]:
                await connection.execute(migration.sql)
                parameters = {"version": migration.version, "name": migration.name, "digest": migration.digest}
                await execute(connection, "schema_version_add", parameters)
            for role, grants in ((writer, WRITER_GRANTS), (reader, READER_GRANTS)):
                for grant in grants if role else ():
                    await connection.execute(sql.SQL(grant).format(role=sql.Identifier(role)))
    except psycopg.OperationalError as error:
        raise LedgerError(
            f"postgres can't be reached, check ABREAST_POSTGRES_URL and the server: {str(error).strip()}"
        ) from error
    except psycopg.Error as error:
        raise LedgerError(f"postgres refuses to change the ledger's schema: {str(error).strip()}") from error
    return target[-1].version if target else 0


async def _read_applied(connection: AsyncConnection[TupleRow], location: str) -> list[TupleRow]:
    """Return the applied migrations. Refuse a database that this code did not create."""
    ((versioned, outdated, tables),) = await (await execute(connection, "schema_state")).fetchall()
    if versioned:
        return await (await execute(connection, "schema_versions")).fetchall()
    if outdated:
        raise SchemaError(
            f"the database at {location} holds a ledger from before schema.sql (it has a table abreast.migration), "
            f"which this abreast can't upgrade: {NEW_DATABASE}"
        )
    if tables:
        raise SchemaError(
            f"the schema abreast of the database at {location} holds tables that are no ledger "
            f"({', '.join(tables)}, ...): {NEW_DATABASE}"
        )
    return []


def _check_history(applied: Sequence[TupleRow], target: Sequence[Migration], location: str) -> None:
    if len(applied) > len(target):
        raise SchemaError(
            f"the ledger at {location} has schema version {applied[-1][0]}, this abreast knows {len(target)}: "
            f"run the newer abreast that made it, or {NEW_DATABASE}"
        )
    for (version, _, digest), migration in zip(applied, target, strict=False):
        if version != migration.version or digest != migration.digest:
            raise SchemaError(
                f"the ledger at {location} was made with a different version of {migration.file}: "
                f"run the abreast that made it, or {NEW_DATABASE}"
            )
