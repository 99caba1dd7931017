"""Ids of releases, got or made, and remembered. Of two, the one with the greater id came later.

They are made one by one, in the order in which they were first seen: two workers that see the same two never wait for
each other, and what is remembered is committed.
"""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast.capture import Capture
from abreast_sidecar.store.database import load_statement
from abreast_sidecar.store.judged import PairRecord, make_release_label

MAX_SERVICE_RELEASES = 10_000  # of one service; then all further labels are one
OTHER_RELEASE = "(other)"
NO_RELEASE = 0  # in place of an id, where that version has no capture

ReleaseKey = tuple[str, str, str]  # service, version, label


class ReleaseIds:
    def __init__(self) -> None:
        self._ids: dict[ReleaseKey, int] = {}

    def clear(self) -> None:
        self._ids.clear()

    async def load(self, connection: AsyncConnection[TupleRow], records: Iterable[PairRecord]) -> None:
        """After this `of` knows all of the batch."""
        missing = list(dict.fromkeys(key for key in _iter_release_keys(records) if key not in self._ids))
        if not missing:
            return
        await self._read(connection, missing)
        for key in missing:
            if key not in self._ids:
                await self._add(connection, key)

    def get_ids(self, record: PairRecord) -> tuple[int, int]:
        """Those of old and of new."""
        result = record.result
        return self._get_id(record, result.old), self._get_id(record, result.new)

    def _get_id(self, record: PairRecord, capture: Capture | None) -> int:
        return NO_RELEASE if capture is None else self._ids[_make_release_key(record, capture)]

    async def _add(self, connection: AsyncConnection[TupleRow], key: ReleaseKey) -> None:
        for label in (key[2], OTHER_RELEASE):
            candidate = (key[0], key[1], label)
            parameters = {"service": key[0], "version": key[1], "label": label}
            limits = {"limit": MAX_SERVICE_RELEASES, "other": OTHER_RELEASE}
            await connection.execute(load_statement("release_add"), {**parameters, **limits})
            await self._read(connection, [candidate])
            if candidate in self._ids:
                self._ids[key] = self._ids[candidate]
                return

    async def _read(self, connection: AsyncConnection[TupleRow], keys: list[ReleaseKey]) -> None:
        services, versions, labels = (list(column) for column in zip(*keys, strict=True))
        parameters = {"services": services, "versions": versions, "labels": labels}
        cursor = await connection.execute(load_statement("release_ids"), parameters)
        for service, version, label, release_id in await cursor.fetchall():
            self._ids[service, version, label] = release_id


def _iter_release_keys(records: Iterable[PairRecord]) -> Iterable[ReleaseKey]:
    for record in sorted(records, key=lambda item: item.time_ms):
        for capture in (record.result.old, record.result.new):
            if capture is not None:
                yield _make_release_key(record, capture)


def _make_release_key(record: PairRecord, capture: Capture) -> ReleaseKey:
    version = "new" if capture is record.result.new else "old"
    return record.service, version, make_release_label(capture.release)
