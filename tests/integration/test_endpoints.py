"""Endpoints of services without the middleware: learned places, merged endpoints and declared templates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from abreast.protocol.capture import Capture
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.errors import StaleRulesError
from abreast_sidecar.jobs import endpoints as job
from abreast_sidecar.jobs.endpoints import DeclaredTemplates, learn_endpoints
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.rules.reapply import FindingIds, reapply_rules
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Connection, Database
from abreast_sidecar.store.reader import LedgerReader, PageRequest
from abreast_sidecar.store.records import StatusChange, Window, set_status
from abreast_sidecar.store.writer import PairWriter
from support import eventually_async
from support_pairs import (
    capture,
    counters_match_pairs,
    difference,
    hourly_counts_match_pairs,
    make_record,
    outcomes,
    query_value,
    rows,
    run_worker,
    send,
)
from support_upstream import Received, Upstream, respond

pytestmark = pytest.mark.postgres

LIMITS: dict[str, Any] = {"max_values": 50, "max_examples": 5}


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    async with Database(url) as database:
        yield database


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with database.connection() as connection:
        yield connection


def record(route: str, differences: Sequence[Any] = (), source: str = "path", **changes: Any) -> Any:
    made = make_record(differences, route=route, **changes)
    made.result = replace(made.result, route_source=source)
    return made


async def write(url: str, records: Sequence[Any]) -> None:
    writer = PairWriter(url, examples_per_finding=5)
    try:
        await writer.write(records)
    finally:
        await writer.close()


def list_routes(url: str) -> list[tuple[str, str, int]]:
    query = "select route, source, compared from abreast.endpoint order by route"
    return [(route, source, compared) for route, source, compared in rows(url, query)]


async def test_paths_of_a_learned_place_merge_with_their_findings(url: str, connection: Connection) -> None:
    price = difference()
    await write(
        url,
        [
            *(record(f"/users/name-{n}", [price], noise=[difference("$.at")]) for n in range(60)),
            *(record(f"/users/name-{n}", [difference("$.age")] if n < 3 else []) for n in range(60)),
            record("/healthz"),
            record("/users/me", source="middleware"),
        ],
    )
    before = outcomes(url)
    [first] = rows(url, "select min(id) from abreast.finding where path = '$.price'")

    await learn_endpoints(connection, **LIMITS)

    assert list_routes(url) == [
        ("/healthz", "path", 1),
        ("/users/me", "middleware", 1),
        ("/users/{id}", "learned", 120),
    ]
    findings = rows(url, "select id, path, count, baseline_count from abreast.finding order by path")
    assert [finding[1:] for finding in findings] == [("$.age", 3, 0), ("$.at", 0, 60), ("$.price", 60, 0)]
    assert findings[2][0] == first[0]  # the first id stays
    assert outcomes(url) == before
    hourly_counts_match_pairs(url)
    counters_match_pairs(url)
    assert (
        query_value(url, "select max(n) from (select count(*) n from abreast.finding_example group by finding_id) c")
        == 5
    )
    unused = "select count(*) from abreast.example x where not exists (select from abreast.finding_example e where e.pair_id = x.pair_id)"
    assert query_value(url, unused) == 0
    await classify_findings(connection)
    await learn_endpoints(connection, **LIMITS)
    assert query_value(url, "select version from abreast.rule_state") == 2  # learned, merged, and nothing more


async def test_learned_place_survives_and_later_paths_join_it(url: str, connection: Connection) -> None:
    await write(url, [record(f"/users/name-{n}", [difference()]) for n in range(51)])
    await learn_endpoints(connection, **LIMITS)
    await write(url, [record("/users/other", [difference()]), record("/users/other/orders", [difference("$.n")])])

    await learn_endpoints(connection, **LIMITS)

    assert list_routes(url) == [("/users/{id}", "learned", 52), ("/users/{id}/orders", "learned", 1)]
    assert rows(url, "select path, count from abreast.finding order by path") == [("$.n", 1), ("$.price", 52)]
    counters_match_pairs(url)


async def test_merged_finding_has_the_most_cautious_status(
    url: str, database: Database, connection: Connection
) -> None:
    await write(url, [record(f"/users/name-{n}", [difference(), difference("$.b")]) for n in range(51)])
    by_path: dict[str, list[int]] = {"$.price": [], "$.b": []}
    for finding, path in rows(url, "select id, path from abreast.finding order by id"):
        by_path[path].append(finding)
    await set_status(database, by_path["$.price"][0], StatusChange("expected", "ann", "wanted"))
    for finding in by_path["$.b"]:
        await set_status(database, finding, StatusChange("expected", "ann", "wanted"))

    await learn_endpoints(connection, **LIMITS)

    assert rows(url, "select path, status from abreast.finding order by path") == [
        ("$.b", "expected"),
        ("$.price", "open"),
    ]
    first = by_path["$.price"][0]
    events = rows(url, "select finding_id, actor, before, after from abreast.finding_event order by id")
    assert events[0] == (first, "ann", "open", "expected")
    assert events[-1] == (first, "abreast", "expected", "open")


async def test_rules_still_explain_the_pairs_of_merged_endpoints(url: str, connection: Connection) -> None:
    records = [record(f"/users/name-{n}", [difference()]) for n in range(51)]
    for made in records:
        made.result = replace(made.result, explained_differences=(replace(difference("$.b"), explained_by="7"),))
    await write(url, records)

    await learn_endpoints(connection, **LIMITS)

    hourly_counts_match_pairs(url)
    counters_match_pairs(url)
    assert query_value(url, "select count(distinct explained) from abreast.pair") == 1


async def test_ten_thousand_paths_are_bounded_and_learned(url: str, connection: Connection) -> None:
    writer = PairWriter(url, examples_per_finding=5)
    for start in range(0, 10_000, 1000):
        await writer.write([record(f"/pages/page-{n}x") for n in range(start, start + 1000)])
    assert query_value(url, "select count(*) from abreast.endpoint") <= 2001

    await learn_endpoints(connection, **LIMITS)

    assert [route for route, *_ in list_routes(url)] == ["(other)", "/pages/{id}"]
    version = query_value(url, "select version from abreast.rule_state")
    await writer.write([record("/pages/{id}", source="learned"), record("/new")], rules_version=version)
    await writer.close()
    assert [route for route, *_ in list_routes(url)] == ["(other)", "/new", "/pages/{id}"]  # there is room again
    assert query_value(url, "select sum(pairs) from abreast.hourly_count") == 10_002


async def test_writer_with_ids_of_merged_endpoints_compares_again(url: str, connection: Connection) -> None:
    writer = PairWriter(url, examples_per_finding=5)
    await writer.write([record(f"/users/name-{n}") for n in range(51)], rules_version=0)
    await learn_endpoints(connection, **LIMITS)

    for differences in ([difference()], []):
        with pytest.raises(StaleRulesError):
            await writer.write([record("/users/name-1", differences)], rules_version=0)
    await writer.close()


async def test_worker_puts_pairs_under_learned_places(redis_url: str, url: str) -> None:
    settings = Settings(redis_url=redis_url, postgres_url=url)
    async with run_worker(settings), Database(url) as database, database.connection() as connection:
        for n in range(80):
            send(redis_url, user_pair(n))
        await wait_for_pairs(url, 80)
        await learn_endpoints(connection, **LIMITS)
        for n in range(80, 120):
            send(redis_url, user_pair(n))
        await wait_for_pairs(url, 120)
    async with run_worker(settings):  # a restart
        send(redis_url, user_pair(120))
        await wait_for_pairs(url, 121)

    assert list_routes(url) == [("/users/{id}", "learned", 121)]
    assert rows(url, "select path, count from abreast.finding") == [("$.price", 121)]
    assert query_value(url, "select count(*) from abreast.dead_letter") == 0
    counters_match_pairs(url)


def user_pair(number: int) -> list[Capture]:
    pair = f"0194b8a2-5f3e-4b7a-9a52-{number:012x}"
    made = [capture(pair, "old", route=""), capture(pair, "new", "shadow", {"price": 2}, route="")]
    return [replace(item, request=replace(item.request, path=f"/users/name-{number}")) for item in made]


async def wait_for_pairs(url: str, count: int) -> None:
    await eventually_async(
        lambda: asyncio.to_thread(lambda: sum(outcomes(url).values()) == count),
        description=f"{count} pairs are written",
    )


async def test_merge_of_many_endpoints_takes_several_transactions(
    url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "MAX_MERGED_ENDPOINTS", 20)
    await write(url, [record(f"/users/name-{n}", [difference()]) for n in range(51)])

    await learn_endpoints(connection, **LIMITS)

    assert list_routes(url) == [("/users/{id}", "learned", 51)]
    assert query_value(url, "select version from abreast.rule_state") == 1 + 3
    counters_match_pairs(url)


@pytest.mark.parametrize("is_forgotten", [False, True])
async def test_rules_are_reapplied_under_learned_places(redis_url: str, url: str, is_forgotten: bool) -> None:
    """A change of rules compares examples again: they stay where they are, even if the template is gone."""
    async with (
        run_worker(Settings(redis_url=redis_url, postgres_url=url)),
        Database(url) as database,
        database.connection() as connection,
    ):
        for n in range(51):
            send(redis_url, user_pair(n))
        await wait_for_pairs(url, 51)
        await learn_endpoints(connection, **LIMITS)
        if is_forgotten:
            await connection.execute("delete from abreast.endpoint_template")
        await connection.execute(
            "insert into abreast.rule (name, definition, owner, reason, expires, created_by, begin_version)"
            """ values ('r', '{"action": "ignore", "endpoint": "GET /users/{id}", "path": "$.price"}', 'ann', 'wanted', """
            "'2100-01-01', 'ann', abreast.next_rules_version())"
        )
        while await reapply_rules(connection, FindingIds(url), CompareOptions()):
            pass

    assert list_routes(url) == [("/users/{id}", "learned", 51)]
    assert query_value(url, "select count(*) from abreast.finding") == 1
    assert rows(url, "select count(*), explained_by from abreast.pair group by 2") == [(51, [1])]
    counters_match_pairs(url)
    hourly_counts_match_pairs(url)


# Declared templates


async def test_configured_templates_take_over_paths_and_learned_places(url: str, connection: Connection) -> None:
    await write(url, [record(f"/users/name-{n}", [difference()]) for n in range(60)])
    await learn_endpoints(connection, **LIMITS)
    await write(url, [record("/shops/one", [difference()]), record("/other/one")])

    await DeclaredTemplates(("GET /users/{name}", "/shops/{shop}"), ()).store(connection)
    await learn_endpoints(connection, **LIMITS)

    assert list_routes(url) == [
        ("/other/one", "path", 1),
        ("/shops/{shop}", "configured", 1),
        ("/users/{name}", "configured", 60),
    ]
    counters_match_pairs(url)
    version = query_value(url, "select version from abreast.rule_state")
    await DeclaredTemplates(("GET /users/{name}", "/shops/{shop}"), ()).store(connection)  # a restart
    assert query_value(url, "select version from abreast.rule_state") == version
    await DeclaredTemplates(("/shops/{shop}",), ()).store(connection)
    assert rows(url, "select source, path from abreast.endpoint_template order by path") == [
        ("configured", "/shops/{shop}"),
        ("learned", "/users/{id}"),
    ]


DOCUMENT = """
openapi: 3.1.0
servers: [{url: "https://api.example/{base}", variables: {base: {default: v1}}}]
paths:
  /users/{name}: {get: {}}
  /users/{name: {get: {}}
  products: {get: {}}
  x-internal: true
"""


async def test_openapi_document_with_errors_gives_its_good_paths(
    url: str, connection: Connection, tmp_path: Path
) -> None:
    file = tmp_path / "openapi.yaml"
    file.write_text(DOCUMENT.replace("/users/{name: {", '"/users/{name": {'))
    declared = DeclaredTemplates((), (str(file),))

    with capture_logs() as logs:
        await declared.store(connection)

    stored = "select path from abreast.endpoint_template order by path"
    assert rows(url, stored) == [("/users/{name}",), ("/v1/users/{name}",)]
    problems = [entry["problem"] for entry in logs if entry["log_level"] == "warning"]
    assert problems == [
        f"{file}: paths./users/{{name: a parameter is a name in braces within a segment, such as {{name}}; the path is left out",
        f"{file}: paths.products: a path begins with / and has no spaces, ? or #; the path is left out",
    ]

    file.write_text("openapi: [")
    with capture_logs() as logs:
        await declared.store(connection)
        await declared.store(connection)
    assert [entry["problem"].partition(": ")[2] for entry in logs if "problem" in entry] == [
        "line 2, column 1: did not find expected node content"
    ]
    assert rows(url, stored) == [("/users/{name}",), ("/v1/users/{name}",)]  # the former paths stay


async def test_openapi_document_is_read_from_the_service(url: str, connection: Connection) -> None:
    paths = ["/users/{name}"]

    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        document = json.dumps({"openapi": "3.0.0", "paths": {path: {} for path in paths}}).encode()
        await respond(writer, document, 200 if paths else 503)

    async with Upstream(answer) as upstream:
        declared = DeclaredTemplates((), (f"http://127.0.0.1:{upstream.port}/openapi.json",))
        await declared.store(connection)
        stored = "select path from abreast.endpoint_template order by path"
        assert rows(url, stored) == [("/users/{name}",)]
        paths[:] = ["/users/{id}", "/orders"]
        await declared.store(connection)
        assert rows(url, stored) == [("/orders",), ("/users/{id}",)]
        paths.clear()
        with capture_logs() as logs:
            await declared.store(connection)
    assert [entry["problem"].partition(".json: ")[2] for entry in logs] == ["its URL answers with status 503"]
    assert rows(url, stored) == [("/orders",), ("/users/{id}",)]


async def test_listing_names_the_sources(url: str, database: Database) -> None:
    await write(url, [record("/a", source="path"), record("/b", source="middleware"), record("/b", source="path")])
    await write(url, [record("/a", source="openapi"), record("(no route)", source="")])

    page = await LedgerReader(database).list_endpoints("shop", Window(), PageRequest(100))

    assert [(row.endpoint.route, row.source) for row in page.rows] == [
        ("(no route)", ""),
        ("/a", "openapi"),
        ("/b", "middleware"),
    ]
