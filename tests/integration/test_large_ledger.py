"""Lists on a ledger with 10,002 findings at 1,000 endpoints: few statements, few rows, causes first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg
import pytest

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.store.database import Database, Row, load_statement
from support_large_ledger import ENDPOINTS, FINDINGS, PAIRS_PER_ENDPOINT, fill
from support_serve import RunningSidecar

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]


PASSES_PER_ROW = 20  # of a plan that reads, sorts, joins and groups each row


def iter_nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from iter_nodes(child)


def count_processed_rows(url: str, name: str, parameters: Mapping[str, Any]) -> int:
    """Run a statement, and return the sum of the rows that all nodes of its plan return."""
    with psycopg.connect(url) as connection:
        statement = b"explain (analyze, timing off, format json) " + load_statement(name)
        (document,) = connection.execute(statement, parameters).fetchone() or ([],)
    counts: list[float] = [node["Actual Rows"] * node["Actual Loops"] for node in iter_nodes(document[0]["Plan"])]
    return round(sum(counts))


@pytest.fixture
def parameters_by_statement(monkeypatch: pytest.MonkeyPatch) -> dict[str, Mapping[str, Any]]:
    """Return the last parameters of each named statement."""
    parameters_by_name: dict[str, Mapping[str, Any]] = {}
    fetch_all = Database.fetch_all

    async def record_parameters(
        database: Database, name: str, parameters: Mapping[str, Any] | None = None
    ) -> list[Row]:
        parameters_by_name[name] = parameters or {}
        return await fetch_all(database, name, parameters)

    monkeypatch.setattr(Database, "fetch_all", record_parameters)
    return parameters_by_name


@pytest.fixture
def rows_by_statement(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the number of rows of each named statement."""
    counts: dict[str, int] = {}
    fetch_all = Database.fetch_all

    async def count_rows(database: Database, name: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
        rows = await fetch_all(database, name, parameters)
        if name != "clock":  # readiness checks read the clock too
            counts[name] = counts.get(name, 0) + len(rows)
        return rows

    monkeypatch.setattr(Database, "fetch_all", count_rows)
    return counts


async def test_lists_of_a_large_ledger_read_few_rows(
    query_sidecar: RunningSidecar, rows_by_statement: dict[str, int]
) -> None:
    await asyncio.to_thread(fill, query_sidecar.ledger())

    causes = await query_sidecar.comparison.ListCauses(pb.ListCausesRequest(service="shop"))

    assert [(cause.harm, cause.endpoint_count, cause.finding_count) for cause in causes.causes] == [
        (pb.HARM_SERVER_ERROR, 2, 2),
        (pb.HARM_LOST_CONTENT, ENDPOINTS, 9 * ENDPOINTS),
        (pb.HARM_CACHING, ENDPOINTS, ENDPOINTS),
    ]
    assert (causes.total_size, causes.finding_count, causes.next_page_token) == (3, FINDINGS, "")
    assert [len(cause.endpoints) for cause in causes.causes] == [2, 20, 20]
    assert rows_by_statement.pop("cause_members") == FINDINGS
    assert rows_by_statement.pop("findings_list") == 3

    rows_by_statement.clear()
    page = await query_sidecar.comparison.ListFindings(pb.ListFindingsRequest(service="shop", page_size=50))

    assert (len(page.findings), bool(page.next_page_token)) == (50, True)
    assert rows_by_statement.pop("findings_list") == 51
    assert len(rows_by_statement) <= 2


async def test_findings_of_a_cause_are_listed(query_sidecar: RunningSidecar) -> None:
    await asyncio.to_thread(fill, query_sidecar.ledger(), endpoints=30)
    first = pb.ListCausesRequest(service="shop", page_size=1)
    page = await query_sidecar.comparison.ListCauses(first)
    second = await query_sidecar.comparison.ListCauses(
        pb.ListCausesRequest(service="shop", page_size=1, page_token=page.next_page_token)
    )

    request = pb.ListFindingsRequest(service="shop", page_size=1000, cause_id=second.causes[0].id)
    members = await query_sidecar.comparison.ListFindings(request)

    assert [cause.harm for cause in (*page.causes, *second.causes)] == [pb.HARM_SERVER_ERROR, pb.HARM_LOST_CONTENT]
    assert (len(members.findings), {finding.part for finding in members.findings}) == (270, {common.PART_BODY})


async def test_overview_shows_causes(query_sidecar: RunningSidecar) -> None:
    await asyncio.to_thread(fill, query_sidecar.ledger(), endpoints=30)

    text = (await query_sidecar.http.get("/")).text

    assert "3 causes of 302 findings" in text
    assert text.index("server error") < text.index("lost content") < text.index("caching")
    assert "10 more: <code>abreast findings --cause" in text


async def test_statements_of_a_large_ledger_process_each_row_a_few_times(
    query_sidecar: RunningSidecar, parameters_by_statement: dict[str, Mapping[str, Any]]
) -> None:
    await asyncio.to_thread(fill, query_sidecar.ledger())

    page = await query_sidecar.http.get("/", timeout=120.0)

    assert f"{ENDPOINTS - 200} more endpoints: <code>abreast endpoints --limit {ENDPOINTS}</code>" in page.text

    limit = PASSES_PER_ROW * (ENDPOINTS * PAIRS_PER_ENDPOINT + FINDINGS)
    names = ("verdict_counts", "summary_outcomes", "cause_members", "findings_list", "endpoints_list")
    counts = {
        name: count_processed_rows(query_sidecar.postgres_url, name, parameters_by_statement[name]) for name in names
    }
    assert all(0 < count <= limit for count in counts.values()), counts
