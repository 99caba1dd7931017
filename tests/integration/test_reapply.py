"""Rules with Redis, a worker and a ledger, and their reapplication to stored pairs after a change."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import random
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace

from abreast_sidecar.compare.model import Difference
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rule_document import rule_from_dict
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.errors import StaleRulesError
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.rules.reapply import FindingIds, reapply_rules
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import ALL_TIME, LedgerReader
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.rules import RuleDraft, RuleStore, end_expired_rules
from abreast_sidecar.store.writer import PairWriter
from support import eventually_async
from support_captures import encode
from support_pairs import (
    SERVICE,
    capture,
    counters_match_pairs,
    difference,
    hourly_counts_match_pairs,
    make_record,
    pair_of,
    query_value,
    ready,
    rows,
    run_worker,
    send,
)

pytestmark = pytest.mark.postgres

SOON = dt.datetime(2099, 1, 1, tzinfo=dt.UTC)
NAME = difference("$.name", old='"a"', new='"b"')
PRICE = difference("$.price")
STATUS = difference("200->404", part="status", impact="breaking")


class Place:
    """A ledger with its rules."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.has_exact_counters = True  # False: the test writes what no worker writes
        self.database = Database(url)
        self.rules = RuleStore(self.database)
        self.ledger = PairWriter(url, examples_per_finding=3)

    async def begin(self, *, expires: dt.datetime = SOON, **fields: Any) -> int:
        draft = RuleDraft(rule_from_dict({"name": str(fields), **fields}), "me", "known", expires)
        (number,) = await self.rules.replace_rules([draft], [], "me")
        return number

    async def end(self, *numbers: int) -> None:
        await self.rules.replace_rules([], numbers, "me")

    async def reapply(self, limit: int = 100) -> int:
        """Reapply the rules, and return the number of steps."""
        steps = 0
        async with self.database.connection() as connection:
            while await reapply_rules(connection, FindingIds(self.url), CompareOptions(), limit=limit):
                steps += 1
        return steps

    def pairs(self) -> list[tuple[Any, ...]]:
        """Group pairs by the paths of their findings, of explained findings, and by the rules."""
        return rows(
            self.url,
            "select array(select path from abreast.finding where id = any(p.findings) order by path), "
            "array(select path from abreast.finding where id = any(p.explained) order by path), "
            "coalesce(p.explained_by, '{}'), count(*)::int from abreast.pair p group by 1, 2, 3 order by 1, 2, 3",
        )

    def read_counts(self) -> dict[str, tuple[int, ...]]:
        columns = "count, baseline_count, shape_explained, copy_greater_of_new, copy_smaller_of_new"
        return {
            path: tuple(counts)
            for path, *counts in rows(self.url, f"select path, {columns} from abreast.finding")  # noqa: S608  # our own
        }

    def by_release(self) -> list[tuple[Any, ...]]:
        return rows(
            self.url,
            "select f.path, r.label, s.count, s.baseline_count, s.shape_explained, s.copy_greater_of_new, s.copy_smaller_of_new "
            "from abreast.finding_release s join abreast.finding f on f.id = s.finding_id "
            "join abreast.release r on r.id = s.new_release "
            "where s.rule_id = 0 and (s.count > 0 or s.baseline_count > 0) order by 1, 2",
        )

    def all_counters(self) -> list[tuple[Any, ...]]:
        return rows(
            self.url,
            "select path, part, kind, count, baseline_count, shape_explained, copy_greater_of_new, copy_smaller_of_new, repeat_checks, "
            "old_repeats, new_repeats, other_above, other_below, same_above, same_below "
            "from abreast.finding order by 1, 2, 3",
        )

    def count_hidden(self) -> dict[tuple[int, str], int]:
        hidden_rows = rows(
            self.url,
            "select s.rule_id, f.path, sum(s.count)::int from abreast.finding_release s "
            "join abreast.finding f on f.id = s.finding_id where s.rule_id <> 0 group by 1, 2 having sum(s.count) <> 0",
        )
        return {(rule, path): count for rule, path, count in hidden_rows}


@pytest.fixture
async def place(postgres_url: str) -> AsyncIterator[Place]:
    place = Place(postgres_url)
    await place.database.open()
    yield place
    await place.ledger.close()
    await place.database.close()
    hourly_counts_match_pairs(place.url)
    if place.has_exact_counters:
        counters_match_pairs(place.url)


def blind(differences: Sequence[Difference], count: int = 1, **changes: Any) -> list[PairRecord]:
    """Pairs whose stored captures can't be read."""
    return [make_record(differences, **changes) for _ in range(count)]


async def test_reapply_hides_pairs_and_restores_them(place: Place) -> None:
    await place.ledger.write([*blind([PRICE, NAME], 5), *blind([PRICE], 5, noise=[PRICE]), *blind([], 10)])
    before = place.pairs(), place.read_counts(), place.by_release()
    rule = await place.begin(action="ignore", path="$.price")
    await place.reapply(limit=3)

    assert place.pairs() == [([], [], [], 10), ([], ["$.price"], [rule], 5), (["$.name"], ["$.price"], [rule], 5)]
    assert place.read_counts() == {"$.name": (5, 0, 0, 5, 0), "$.price": (0, 0, 0, 0, 0)}
    assert [row[0] for row in place.by_release()] == ["$.name"]
    assert place.count_hidden() == {(rule, "$.price"): 10}

    await place.end(rule)
    await place.reapply(limit=3)

    assert (place.pairs(), place.read_counts(), place.by_release()) == before
    assert place.count_hidden() == {}


async def test_reapply_excludes_explained_pairs_from_mismatches(place: Place) -> None:
    await place.ledger.write([*blind([PRICE], 40), *blind([NAME], 2), *blind([], 30)])
    async with place.database.connection() as connection:
        await classify_findings(connection)
    queries = LedgerReader(place.database)
    assert (await queries.read_summary(SERVICE, ALL_TIME)).explained == 0
    await place.begin(action="expect", path="$.price", kind="changed")
    await place.reapply()
    async with place.database.connection() as connection:
        await classify_findings(connection)
    summary = await queries.read_summary(SERVICE, ALL_TIME)
    (counts,) = (await queries.read_evidence(SERVICE, ALL_TIME, 0.1)).endpoints

    assert summary.explained == 40
    assert summary.outcomes == {"mismatch": 42, "match": 30}
    assert counts.mismatches + counts.undecided == 2
    assert counts.compared == 72


@pytest.mark.parametrize(
    ("limits", "hidden_count"),
    [
        ({"release": "2"}, 3),
        ({"release": "*"}, 7),
        ({"endpoint": "GET /products/{id}"}, 7),
        ({"endpoint": "POST *"}, 0),
        ({"status": "200"}, 7),
        ({"status": "404->200"}, 0),
        ({"service": "other"}, 0),
        ({"kind": "removed"}, 0),
    ],
)
async def test_reapply_respects_limits_of_rule(place: Place, limits: dict[str, Any], hidden_count: int) -> None:
    await place.ledger.write(blind([PRICE], 4, releases=("1", "1")) + blind([PRICE], 3, releases=("1", "2")))
    rule = await place.begin(action="ignore", path="$.price", **limits)
    await place.reapply()

    assert place.count_hidden().get((rule, "$.price"), 0) == hidden_count
    assert place.read_counts()["$.price"][0] == 7 - hidden_count


async def test_reapply_passes_findings_to_the_next_rule(place: Place) -> None:
    await place.ledger.write(blind([PRICE], 4))
    first = await place.begin(action="ignore", path="$.price")
    second = await place.begin(action="ignore", part="body")
    await place.reapply()
    assert place.count_hidden() == {(first, "$.price"): 4}

    await place.end(first)
    await place.reapply()
    assert place.count_hidden() == {(second, "$.price"): 4}


async def test_expired_rule_ends_and_is_listed_as_expired(place: Place) -> None:
    await place.ledger.write(blind([PRICE], 4))
    rule = await place.begin(
        action="ignore", path="$.price", expires=dt.datetime.now(dt.UTC) + dt.timedelta(seconds=0.3)
    )
    await place.reapply()
    assert place.count_hidden() == {(rule, "$.price"): 4}

    async def is_expired() -> bool:
        async with place.database.connection() as connection:
            return await end_expired_rules(connection) == 1

    await eventually_async(is_expired, description="the rule expired")
    await place.reapply()
    (listed_rule,) = await place.rules.list_rules(limit=10)

    assert place.read_counts()["$.price"][0] == 4
    assert (listed_rule.id, listed_rule.is_expired, listed_rule.ended_by) == (rule, True, "abreast")


async def test_reapply_does_not_guess_values_without_captures(place: Place) -> None:
    """A tolerance can't be applied without values: the pair names the rule, and still counts."""
    await place.ledger.write(blind([PRICE], 4))
    rule = await place.begin(action="tolerate", path="$.price", absolute=5)
    await place.reapply()
    (listed_rule,) = await place.rules.list_rules(limit=10)

    assert place.pairs() == [(["$.price"], [], [], 4)]
    assert (listed_rule.pairs, listed_rule.undetermined_pairs) == (0, 4)
    assert query_value(place.url, "select distinct reason from abreast.pair") == f"judged before rule {rule}"

    await place.end(rule)
    await place.reapply()
    assert query_value(place.url, "select distinct reason from abreast.pair") == ""


async def test_reapply_moves_counts_of_dropped_pairs(place: Place) -> None:
    await place.ledger.write(blind([PRICE], 4))
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute("select abreast.drop_day((now() at time zone 'UTC')::date)")
    rule = await place.begin(action="ignore", path="$.price")
    await place.reapply()
    assert (place.read_counts()["$.price"], place.count_hidden()) == ((0, 0, 0, 0, 0), {(rule, "$.price"): 4})

    await place.end(rule)
    await place.reapply()
    assert (place.read_counts()["$.price"], place.count_hidden()) == ((4, 0, 0, 4, 0), {})


async def test_writer_rejects_batch_compared_under_other_rules(place: Place) -> None:
    await place.begin(action="ignore", path="$.price")
    with pytest.raises(StaleRulesError):
        await place.ledger.write(blind([PRICE]), rules_version=0)

    assert rows(place.url, "select from abreast.pair") == []
    assert await place.ledger.write(blind([PRICE]), rules_version=1) == 1


async def test_reapply_in_parallel_counts_each_pair_once(place: Place) -> None:
    await place.ledger.write(blind([PRICE, NAME], 60))
    rule = await place.begin(action="ignore", path="$.price")
    places = [Place(place.url) for _ in range(3)]
    for other in places:
        await other.database.open()
    while rows(place.url, "select from abreast.rule_state where applied_version < version"):
        await asyncio.gather(*(other.reapply(limit=7) for other in places))
    for other in places:
        await other.database.close()

    assert place.count_hidden() == {(rule, "$.price"): 60}
    assert place.read_counts()["$.name"][0] == 60


async def test_reapply_and_workers_never_deadlock(place: Place) -> None:
    place.has_exact_counters = False
    await place.ledger.write(blind([PRICE, NAME], 200))
    over = asyncio.Event()

    async def work(ledger: PairWriter) -> int:
        count = 0
        while not over.is_set():
            version = query_value(place.url, "select version from abreast.rule_state")
            with contextlib.suppress(StaleRulesError):
                count += await ledger.write(blind([PRICE, NAME], 5), rules_version=version)
        await ledger.close()
        return count

    workers = [asyncio.create_task(work(PairWriter(place.url, examples_per_finding=3))) for _ in range(2)]
    rule = await place.begin(action="ignore", path="$.price")
    await place.reapply(limit=20)
    over.set()
    total = sum(await asyncio.gather(*workers)) + 200

    assert query_value(place.url, "select deadlocks from pg_stat_database where datname = current_database()") == 0
    assert query_value(place.url, "select sum(pairs)::int from abreast.outcome_count") == total
    # These workers ignore the rule: their pairs still count for the finding.
    assert place.read_counts()["$.price"][0] + place.count_hidden()[rule, "$.price"] == total
    assert place.read_counts()["$.name"][0] == total


REAPPLY_SCRIPT = """
import asyncio, sys
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.rules.reapply import FindingIds, reapply_rules
from abreast_sidecar.store.database import Database
async def main():
    database = Database(sys.argv[1])
    await database.open()
    async with database.connection() as connection:
        while await reapply_rules(connection, FindingIds(sys.argv[1]), CompareOptions(), limit=2):
            print("step", flush=True)
asyncio.run(main())
"""


async def test_reapply_resumes_after_crash(place: Place) -> None:
    await place.ledger.write(blind([PRICE, NAME], 80))
    before = place.pairs(), place.read_counts(), place.by_release()
    rule = await place.begin(action="ignore", path="$.price")
    for _ in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", REAPPLY_SCRIPT, place.url, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        for _ in range(random.randint(3, 6)):
            assert await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        await process.wait()
    remaining = query_value(place.url, "select count(*) from abreast.reapply_queue")
    assert 0 < remaining < 80

    await place.reapply()
    assert place.count_hidden() == {(rule, "$.price"): 80}
    assert place.pairs() == [(["$.name"], ["$.price"], [rule], 80)]

    await place.end(rule)
    await place.reapply()
    assert (place.pairs(), place.read_counts(), place.by_release()) == before


async def test_reapply_moves_every_counter_exactly(place: Place) -> None:
    """Pairs with and without stored captures, repeated values, numbers of another magnitude, noise, two releases."""
    generator = random.Random(3)
    records = []
    for number in range(120):
        old, new = generator.choice((1, 5, 40)), generator.choice((2, 50, "x"))
        visible = [
            difference("$.price", old=str(old), new=json.dumps(new)),
            difference("$.id", old=json.dumps(str(uuid.uuid4())), new=json.dumps(str(uuid.uuid4()))),
            difference("$.tag", kind="added", old=None, new='"t"'),
        ]
        differences = generator.sample(visible, generator.randint(0, 3))
        noise = [difference("$.price", old=str(old), new="99")] if generator.random() < 0.3 else []
        release = ("1", generator.choice(("1", "2")))
        pair = str(uuid.uuid4())
        contents = ({"price": old, "id": pair}, {"price": new, "id": str(uuid.uuid4()), "tag": "t"})
        if number % 3:
            records.append(make_record(differences, noise=noise, releases=release, pair=pair))
        else:
            records.append(stored_pair(pair, *contents, release=release[1]))
    for batch in (records[:50], records[50:]):
        await place.ledger.write(batch)
    before = place.all_counters()
    counters_match_pairs(place.url)

    rules: list[int] = []
    for fields in (
        {"action": "ignore", "path": "$.price", "release": "2"},
        {"action": "tolerate", "path": "$.price", "absolute": 30},
        {"action": "ignore", "part": "body", "kind": "added"},
        {"action": "ignore", "path": "$.id"},
    ):
        rules.append(await place.begin(**fields))
        await place.reapply(limit=17)
        counters_match_pairs(place.url)
    assert place.all_counters() != before

    generator.shuffle(rules)
    for rule in rules:
        await place.end(rule)
        await place.reapply(limit=17)
        counters_match_pairs(place.url)
    assert place.all_counters() == before


def stored_pair(pair: str, old: object, new: object, *, release: str) -> PairRecord:
    """Make a pair whose captures can be compared again."""
    captures = [
        replace(capture(pair, "old", "live", old), release="1"),
        replace(capture(pair, "new", "shadow", new), release=release),
    ]
    result = compare_pair(captures, CompareOptions())
    moment = int(time.time() * 1000)
    return PairRecord(SERVICE, f"{moment}-0", moment, pair, result, tuple(map(encode, captures)))


async def emptied(settings: Settings) -> None:
    async def empty() -> bool:
        return ready(settings.redis_url) == 0

    await eventually_async(empty, description="the stream is empty")


async def test_worker_applies_rules_and_reapply_uses_stored_captures(place: Place, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url, postgres_url=place.url, claim_idle=0.5, shutdown_timeout=5.0)
    tolerated = await place.begin(action="tolerate", path="$.price", absolute=0.5)
    async with run_worker(settings):
        for new in (1.2, 1.4, 9.0):
            send(redis_url, pair_of({"price": 1.0, "tags": [1, 2]}, {"price": new, "tags": [2, 1]}))
        await emptied(settings)
        assert place.pairs() == [(["$.price", "$.tags"], [], [], 1), (["$.tags"], ["$.price"], [tolerated], 2)]

        unordered = await place.begin(action="unordered", path="$.tags")
        send(redis_url, pair_of({"price": 1.0, "tags": [1, 2]}, {"price": 1.0, "tags": [2, 1]}))
        await emptied(settings)
    assert ([], ["$.tags"], [unordered], 1) in place.pairs()

    await place.reapply()
    assert place.pairs() == [
        ([], ["$.price", "$.tags"], [tolerated, unordered], 2),
        ([], ["$.tags"], [unordered], 1),
        (["$.price"], ["$.tags"], [unordered], 1),
    ]

    await place.end(tolerated)
    await place.reapply()
    assert place.pairs() == [([], ["$.tags"], [unordered], 1), (["$.price"], ["$.tags"], [unordered], 3)]
    assert place.read_counts()["$.price"] == (3, 0, 0, 3, 0)


async def test_reapply_of_keyed_by_rule_adds_findings(place: Place, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url, postgres_url=place.url, claim_idle=0.5, shutdown_timeout=5.0)
    old = [{"nr": 1, "v": 1}, {"nr": 2, "v": 2}]
    async with run_worker(settings):
        send(redis_url, pair_of({"rows": old}, {"rows": [{"nr": 2, "v": 3}, {"nr": 3, "v": 1}]}))
        await emptied(settings)
    assert "$.rows[*].nr" in place.read_counts()

    rule = await place.begin(action="keyed-by", path="$.rows", by="nr")
    await place.reapply()

    (pair,) = place.pairs()
    assert pair[0] == ["$.rows[*]", "$.rows[*]", "$.rows[*].v"]
    assert place.read_counts()["$.rows[*].nr"][0] == 0

    await place.end(rule)
    await place.reapply()
    assert "$.rows[*].nr" in place.pairs()[0][0]


async def test_reapply_keeps_drift(place: Place, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url, postgres_url=place.url, claim_idle=0.5, shutdown_timeout=5.0)
    async with run_worker(settings):
        send(redis_url, pair_of({"price": 1, "name": "a"}, {"price": 2, "name": "b"}))
        await emptied(settings)
    place.has_exact_counters = False
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute(
            "update abreast.pair p set drift = array[f.id], findings = array_remove(findings, f.id) "
            "from abreast.finding f where f.path = '$.price'"
        )
    rule = await place.begin(action="ignore", part="body")
    await place.reapply()

    assert place.pairs() == [([], ["$.name"], [rule], 1)]


async def test_worker_waits_until_rules_are_readable(place: Place, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url, postgres_url=place.url, claim_idle=0.5, shutdown_timeout=5.0)
    rule = await place.begin(action="ignore", path="$.price")
    send(redis_url, pair_of({"price": 1}, {"price": 2}))
    with psycopg.connect(place.url) as gate:
        gate.execute("lock table abreast.rule in access exclusive mode")
        async with run_worker(settings) as worker:
            waits = (
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and application_name = 'abreast'"
            )

            async def waiting() -> bool:
                return bool(query_value(place.url, waits))

            await eventually_async(waiting, description="the worker waits for the rules")
            assert (ready(redis_url), worker.last_heartbeat) == (1, 0.0)

            gate.rollback()
            await emptied(settings)

    assert place.pairs() == [([], ["$.price"], [rule], 1)]
