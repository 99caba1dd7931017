"""Findings are classified from the counters that batches store."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Sequence

import pytest
from msgspec.structs import replace

from abreast_sidecar.compare.model import Difference
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.store.database import Connection, Database
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.writer import PairWriter
from captures import capture
from support_pairs import difference, judged, one, rows

pytestmark = pytest.mark.postgres

PRICE = difference("$.price", old="1.5", new="1.6")
COPIES = 10  # safe requests for each baseline copy


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[PairWriter]:
    made = PairWriter(url, examples_per_finding=3)
    yield made
    await made.close()


@pytest.fixture
async def connection(url: str) -> AsyncIterator[Connection]:
    database = Database(url)
    await database.open()
    async with database.connection() as made:
        yield made
    await database.close()


def fresh(path: str = "$.id") -> Difference:
    return difference(path, old=f'"{uuid.uuid4()}"', new=f'"{uuid.uuid4()}"')


def pairs(
    many: int,
    shown: Sequence[Difference] = (),
    *,
    noise: Sequence[Difference] = (),
    copies: bool = True,
    route: str = "/",
    releases: tuple[str, str] = ("old-1", "new-1"),
) -> list[PairRecord]:
    """`noise` is what every tenth of them, which has a copy, shows of old against old."""
    return [
        judged(shown, noise=noise if has_copy else (), baseline_compared=has_copy, route=route, releases=releases)
        for has_copy in (copies and number % COPIES == 0 for number in range(many))
    ]


def states(url: str) -> dict[str, str]:
    return dict(rows(url, "select path, state from abreast.finding"))


def reason(url: str, path: str) -> str:
    return str(one(url, f"select reason from abreast.finding where path = '{path}'"))  # noqa: S608  # our own


async def test_batch_stores_counts_for_classification(ledger: PairWriter, url: str) -> None:
    batch = [
        judged([fresh(), PRICE], baseline_compared=True),
        judged([fresh(), fresh()]),
        judged([fresh(), difference("$.id", old='"a"', new='"b"')]),
        judged(noise=[fresh()]),
        judged([PRICE], outcome="oversize"),
        judged(outcome="only_old"),
    ]
    for _ in range(2):  # the second time none is new
        await ledger.write(batch)

    assert rows(url, "select compared, baseline_compared from abreast.endpoint") == [(5, 2)]
    found = rows(url, "select path, count, baseline_count, shape_explained from abreast.finding order by path")
    assert found == [("$.id", 3, 1, 2), ("$.price", 2, 0, 0)]
    assert rows(url, "select new_greater, new_smaller from abreast.finding where path = '$.price'") == [(2, 0)]


async def test_difference_only_in_new_is_real(ledger: PairWriter, connection: Connection, url: str) -> None:
    await ledger.write([*pairs(300), *pairs(300, [PRICE])])
    assert states(url) == {"$.price": "undecided"}

    assert await classify_findings(connection) == 1
    assert states(url) == {"$.price": "real"}
    assert reason(url, "$.price") == "new differs in 300 of 600, old from itself in 0 of 60: more than chance"


async def test_rare_difference_of_old_hides_no_frequent_regression(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    await ledger.write([judged(noise=[PRICE], route="/"), *pairs(400), *pairs(400, [PRICE])])
    await classify_findings(connection)

    assert rows(url, "select baseline_count from abreast.finding") == [(1,)]
    assert states(url) == {"$.price": "real"}


async def test_difference_as_frequent_in_old_is_noise(ledger: PairWriter, connection: Connection, url: str) -> None:
    counter = difference("$.views", old="7", new="8")
    await ledger.write([*pairs(100, [fresh()], noise=[fresh()]), *pairs(100, [counter], noise=[counter])])
    await classify_findings(connection)

    assert states(url) == {"$.id": "noise", "$.views": "noise"}


async def test_values_explained_by_shape_are_noise_without_copies(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    await ledger.write([judged([fresh(), PRICE]) for _ in range(3)])
    await classify_findings(connection)

    assert states(url) == {"$.id": "noise", "$.price": "undecided"}
    assert "old was never compared with itself" in reason(url, "$.price")


async def test_noisy_field_that_becomes_empty_is_real(ledger: PairWriter, connection: Connection, url: str) -> None:
    emptied = difference("$.id", kind="type", impact="breaking", old='"a"', new="null")
    await ledger.write(pairs(300, [fresh()], noise=[fresh()]))
    await ledger.write(pairs(100, [emptied], noise=[fresh()]))
    await classify_findings(connection)

    found = rows(url, "select kind, state from abreast.finding order by kind")
    assert found == [("changed", "noise"), ("type", "real")]


async def test_noisy_id_that_is_sometimes_empty_is_real(ledger: PairWriter, connection: Connection, url: str) -> None:
    """From the answers on: what is compared, counted and decided."""

    def answers(number: int) -> PairRecord:
        old, new, again = (str(uuid.uuid4()) for _ in range(3))
        taken = [
            capture("old", {"id": old}),
            capture("new", {"id": new if number % 4 else ""}, role="shadow"),
            *([capture("old", {"id": again}, role="baseline")] if number % 10 == 0 else []),
        ]
        pair = str(uuid.uuid4())
        return PairRecord(
            "shop", f"{number + 1}-0", 1_767_225_600_000 + number, pair, compare_pair(taken, CompareOptions()), ()
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

    def took() -> dict[str, float]:
        return {"took_ms": rng.expovariate(0.02)}

    def answers(number: int, factor: int, release: str) -> PairRecord:
        new = {"took_ms": took()["took_ms"] * factor}
        taken = [
            capture("old", took()),
            replace(capture("new", new, role="shadow"), release=release),
            *([capture("old", took(), role="baseline")] if number % 10 == 0 else []),
        ]
        pair = str(uuid.uuid4())
        return PairRecord(
            "shop", f"{number + 1}-0", 1_767_225_600_000 + number, pair, compare_pair(taken, CompareOptions()), ()
        )

    await ledger.write([answers(number, 1, "1") for number in range(600)])
    await ledger.write([answers(number, factor, "2") for number in range(600)])
    await classify_findings(connection)

    found = rows(url, "select path, kind, state from abreast.finding where kind = 'changed'")
    assert found == [("$.took_ms", "changed", expected)]
    said = reason(url, "$.took_ms")
    assert said.startswith("new is more than twice old in ") is (expected == "real")
    assert one(
        url,
        "select magnitude_up + magnitude_down > 0 and baseline_magnitude_up + baseline_magnitude_down > 0 from abreast.finding",
    )


async def test_constant_token_is_real_and_host_name_is_noise(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    def shown(number: int) -> list[Difference]:
        token = difference("$.token", old=f'"{uuid.uuid4()}"', new=f'"{uuid.UUID(int=7 << 64)}"')
        return [token, difference("$.host", old=f'"shop-{number % 5}"', new='"shop-new"'), fresh()]

    noise = [fresh("$.token"), difference("$.host", old='"shop-1"', new='"shop-2"'), fresh()]
    await ledger.write([judged(shown(n), noise=noise, baseline_compared=True, route="/") for n in range(40)])
    await classify_findings(connection)

    assert states(url) == {"$.token": "real", "$.host": "noise", "$.id": "noise"}
    assert reason(url, "$.token") == "new repeats a value in 39 of 39 pairs, old in 0: more than chance"


async def test_one_sided_difference_without_copies_is_real(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    lost = difference("$.stock", kind="removed", impact="breaking", old="0", new=None)
    gone, come = (
        difference("$.badge", kind="removed", old="1", new=None),
        difference("$.badge", kind="added", old=None, new="1"),
    )
    await ledger.write(
        [*pairs(30, [lost], copies=False), *pairs(30, [gone], copies=False), *pairs(30, [come], copies=False)]
    )
    await classify_findings(connection)

    assert states(url) == {"$.stock": "real", "$.badge": "undecided"}


VIEWS = difference("$.views", old="7", new="8")


async def test_earlier_releases_do_not_dilute_a_new_difference(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    for release in ("1", "2"):
        await ledger.write(pairs(900, releases=("a", release)))
        await ledger.write(pairs(300, [VIEWS], noise=[VIEWS], releases=("a", release)))
    await classify_findings(connection)
    assert states(url) == {"$.views": "noise"}

    await ledger.write(pairs(100, [VIEWS], releases=("a", "3")))
    await classify_findings(connection)
    assert states(url) == {"$.views": "real"}
    assert reason(url, "$.views").startswith("new differs in 100 of 100, old from itself in 60 of 250")
    assert reason(url, "$.views").endswith("in release 3")


async def test_noise_of_former_old_release_hides_nothing(ledger: PairWriter, connection: Connection, url: str) -> None:
    await ledger.write(pairs(400, [VIEWS], noise=[VIEWS], releases=("a", "1")))
    await ledger.write(pairs(400, releases=("a", "1")))
    await classify_findings(connection)
    assert states(url) == {"$.views": "noise"}

    calm = [judged([VIEWS] * (n % 2), baseline_compared=True, route="/", releases=("b", "1")) for n in range(500)]
    await ledger.write(calm[:20])
    await classify_findings(connection)
    assert states(url) == {"$.views": "noise"}  # too few copies of this release to go by

    await ledger.write(calm[20:])
    await classify_findings(connection)
    assert states(url) == {"$.views": "real"}


async def test_regression_that_is_noise_in_later_release_becomes_noise(
    ledger: PairWriter, connection: Connection, url: str
) -> None:
    await ledger.write([*pairs(400, [VIEWS]), *pairs(50, noise=[VIEWS])])
    await classify_findings(connection)
    assert states(url) == {"$.views": "real"}

    await ledger.write([judged([VIEWS], route="/", releases=("old-1", "new-2"))])
    await classify_findings(connection)
    assert states(url) == {"$.views": "real"}  # one pair settles nothing

    await ledger.write(pairs(100, [VIEWS], noise=[VIEWS], releases=("old-1", "new-2")))
    await ledger.write(pairs(500, releases=("old-1", "new-2")))
    await classify_findings(connection)
    assert states(url) == {"$.views": "noise"}


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
            await to.write([judged([difference(path) for path in paths], route=f"/{n % 3}") for n in range(30)])

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

    assert one(url, "select sum(compared)::int from abreast.endpoint") == 600
    assert one(url, "select count(*) from abreast.finding where reason = ''") == 0
