"""Ids of releases, endpoints and findings: read, created and cached.

Ids are created in separate transactions before the batch, so each cached id is committed. If the batch then fails, its new
findings stay with a count of 0, and listings leave them out.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.model import Difference
from abreast_sidecar.store.database import load_statement, sanitise_text, to_json
from abreast_sidecar.store.records import EndpointKey, PairRecord, make_release_label
from abreast_sidecar.store.samples import ExampleSummary

MAX_SERVICE_RELEASES = 10_000  # further labels share the label OTHER_RELEASE
MAX_SERVICE_ENDPOINTS = 2000  # further routes of a method share OTHER_PATH
MAX_ENDPOINT_FINDINGS = 1000  # further paths of a part and kind share OTHER_PATH
MAX_PATH_CHARS = 500
MAX_VALUE_CHARS = 500
OTHER_RELEASE = "(other)"
OTHER_PATH = "(other)"
NO_RELEASE = 0  # in place of an id: the version has no capture

ReleaseKey = tuple[str, str, str]  # service, version, label
FindingKey = tuple[str, str, str]  # part, path, kind


class ReleaseIds:
    def __init__(self) -> None:
        self._ids: dict[ReleaseKey, int] = {}

    def clear(self) -> None:
        self._ids.clear()

    async def load(self, connection: AsyncConnection[TupleRow], records: Iterable[PairRecord]) -> None:
        """Read or create the ids of all releases in a batch."""
        missing = list(dict.fromkeys(key for key in _iter_release_keys(records) if key not in self._ids))
        if not missing:
            return
        await self._read(connection, missing)
        for key in missing:
            if key not in self._ids:
                await self._add(connection, key)

    def get_ids(self, record: PairRecord) -> tuple[int, int]:
        """Return the ids for old and new."""
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


@dataclass(slots=True)
class EndpointIds:
    id: int
    findings: dict[FindingKey, int] = field(default_factory=dict)


class IdCache:
    def __init__(self) -> None:
        self.services: dict[str, dict[EndpointKey, EndpointIds]] = {}
        self.examples: dict[int, ExampleSummary] = {}  # by finding; other processes may have added some

    def clear(self) -> None:
        self.services.clear()
        self.examples.clear()

    async def load(self, connection: AsyncConnection[TupleRow], records: Iterable[PairRecord]) -> None:
        """Read or create the ids of all endpoints and findings in a batch."""
        records = list(records)
        await self._load_services(connection, {record.endpoint[0] for record in records})
        missing = {record.endpoint for record in records if self._find_endpoint(record.endpoint) is None}
        if missing:
            await self._add_endpoints(connection, missing)
        if unknown := self._collect_unknown_findings(records):
            await self._add_findings(connection, unknown)

    def get_endpoint(self, key: EndpointKey) -> EndpointIds:
        ids = self._find_endpoint(key)
        assert ids is not None
        return ids

    def find_finding(self, endpoint: EndpointIds, difference: Difference) -> int | None:
        findings = endpoint.findings
        return (
            findings.get((difference.part, difference.path, difference.kind))
            or findings.get(_make_finding_key(difference))
            or findings.get((difference.part, OTHER_PATH, difference.kind))
        )

    def group_by_finding(
        self, endpoint: EndpointIds, differences: Iterable[Difference], *, excluded: Container[int] = ()
    ) -> dict[int, list[Difference]]:
        by_finding: dict[int, list[Difference]] = {}
        for difference in differences:
            finding = self.find_finding(endpoint, difference)
            if finding is not None and finding not in excluded:
                by_finding.setdefault(finding, []).append(difference)
        return by_finding

    def _find_endpoint(self, key: EndpointKey) -> EndpointIds | None:
        endpoints = self.services.get(key[0], {})
        return endpoints.get(key) or endpoints.get(_fold_endpoint(key))

    async def _load_services(self, connection: AsyncConnection[TupleRow], services: set[str]) -> None:
        unknown = services - self.services.keys()
        if not unknown:
            return
        await self._read_endpoints(connection, unknown)

    async def _add_endpoints(self, connection: AsyncConnection[TupleRow], missing: set[EndpointKey]) -> None:
        keys = {
            key if len(self.services[key[0]]) + index < MAX_SERVICE_ENDPOINTS else _fold_endpoint(key)
            for index, key in enumerate(sorted(missing))
        }
        endpoints = [dict(zip(("service", "method", "route"), key, strict=True)) for key in keys]
        await connection.execute(load_statement("endpoints_add"), {"rows": to_json(endpoints).decode()})
        await self._read_endpoints(connection, {key[0] for key in keys})

    async def _read_endpoints(self, connection: AsyncConnection[TupleRow], services: set[str]) -> None:
        cursor = await connection.execute(load_statement("endpoints_read"), {"services": list(services)})
        added = {}
        for service in services:
            self.services.setdefault(service, {})
        for *key, endpoint_id in await cursor.fetchall():
            service, method, route = key
            if (service, method, route) not in self.services[service]:
                added[endpoint_id] = self.services[service][service, method, route] = EndpointIds(endpoint_id)
        if added:
            await self._read_findings(connection, added)

    async def _read_findings(self, connection: AsyncConnection[TupleRow], endpoints: dict[int, EndpointIds]) -> None:
        cursor = await connection.execute(load_statement("finding_ids"), {"endpoints": list(endpoints)})
        for endpoint_id, part, path, kind, finding_id, *summary in await cursor.fetchall():
            endpoints[endpoint_id].findings[part, path, kind] = finding_id
            if finding_id not in self.examples or summary[0] > self.examples[finding_id].count:
                self.examples[finding_id] = ExampleSummary(*summary)

    def _collect_unknown_findings(self, records: Iterable[PairRecord]) -> dict[tuple[int, FindingKey], dict[str, Any]]:
        unknown: dict[tuple[int, FindingKey], dict[str, Any]] = {}
        capacity: dict[int, int] = {}  # endpoint → findings that it may still add
        for record in records:
            differences = record.result.all_differences
            endpoint = self.get_endpoint(record.endpoint) if differences else None
            for difference in differences:
                if endpoint is None or self.find_finding(endpoint, difference) is not None:
                    continue
                remaining = capacity.setdefault(endpoint.id, MAX_ENDPOINT_FINDINGS - len(endpoint.findings))
                key = _make_finding_key(difference) if remaining > 0 else (difference.part, OTHER_PATH, difference.kind)
                if (endpoint.id, key) not in unknown:
                    unknown[endpoint.id, key] = _make_finding_record(endpoint, key, difference, record.time_ms)
                    capacity[endpoint.id] -= 1
        return unknown

    async def _add_findings(
        self, connection: AsyncConnection[TupleRow], unknown: dict[tuple[int, FindingKey], dict[str, Any]]
    ) -> None:
        findings = to_json(list(unknown.values())).decode()
        await connection.execute(load_statement("findings_add"), {"rows": findings})
        endpoint_ids = {endpoint for endpoint, _ in unknown}
        endpoints = {
            endpoint.id: endpoint
            for service_endpoints in self.services.values()
            for endpoint in service_endpoints.values()
            if endpoint.id in endpoint_ids
        }
        await self._read_findings(connection, endpoints)


def _fold_endpoint(key: EndpointKey) -> EndpointKey:
    return (key[0], key[1], OTHER_PATH)


def _make_finding_key(difference: Difference) -> FindingKey:
    return (difference.part, sanitise_text(difference.path, MAX_PATH_CHARS), difference.kind)


def _make_finding_record(
    endpoint: EndpointIds, key: FindingKey, difference: Difference, time_ms: int
) -> dict[str, Any]:
    part, path, kind = key
    return {
        "endpoint_id": endpoint.id,
        "part": part,
        "path": path,
        "kind": kind,
        "impact": difference.impact,
        "ms": time_ms,
        "detail": {
            "exact_path": sanitise_text(difference.exact_path, MAX_VALUE_CHARS),
            "old": None if difference.old is None else sanitise_text(difference.old, MAX_VALUE_CHARS),
            "new": None if difference.new is None else sanitise_text(difference.new, MAX_VALUE_CHARS),
        },
    }
