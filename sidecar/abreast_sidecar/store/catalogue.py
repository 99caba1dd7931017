"""Ids of releases, endpoints and findings: read, created and cached.

Ids are created in separate transactions before the batch, so each cached id is committed. If the batch then fails, its new
findings stay with a count of 0, and listings leave them out.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.endpoints import SOURCES_BY_PRECEDENCE
from abreast_sidecar.compare.model import Difference
from abreast_sidecar.store.database import execute, sanitise_text, to_json
from abreast_sidecar.store.records import EndpointKey, PairRecord, make_release_label
from abreast_sidecar.store.samples import ExampleSummary

MAX_SERVICE_RELEASES = 10_000  # further labels share the label OTHER_RELEASE
MAX_CACHED_RELEASES = 2 * MAX_SERVICE_RELEASES
MAX_SERVICE_ENDPOINTS = 2000  # further routes of a method share OTHER_PATH, and further methods OTHER_METHOD
MAX_ENDPOINT_FINDINGS = 1000  # further paths of a part and kind share OTHER_PATH
MAX_PATH_CHARS = 500
MAX_VALUE_CHARS = 500
OTHER_RELEASE = "(other)"
OTHER_PATH = "(other)"
OTHER_METHOD = "OTHER"
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY"})
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
        keys = [
            _make_release_key(record, capture)
            for record in sorted(records, key=lambda item: item.time_ms)
            for capture in (record.result.old, record.result.new)
            if capture is not None
        ]
        if len(self._ids) > MAX_CACHED_RELEASES:
            self._ids.clear()
        missing = list(dict.fromkeys(key for key in keys if key not in self._ids))
        if missing:
            await self._read(connection, missing)
            await self._add(connection, [key for key in missing if key not in self._ids])

    def get_ids(self, record: PairRecord) -> tuple[int, int]:
        """Return the ids for old and new."""
        result = record.result
        return self._get_id(record, result.old), self._get_id(record, result.new)

    def _get_id(self, record: PairRecord, capture: Capture | None) -> int:
        return NO_RELEASE if capture is None else self._ids[_make_release_key(record, capture)]

    async def _add(self, connection: AsyncConnection[TupleRow], keys: list[ReleaseKey]) -> None:
        """Add the releases that fit, and take the common row for the others."""
        for stored_keys in (keys, [(service, version, OTHER_RELEASE) for service, version, _ in keys]):
            added = {key: stored for key, stored in zip(keys, stored_keys, strict=True) if key not in self._ids}
            if added:
                services, versions, labels = map(list, zip(*dict.fromkeys(added.values()), strict=True))
                parameters = {"services": services, "versions": versions, "labels": labels}
                limits = {"limit": MAX_SERVICE_RELEASES, "other": OTHER_RELEASE}
                await execute(connection, "releases_add", {**parameters, **limits})
                await self._read(connection, list(added.values()))
                self._ids |= {key: self._ids[stored] for key, stored in added.items() if stored in self._ids}

    async def _read(self, connection: AsyncConnection[TupleRow], keys: list[ReleaseKey]) -> None:
        services, versions, labels = map(list, zip(*keys, strict=True))
        parameters = {"services": services, "versions": versions, "labels": labels}
        cursor = await execute(connection, "release_ids", parameters)
        self._ids |= {(service, version, label): id_ for service, version, label, id_ in await cursor.fetchall()}


def _make_release_key(record: PairRecord, capture: Capture) -> ReleaseKey:
    version = "new" if capture is record.result.new else "old"
    return record.service, version, make_release_label(capture.release)


@dataclass(slots=True)
class EndpointIds:
    id: int
    source: str
    pool: str  # of the endpoints that are classified together while they have few pairs
    compared: int  # pairs, by the last reading and this process
    findings: dict[FindingKey, int] = field(default_factory=dict)


class IdCache:
    def __init__(self) -> None:
        self.services: dict[str, dict[EndpointKey, EndpointIds]] = {}
        self.examples: dict[int, ExampleSummary] = {}  # by finding; other processes may have added some
        self._written_services: set[str] = set()

    def clear(self) -> None:
        self.services.clear()
        self._written_services.clear()
        self.examples.clear()

    async def load(self, connection: AsyncConnection[TupleRow], records: Iterable[PairRecord]) -> None:
        """Read or create the ids of all endpoints and findings in a batch."""
        records = list(records)
        unknown_services = {record.endpoint[0] for record in records} - self.services.keys()
        if unknown_services:
            await self._read_endpoints(connection, unknown_services)
        missing: dict[EndpointKey, str] = {}
        for record in records:
            key, source = record.endpoint, record.result.route_source
            if self._is_missing(key, source) and (key not in missing or _has_precedence(source, missing[key])):
                missing[key] = source
        if missing:
            await self._add_endpoints(connection, missing)
        unknown_findings = self._collect_unknown_findings(records)
        if unknown_findings:
            await execute(connection, "findings_add", {"rows": to_json(list(unknown_findings.values()))})
            endpoint_ids = {endpoint for endpoint, _ in unknown_findings}
            endpoints = (endpoint for service in self.services.values() for endpoint in service.values())
            await self._read_findings(connection, {item.id: item for item in endpoints if item.id in endpoint_ids})

    def get_endpoint(self, key: EndpointKey) -> EndpointIds:
        ids = self._find_endpoint(key)
        assert ids is not None
        return ids

    def copies_writes(self, service: str) -> bool:
        """Tell whether the ledger has pairs of unsafe requests of the service."""
        return service in self._written_services

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
        return endpoints.get(key) or (
            endpoints.get(_fold_endpoint(key)) if len(endpoints) >= MAX_SERVICE_ENDPOINTS else None
        )

    def _is_missing(self, key: EndpointKey, source: str) -> bool:
        endpoint = self._find_endpoint(key)
        return endpoint is None or (key in self.services[key[0]] and _has_precedence(source, endpoint.source))

    async def _add_endpoints(self, connection: AsyncConnection[TupleRow], missing: Mapping[EndpointKey, str]) -> None:
        endpoints = {
            (*key, missing[key])
            if key in self.services[key[0]] or len(self.services[key[0]]) + index < MAX_SERVICE_ENDPOINTS
            else (*_fold_endpoint(key), "")
            for index, key in enumerate(sorted(missing))
        }
        await add_endpoints(connection, endpoints)
        await self._read_endpoints(connection, {endpoint[0] for endpoint in endpoints})

    async def _read_endpoints(self, connection: AsyncConnection[TupleRow], services: set[str]) -> None:
        cursor = await execute(connection, "endpoints_read", {"services": list(services)})
        added = {}
        for service in services:
            self.services.setdefault(service, {})
        for service, method, route, endpoint_id, source, pool, compared, is_safe in await cursor.fetchall():
            endpoints = self.services[service]
            if (service, method, route) not in endpoints:
                ids = EndpointIds(endpoint_id, source, pool, compared)
                added[endpoint_id] = endpoints[service, method, route] = ids
                if not is_safe:
                    self._written_services.add(service)
            endpoints[service, method, route].source = source
        if added:
            await self._read_findings(connection, added)

    async def _read_findings(self, connection: AsyncConnection[TupleRow], endpoints: dict[int, EndpointIds]) -> None:
        cursor = await execute(connection, "finding_ids", {"endpoints": list(endpoints)})
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


async def add_endpoints(connection: AsyncConnection[Any], endpoints: Iterable[tuple[str, str, str, str]]) -> None:
    """Add endpoints as service, method, route and source, unless the ledger has them with a source of higher precedence."""
    names = ("service", "method", "route", "source")
    rows = to_json([dict(zip(names, endpoint, strict=True)) for endpoint in endpoints])
    await execute(connection, "endpoints_add", {"rows": rows, "precedence": list(SOURCES_BY_PRECEDENCE)})


def _has_precedence(source: str, other: str) -> bool:
    """Tell whether a route is better known from `source` than from `other`."""
    if source not in SOURCES_BY_PRECEDENCE or other not in SOURCES_BY_PRECEDENCE:
        return False
    return SOURCES_BY_PRECEDENCE.index(source) < SOURCES_BY_PRECEDENCE.index(other)


def _fold_endpoint(key: EndpointKey) -> EndpointKey:
    service, method, _ = key
    return service, method if method in KNOWN_METHODS else OTHER_METHOD, OTHER_PATH


def _make_finding_key(difference: Difference) -> FindingKey:
    return (difference.part, sanitise_text(difference.path, MAX_PATH_CHARS), difference.kind)


def _make_finding_record(
    endpoint: EndpointIds, key: FindingKey, difference: Difference, time_ms: int
) -> dict[str, Any]:
    detail = {"exact_path": difference.exact_path, "old": difference.old, "new": difference.new}
    return {
        **dict(zip(("part", "path", "kind"), key, strict=True)),
        "endpoint_id": endpoint.id,
        "impact": difference.impact,
        "ms": time_ms,
        "detail": {
            name: None if value is None else sanitise_text(value, MAX_VALUE_CHARS) for name, value in detail.items()
        },
    }
