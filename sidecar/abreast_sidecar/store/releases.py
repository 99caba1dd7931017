"""Ids of releases, got or made, and remembered. Of two, the one with the greater id came later.

They are made one by one, in the order in which they were first seen: two workers that see the same two never wait for
each other, and what is remembered is committed.
"""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast.capture import Capture
from abreast_sidecar.store.database import statement
from abreast_sidecar.store.judged import Judged, release_label

MAX_RELEASES = 10_000  # of one service; then all further labels are one
OTHER = "(other)"
NONE = 0  # in place of an id, where that version has no capture

Key = tuple[str, str, str]  # service, version, label


class Releases:
    def __init__(self) -> None:
        self._known: dict[Key, int] = {}

    def clear(self) -> None:
        self._known.clear()

    async def learn(self, connection: AsyncConnection[TupleRow], batch: Iterable[Judged]) -> None:
        """After this `of` knows all of the batch."""
        missing = list(dict.fromkeys(key for key in _keys(batch) if key not in self._known))
        if not missing:
            return
        await self._read(connection, missing)
        for key in missing:
            if key not in self._known:
                await self._add(connection, key)

    def of(self, judged: Judged) -> tuple[int, int]:
        """Those of old and of new."""
        judgement = judged.judgement
        return self._id(judged, judgement.old), self._id(judged, judgement.new)

    def _id(self, judged: Judged, capture: Capture | None) -> int:
        return NONE if capture is None else self._known[_key(judged, capture)]

    async def _add(self, connection: AsyncConnection[TupleRow], key: Key) -> None:
        for label in (key[2], OTHER):
            wanted = (key[0], key[1], label)
            parameters = {"service": key[0], "version": key[1], "label": label}
            limits = {"limit": MAX_RELEASES, "other": OTHER}
            await connection.execute(statement("release_add"), {**parameters, **limits})
            await self._read(connection, [wanted])
            if wanted in self._known:
                self._known[key] = self._known[wanted]
                return

    async def _read(self, connection: AsyncConnection[TupleRow], wanted: list[Key]) -> None:
        services, versions, labels = (list(column) for column in zip(*wanted, strict=True))
        parameters = {"services": services, "versions": versions, "labels": labels}
        cursor = await connection.execute(statement("release_ids"), parameters)
        for service, version, label, number in await cursor.fetchall():
            self._known[service, version, label] = number


def _keys(batch: Iterable[Judged]) -> Iterable[Key]:
    for judged in sorted(batch, key=lambda one: one.at):
        for capture in (judged.judgement.old, judged.judgement.new):
            if capture is not None:
                yield _key(judged, capture)


def _key(judged: Judged, capture: Capture) -> Key:
    version = "new" if capture is judged.judgement.new else "old"
    return judged.service, version, release_label(capture.release)
