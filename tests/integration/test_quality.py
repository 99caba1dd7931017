"""Promised quality of verdicts: 20,000 requests of the demo's real old shop, through comparison, ledger and verdict.

Envoy and Redis are left out, because other tests cover them and 20,000 requests through them take minutes. `make bench`
measures the same with all servers (bench/quality.py).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import orjson
import psycopg
import pytest
from msgspec.structs import replace

from abreast.protocol.capture import Body, Capture
from abreast_demo.load import PRODUCT_COUNT, UserRequest
from abreast_sidecar.stack.servers import PostgresServer
from abreast_sidecar.stats.verdict import Budget
from abreast_sidecar.store.migrate import migrate
from support_quality import capture_pairs, describe, envoy_counted, fill, make_record, safe_requests, verdict

pytestmark = pytest.mark.postgres

REQUESTS = 20_000
ONE_IN = 200  # 100 broken requests, of which 30 have second copies
PRODUCT = "GET /products/{product_id}"


@pytest.fixture
def shop_url(postgres_server: PostgresServer) -> Iterator[str]:
    name = f"shop_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
        yield postgres_server.url(name)
        admin.execute(f"drop database {name} with (force)".encode())


def one_in_200(requests: list[UserRequest]) -> set[int]:
    """Return requests for a product, one in 200 of all, spread over the run."""
    product_paths = {f"/products/{number}" for number in range(1, PRODUCT_COUNT + 1)}
    products = [number for number, request in enumerate(requests) if request.path in product_paths]
    count = REQUESTS // ONE_IN
    return {products[(2 * part + 1) * len(products) // (2 * count)] for part in range(count)}


def without_price(new: Capture) -> Capture:
    content = orjson.dumps({**orjson.loads(new.answer.body.content), "price": 0.0})
    headers = tuple(
        (name, str(len(content)) if name == "content-length" else value) for name, value in new.answer.headers
    )
    return replace(new, answer=replace(new.answer, headers=headers, body=Body(content, len(content))))


@pytest.mark.timeout(600)
async def test_verdict_passes_equal_shops_and_fails_rare_errors(
    postgres_url: str, empty_postgres_url: str, shop_url: str
) -> None:
    """One test, since 20,000 requests take their time."""
    requests = safe_requests(REQUESTS)
    captures = await capture_pairs(shop_url, requests)
    records = [make_record(number, pair) for number, pair in enumerate(captures)]
    looks = await fill(postgres_url, records)
    envoy_counted(postgres_url, REQUESTS)
    result = await verdict(postgres_url, Budget())

    assert (looks.ever, looks.findings) == (set(), [])
    assert (result.state, result.pairs_to_pass) == ("PASS", 0), result.reasons

    for number in one_in_200(requests):
        broken = [without_price(capture) if capture.version == "new" else capture for capture in captures[number]]
        records[number] = make_record(number, broken)
    await migrate(empty_postgres_url)
    looks = await fill(empty_postgres_url, records)
    envoy_counted(empty_postgres_url, REQUESTS)
    strict = await verdict(empty_postgres_url, Budget(max_mismatch=0.0001))
    lenient = await verdict(empty_postgres_url, Budget(max_mismatch=0.05))

    assert looks.ever == {f"{PRODUCT} body $.price changed"}
    assert [describe(finding) for finding in looks.findings] == [f"{PRODUCT} body $.price changed"]
    assert looks.findings[0].count == REQUESTS // ONE_IN
    assert (strict.state, strict.reasons[0].subject) == ("FAIL", "mismatches"), strict.reasons
    assert (lenient.state, lenient.pairs_to_pass) == ("PASS", 0), lenient.reasons
