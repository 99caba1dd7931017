"""Ids of endpoints and findings, got or made, and remembered.

They are made in transactions of their own, before the batch's: what is remembered is committed. A finding whose batch
then fails stays with a count of 0 and is not listed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast_sidecar.compare import Difference
from abreast_sidecar.store.clean import clean, json_text
from abreast_sidecar.store.database import statement
from abreast_sidecar.store.examples import Kept
from abreast_sidecar.store.judged import EndpointKey, Judged

MAX_ENDPOINTS = 2000  # of one service; then all further routes are one
MAX_FINDINGS = 1000  # of one endpoint; then all further paths of a part and kind are one
OTHER = "(other)"
PATH_LIMIT = 500  # characters
VALUE_LIMIT = 500

FindingKey = tuple[str, str, str]  # part, path, kind


@dataclass(slots=True)
class Endpoint:
    id: int
    findings: dict[FindingKey, int] = field(default_factory=dict)


class Catalogue:
    def __init__(self) -> None:
        self.services: dict[str, dict[EndpointKey, Endpoint]] = {}
        self.examples: dict[int, Kept] = {}  # by finding, as far as this process knows

    def clear(self) -> None:
        self.services.clear()
        self.examples.clear()

    async def learn(self, connection: AsyncConnection[TupleRow], batch: Iterable[Judged]) -> None:
        """After this `endpoint` and `finding` know all of the batch."""
        batch = list(batch)
        await self._learn_services(connection, {judged.endpoint[0] for judged in batch})
        missing = {judged.endpoint for judged in batch if self._known(judged.endpoint) is None}
        if missing:
            await self._add_endpoints(connection, missing)
        if unknown := self._unknown_findings(batch):
            await self._add_findings(connection, unknown)

    def endpoint(self, key: EndpointKey) -> Endpoint:
        found = self._known(key)
        assert found is not None
        return found

    def finding(self, endpoint: Endpoint, difference: Difference) -> int | None:
        findings = endpoint.findings
        found = findings.get((difference.part, difference.path, difference.kind))
        if found is None:
            found = findings.get(_key(difference)) or findings.get((difference.part, OTHER, difference.kind))
        return found

    def _known(self, key: EndpointKey) -> Endpoint | None:
        endpoints = self.services.get(key[0], {})
        return endpoints.get(key) or endpoints.get(_other(key))

    async def _learn_services(self, connection: AsyncConnection[TupleRow], services: set[str]) -> None:
        new = services - self.services.keys()
        if not new:
            return
        await self._read_endpoints(connection, new)

    async def _add_endpoints(self, connection: AsyncConnection[TupleRow], missing: set[EndpointKey]) -> None:
        wanted = {
            key if len(self.services[key[0]]) + place < MAX_ENDPOINTS else _other(key)
            for place, key in enumerate(sorted(missing))
        }
        given = [dict(zip(("service", "method", "route"), key, strict=True)) for key in wanted]
        await connection.execute(statement("endpoints_add"), {"rows": json_text(given).decode()})
        await self._read_endpoints(connection, {key[0] for key in wanted})

    async def _read_endpoints(self, connection: AsyncConnection[TupleRow], services: set[str]) -> None:
        cursor = await connection.execute(statement("endpoints_read"), {"services": list(services)})
        fresh = {}
        for service in services:
            self.services.setdefault(service, {})
        for *key, number in await cursor.fetchall():
            service, method, route = key
            if (service, method, route) not in self.services[service]:
                fresh[number] = self.services[service][service, method, route] = Endpoint(number)
        if fresh:
            await self._read_findings(connection, fresh)

    async def _read_findings(
        self, connection: AsyncConnection[TupleRow], endpoints: dict[int, Endpoint]
    ) -> None:
        cursor = await connection.execute(statement("finding_ids"), {"endpoints": list(endpoints)})
        for endpoint, part, path, kind, number, *kept in await cursor.fetchall():
            endpoints[endpoint].findings[part, path, kind] = number
            if number not in self.examples or kept[0] > self.examples[number].count:
                self.examples[number] = Kept(*kept)

    def _unknown_findings(self, batch: Iterable[Judged]) -> dict[tuple[int, FindingKey], dict[str, Any]]:
        unknown: dict[tuple[int, FindingKey], dict[str, Any]] = {}
        room: dict[int, int] = {}  # endpoint → findings that it may still get
        for judged in batch:
            differences = judged.judgement.shown
            endpoint = self.endpoint(judged.endpoint) if differences else None
            for difference in differences:
                if endpoint is None or self.finding(endpoint, difference) is not None:
                    continue
                left = room.setdefault(endpoint.id, MAX_FINDINGS - len(endpoint.findings))
                key = _key(difference) if left > 0 else (difference.part, OTHER, difference.kind)
                if (endpoint.id, key) not in unknown:
                    unknown[endpoint.id, key] = _new(endpoint, key, difference, judged.at)
                    room[endpoint.id] -= 1
        return unknown

    async def _add_findings(
        self, connection: AsyncConnection[TupleRow], unknown: dict[tuple[int, FindingKey], dict[str, Any]]
    ) -> None:
        given = json_text(list(unknown.values())).decode()
        await connection.execute(statement("findings_add"), {"rows": given})
        wanted = {endpoint for endpoint, _ in unknown}
        endpoints = {
            endpoint.id: endpoint
            for known in self.services.values()
            for endpoint in known.values()
            if endpoint.id in wanted
        }
        await self._read_findings(connection, endpoints)


def _other(key: EndpointKey) -> EndpointKey:
    return (key[0], key[1], OTHER)


def _key(difference: Difference) -> FindingKey:
    return (difference.part, clean(difference.path, PATH_LIMIT), difference.kind)


def _new(endpoint: Endpoint, key: FindingKey, difference: Difference, at: int) -> dict[str, Any]:
    part, path, kind = key
    return {
        "endpoint_id": endpoint.id,
        "part": part,
        "path": path,
        "kind": kind,
        "impact": difference.impact,
        "ms": at,
        "detail": {
            "place": clean(difference.place, VALUE_LIMIT),
            "old": None if difference.old is None else clean(difference.old, VALUE_LIMIT),
            "new": None if difference.new is None else clean(difference.new, VALUE_LIMIT),
        },
    }
