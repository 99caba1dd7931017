"""Findings are classified from the counters that batches store."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace as replace_record
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from abreast_sidecar.compare.model import Difference
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.store.database import Connection, Database
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.samples import BET_PERIOD_MS, FEW_PAIRS
from abreast_sidecar.store.writer import PairWriter
from support_captures import capture
from support_pairs import difference, make_record, query_value, rows

pytestmark = pytest.mark.postgres

PRICE = difference("$.price", old="1.5", new="1.6")
COPIES = 10  # safe requests for each baseline copy


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[PairWriter]:
    writer = PairWriter(url, examples_per_finding=3)
    yield writer
    await writer.close()


@pytest.fixture
async def connection(url: str) -> AsyncIterator[Connection]:
    database = Database(url)
    await database.open()
    async with database.connection() as connection:
        yield connection
    await database.close()


def fresh(path: str = "$.id") -> Difference:
    return difference(path, old=f'"{uuid.uuid4()}"', new=f'"{uuid.uuid4()}"')


def pairs(
    count: int,
    differences: Sequence[Difference] = (),
    *,
    noise: Sequence[Difference] = (),
    copies: bool = True,
    route: str = "/",
    releases: tuple[str, str] = ("old-1", "new-1"),
) -> list[PairRecord]:
    """`noise` is what every tenth of them, which has a copy, shows of old against old."""
    return [
        make_record(
            differences, noise=noise if has_copy else (), baseline_compared=has_copy, route=route, releases=releases
        )
        for has_copy in (copies and number % COPIES == 0 for number in range(count))
    ]


def states(url: str) -> dict[str, str]:
    return dict(rows(url, "select path, state from abreast.finding"))


def reason(url: str, path: str) -> str:
    return str(query_value(url, f"select reason from abreast.finding where path = '{path}'"))  # noqa: S608  # our own


async def test_batch_stores_counts_for_classification(ledger: PairWriter, url: str) -> None:
    batch = [
        make_record([fresh(), PRICE], baseline_compared=True),
        make_record([fresh(), fresh()]),
        make_record([fresh(), difference("$.id", old='"a"', new='"b"')]),
        make_record(noise=[fresh()]),
        make_record([PRICE], outcome="oversize"),
        make_record(outcome="only_old"),
    ]
    for _ in range(2):  # the second time none is new
        await ledger.write(batch)

    assert rows(url, "select compared, baseline_compared from abreast.endpoint") == [(5, 2)]
    findings = rows(url, "select path, count, baseline_count, shape_explained from abreast.finding order by path")
    assert findings == [("$.id", 3, 1, 2), ("$.price", 2, 0, 0)]
    assert rows(url, "select copy_greater_of_new, copy_smaller_of_new from abreast.finding where path = '$.price'") == [
        (2, 0)
    ]


async def test_difference_only_in_new_is_real(ledger: PairWriter, connection: Connection, url: str) -> None:
    await ledger.write([*pairs(300), *pairs(300, [PRICE])])
    assert states(url) == {"$.price": "undecided"}

    assert await classify_findings(connection) == 1
    assert states(url) == {"$.price": "real"}
    assert reason(url, "$.price") == (
        "new differs in 300 of 600; of two copies, only the other version's differs in 30, only the same version's in 0: more than chance"
    )


async def test_rare_difference_of_old_hides_no_frequent_regression(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    await ledger.write([make_record(noise=[PRICE], route="/"), *pairs(400), *pairs(400, [PRICE])])
    await classify_findings(connection)

    assert rows(url, "select baseline_count from abreast.finding") == [(1,)]
    assert states(url) == {"$.price": "real"}


@pytest.mark.parametrize(
    ("method", "seconds", "days", "state"),
    [
        ("PUT", 0.016, 3, "noise"),
        ("GET", 0.016, 3, "real"),  # nothing is written
        ("PUT", 3600, 3, "real"),
        ("PUT", 1, 40, "real"),  # older than the run
    ],
)
async def test_stored_times_are_noise_if_each_version_writes(
    ledger: PairWriter, connection: Connection, url: str, method: str, seconds: float, days: int, state: str
) -> None:
    written = make_record()
    stored = int((time.time() - days * 86_400) * 1000)
    modified = difference("$.last_modified", old=str(stored), new=str(stored + int(seconds * 1000)))
    created = difference("$.created_at", old=_format_time(stored), new=_format_time(stored + int(seconds * 1000)))
    await ledger.write([replace_record(written, result=replace(written.result, method=method))])
    await ledger.write(pairs(300, [modified, created]))
    await classify_findings(connection)

    assert states(url) == {"$.last_modified": state, "$.created_at": state}


@pytest.mark.parametrize(
    ("method", "equal_pairs", "every", "state"),
    [
        ("POST", 50, 1, "undecided"),
        ("GET", 50, 1, "real"),  # nothing is written
        ("POST", 0, 1, "real"),  # from the first pair on
        ("POST", 50, 20, "real"),  # so rare that it may have begun earlier
    ],
)
async def test_value_that_begins_to_differ_after_a_write_may_be_of_the_stores(
    ledger: PairWriter, connection: Connection, url: str, method: str, equal_pairs: int, every: int, state: str
) -> None:
    now_ms = int(time.time() * 1000) - 1_000_000
    written = make_record(at=now_ms)
    removed = difference("$.rows[*]", kind="removed", old='{"id": 1}', new=None)
    differing = [[PRICE, removed] if number % every == 0 else [] for number in range(300)]
    batch = [
        make_record(found, at=now_ms + number * 1000, baseline_compared=True)
        for number, found in enumerate([*([] for _ in range(equal_pairs)), *differing], start=1)
    ]
    await ledger.write([replace_record(written, result=replace(written.result, method=method))])
    await ledger.write(batch)
    await classify_findings(connection)

    assert states(url) == {"$.price": state, "$.rows[*]": state}
    assert ("stores of both versions" in reason(url, "$.price")) is (state == "undecided")


def _format_time(milliseconds: int) -> str:
    return f'"{datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")}"'


async def test_difference_as_frequent_in_old_is_noise(ledger: PairWriter, connection: Connection, url: str) -> None:
    counter = difference("$.views", old="7", new="8")
    await ledger.write([*pairs(100, [fresh()], noise=[fresh()]), *pairs(100, [counter], noise=[counter])])
    await classify_findings(connection)

    assert states(url) == {"$.id": "noise", "$.views": "noise"}


async def test_values_explained_by_shape_are_noise_without_copies(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    await ledger.write([make_record([fresh(), PRICE]) for _ in range(3)])
    await classify_findings(connection)

    assert states(url) == {"$.id": "noise", "$.price": "undecided"}
    assert "no version was compared with itself" in reason(url, "$.price")


async def test_noisy_field_that_becomes_empty_is_real(ledger: PairWriter, connection: Connection, url: str) -> None:
    emptied = difference("$.id", kind="type", impact="breaking", old='"a"', new="null")
    await ledger.write(pairs(300, [fresh()], noise=[fresh()]))
    await ledger.write(pairs(100, [emptied], noise=[fresh()]))
    await classify_findings(connection)

    findings = rows(url, "select kind, state from abreast.finding order by kind")
    assert findings == [("changed", "noise"), ("type", "real")]


async def test_noisy_id_that_is_sometimes_empty_is_real(ledger: PairWriter, connection: Connection, url: str) -> None:
    """From the answers on: what is compared, counted and decided."""

    def answers(number: int) -> PairRecord:
        old, new, copy = (str(uuid.uuid4()) for _ in range(3))
        client = (("cookie", f"session={number}"),)
        captures = [
            capture("old", {"id": old}, request_headers=client),
            capture("new", {"id": new if number % 4 else ""}, role="shadow"),
            *([capture("old", {"id": copy}, role="baseline")] if number % 10 < 2 else []),
        ]
        pair = str(uuid.uuid4())
        return PairRecord(
            "shop", f"{number + 1}-0", 1_767_225_600_000 + number, pair, compare_pair(captures, CompareOptions()), ()
        )

    await ledger.write([answers(number) for number in range(1000)])
    await classify_findings(connection)

    assert rows(url, "select path, kind, state, count from abreast.finding order by kind") == [
        ("$.id", "changed", "noise", 750),
        ("$.id", "format", "real", 250),
    ]


@pytest.mark.parametrize(("factor", "expected"), [(1, "noise"), (10, "real")])
async def test_noisy_number_ten_times_as_large_is_real(
    ledger: PairWriter, connection: Connection, url: str, factor: int, expected: str
) -> None:
    """From the answers on, in two releases of new of which the second is judged by its own pairs."""
    rng = random.Random(factor)

    def make_answer() -> dict[str, float]:
        return {"took_ms": rng.expovariate(0.02)}

    def answers(number: int, factor: int, release: str) -> PairRecord:
        new = {"took_ms": make_answer()["took_ms"] * factor}
        captures = [
            capture("old", make_answer(), request_headers=(("cookie", f"session={number}"),)),
            replace(capture("new", new, role="shadow"), release=release),
            *([capture("old", make_answer(), role="baseline")] if number % 10 == 0 else []),
        ]
        pair = str(uuid.uuid4())
        return PairRecord(
            "shop", f"{number + 1}-0", 1_767_225_600_000 + number, pair, compare_pair(captures, CompareOptions()), ()
        )

    await ledger.write([answers(number, 1, "1") for number in range(600)])
    await ledger.write([answers(number, factor, "2") for number in range(1000)])
    await classify_findings(connection)

    findings = rows(url, "select path, kind, state from abreast.finding where kind = 'changed'")
    assert findings == [("$.took_ms", "changed", expected)]
    explanation = reason(url, "$.took_ms")
    assert explanation.startswith("new has the greater value") is (expected == "real")
    assert query_value(url, "select other_above + other_below > 0 and same_above + same_below > 0 from abreast.finding")


async def test_constant_token_is_real_and_host_name_is_noise(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    def make_differences(number: int) -> list[Difference]:
        token = difference("$.token", old=f'"{uuid.uuid4()}"', new=f'"{uuid.UUID(int=7 << 64)}"')
        return [token, difference("$.host", old=f'"shop-{number % 5}"', new='"shop-new"'), fresh()]

    noise = [fresh("$.token"), difference("$.host", old='"shop-1"', new='"shop-2"'), fresh()]
    await ledger.write(
        [make_record(make_differences(n), noise=noise, baseline_compared=True, route="/") for n in range(40)]
    )
    await classify_findings(connection)

    assert states(url) == {"$.token": "real", "$.host": "noise", "$.id": "noise"}
    assert reason(url, "$.token") == "new repeats a value in 39 of 39 pairs, old in 0: more than chance"


async def test_one_sided_difference_without_copies_is_undecided(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    lost = difference("$.stock", kind="removed", impact="breaking", old="0", new=None)
    removed, added = (
        difference("$.badge", kind="removed", old="1", new=None),
        difference("$.badge", kind="added", old=None, new="1"),
    )
    await ledger.write(
        [*pairs(30, [lost], copies=False), *pairs(30, [removed], copies=False), *pairs(30, [added], copies=False)]
    )
    await classify_findings(connection)

    assert states(url) == {"$.stock": "undecided", "$.badge": "undecided"}


VIEWS = difference("$.views", old="7", new="8")


async def test_earlier_releases_do_not_dilute_a_new_difference(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    for release in ("1", "2"):
        await ledger.write(pairs(900, releases=("a", release)))
        await ledger.write(pairs(300, [VIEWS], noise=[VIEWS], releases=("a", release)))
    await classify_findings(connection)
    assert states(url) == {"$.views": "noise"}

    await ledger.write(pairs(150, [VIEWS], releases=("a", "3")))
    await classify_findings(connection)
    assert states(url) == {"$.views": "real"}
    assert "only the other version's differs in 15" in reason(url, "$.views")


async def test_noise_of_a_former_release_hides_nothing(ledger: PairWriter, connection: Connection, url: str) -> None:
    await ledger.write(pairs(400, [VIEWS], noise=[VIEWS], releases=("a", "1")))
    await ledger.write(pairs(400, releases=("a", "1")))
    await classify_findings(connection)
    assert states(url) == {"$.views": "noise"}

    calm = [make_record([VIEWS] * (n % 2), baseline_compared=True, route="/", releases=("b", "1")) for n in range(60)]
    await ledger.write(calm)
    await classify_findings(connection)
    assert states(url) == {"$.views": "real"}


async def test_regression_that_is_noise_in_later_release_becomes_noise(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    await ledger.write([*pairs(400, [VIEWS]), *pairs(50, noise=[VIEWS])])
    await classify_findings(connection)
    assert states(url) == {"$.views": "real"}

    await ledger.write([make_record([VIEWS], route="/", releases=("old-1", "new-2"))])
    await classify_findings(connection)
    assert states(url) == {"$.views": "real"}  # one pair settles nothing

    await ledger.write(pairs(100, [VIEWS], noise=[VIEWS], releases=("old-1", "new-2")))
    await ledger.write(pairs(500, releases=("old-1", "new-2")))
    await classify_findings(connection)
    assert states(url) == {"$.views": "noise"}


async def test_endpoints_with_one_request_are_classified_together(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    routes = [f"/products/tea-{'abcdefghij'[number // 20]}{number % 20}x" for number in range(200)]
    await ledger.write(
        [
            make_record([PRICE, fresh()], noise=[fresh()], baseline_compared=True, route=route)
            for route in (*routes, "/other/tea")
        ]
    )
    await classify_findings(connection)
    decided = rows(
        url,
        "select split_part(route, '/', 2), path, state, count(*) from abreast.finding f"
        " join abreast.endpoint e on e.id = f.endpoint_id group by 1, 2, 3 order by 1, 2",
    )

    assert decided == [
        ("other", "$.id", "noise", 1),
        ("other", "$.price", "undecided", 1),
        ("products", "$.id", "noise", 200),
        ("products", "$.price", "real", 200),
    ]
    assert {
        text.rpartition("; ")[2] for (text,) in rows(url, "select reason from abreast.finding where state = 'real'")
    } == {"200 endpoints with few requests count together"}


async def test_pool_of_small_endpoints_finds_nothing_between_equal_versions(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    dice = random.Random(3)
    flicker = difference("$.stock", old="7", new="8")
    batch = [
        make_record(
            [flicker] if dice.random() < 0.3 else [],
            noise=[flicker] if dice.random() < 0.3 else [],
            baseline_compared=True,
            route=f"/products/p{number}/stock",
        )
        for number in range(150)
    ]
    await ledger.write(batch)
    await classify_findings(connection)

    assert rows(url, "select distinct state from abreast.finding") == [("noise",)]


async def test_outage_of_equal_versions_is_one_event_in_a_pool(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    start = int(time.time() * 1000) // BET_PERIOD_MS * BET_PERIOD_MS
    outage = difference("unfinished", part="error", kind="removed", impact="breaking")
    batch = [
        make_record([outage], baseline_compared=True, at=start, route=f"/products/p{'x' * number}")
        for number in range(25)
    ]
    await ledger.write(batch)
    await classify_findings(connection)

    assert rows(url, "select distinct state from abreast.finding") == [("undecided",)]


async def test_endpoint_that_grows_leaves_its_pool(ledger: PairWriter, connection: Connection, url: str) -> None:
    await ledger.write([make_record([PRICE], baseline_compared=True, route=f"/p/{'x' * n}") for n in range(1, 60)])
    await classify_findings(connection)
    assert rows(url, "select distinct state from abreast.finding") == [("real",)]

    await ledger.write([make_record(noise=[PRICE], baseline_compared=True, route="/p/x") for _ in range(FEW_PAIRS)])
    await classify_findings(connection)
    grown = rows(
        url, "select state from abreast.finding f join abreast.endpoint e on e.id = endpoint_id where route = '/p/x'"
    )

    assert grown == [("noise",)]


async def test_classify_findings_skips_endpoints_without_new_counts(ledger: PairWriter, connection: Connection) -> None:
    await ledger.write([*pairs(200, [PRICE]), *pairs(200, [PRICE], route="/quiet")])
    assert await classify_findings(connection) == 2
    assert await classify_findings(connection) == 0

    await ledger.write(pairs(1, route="/"))
    assert await classify_findings(connection) == 1  # the reason has the new counts


async def test_classify_findings_and_writers_never_deadlock(ledger: PairWriter, url: str) -> None:
    other = PairWriter(url, examples_per_finding=3)
    databases = [Database(url) for _ in range(2)]
    paths = [f"$.field{number}" for number in range(20)]

    async def decide(database: Database) -> None:
        for _ in range(20):
            async with database.connection() as connection:
                await classify_findings(connection)

    async def write(to: PairWriter) -> None:
        for _ in range(10):
            await to.write([make_record([difference(path) for path in paths], route=f"/{n % 3}") for n in range(30)])

    for database in databases:
        await database.open()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for database in databases:
            group.create_task(decide(database))
        for to in (ledger, other):
            group.create_task(write(to))
    async with databases[0].connection() as connection:
        await classify_findings(connection)
        assert await classify_findings(connection) == 0
    for database in databases:
        await database.close()
    await other.close()

    assert query_value(url, "select sum(compared)::int from abreast.endpoint") == 600
    assert query_value(url, "select count(*) from abreast.finding where reason = ''") == 0
