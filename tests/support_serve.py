"""A complete sidecar in the event loop of the test, and rows in its ledger."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import psycopg
import zstandard
from google.protobuf import any_pb2
from psycopg.types.json import Jsonb

from abreast.protocol.capture import Capture
from abreast.v1 import access_pb2_grpc, comparison_pb2_grpc, rollout_pb2_grpc, traffic_pb2_grpc
from abreast_sidecar.app import Sidecar
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.settings import Settings
from abreast_sidecar.traffic.xds import wire_pb2 as wire
from support import eventually_async
from support_captures import encode
from support_database import execute

NOON = dt.datetime(2026, 3, 4, 12, tzinfo=dt.UTC)


@dataclass
class RunningSidecar:
    sidecar: Sidecar
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    postgres_url: str
    stop: asyncio.Event
    task: asyncio.Task[None]

    async def halt(self) -> None:
        """Stop the sidecar before the end of the test."""
        self.stop.set()
        await self.task

    @property
    def access(self) -> access_pb2_grpc.AccessServiceStub:
        return access_pb2_grpc.AccessServiceStub(self.channel)

    @property
    def comparison(self) -> comparison_pb2_grpc.ComparisonServiceStub:
        return comparison_pb2_grpc.ComparisonServiceStub(self.channel)

    @property
    def traffic(self) -> traffic_pb2_grpc.TrafficServiceStub:
        return traffic_pb2_grpc.TrafficServiceStub(self.channel)

    @property
    def rollout(self) -> rollout_pb2_grpc.RolloutServiceStub:
        return rollout_pb2_grpc.RolloutServiceStub(self.channel)

    @property
    def port(self) -> int:
        return self.sidecar.grpc.port

    def ledger(self) -> Ledger:
        return Ledger(self.postgres_url)


class QuerySidecar(Sidecar):
    """A sidecar that only answers calls. It has no worker, job or leader that could change the rows of a test."""

    async def _run_components(self) -> None:
        await self._migrate()
        await self.control.run(self._drain_started)

    async def _check_workers(self) -> None:
        """Report ready without workers."""


@asynccontextmanager
async def run_sidecar(
    redis_url: str,
    postgres_url: str,
    *,
    kind: type[Sidecar] = Sidecar,
    ready: bool = True,
    grpc_port: int = 0,
    services: Sequence[EnvoySettings] = (),
    **changes: Any,
) -> AsyncIterator[RunningSidecar]:
    settings = Settings(
        redis_url=redis_url,
        postgres_url=postgres_url,
        grpc_listen=f"127.0.0.1:{grpc_port}",
        http_listen="127.0.0.1:0",
        **{"collector_listen": "127.0.0.1:0", "shutdown_timeout": 5.0, "retention_days": 36_500, **changes},
    )
    stop = asyncio.Event()
    sidecar = kind(settings, services=services)
    task = asyncio.create_task(sidecar.run(stop))

    async def up() -> bool:
        if task.done():
            task.result()
        return sidecar.readiness.is_ready if ready else bool(sidecar.grpc.port)

    try:
        await eventually_async(up, description="the sidecar is up")
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{sidecar.grpc.port}") as channel,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{sidecar.http.port}") as http,
        ):
            yield RunningSidecar(sidecar, channel, http, postgres_url, stop, task)
    finally:
        stop.set()
        await task


@dataclass
class Ledger:
    """Writes rows with plain SQL."""

    url: str

    def execute(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return execute(self.url, sql, parameters)

    @asynccontextmanager
    async def locked(self, table: str) -> AsyncIterator[None]:
        """Lock a table against all other connections. A sidecar in this process may have to release it first."""
        async with await psycopg.AsyncConnection.connect(self.url) as connection:
            await connection.execute(f"lock table {table}".encode())
            yield

    def endpoint(self, service: str = "shop", method: str = "GET", route: str = "/products/{id}") -> int:
        (row,) = self.execute(
            "insert into abreast.endpoint (service, method, route) values (%s, %s, %s) "
            "on conflict (service, method, route) do update set service = excluded.service returning id",
            service,
            method,
            route,
        )
        return int(row[0])

    def finding(
        self,
        endpoint: int,
        path: str,
        *,
        part: str = "body",
        kind: str = "changed",
        impact: str = "value",
        count: int = 0,
        baseline_count: int = 0,
        state: str = "",
        reason: str = "because",
        detail: Mapping[str, Any] | None = None,
    ) -> int:
        """Add a finding. The sidecar does not change its state, because the endpoint has no counters."""
        state = state or ("noise" if baseline_count else "real")
        (row,) = self.execute(
            "insert into abreast.finding (endpoint_id, part, path, kind, impact, count, baseline_count, "
            "first_seen, last_seen, state, reason, detail) "
            "values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) returning id",
            *(endpoint, part, path, kind, impact, count, baseline_count, NOON, NOON),
            *(state, reason, Jsonb(detail or {})),
        )
        return int(row[0])

    def pair(
        self, endpoint: int, *findings: int, at: dt.datetime = NOON, outcome: str | None = None, **columns: Any
    ) -> str:
        """Add a pair, and update the counters like a worker."""
        number = str(uuid.uuid4())
        day = at.astimezone(dt.UTC).date()
        values = {
            "day": day,
            "id": number,
            "at": at,
            "endpoint_id": endpoint,
            "outcome": outcome or ("mismatch" if findings else "match"),
            "findings": list(findings),
            "live": "old",
            "old_status": 200,
            "new_status": 200,
            "old_us": 1500,
            "new_us": 2500,
            "waits_match": True,
            **columns,
        }
        self.execute("select abreast.open_day(%s)", day)
        names, marks = ", ".join(values), ", ".join(["%s"] * len(values))
        self.execute(f"insert into abreast.pair ({names}) values ({marks})", *values.values())  # noqa: S608  # constants of this file
        self.execute(
            "update abreast.finding set count = count + 1, last_seen = greatest(last_seen, %s) where id = any(%s)",
            *(at, list(findings)),
        )
        self.execute(
            "insert into abreast.outcome_count (service, day, outcome, pairs) "
            "select service, %s, %s, 1 from abreast.endpoint where id = %s "
            "on conflict (service, day, outcome) do update set pairs = outcome_count.pairs + 1",
            *(day, values["outcome"], endpoint),
        )
        return number

    def example(
        self, pair: str, findings: Mapping[int, int], captures: bytes, differences: list[Any], at: dt.datetime = NOON
    ) -> None:
        """Keep a pair as an example. `findings` has the size of the example for each finding."""
        self.execute(
            "insert into abreast.example (day, pair_id, captures, differences) values (%s, %s, %s, %s)",
            *(at.date(), pair, captures, Jsonb(differences)),
        )
        for finding, size in findings.items():
            self.execute(
                "insert into abreast.finding_example (finding_id, day, pair_id, body_bytes) values (%s, %s, %s, %s)",
                *(finding, at.date(), pair, size),
            )


def packed(*captures: Capture) -> bytes:
    blobs = [encode(item) for item in captures]
    return zstandard.compress(b"".join(len(blob).to_bytes(4, "big") + blob for blob in blobs))


@dataclass(frozen=True)
class Refused:
    """The error of a call, as a client receives it."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    field: str = ""


def refused(error: grpc.aio.AioRpcError) -> Refused:
    metadata = dict(error.trailing_metadata())
    status = wire.Status.FromString(bytes(metadata["grpc-status-details-bin"]))
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    detail: any_pb2.Any = status.details[0]
    assert detail.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    info = wire.ErrorInfo.FromString(detail.value)
    field = ""
    for violation_detail in status.details[1:]:
        assert violation_detail.type_url == "type.googleapis.com/google.rpc.BadRequest"
        [violation] = wire.BadRequest.FromString(violation_detail.value).field_violations
        assert violation.description == status.message
        field = violation.field
    return Refused(error.code(), error.details() or "", info.reason, info.domain, field)
