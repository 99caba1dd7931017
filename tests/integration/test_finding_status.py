"""Status changes of findings, and findings that reopen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from click.testing import CliRunner
from msgspec import structs

from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.cli import abreast
from abreast_sidecar.jobs.detectors import detect_unanswered
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import PairRecord, StatusChange, Window, set_status
from abreast_sidecar.store.writer import PairWriter
from support_pairs import difference, make_record, query_value, rows
from support_serve import RunningSidecar, refused, run_sidecar

pytestmark = pytest.mark.postgres

PRICE = difference("$.price")
FIXED, EXPECTED = pb.FINDING_STATUS_FIXED, pb.FINDING_STATUS_EXPECTED
CONFIRMED, OPEN, REOPENED = (pb.FINDING_STATUS_CONFIRMED, pb.FINDING_STATUS_OPEN, pb.FINDING_STATUS_REOPENED)


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url) as instance:
        yield instance


@pytest.fixture
async def ledger(sidecar: RunningSidecar) -> AsyncIterator[PairWriter]:
    writer = PairWriter(sidecar.postgres_url, examples_per_finding=3)
    yield writer
    await writer.close()


def mismatching(release: str, count: int = 20, *, old: str = "a") -> list[PairRecord]:
    return [make_record([PRICE], baseline_compared=True, releases=(old, release)) for _ in range(count)]


def clean(release: str, count: int = 20) -> list[PairRecord]:
    return [make_record(releases=("a", release)) for _ in range(count)]


async def the_finding(sidecar: RunningSidecar) -> pb.GetFindingResponse:
    number = query_value(sidecar.postgres_url, "select id from abreast.finding")
    response: pb.GetFindingResponse = await sidecar.comparison.GetFinding(pb.GetFindingRequest(id=number))
    return response


async def say(sidecar: RunningSidecar, status: pb.FindingStatus.ValueType, release: str = "") -> pb.Finding:
    number = query_value(sidecar.postgres_url, "select id from abreast.finding")
    request = pb.SetFindingStatusRequest(id=number, status=status, reason="so it is", actor="ann", release=release)
    answer: pb.SetFindingStatusResponse = await sidecar.comparison.SetFindingStatus(request)
    return answer.finding


async def verdict(sidecar: RunningSidecar, **fields: object) -> tuple[int, int, str]:
    """Mismatches and compared pairs of the release that was judged, and which it was."""
    await decide(sidecar)
    request = pb.GetVerdictRequest(service="shop", **fields)  # type: ignore[arg-type]  # each test's own
    response = await sidecar.comparison.GetVerdict(request)
    text = next(reason.text for reason in response.reasons if reason.subject == pb.VERDICT_SUBJECT_MISMATCHES)
    words = text.replace(",", "").split()
    return int(words[0]), int(words[2]), response.release


async def decide(sidecar: RunningSidecar) -> None:
    async with sidecar.sidecar.database.connection() as connection:
        await classify_findings(connection)


async def missing(sidecar: RunningSidecar) -> int:
    async with sidecar.sidecar.database.connection() as connection:
        return await detect_unanswered(connection)


async def test_finding_has_rate_interval_and_releases(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write([*mismatching("1", 30), *clean("1", 170), *mismatching("2", 10, old="b")])

    response = (await the_finding(sidecar)).finding

    assert (response.count, response.compared) == (40, 210)
    assert response.rate.value == pytest.approx(40 / 210)
    assert 0.1 < response.rate.low < response.rate.value < response.rate.high < 0.35
    assert (list(response.new_releases), list(response.old_releases)) == (["2", "1"], ["b", "a"])
    assert response.status == OPEN


async def test_status_change_stores_actor_and_reason(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write(mismatching("1"))
    confirmed = await say(sidecar, CONFIRMED)
    await say(sidecar, EXPECTED)

    response = await the_finding(sidecar)

    assert confirmed.status == CONFIRMED
    assert response.finding.status == EXPECTED
    assert [(e.before, e.after, e.actor, e.reason) for e in response.events] == [
        (CONFIRMED, EXPECTED, "ann", "so it is"),
        (OPEN, CONFIRMED, "ann", "so it is"),
    ]


async def test_status_change_rejects_invalid_arguments(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write(mismatching("1"))
    number = query_value(sidecar.postgres_url, "select id from abreast.finding")
    for fields, message in (
        ({"status": REOPENED, "reason": "x"}, "status must be one of open, confirmed, expected, fixed"),
        ({"status": 0, "reason": "x"}, "status must be one of"),
        ({"status": EXPECTED}, "reason must not be empty"),
        ({"status": EXPECTED, "reason": "x", "release": "2"}, "release must be empty unless the status is fixed"),
        ({"status": FIXED, "reason": "x", "release": "1"}, "can't be fixed in release '1'"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await sidecar.comparison.SetFindingStatus(pb.SetFindingStatusRequest(id=number, **fields))

        assert refused(error.value).code is grpc.StatusCode.INVALID_ARGUMENT
        assert message in refused(error.value).message
        assert query_value(sidecar.postgres_url, "select status from abreast.finding") == "open"


async def test_status_change_of_unknown_finding_is_not_found(sidecar: RunningSidecar) -> None:
    request = pb.SetFindingStatusRequest(id=7, status=EXPECTED, reason="x")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await sidecar.comparison.SetFindingStatus(request)

    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_fixed_finding_reopens_once_in_later_release(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    """Four workers at once, each with pairs that show it."""
    await ledger.write([*clean("0"), *mismatching("1")])
    await say(sidecar, FIXED)
    await ledger.write([*mismatching("1"), *mismatching("0"), *clean("2")])  # late ones of what is known to have it
    assert (await the_finding(sidecar)).finding.status == FIXED

    ledgers = [PairWriter(sidecar.postgres_url, examples_per_finding=1) for _ in range(4)]
    await asyncio.gather(*(writer.write(mismatching("2", 5)) for writer in ledgers for _ in range(1)))
    for writer in ledgers:
        await writer.close()

    response = await the_finding(sidecar)
    assert response.finding.status == REOPENED
    assert [(e.actor, e.after, e.release) for e in response.events] == [("abreast", REOPENED, "2"), ("ann", FIXED, "")]


async def test_fixed_status_accepts_release_with_the_fix(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write([*mismatching("1"), *clean("2")])
    await say(sidecar, FIXED, release="2")
    await ledger.write(mismatching("1"))
    assert (await the_finding(sidecar)).finding.status == FIXED

    await ledger.write(mismatching("2", 1))
    assert (await the_finding(sidecar)).finding.status == REOPENED


async def test_fixed_finding_without_labels_reopens_with_later_pair(
    sidecar: RunningSidecar, ledger: PairWriter
) -> None:
    await ledger.write(mismatching(""))
    before = mismatching("", 1)
    await say(sidecar, FIXED)
    await ledger.write(before)
    assert (await the_finding(sidecar)).finding.status == FIXED

    await ledger.write(mismatching("", 1))
    assert (await the_finding(sidecar)).finding.status == REOPENED


async def test_status_changes_and_workers_run_concurrently(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    """Whichever comes first, it ends reopened: release 2 shows it after every word."""
    await ledger.write(mismatching("1"))
    number = query_value(sidecar.postgres_url, "select id from abreast.finding")
    other = PairWriter(sidecar.postgres_url, examples_per_finding=1)

    async def speak() -> None:
        for turn in range(10):
            await set_status(sidecar.sidecar.database, number, StatusChange("fixed", "ann", f"turn {turn}"))

    async def write(to: PairWriter) -> None:
        for _ in range(10):
            await to.write(mismatching("1", 3))

    await asyncio.gather(speak(), write(ledger), write(other))
    assert (await the_finding(sidecar)).finding.status == FIXED
    await asyncio.gather(*(to.write(mismatching("2", 3)) for to in (ledger, other)))
    await other.close()

    events = rows(sidecar.postgres_url, "select actor, count(*) from abreast.finding_event group by 1 order by 1")
    assert events == [("abreast", 1), ("ann", 10)]
    assert query_value(sidecar.postgres_url, "select count from abreast.finding") == 20 + 60 + 6
    assert (
        query_value(sidecar.postgres_url, "select deadlocks from pg_stat_database where datname = current_database()")
        == 0
    )


async def test_fixed_unanswered_finding_reopens_in_later_release(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    def hanging(release: str) -> list[PairRecord]:
        return [make_record(route="/hangs", outcome="only_old", releases=("a", release)) for _ in range(12)]

    await ledger.write([*clean("1"), *hanging("1")])
    assert await missing(sidecar) == 1
    await say(sidecar, FIXED)
    await ledger.write([*clean(""), *hanging("1")])  # a capture without a label is no later release
    assert await missing(sidecar) == 1
    assert (await the_finding(sidecar)).finding.status == FIXED
    await ledger.write(clean("2"))
    assert await missing(sidecar) == 0  # findings of release 1 don't count for release 2
    assert (await the_finding(sidecar)).finding.status == FIXED

    await ledger.write(hanging("2"))
    await asyncio.gather(missing(sidecar), missing(sidecar))

    response = await the_finding(sidecar)
    assert response.finding.status == REOPENED
    assert len(response.events) == 2


async def test_expected_finding_counts_as_explained(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write([*mismatching("1", 30), *clean("1", 70)])
    assert await verdict(sidecar) == (30, 100, "1")

    await say(sidecar, EXPECTED)

    assert await verdict(sidecar) == (0, 100, "1")
    summary = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(service="shop"))
    assert (summary.findings, summary.explained) == (0, 30)


async def test_confirmed_finding_counts_despite_noise(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    noisy = [make_record([PRICE], noise=[PRICE], releases=("a", "1")) for _ in range(50)]
    await ledger.write([*noisy, *clean("1", 50)])
    assert await verdict(sidecar) == (0, 100, "1")
    assert not (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings

    await say(sidecar, CONFIRMED)

    assert await verdict(sidecar) == (50, 100, "1")
    assert len((await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings) == 1


async def test_verdict_covers_newest_release_by_default(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write(mismatching("1", 40))
    await say(sidecar, FIXED)
    assert await verdict(sidecar) == (40, 40, "1")  # saying so makes nothing pass

    await ledger.write(clean("2", 60))
    assert await verdict(sidecar) == (0, 60, "2")
    assert await verdict(sidecar, release="1") == (40, 40, "1")
    assert await verdict(sidecar, all_releases=True) == (0, 100, "")

    await ledger.write(mismatching("2", 20))
    assert await verdict(sidecar) == (20, 80, "2")


async def test_unanswered_requests_count_for_release_of_their_time(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    def unanswered(count: int) -> list[PairRecord]:
        records = [make_record(outcome="only_old", releases=("a", "")) for _ in range(count)]
        for record in records:
            record.result = structs.replace(record.result, new=None)
        return records

    await ledger.write([*clean("1", 10), *unanswered(3)])
    await ledger.write(clean("2", 10))
    await ledger.write(unanswered(5))

    counts = {
        release: [
            (record.old_requests, record.new_requests)
            for record in (
                await LedgerReader(sidecar.sidecar.database).read_evidence("shop", Window(), 0.1, release=release)
            ).endpoints
        ]
        for release in ("1", "2")
    }
    assert counts == {"1": [(13, 10)], "2": [(15, 10)]}


async def test_settled_findings_are_listed_separately(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write(
        [make_record([PRICE, difference("$.stock"), difference("$.name")], releases=("a", "1")) for _ in range(30)]
    )
    ids = dict(rows(sidecar.postgres_url, "select path, id from abreast.finding"))
    await set_status(sidecar.sidecar.database, ids["$.stock"], StatusChange("expected", "ann", "counted anew"))
    await set_status(sidecar.sidecar.database, ids["$.name"], StatusChange("fixed", "ann", "done"))

    async def list_paths(**fields: object) -> set[str]:
        answer = await sidecar.comparison.ListFindings(pb.ListFindingsRequest(**fields))  # type: ignore[arg-type]
        return {finding.path for finding in answer.findings}

    assert await list_paths() == {"$.price"}
    assert await list_paths(include_settled=True) == {"$.price", "$.stock", "$.name"}
    assert await list_paths(only_explained=True) == {"$.stock", "$.name"}
    assert await list_paths(release="1") == {"$.price"}
    with pytest.raises(grpc.aio.AioRpcError, match="no pair of release '2'"):
        await list_paths(release="2")
    page = (await sidecar.http.get("/")).text
    assert page.index("Explained") < page.index("counted anew")


async def test_watch_reports_reopened_finding(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write(mismatching("1"))
    await decide(sidecar)
    await say(sidecar, FIXED)
    watching = sidecar.comparison.WatchFindings(pb.WatchFindingsRequest(service="shop"))
    await watching.initial_metadata()
    await ledger.write(mismatching("2", 1))
    async with asyncio.timeout(20):
        message = await anext(aiter(watching))
    watching.cancel()

    assert message.finding.status == REOPENED


async def test_status_commands_set_and_show_status(sidecar: RunningSidecar, ledger: PairWriter) -> None:
    await ledger.write(mismatching("1.4"))
    address = ["--address", f"127.0.0.1:{sidecar.port}"]

    async def run(*words: str) -> tuple[int, str]:
        result = await asyncio.to_thread(CliRunner().invoke, abreast, [*words, *address])
        return result.exit_code, result.output

    number = str(query_value(sidecar.postgres_url, "select id from abreast.finding"))
    code, text = await run("finding", number, "--fixed", "--release", "1.5", "--reason", "rounds again")
    assert (code, "fixed in release 1.5: rounds again" in text) == (0, True)
    assert "20 of 20 compared (100%; with 95% confidence" in text
    assert "new 1.4; old a" in text
    assert "no differences" in (await run("findings"))[1]
    assert "fixed" in (await run("findings", "--explained"))[1]
    assert "fixed" in (await run("findings", "--all"))[1]
    await run("finding", number, "--open", "--reason", "wrong one")
    assert "earlier status" in (await run("finding", number))[1]
    assert (await run("finding", number, "--expected"))[0] == 2
    assert (await run("finding", number, "--reason", "x"))[0] == 2
    code, text = await run("pairs", "--finding", number, "--outcome", "mismatch", "--limit", "3")
    assert (code, text.count("GET /products/7?page=1")) == (0, 3)
    assert "no stored pair matches" in (await run("pairs", "--outcome", "shed"))[1]
    assert "release 1.4" in (await run("verdict"))[1]
