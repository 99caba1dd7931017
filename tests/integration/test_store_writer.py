from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import psycopg
import pytest

from abreast.protocol.capture import encode
from abreast_sidecar.errors import LedgerError, RefusedError
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import read_captures
from abreast_sidecar.store.writer import PairWriter
from support_pairs import capture, difference, judged, one, rows

pytestmark = pytest.mark.postgres

DAY = 86_400_000  # ms


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[PairWriter]:
    made = PairWriter(url, examples_per_finding=3)
    yield made
    await made.close()


async def test_writer_counts_repeated_batch_once(ledger: PairWriter, url: str) -> None:
    batch = [judged([difference()]), judged(), judged(noise=[difference("$.id")])]
    first, again = await ledger.write(batch), await ledger.write(batch)

    assert (first, again) == (3, 0)
    found = rows(url, "select path, count, baseline_count from abreast.finding order by path")
    assert found == [("$.id", 0, 1), ("$.price", 1, 0)]
    assert one(url, "select sum(pairs) from abreast.outcome_count") == 3


async def test_writer_counts_only_new_pairs_of_a_batch(ledger: PairWriter, url: str) -> None:
    known = [judged([difference()]) for _ in range(5)]
    await ledger.write(known)
    added = await ledger.write(known + [judged([difference()]) for _ in range(4)])

    assert added == 4
    assert one(url, "select count from abreast.finding") == 9


async def test_writer_counts_pair_once_per_finding(ledger: PairWriter, url: str) -> None:
    many = [difference("$.items[*].price", exact_path=f"$.items[{n}].price") for n in range(50)]
    await ledger.write([judged(many)])

    assert rows(url, "select count, cardinality(findings) from abreast.finding, abreast.pair") == [(1, 1)]
    assert one(url, "select jsonb_array_length(differences) from abreast.example") == 50


async def test_writer_uses_day_and_time_of_stream_in_utc(ledger: PairWriter, url: str) -> None:
    late = int(dt.datetime(2026, 3, 1, 23, 59, 59, 999000, dt.UTC).timestamp() * 1000)
    await ledger.write([judged(at=late, pair="a"), judged(at=late + 1, pair="b")])

    found = rows(url, "select id, day, extract(epoch from at) * 1000 from abreast.pair order by id")
    assert found == [("a", dt.date(2026, 3, 1), late), ("b", dt.date(2026, 3, 2), late + 1)]


async def test_examples_are_limited_to_smallest_of_batch(ledger: PairWriter, url: str) -> None:
    await ledger.write([judged([difference()], size=1000 - 10 * n) for n in range(20)])
    await ledger.write([judged([difference()], size=800) for _ in range(20)])  # hardly smaller

    kept = rows(url, "select body_bytes from abreast.finding_example order by body_bytes")
    assert [size for (size,) in kept] == [2 * (1000 - 10 * n + 2) for n in (19, 18, 17)]
    assert one(url, "select count(*) from abreast.example") == 3


async def test_examples_are_replaced_by_much_smaller_ones(ledger: PairWriter, url: str) -> None:
    await ledger.write([judged([difference()], size=10_000 + n, pair=f"large {n}") for n in range(3)])
    await ledger.write([judged([difference()], size=9_000)])
    assert one(url, "select min(body_bytes) from abreast.finding_example") == 2 * 10_002

    for size in (4_000, 3_000, 500, 400):
        await ledger.write([judged([difference()], size=size), judged([difference()], size=size + 9)])

    kept = rows(url, "select body_bytes from abreast.finding_example order by body_bytes")
    assert [size for (size,) in kept] == [2 * (size + 2) for size in (400, 500, 3_000)]
    assert one(url, "select count(*) from abreast.example") == 3
    assert one(url, "select examples_replaced from abreast.finding") == 4


async def test_examples_are_replaced_a_limited_number_of_times(
    ledger: PairWriter, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abreast_sidecar.store.samples.MAX_REPLACEMENTS", 2)
    await ledger.write([judged([difference()], size=100_000) for _ in range(3)])
    for turn in range(10):
        await ledger.write([judged([difference()], size=1_000 // (turn + 1))])

    assert one(url, "select examples_replaced from abreast.finding") == 2
    assert one(url, "select count(*) from abreast.finding_example where body_bytes < 3000") == 2


async def test_evicted_example_stays_for_its_other_finding(ledger: PairWriter, url: str) -> None:
    both = [judged([difference("$.a"), difference("$.b")], size=1000, pair=f"both {n}") for n in range(3)]
    await ledger.write(both)
    await ledger.write([judged([difference("$.a")], size=10)])

    assert one(url, "select count(*) from abreast.example") == 4
    assert rows(url, "select count(*) from abreast.finding_example group by finding_id") == [(3,), (3,)]


async def test_examples_stay_limited_with_many_workers(url: str) -> None:
    ledgers = [PairWriter(url, examples_per_finding=3) for _ in range(4)]
    await ledgers[0].write([judged([difference()])])
    for each in ledgers:
        await each.write([judged()])  # all know of one example
    await asyncio.gather(*(each.write([judged([difference()]) for _ in range(9)]) for each in ledgers))
    for each in ledgers:
        await each.close()

    assert one(url, "select count(*) from abreast.finding_example") == 3
    assert one(url, "select count(*) from abreast.example") == 3


async def test_example_contains_captures_as_sent(ledger: PairWriter, url: str) -> None:
    captures = (capture("p", "old", "live", {"a": 1}), capture("p", "new", "shadow", {"a": 2}))
    await ledger.write([judged([difference()], pair="p", blobs=tuple(encode(each) for each in captures))])

    assert read_captures(one(url, "select captures from abreast.example")) == captures


async def test_finding_impact_rises_to_the_worst(ledger: PairWriter, url: str) -> None:
    await ledger.write([judged([difference(impact="value")])])
    await ledger.write([judged([difference(impact="breaking")])])
    await ledger.write([judged([difference(impact="additive")])])

    assert rows(url, "select impact, count from abreast.finding") == [("breaking", 3)]


async def test_writers_of_same_findings_never_deadlock(url: str) -> None:
    ledgers = [PairWriter(url, examples_per_finding=2) for _ in range(4)]
    paths = [f"$.field{n}" for n in range(30)]

    async def work(ledger: PairWriter, turn: int) -> int:
        total = 0
        for start in range(6):
            order = paths[(turn * 7 + start) % 30 :] + paths[: (turn * 7 + start) % 30]
            total += await ledger.write([judged([difference(path)], pair=f"{turn}-{start}-{path}") for path in order])
        return total

    totals = await asyncio.gather(*(work(ledger, turn) for turn, ledger in enumerate(ledgers)))
    for ledger in ledgers:
        await ledger.close()

    assert sum(totals) == 4 * 6 * 30
    assert set(rows(url, "select count from abreast.finding")) == {(24,)}
    assert one(url, "select deadlocks from pg_stat_database where datname = current_database()") == 0


async def test_writers_with_same_entries_count_each_once(url: str) -> None:
    batch = [judged([difference(f"$.f{n % 5}")], pair=f"pair-{n}") for n in range(200)]
    ledgers = [PairWriter(url, examples_per_finding=2) for _ in range(3)]
    added = await asyncio.gather(*(each.write(batch if n else batch[::-1]) for n, each in enumerate(ledgers)))
    for each in ledgers:
        await each.close()

    assert sum(added) == 200
    assert one(url, "select sum(count) from abreast.finding") == 200


async def test_writer_distinguishes_rejected_data_from_lost_server(ledger: PairWriter, url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("alter table abreast.pair add check (id <> 'bad')")
    with pytest.raises(RefusedError, match="violates check constraint"):
        await ledger.write([judged(), judged(pair="bad")])

    assert one(url, "select count(*) from abreast.pair") == 0
    assert await ledger.write([judged()]) == 1
    away = PairWriter("postgresql://postgres@127.0.0.1:1/x", examples_per_finding=1)
    with pytest.raises(LedgerError) as caught:
        await away.write([judged()])
    assert not isinstance(caught.value, RefusedError)


async def test_dropped_day_rejects_pairs_and_counts_them(ledger: PairWriter, url: str) -> None:
    """A pair that is delivered again must not count twice, and nobody knows any more which pairs it had."""
    again = judged(at=20_000 * DAY)
    await ledger.write([again])
    with psycopg.connect(url) as connection:
        connection.execute("select abreast.drop_day(date '1970-01-01' + 20000)")
    fresh = PairWriter(url, examples_per_finding=1)
    written = [await one.write([again, judged(at=19_990 * DAY), judged(at=20_001 * DAY)]) for one in (ledger, fresh)]
    await fresh.close()
    database = Database(url)
    await database.open()
    drops = await LedgerReader(database).list_drops("shop")
    await database.close()

    assert written == [1, 1]
    assert one(url, "select sum(pairs)::int from abreast.outcome_count") == 3
    assert [(drop.stage, drop.reason, drop.count) for drop in drops] == [("ledger", "day_dropped", 4)]


async def test_second_entry_after_midnight_counts_once(ledger: PairWriter, url: str) -> None:
    midnight = 20_000 * DAY
    first = judged(pair="p", at=midnight - 60_000)
    written = [await ledger.write([one]) for one in (first, judged(pair="p", at=midnight + 60_000))]

    assert written == [1, 0]
    assert one(url, "select sum(pairs)::int from abreast.outcome_count") == 1


async def test_writer_counts_once_after_connection_lost_in_commit(url: str) -> None:
    async with proxy_that_swallows_a_commit(url) as through:
        ledger = PairWriter(through, examples_per_finding=3)
        batch = [judged([difference()]) for _ in range(10)]
        with pytest.raises(LedgerError):
            await ledger.write(batch)
        committed = one(url, "select count(*) from abreast.pair")
        again = await ledger.write(batch)
        await ledger.close()

    assert (committed, again) == (10, 0)
    assert one(url, "select count from abreast.finding") == 10


async def test_writer_accepts_nul_surrogates_and_long_text(ledger: PairWriter, url: str) -> None:
    awkward = difference("$.a\0b\ud800" + "x" * 5000, exact_path="\0", old='"\\u0000"', new="\udfff\0")
    strange = judged([awkward], noise=[awkward], pair="p\0\ud800", route="/\0" + "é" * 3000)
    await ledger.write([strange])

    assert rows(url, "select id from abreast.pair") == [("p␀?",)]
    assert one(url, "select differences->0->>'exact_path' from abreast.example") == "␀"


async def test_writer_folds_excess_endpoints(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abreast_sidecar.store.catalogue.MAX_SERVICE_ENDPOINTS", 10)
    ledger = PairWriter(url, examples_per_finding=3)
    for start in (0, 20):
        await ledger.write([judged(route=f"/page/{n}") for n in range(start, start + 20)])
    await ledger.close()

    assert one(url, "select count(*) from abreast.endpoint") == 11
    assert one(url, "select count(*) from abreast.pair") == 40


async def test_writer_keeps_no_session_state(ledger: PairWriter, url: str) -> None:
    """So that a pooler that gives each transaction another session may stand between."""
    await ledger.write([judged([difference()])])
    held = "select count(*) from pg_locks where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())"

    assert one(url, held) == 0
    assert ledger._connection is not None
    cursor = await ledger._connection.execute("select count(*) from pg_prepared_statements")
    assert await cursor.fetchone() == (0,)


@asynccontextmanager
async def proxy_that_swallows_a_commit(url: str) -> AsyncIterator[str]:
    """Run a proxy that cuts the first connection when the answer to its first COMMIT arrives."""
    parts = urlsplit(url)
    cut = False
    done: list[asyncio.Event] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal cut
        ended = asyncio.Event()
        done.append(ended)
        up_reader, up_writer = await asyncio.open_connection(parts.hostname, parts.port)
        committing = asyncio.Event()

        async def upwards() -> None:
            while data := await reader.read(65536):
                if b"COMMIT" in data and not cut:
                    committing.set()
                up_writer.write(data)
            up_writer.close()

        task = asyncio.create_task(upwards())
        with suppress(ConnectionError):
            while data := await up_reader.read(65536):
                if committing.is_set() and not cut:
                    cut = True
                    break
                writer.write(data)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for each in (up_writer, writer):
            each.close()
            with suppress(ConnectionError):
                await each.wait_closed()
        ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield url.replace(f"{parts.hostname}:{parts.port}", f"127.0.0.1:{port}")
        for each in done:
            await each.wait()
    assert cut
