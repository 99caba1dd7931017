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
from support_quality import compared, envoy_counted, fill, named, safe_requests, taken, verdict

pytestmark = pytest.mark.postgres

REQUESTS = 20_000
ONE_IN = 2000
PRODUCT = "GET /products/{product_id}"


@pytest.fixture
def shop_url(postgres_server: PostgresServer) -> Iterator[str]:
    name = f"shop_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
        yield postgres_server.url(name)
        admin.execute(f"drop database {name} with (force)".encode())


def one_in_2_000(asked: list[UserRequest]) -> set[int]:
    """Return requests for a product, one in 2,000 of all, spread over the run."""
    known = {f"/products/{number}" for number in range(1, PRODUCT_COUNT + 1)}
    products = [number for number, one in enumerate(asked) if one.path in known]
    many = REQUESTS // ONE_IN
    return {products[(2 * part + 1) * len(products) // (2 * many)] for part in range(many)}


def without_price(new: Capture) -> Capture:
    held = orjson.dumps({**orjson.loads(new.answer.body.content), "price": 0.0})
    headers = tuple((name, str(len(held)) if name == "content-length" else value) for name, value in new.answer.headers)
    return replace(new, answer=replace(new.answer, headers=headers, body=Body(held, len(held))))


@pytest.mark.timeout(600)
async def test_verdict_passes_equal_shops_and_fails_rare_errors(
    postgres_url: str, empty_postgres_url: str, shop_url: str
) -> None:
    """One test, since 20,000 requests take their time."""
    asked = safe_requests(REQUESTS)
    captures = await taken(shop_url, asked)
    judged = [compared(number, each) for number, each in enumerate(captures)]
    seen = await fill(postgres_url, judged)
    envoy_counted(postgres_url, REQUESTS)
    found = await verdict(postgres_url, Budget())

    assert (seen.ever, seen.findings) == (set(), [])
    assert (found.state, found.pairs_to_pass) == ("PASS", 0), found.reasons

    for number in one_in_2_000(asked):
        broken = [without_price(one) if one.version == "new" else one for one in captures[number]]
        judged[number] = compared(number, broken)
    await migrate(empty_postgres_url)
    seen = await fill(empty_postgres_url, judged)
    envoy_counted(empty_postgres_url, REQUESTS)
    strict = await verdict(empty_postgres_url, Budget(max_mismatch=0.0001))
    lenient = await verdict(empty_postgres_url, Budget(max_mismatch=0.002))

    assert seen.ever == {f"{PRODUCT} body $.price changed"}
    assert [named(one) for one in seen.findings] == [f"{PRODUCT} body $.price changed"]
    assert seen.findings[0].count == REQUESTS // ONE_IN
    assert (strict.state, strict.reasons[0].subject) == ("FAIL", "mismatches"), strict.reasons
    assert (lenient.state, lenient.pairs_to_pass) == ("PASS", 0), lenient.reasons
