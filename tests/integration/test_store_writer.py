from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from msgspec import structs

from abreast_sidecar.errors import LedgerError, RefusedError
from abreast_sidecar.jobs.retention import drop_days
from abreast_sidecar.store import catalogue
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import PairRecord, read_captures
from abreast_sidecar.store.samples import BET_PERIOD_MS, FEW_PAIRS
from abreast_sidecar.store.writer import PairWriter
from support_captures import encode
from support_database import execute
from support_pairs import capture, difference, make_record, query_value, rows

pytestmark = pytest.mark.postgres

DAY = 86_400_000  # ms


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[PairWriter]:
    writer = PairWriter(url, examples_per_finding=3)
    yield writer
    await writer.close()


async def test_writer_counts_repeated_batch_once(ledger: PairWriter, url: str) -> None:
    batch = [make_record([difference()]), make_record(), make_record(noise=[difference("$.id")])]
    first, second = await ledger.write(batch), await ledger.write(batch)

    assert (first, second) == (3, 0)
    findings = rows(url, "select path, count, baseline_count from abreast.finding order by path")
    assert findings == [("$.id", 0, 1), ("$.price", 1, 0)]
    assert query_value(url, "select sum(pairs) from abreast.outcome_count") == 3


async def test_writer_writes_batch_again_to_ledger_with_other_findings(
    ledger: PairWriter, url: str, empty_postgres_url: str
) -> None:
    """A restored or emptied ledger gives the same differences other findings."""
    await migrate(empty_postgres_url)
    other = PairWriter(empty_postgres_url, examples_per_finding=3)
    batch = [make_record([difference("$.name")], noise=[difference("$.id")]) for _ in range(3)]
    try:
        await other.write([make_record([difference("$.price")])])
        await other.write(batch)
        await ledger.write(batch)
    finally:
        await other.close()

    findings = "select path, count, baseline_count from abreast.finding order by path"
    assert rows(empty_postgres_url, findings) == [("$.id", 0, 3), ("$.name", 3, 0), ("$.price", 1, 0)]
    assert rows(url, findings) == [("$.id", 0, 3), ("$.name", 3, 0)]
    marked = "select marks ?& array(select unnest(findings || baseline_findings)::text) from abreast.pair order by id"
    assert [marks for (marks,) in rows(url, marked)] == [True, True, True]


async def test_writer_folds_releases_above_the_limit_in_few_statements(
    ledger: PairWriter, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "MAX_SERVICE_RELEASES", 100)
    statements: list[object] = []
    run = psycopg.AsyncConnection.execute

    async def record(self: Any, *arguments: Any, **options: Any) -> Any:
        statements.append(arguments[0])
        return await run(self, *arguments, **options)

    batches = []
    for start in (0, 80):
        result = make_record().result
        assert result.new is not None
        news = [structs.replace(result.new, release=f"build-{number}") for number in range(start, start + 80)]
        batches.append([replace(make_record(), result=structs.replace(result, new=new)) for new in news])
    monkeypatch.setattr(psycopg.AsyncConnection, "execute", record)
    for batch in batches:
        assert await ledger.write(batch) == 80

    labels = [label for (label,) in rows(url, "select label from abreast.release where version = 'new' order by id")]
    assert labels == [*[f"build-{number}" for number in range(99)], catalogue.OTHER_RELEASE]
    assert sum(b"abreast.release" in str(statement).encode() for statement in statements) < 12
    counts = "select sum(compared) from abreast.endpoint_release join abreast.release on id = new_release where label = '(other)'"
    assert query_value(url, counts) == 61


async def test_writer_commits_a_batch_in_few_statements(
    ledger: PairWriter, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # fills the caches and the examples
        await ledger.write([make_record([difference(), difference("$.name")]) for _ in range(10)])
    statements: list[object] = []
    run = psycopg.AsyncConnection.execute

    async def count(self: psycopg.AsyncConnection[object], query: object, *args: object, **options: object) -> object:
        statements.append(query)
        return await run(self, query, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", count)
    await ledger.write([make_record([difference(), difference("$.name")]) for _ in range(50)])

    assert len(statements) <= 6  # with a notification, if one is due
    assert rows(url, "select count from abreast.finding") == [(70,), (70,)]


async def test_writer_marks_pair_whose_capture_came_late(ledger: PairWriter, url: str) -> None:
    def without_new(record: PairRecord, outcome: str) -> PairRecord:
        return replace(record, result=structs.replace(record.result, outcome=outcome, new=None))

    pairs = [without_new(make_record(pair=name), "only_old") for name in ("late", "missing")]
    late = [make_record(pair=name, outcome="late", at=pairs[0].time_ms + 9000) for name in ("late", "unknown")]
    await ledger.write(pairs)
    await ledger.write(late)
    await ledger.write(late)

    assert rows(url, "select id, outcome from abreast.pair order by id") == [("late", "late"), ("missing", "only_old")]
    totals = "select outcome, sum(pairs)::int from {} group by outcome order by outcome"
    for table in ("abreast.outcome_count", "abreast.hourly_count"):
        assert [row for row in rows(url, totals.format(table)) if row[1]] == [("late", 1), ("only_old", 1)]


async def test_writer_counts_only_new_pairs_of_a_batch(ledger: PairWriter, url: str) -> None:
    stored = [make_record([difference()]) for _ in range(5)]
    await ledger.write(stored)
    added = await ledger.write(stored + [make_record([difference()]) for _ in range(4)])

    assert added == 4
    assert query_value(url, "select count from abreast.finding") == 9


async def test_writer_counts_pair_once_per_finding(ledger: PairWriter, url: str) -> None:
    differences = [difference("$.items[*].price", exact_path=f"$.items[{n}].price") for n in range(50)]
    await ledger.write([make_record(differences)])

    assert rows(url, "select count, cardinality(findings) from abreast.finding, abreast.pair") == [(1, 1)]
    assert query_value(url, "select jsonb_array_length(differences) from abreast.example") == 50


async def test_writer_uses_day_and_time_of_stream_in_utc(ledger: PairWriter, url: str) -> None:
    late = int(dt.datetime(2026, 3, 1, 23, 59, 59, 999000, dt.UTC).timestamp() * 1000)
    await ledger.write([make_record(at=late, pair="a"), make_record(at=late + 1, pair="b")])

    pairs = rows(url, "select id, day, extract(epoch from at) * 1000 from abreast.pair order by id")
    assert pairs == [("a", dt.date(2026, 3, 1), late), ("b", dt.date(2026, 3, 2), late + 1)]


async def test_examples_are_limited_to_smallest_of_batch(ledger: PairWriter, url: str) -> None:
    await ledger.write([make_record([difference()], size=1000 - 10 * n) for n in range(20)])
    await ledger.write([make_record([difference()], size=800) for _ in range(20)])  # hardly smaller

    sizes = rows(url, "select body_bytes from abreast.finding_example order by body_bytes")
    assert [size for (size,) in sizes] == [2 * (1000 - 10 * n + 2) for n in (19, 18, 17)]
    assert query_value(url, "select count(*) from abreast.example") == 3


async def test_examples_are_replaced_by_much_smaller_ones(ledger: PairWriter, url: str) -> None:
    await ledger.write([make_record([difference()], size=10_000 + n, pair=f"large {n}") for n in range(3)])
    await ledger.write([make_record([difference()], size=9_000)])
    assert query_value(url, "select min(body_bytes) from abreast.finding_example") == 2 * 10_002

    for size in (4_000, 3_000, 500, 400):
        await ledger.write([make_record([difference()], size=size), make_record([difference()], size=size + 9)])

    sizes = rows(url, "select body_bytes from abreast.finding_example order by body_bytes")
    assert [size for (size,) in sizes] == [2 * (size + 2) for size in (400, 500, 3_000)]
    assert query_value(url, "select count(*) from abreast.example") == 3
    assert query_value(url, "select examples_replaced from abreast.finding") == 4


async def test_examples_are_replaced_a_limited_number_of_times(
    ledger: PairWriter, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abreast_sidecar.store.samples.MAX_REPLACEMENTS", 2)
    await ledger.write([make_record([difference()], size=100_000) for _ in range(3)])
    for turn in range(10):
        await ledger.write([make_record([difference()], size=1_000 // (turn + 1))])

    assert query_value(url, "select examples_replaced from abreast.finding") == 2
    assert query_value(url, "select count(*) from abreast.finding_example where body_bytes < 3000") == 2


async def test_evicted_example_stays_for_its_other_finding(ledger: PairWriter, url: str) -> None:
    shared = [make_record([difference("$.a"), difference("$.b")], size=1000, pair=f"both {n}") for n in range(3)]
    await ledger.write(shared)
    await ledger.write([make_record([difference("$.a")], size=10)])

    assert query_value(url, "select count(*) from abreast.example") == 4
    assert rows(url, "select count(*) from abreast.finding_example group by finding_id") == [(3,), (3,)]


async def test_examples_stay_limited_with_many_workers(url: str) -> None:
    ledgers = [PairWriter(url, examples_per_finding=3) for _ in range(4)]
    await ledgers[0].write([make_record([difference()])])
    for writer in ledgers:
        await writer.write([make_record()])  # all know of one example
    await asyncio.gather(*(writer.write([make_record([difference()]) for _ in range(9)]) for writer in ledgers))
    for writer in ledgers:
        await writer.close()

    assert query_value(url, "select count(*) from abreast.finding_example") == 3
    assert query_value(url, "select count(*) from abreast.example") == 3


async def test_example_contains_captures_as_sent(ledger: PairWriter, url: str) -> None:
    captures = (capture("p", "old", "live", {"a": 1}), capture("p", "new", "shadow", {"a": 2}))
    await ledger.write([make_record([difference()], pair="p", blobs=tuple(encode(capture) for capture in captures))])

    assert read_captures(query_value(url, "select captures from abreast.example")) == captures


async def test_finding_impact_rises_to_the_worst(ledger: PairWriter, url: str) -> None:
    await ledger.write([make_record([difference(impact="value")])])
    await ledger.write([make_record([difference(impact="breaking")])])
    await ledger.write([make_record([difference(impact="additive")])])

    assert rows(url, "select impact, count from abreast.finding") == [("breaking", 3)]


async def test_writers_of_same_findings_never_deadlock(url: str) -> None:
    ledgers = [PairWriter(url, examples_per_finding=2) for _ in range(4)]
    paths = [f"$.field{n}" for n in range(30)]

    async def work(ledger: PairWriter, turn: int) -> int:
        total = 0
        for start in range(6):
            order = paths[(turn * 7 + start) % 30 :] + paths[: (turn * 7 + start) % 30]
            total += await ledger.write(
                [make_record([difference(path)], pair=f"{turn}-{start}-{path}") for path in order]
            )
        return total

    totals = await asyncio.gather(*(work(ledger, turn) for turn, ledger in enumerate(ledgers)))
    for ledger in ledgers:
        await ledger.close()

    assert sum(totals) == 4 * 6 * 30
    assert set(rows(url, "select count from abreast.finding")) == {(24,)}
    assert query_value(url, "select deadlocks from pg_stat_database where datname = current_database()") == 0


async def test_writers_with_same_entries_count_each_once(url: str) -> None:
    batch = [make_record([difference(f"$.f{n % 5}")], pair=f"pair-{n}") for n in range(200)]
    ledgers = [PairWriter(url, examples_per_finding=2) for _ in range(3)]
    added = await asyncio.gather(*(writer.write(batch if n else batch[::-1]) for n, writer in enumerate(ledgers)))
    for writer in ledgers:
        await writer.close()

    assert sum(added) == 200
    assert query_value(url, "select sum(count) from abreast.finding") == 200


async def test_clients_bet_once_per_period_with_any_number_of_workers(url: str) -> None:
    """Each worker gets some of the pairs of each client. Both copies of a request were compared."""
    start = int(time.time() * 1000) // BET_PERIOD_MS * BET_PERIOD_MS
    records = [
        with_client(make_record([difference()], baseline_compared=True, at=start + period * BET_PERIOD_MS), client)
        for period in range(2)
        for client in range(5)
        for _ in range(6)
    ]
    writers = [PairWriter(url, examples_per_finding=3) for _ in range(3)]
    try:
        await asyncio.gather(*(writer.write(records[number::3]) for number, writer in enumerate(writers)))
        await writers[0].write(records)
    finally:
        for writer in writers:
            await writer.close()

    columns = "count, other_only, copy_greater_of_new"
    assert rows(url, f"select {columns} from abreast.finding") == [(60, 10, 10)]  # noqa: S608  # our own
    bits = rows(url, "select sum((value::int & 1024) / 1024) from abreast.pair, jsonb_each(marks)")
    assert bits == [(10,)]


async def test_client_bets_once_for_all_small_endpoints_of_a_pool(ledger: PairWriter, url: str) -> None:
    """A session shows one cause on many pages. Endpoints with enough pairs bet separately."""
    start = int(time.time() * 1000) // BET_PERIOD_MS * BET_PERIOD_MS

    def visit(route: str, client: int) -> PairRecord:
        record = make_record([difference()], baseline_compared=True, at=start, route=route)
        return with_client(record, client)

    await ledger.write([make_record(route="/p/large", at=start) for _ in range(FEW_PAIRS)])
    await ledger.write([visit(f"/p/{'x' * page}", client) for client in range(2) for page in range(1, 9)])
    await ledger.write([visit(f"/p/{page}", 0) for page in ("xxx", "large")])

    bets = "select route = '/p/large', sum(count)::int, sum(other_only)::int, sum(copy_greater_of_new)::int"
    tables = "from abreast.finding f join abreast.endpoint e on e.id = endpoint_id"
    assert rows(url, f"{bets} {tables} group by 1 order by 1") == [(False, 17, 2, 2), (True, 1, 1, 1)]


async def test_server_errors_of_all_clients_bet_once_per_period(ledger: PairWriter, url: str) -> None:
    start = int(time.time() * 1000) // BET_PERIOD_MS * BET_PERIOD_MS
    status = difference("200->500", part="status")
    for number in range(20):
        record = make_record([status], baseline_compared=True, at=start + number)
        assert record.result.new is not None
        new = structs.replace(record.result.new, answer=structs.replace(record.result.new.answer, status=500))
        await ledger.write([replace(record, result=structs.replace(record.result, new=new))])

    assert rows(url, "select count, other_only from abreast.finding") == [(20, 1)]


async def test_bets_expire_after_an_hour(ledger: PairWriter, url: str) -> None:
    await ledger.write([make_record([difference()], baseline_compared=True)])
    execute(url, "insert into abreast.bet values (1, now() - interval '2 hours')")
    async with Database(url) as database, database.connection() as connection:
        await drop_days(connection, retention_days=1)

    assert query_value(url, "select count(*) from abreast.bet where key <> 1") == 3
    assert query_value(url, "select count(*) from abreast.bet where key = 1") == 0


def with_client(record: PairRecord, client: int) -> PairRecord:
    assert record.result.old is not None
    request = structs.replace(record.result.old.request, headers=(("cookie", f"session={client}"),))
    return replace(
        record, result=structs.replace(record.result, old=structs.replace(record.result.old, request=request))
    )


async def test_writer_distinguishes_rejected_data_from_lost_server(ledger: PairWriter, url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("alter table abreast.pair add check (id <> 'bad')")
    with pytest.raises(RefusedError, match="rejects a record: CheckViolation"):
        await ledger.write([make_record(), make_record(pair="bad")])

    assert query_value(url, "select count(*) from abreast.pair") == 0
    assert await ledger.write([make_record()]) == 1
    offline_writer = PairWriter("postgresql://postgres@127.0.0.1:1/x", examples_per_finding=1)
    with pytest.raises(LedgerError) as error:
        await offline_writer.write([make_record()])
    assert not isinstance(error.value, RefusedError)


async def test_dropped_day_rejects_pairs_and_counts_them(ledger: PairWriter, url: str) -> None:
    """A pair that is delivered again must not count twice, and nobody knows any more which pairs it had."""
    late_record = make_record(at=20_000 * DAY)
    await ledger.write([late_record])
    with psycopg.connect(url) as connection:
        connection.execute("select abreast.drop_day(date '1970-01-01' + 20000)")
    fresh = PairWriter(url, examples_per_finding=1)
    counts = [
        await writer.write([late_record, make_record(at=19_990 * DAY), make_record(at=20_001 * DAY)])
        for writer in (ledger, fresh)
    ]
    await fresh.close()
    database = Database(url)
    await database.open()
    drops = await LedgerReader(database).list_drops("shop")
    await database.close()

    assert counts == [1, 1]
    assert query_value(url, "select sum(pairs)::int from abreast.outcome_count") == 3
    assert [(drop.stage, drop.reason, drop.count) for drop in drops] == [("ledger", "day_dropped", 4)]


async def test_second_entry_after_midnight_counts_once(ledger: PairWriter, url: str) -> None:
    midnight = 20_000 * DAY
    first = make_record(pair="p", at=midnight - 60_000)
    counts = [await ledger.write([record]) for record in (first, make_record(pair="p", at=midnight + 60_000))]

    assert counts == [1, 0]
    assert query_value(url, "select sum(pairs)::int from abreast.outcome_count") == 1


async def test_writer_counts_once_after_connection_lost_in_commit(url: str) -> None:
    async with proxy_that_swallows_a_commit(url) as proxy_url:
        ledger = PairWriter(proxy_url, examples_per_finding=3)
        batch = [make_record([difference()]) for _ in range(10)]
        with pytest.raises(LedgerError):
            await ledger.write(batch)
        committed = query_value(url, "select count(*) from abreast.pair")
        second = await ledger.write(batch)
        await ledger.close()

    assert (committed, second) == (10, 0)
    assert query_value(url, "select count from abreast.finding") == 10


async def test_writer_accepts_nul_surrogates_and_long_text(ledger: PairWriter, url: str) -> None:
    long_difference = difference("$.a\0b\ud800" + "x" * 5000, exact_path="\0", old='"\\u0000"', new="\udfff\0")
    record = make_record([long_difference], noise=[long_difference], pair="p\0\ud800", route="/\0" + "é" * 3000)
    await ledger.write([record])

    assert rows(url, "select id from abreast.pair") == [("p␀?",)]
    assert query_value(url, "select differences->0->>'exact_path' from abreast.example") == "␀"


async def test_writer_folds_excess_endpoints(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abreast_sidecar.store.catalogue.MAX_SERVICE_ENDPOINTS", 10)
    ledger = PairWriter(url, examples_per_finding=3)
    for start in (0, 20):
        await ledger.write([make_record(route=f"/page/{n}") for n in range(start, start + 20)])
    for n in range(20):
        record = make_record()
        await ledger.write([replace(record, result=structs.replace(record.result, method=f"FORGED{n}"))])
    await ledger.close()

    assert query_value(url, "select count(*) from abreast.endpoint") == 12
    assert rows(url, "select method, route from abreast.endpoint where method <> 'GET'") == [("OTHER", "(other)")]
    assert query_value(url, "select count(*) from abreast.pair") == 60


async def test_writer_keeps_no_session_state(ledger: PairWriter, url: str) -> None:
    """So that a pooler that gives each transaction another session may stand between."""
    await ledger.write([make_record([difference()])])
    query = "select count(*) from pg_locks where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())"

    assert query_value(url, query) == 0
    assert ledger._connection is not None
    cursor = await ledger._connection.execute("select count(*) from pg_prepared_statements")
    assert await cursor.fetchone() == (0,)


@asynccontextmanager
async def proxy_that_swallows_a_commit(url: str) -> AsyncIterator[str]:
    """Run a proxy that cuts the first connection when the answer to its first COMMIT arrives."""
    parts = urlsplit(url)
    is_cut = False
    done: list[asyncio.Event] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal is_cut
        finished = asyncio.Event()
        done.append(finished)
        up_reader, up_writer = await asyncio.open_connection(parts.hostname, parts.port)
        committing = asyncio.Event()

        async def upwards() -> None:
            while data := await reader.read(65536):
                if b"COMMIT" in data and not is_cut:
                    committing.set()
                up_writer.write(data)
            up_writer.close()

        task = asyncio.create_task(upwards())
        with suppress(ConnectionError):
            while data := await up_reader.read(65536):
                if committing.is_set() and not is_cut:
                    is_cut = True
                    break
                writer.write(data)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for stream in (up_writer, writer):
            stream.close()
            with suppress(ConnectionError):
                await stream.wait_closed()
        finished.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield url.replace(f"{parts.hostname}:{parts.port}", f"127.0.0.1:{port}")
        for event in done:
            await event.wait()
    assert is_cut
