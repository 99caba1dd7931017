"""Captures, pairs and what else tests of the way from Redis to Postgres need."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis
from msgspec.structs import replace

from abreast.protocol.capture import Answer, Body, Capture, Request, Role, Version
from abreast.protocol.join import CONSUMER_GROUP, JOIN_SCRIPT, SERVICES_KEY, Keys, Limits, join_arguments
from abreast_sidecar.compare.model import ComparisonResult, Difference, RenderedValues
from abreast_sidecar.ingest.worker import Worker
from abreast_sidecar.jobs.runner import JobRunner
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.counters import BASELINE_MARKS, COUNTERS, MARKS
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.records import PairRecord
from support_captures import encode
from support_database import execute

SERVICE = "shop"


def capture(
    pair: str,
    version: Version,
    role: Role = "live",
    content: object = None,
    *,
    arms: int = 2,
    attempt: int = 1,
    total_us: int = 2000,
    route: str = "/products/{id}",
    status: int = 200,
) -> Capture:
    body = json.dumps({"price": 1} if content is None else content).encode()
    return Capture(
        pair,
        SERVICE,
        version,
        role,
        Request("GET", "/products/7", "page=1", route, (("cookie", f"session={pair}"),)),
        Answer(status, (("content-type", "application/json"),), Body(body, len(body))),
        attempt=attempt,
        expected_captures=arms,
        release=f"{version}-1",
        started_at=time.time(),
        total_us=total_us,
        wait_us=300,
        in_flight=0,
    )


def pair_of(old: object = None, new: object = None, **changes: Any) -> list[Capture]:
    """Both captures of one request."""
    pair = str(uuid.uuid4())
    return [capture(pair, "old", "live", old, **changes), capture(pair, "new", "shadow", new, **changes)]


def send(url: str, captures: Iterable[Capture], *, bounds: Limits | None = None, shard: int = 0) -> list[int]:
    """Hand captures to the services' own script, as a service does."""
    keys = Keys(SERVICE, shard)
    rows = [(capture.pair, capture.slot, capture.expected_captures, encode(capture)) for capture in captures]
    names, arguments = join_arguments(keys, bounds or Limits(), rows)
    with redis.Redis.from_url(url) as client:
        client.hset(SERVICES_KEY, SERVICE, str(shard + 1))
        answer: list[int] = client.register_script(JOIN_SCRIPT)(keys=names, args=arguments)
        return answer


def add_entry(url: str, fields: dict[str, bytes | str], *, shard: int = 0) -> str:
    """Put an entry into the stream by hand."""
    with redis.Redis.from_url(url) as client:
        client.hset(SERVICES_KEY, SERVICE, str(shard + 1))
        raw = client.xadd(Keys(SERVICE, shard).ready, fields)
        assert isinstance(raw, bytes)
        return raw.decode()


def add_stuck_entry(url: str, age_s: float) -> str:
    """Add an entry that a worker received and never acknowledged. Return its id."""
    keys = Keys(SERVICE, 0)
    with redis.Redis.from_url(url) as client:
        client.hset(SERVICES_KEY, SERVICE, "1")
        client.xgroup_create(keys.ready, CONSUMER_GROUP, id="0", mkstream=True)
        entry_id = f"{int((time.time() - age_s) * 1000)}-0"
        client.xadd(keys.ready, {"pair": "p", "why": "joined"}, id=entry_id)
        client.xreadgroup(CONSUMER_GROUP, "stuck", {keys.ready: ">"})
    return entry_id


def ready(url: str, shard: int = 0) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.xlen(Keys(SERVICE, shard).ready))


def stats(url: str, shard: int = 0) -> dict[str, int]:
    with redis.Redis.from_url(url) as client:
        raw = client.hgetall(Keys(SERVICE, shard).stats)
        return {name.decode(): int(value) for name, value in raw.items() if name != b"life"}


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    return execute(url, query)


def query_value(url: str, query: str) -> Any:
    return rows(url, query)[0][0]


def outcomes(url: str) -> dict[str, int]:
    return dict(rows(url, "select outcome, count(*) from abreast.pair group by outcome"))


def hourly_counts_match_pairs(url: str) -> None:
    """By all that questions are answered by; what is zero was judged again."""
    stored = rows(
        url, "select endpoint_id, hour, outcome, old_release, new_release, old_status, new_status, findings, explained,"
        " explained_by, drift, pairs from abreast.hourly_count where pairs <> 0"
    )  # fmt: skip
    expected = rows(
        url, "select endpoint_id, date_trunc('hour', at, 'UTC'), outcome, old_release, new_release, old_status,"
        " new_status, array(select unnest(findings) order by 1), explained, explained_by, drift, count(*)"
        " from abreast.pair group by 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    )  # fmt: skip
    assert sorted(map(str, stored)) == sorted(map(str, expected))


def counters_match_pairs(url: str) -> None:
    """Assert that all counters of findings and rules equal a recount of the stored pairs, whose marks name them."""
    expected: Counter[tuple[Any, ...]] = Counter()
    for rule, finding, *releases, name in count_pairs(url):
        expected[rule, finding, *releases, name] += 1
        if rule == 0:
            expected[finding, name] += 1
    names = ", ".join(COUNTERS)
    label = "(select version || ' ' || label from abreast.release where id = {0}_release)"
    columns = f"finding_id, {label.format('old')}, {label.format('new')}, {names}"
    stored: Counter[tuple[Any, ...]] = Counter()
    for query in (
        f"select rule_id, {columns} from abreast.finding_release",  # noqa: S608  # ours
        f"select id, {names} from abreast.finding f where not abreast.is_aggregate(f)",  # noqa: S608  # ours
    ):
        for row in rows(url, query):
            key, counts = row[: -len(COUNTERS)], row[-len(COUNTERS) :]
            stored.update({(*key, name): count for name, count in zip(COUNTERS, counts, strict=True)})
    if not rows(url, "select from abreast.retention_state where dropped_until > '-infinity'"):
        differing = {key for key in stored | expected if stored[key] != expected[key]}
        assert not differing, sorted(f"{key}: {stored[key]}, pairs have {expected[key]}" for key in differing)


def count_pairs(url: str) -> Iterator[tuple[Any, ...]]:
    """Yield (rule or 0, finding, old release, new release, counter) for all that the stored pairs count."""
    columns = (
        "id, marks, case when old_us is not null then 'old ' || old_release end, "
        "case when new_us is not null then 'new ' || new_release end"
    )
    for counter, prefix in (("count", ""), ("baseline_count", "baseline_")):
        names = [name for name, mark in MARKS.items() if bool(mark & BASELINE_MARKS) == bool(prefix)]
        for query in (
            f"select {columns}, unnest({prefix}findings), 0 from abreast.pair",  # noqa: S608  # ours
            f"select {columns}, unnest({prefix}explained), unnest({prefix}explained_by) from abreast.pair",  # noqa: S608
        ):
            for _, marks, *releases, finding, rule in rows(url, query):
                bits = (marks or {}).get(str(finding), 0)
                for name in (counter, *(name for name in names if bits & MARKS[name])):
                    yield rule, finding, *releases, name


def make_record(
    differences: Sequence[Difference] = (),
    *,
    noise: Sequence[Difference] = (),
    baseline_compared: bool | None = None,
    pair: str = "",
    at: int | None = None,
    outcome: Any = None,
    route: str = "/products/{id}",
    blobs: tuple[bytes, ...] = (b"old", b"new"),
    size: int = 100,
    releases: tuple[str, str] = ("old-1", "new-1"),
) -> PairRecord:
    pair = pair or str(uuid.uuid4())
    has_baseline = bool(noise) if baseline_compared is None else baseline_compared
    judgement = ComparisonResult(
        outcome=outcome or ("mismatch" if differences else "match"),
        method="GET",
        route=route,
        old=replace(capture(pair, "old", "live", "x" * size), release=releases[0]),
        new=replace(capture(pair, "new", "shadow", "x" * size), release=releases[1]),
        baseline=capture(pair, "old", "baseline") if has_baseline else None,
        differences=tuple(differences),
        noise=tuple(noise),
        baseline_compared=has_baseline,
    )
    moment = int(time.time() * 1000) if at is None else at
    return PairRecord(SERVICE, f"{moment}-0", moment, pair, judgement, blobs)


def difference(path: str = "$.price", **changes: Any) -> Difference:
    fields: dict[str, Any] = {"part": "body", "path": path, "kind": "changed", "impact": "value", **changes}
    defaults = {"exact_path": path, "old": "1", "new": "2"}
    location = RenderedValues(**{name: fields.pop(name, value) for name, value in defaults.items()})
    return Difference(location=location, **fields)


async def run_jobs(settings: Settings, stop: asyncio.Event) -> None:
    async with Database(settings.postgres_url) as database:
        await JobRunner(settings, database).run(stop)


@asynccontextmanager
async def run_worker(settings: Settings, name: str = "worker") -> AsyncIterator[Worker]:
    stop = asyncio.Event()
    async with Database(settings.postgres_url) as database:
        worker = Worker(settings, database, name=name)
        task = asyncio.create_task(worker.run(stop))
        try:
            yield worker
        finally:
            stop.set()
            await task
