"""Common features of the requests of a finding, planted in a ledger that the worker's code wrote."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable

import psycopg
import pytest
from msgspec import structs

from abreast.protocol.capture import Body, Capture, Request
from abreast_sidecar.stats.features import Feature
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.samples import MAX_SAMPLING_INTERVAL, SLOTS_PER_KEY, RequestSampler
from abreast_sidecar.store.writer import PairWriter
from support_pairs import difference, make_record, query_value

pytestmark = pytest.mark.postgres

PRICE = difference("$.price")
Plant = Callable[[Request], bool]


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
async def queries(url: str) -> AsyncIterator[LedgerReader]:
    database = Database(url)
    await database.open()
    yield LedgerReader(database)
    await database.close()


def requests(count: int, seed: int = 1) -> list[Request]:
    dice = random.Random(seed)
    return [
        Request(
            "POST",
            f"/orders/{dice.randrange(5)}",
            f"currency={dice.choice(['EUR', 'USD', 'JPY'])}&page={dice.randrange(9)}",
            "/orders/{id}",
            (
                ("content-type", "application/json"),
                ("accept-language", dice.choice(["de", "en", "fr"])),
                *dice.choice(((), (("origin", f"https://{dice.randrange(999)}.example"),))),
            ),
            _body({"size": dice.choice(["S", "M", "L"]), "lines": [{"sku": str(dice.randrange(99))}]}),
            dice.choice(((), ("x-tenant",))),
        )
        for _ in range(count)
    ]


def _body(content: object) -> Body:
    encoded = json.dumps(content).encode()
    return Body(encoded, len(encoded))


def record_request(request: Request, *, is_affected: bool) -> PairRecord:
    plain = make_record([PRICE] if is_affected else [], route="/orders/{id}")
    old, new = plain.result.old, plain.result.new
    assert isinstance(old, Capture)
    assert isinstance(new, Capture)
    sides = {"old": structs.replace(old, request=request), "new": structs.replace(new, request=request)}
    return PairRecord(
        plain.service, plain.entry_id, plain.time_ms, plain.pair_id, structs.replace(plain.result, **sides), ()
    )


async def find_feature(url: str, queries: LedgerReader, plant: Plant, count: int = 300) -> Feature | None:
    ledger = PairWriter(url, examples_per_finding=1)
    await ledger.write([record_request(request, is_affected=plant(request)) for request in requests(count)])
    await ledger.close()
    number = query_value(url, "select id from abreast.finding")
    (finding,) = await queries.get_findings([number])
    return await queries.find_common_feature(finding)


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("query.currency=JPY", lambda r: "currency=JPY" in r.query),
        ("path.id=3", lambda r: r.path.endswith("/3")),
        ("header.accept-language=fr", lambda r: ("accept-language", "fr") in r.headers),
        ("header.origin", lambda r: any(name == "origin" for name, _ in r.headers)),
        ("no header.origin", lambda r: all(name != "origin" for name, _ in r.headers)),
        ("header.x-tenant", lambda r: "x-tenant" in r.other_headers),
        ("body.size=L", lambda r: b'"L"' in r.body.content),
    ],
)
async def test_common_feature_finds_planted_feature(url: str, queries: LedgerReader, name: str, plant: Plant) -> None:
    feature = await find_feature(url, queries, plant)

    assert str(feature) == name
    assert feature is not None
    assert feature.coverage == 1.0
    assert feature.precision == pytest.approx(1.0, abs=0.05)


async def test_common_feature_ignores_random_failures(url: str, queries: LedgerReader) -> None:
    dice = random.Random(7)

    assert await find_feature(url, queries, lambda _: dice.random() < 0.3) is None


@pytest.mark.parametrize(("clients", "name"), [(2, "None"), (60, "query.currency=JPY")])
async def test_repeated_requests_of_a_client_count_once(
    url: str, queries: LedgerReader, clients: int, name: str
) -> None:
    ledger = PairWriter(url, examples_per_finding=1)
    for currency in ("JPY", "EUR"):
        sessions = [
            Request(
                "GET", "/orders/1", f"currency={currency}", "/orders/{id}", (("cookie", f"hmac:{currency}{number}"),)
            )
            for number in range(clients)
        ]
        records = [record_request(sessions[number % clients], is_affected=currency == "JPY") for number in range(60)]
        await ledger.write(records)
    await ledger.close()
    (finding,) = await queries.get_findings([query_value(url, "select id from abreast.finding")])

    assert str(await queries.find_common_feature(finding)) == name


async def test_common_feature_falls_back_to_rows(url: str, queries: LedgerReader) -> None:
    await find_feature(url, queries, lambda r: "currency=JPY" in r.query)
    with psycopg.connect(url) as connection:
        connection.execute("delete from abreast.request_sample where finding_id = 0")
    (finding,) = await queries.get_findings([query_value(url, "select id from abreast.finding")])

    assert str(await queries.find_common_feature(finding)) == "query.currency=JPY"


async def test_request_samples_contain_no_secrets_or_bodies(url: str) -> None:
    secret = Request(
        "POST",
        "/login",
        "",
        "/login",
        (("content-type", "application/json"), ("authorization", "hmac:0011")),
        _body({"user": "ann", "password": "hunter2", "note": "x" * 200}),
    )
    ledger = PairWriter(url, examples_per_finding=0)
    await ledger.write([record_request(secret, is_affected=True)])
    await ledger.close()
    samples_text = query_value(url, "select string_agg(features::text, '') from abreast.request_sample")

    assert "ann" in samples_text
    assert not any(text in samples_text for text in ("hunter2", "hmac", "xxx"))


def test_request_sampler_limits_slots_and_writes() -> None:
    samples = RequestSampler(seed=1)
    plain = make_record([PRICE])
    counts = [len(samples.sample([(plain, 1, [2])])) for _ in range(SLOTS_PER_KEY * 100)]

    assert sum(counts[:SLOTS_PER_KEY]) == 2 * SLOTS_PER_KEY
    assert sum(counts[-10_000:]) < 2 * 10_000 / MAX_SAMPLING_INTERVAL * 1.5
    assert sum(counts[-10_000:]) > 2 * 10_000 / MAX_SAMPLING_INTERVAL / 1.5


async def test_request_sample_table_is_limited(url: str) -> None:
    ledger = PairWriter(url, examples_per_finding=0)
    for _ in range(3):
        await ledger.write([make_record([PRICE]) for _ in range(SLOTS_PER_KEY)])
    await ledger.close()

    assert query_value(url, "select count(*) from abreast.request_sample") == 2 * SLOTS_PER_KEY
