"""GetVerdict over gRPC, from a ledger with many rows."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.cli import abreast
from support_serve import NOON, Ledger, Running, refused, running
from support_verdict import add, reason, sampled, state, verdict

pytestmark = pytest.mark.postgres


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[Running]:
    async with running(redis_url, postgres_url) as found:
        yield found


@pytest.fixture
def ledger(sidecar: Running) -> Ledger:
    return sidecar.ledger()


async def test_verdict_passes_equal_versions_with_enough_pairs(sidecar: Running, ledger: Ledger) -> None:
    noise = ledger.finding(ledger.endpoint(), "$.id", baseline_count=9)
    additive = ledger.finding(ledger.endpoint(), "$.colour", kind="added", impact="additive")
    add(ledger, 2000)
    add(ledger, 2000, noise)
    add(ledger, 1000, additive, noise)
    sampled(ledger)

    found = await verdict(sidecar)

    assert (state(found), found.pairs_needed, found.service) == ("PASS", 0, "shop")
    assert [state(one) for one in found.endpoints] == ["PASS"]
    assert found.endpoints[0].endpoint.route == "/products/{id}"
    assert {state(one) for one in found.reasons} == {"PASS"}
    assert (found.budget.max_mismatch, found.budget.confidence) == (0.001, 0.95)


async def test_verdict_fails_one_error_in_two_thousand(sidecar: Running, ledger: Ledger) -> None:
    broken = ledger.finding(ledger.endpoint(), "$.price")
    add(ledger, 19_990)
    add(ledger, 10, broken)
    sampled(ledger)

    strict, lenient = await verdict(sidecar, max_mismatch=0.0001), await verdict(sidecar, max_mismatch=0.002)
    (listed,) = (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings

    assert (state(strict), state(lenient)) == ("FAIL", "PASS")
    assert strict.reasons[0].subject == pb.VERDICT_SUBJECT_MISMATCHES
    assert strict.reasons[0].text.startswith("10 of 20,000 pairs have unexplained mismatches: 0.05%")
    assert listed.id == broken


@pytest.mark.parametrize("many", [0, 1, 100, 2500])
async def test_verdict_with_few_pairs_never_passes(sidecar: Running, ledger: Ledger, many: int) -> None:
    add(ledger, many)
    sampled(ledger)

    found = await verdict(sidecar)

    assert state(found) == "INCONCLUSIVE"
    if many:
        assert 500 < found.pairs_needed < 4000


async def test_verdict_with_undecided_finding_is_inconclusive(sidecar: Running, ledger: Ledger) -> None:
    doubtful = ledger.finding(ledger.endpoint(), "$.price", state="undecided")
    add(ledger, 5000)
    add(ledger, 100, doubtful)
    sampled(ledger)

    found = await verdict(sidecar)

    assert state(found) == "INCONCLUSIVE"
    assert "100 more are undecided" in reason(found, "MISMATCHES").text


@pytest.mark.parametrize("outcome", ["only_old", "undecodable", "shed", "baseline_only"])
async def test_verdict_counts_outcomes_without_evidence_as_lost(sidecar: Running, ledger: Ledger, outcome: str) -> None:
    add(ledger, 5000)
    add(ledger, 200, outcome=outcome)
    sampled(ledger)

    found = await verdict(sidecar)

    assert (state(found), state(reason(found, "COMPLETENESS"))) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert "200 are missing" in found.reasons[0].text


async def test_verdict_counts_missing_rows_as_lost(sidecar: Running, ledger: Ledger) -> None:
    add(ledger, 5000)
    sampled(ledger, 6000)
    window = common.TimeWindow()
    window.start.FromDatetime(NOON - dt.timedelta(hours=1))

    for found in (await verdict(sidecar), await verdict(sidecar, window)):
        assert (state(found), found.reasons[0].subject) == ("INCONCLUSIVE", pb.VERDICT_SUBJECT_COMPLETENESS)
        assert "5,000 of 6,000 sampled requests" in found.reasons[0].text


async def test_verdict_without_envoy_count_never_passes(sidecar: Running, ledger: Ledger) -> None:
    add(ledger, 5000)

    found = await verdict(sidecar)

    assert state(found) == "INCONCLUSIVE"
    assert "no Envoy's count" in found.reasons[0].text


async def test_verdict_stays_fail_with_lost_requests(sidecar: Running, ledger: Ledger) -> None:
    add(ledger, 900)
    add(ledger, 100, ledger.finding(ledger.endpoint(), "$.price"))
    sampled(ledger, 9000)

    assert state(await verdict(sidecar)) == "FAIL"


async def test_verdict_fails_errors_of_new(sidecar: Running, ledger: Ledger) -> None:
    broken = ledger.finding(ledger.endpoint(), "200->500", part="status", impact="breaking")
    add(ledger, 3000)
    add(ledger, 40, broken, statuses=(200, 500))
    add(ledger, 40, outcome="match", statuses=(503, 503))
    sampled(ledger)

    found = await verdict(sidecar, max_mismatch=0.5)

    assert (state(found), found.reasons[0].subject) == ("FAIL", pb.VERDICT_SUBJECT_ERRORS)
    assert found.reasons[0].text.startswith("40 of 3,080 pairs have errors of new")


async def test_verdict_fails_slower_version(sidecar: Running, ledger: Ledger) -> None:
    add(ledger, 5000)
    ledger.execute("update abreast.pair set new_us = old_us * 1.2")
    sampled(ledger)

    allowed, found = await verdict(sidecar, max_slower=0.3), await verdict(sidecar)

    assert (state(allowed), state(found)) == ("PASS", "FAIL")
    assert found.reasons[0].subject == pb.VERDICT_SUBJECT_SLOWER
    assert "4,500 of 4,500 pairs" in found.reasons[0].text  # a tenth is cold


@pytest.mark.parametrize(("old_us", "new_us", "expected"), [(100, 590, "PASS"), (1000, 1600, "FAIL")])
async def test_verdict_ignores_imperceptible_slowdown(
    sidecar: Running, ledger: Ledger, old_us: int, new_us: int, expected: str
) -> None:
    add(ledger, 5000)
    ledger.execute("update abreast.pair set old_us = %s, new_us = %s", old_us, new_us)
    sampled(ledger)

    assert state(await verdict(sidecar)) == expected


@pytest.mark.parametrize(("copies", "expected"), [(19, "FAIL"), (5000, "PASS")])
async def test_verdict_ignores_slowness_of_copies(sidecar: Running, ledger: Ledger, copies: int, expected: str) -> None:
    """Copies of old take twice as long too, where there are enough to say so."""
    add(ledger, 5000)
    ledger.execute("update abreast.pair set new_us = old_us * 2")
    ledger.execute(
        "update abreast.pair set baseline_us = new_us where id in (select id from abreast.pair order by at desc limit %s)",
        copies,
    )
    sampled(ledger)

    assert state(await verdict(sidecar)) == expected


async def test_verdict_fails_version_slower_than_copies(sidecar: Running, ledger: Ledger) -> None:
    """The request has warmed the caches of both."""
    add(ledger, 5000)
    ledger.execute(
        "update abreast.pair set new_us = old_us / 2, baseline_us = case when old_us %% 2 = 0 then old_us / 4 end"
    )
    sampled(ledger)

    assert state(await verdict(sidecar)) == "FAIL"


async def test_verdict_with_unanswered_endpoint_never_passes(sidecar: Running, ledger: Ledger) -> None:
    add(ledger, 9000)
    add(ledger, 5, endpoint=ledger.endpoint(route="/gone"), outcome="only_old", statuses=(200, None))
    sampled(ledger)

    found = await verdict(sidecar)

    assert state(found) == "INCONCLUSIVE"
    assert (found.reasons[0].subject, found.reasons[0].endpoint.route) == (pb.VERDICT_SUBJECT_COVERAGE, "/gone")
    assert {one.endpoint.route: state(one) for one in found.endpoints} == {
        "/products/{id}": "PASS",
        "/gone": "INCONCLUSIVE",
    }


@pytest.mark.parametrize(
    ("outcome", "shows", "expected"),
    [
        ("not_compared", "", "INCONCLUSIVE"),
        ("aborted", "", "INCONCLUSIVE"),
        ("oversize", "noise", "INCONCLUSIVE"),
        ("oversize", "real", "FAIL"),
    ],
)
async def test_verdict_with_uncompared_endpoint_never_passes(
    sidecar: Running, ledger: Ledger, outcome: str, shows: str, expected: str
) -> None:
    large = ledger.endpoint(route="/large")
    shown = [ledger.finding(large, "$", state=shows)] if shows else []
    add(ledger, 9000)
    add(ledger, 50, *shown, endpoint=large, outcome=outcome)
    sampled(ledger)

    found = await verdict(sidecar)

    assert (state(found), found.reasons[0].endpoint.route) == (expected, "/large")


async def test_verdict_passes_and_names_explained_pairs(sidecar: Running, ledger: Ledger) -> None:
    add(ledger, 9000)
    ledger.execute("update abreast.pair set outcome = 'mismatch', explained = '{1}', explained_by = '{1}'")
    sampled(ledger)

    found = await verdict(sidecar)

    assert state(found) == "PASS"
    assert "9,000 explained by rules" in reason(found, "MISMATCHES").text


async def test_verdict_fails_with_one_bad_endpoint(sidecar: Running, ledger: Ledger) -> None:
    rare = ledger.endpoint(route="/rare")
    add(ledger, 50_000)
    add(ledger, 20, ledger.finding(rare, "$.price"), endpoint=rare)
    sampled(ledger)

    found = await verdict(sidecar)

    assert (state(found), found.reasons[0].endpoint.route) == ("FAIL", "/rare")
    assert [(one.endpoint.route, state(one)) for one in found.endpoints] == [
        ("/rare", "FAIL"),
        ("/products/{id}", "PASS"),
    ]


async def test_verdict_of_window_uses_its_rows(sidecar: Running, ledger: Ledger) -> None:
    add(ledger, 1000, ledger.finding(ledger.endpoint(), "$.price"))
    add(ledger, 5000, at=NOON + dt.timedelta(hours=2))
    sampled(ledger)
    window = common.TimeWindow()
    window.start.FromDatetime(NOON + dt.timedelta(hours=1))

    assert (state(await verdict(sidecar)), state(await verdict(sidecar, window))) == ("FAIL", "PASS")


@pytest.mark.parametrize(
    "budget", [{"max_mismatch": 1.5}, {"confidence": 1.0}, {"max_slower": -1.0}, {"max_error": float("nan")}]
)
async def test_verdict_rejects_empty_budget(sidecar: Running, budget: dict[str, Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await verdict(sidecar, **budget)
    found = refused(caught.value)

    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert next(iter(budget)) in found.message


@pytest.mark.parametrize(
    ("many", "broken", "code", "word"), [(5000, 0, 0, "PASS"), (5000, 500, 1, "FAIL"), (50, 0, 2, "INCONCLUSIVE")]
)
async def test_verdict_command_exits_with_verdict(
    sidecar: Running, ledger: Ledger, many: int, broken: int, code: int, word: str
) -> None:
    add(ledger, many)
    add(ledger, broken, ledger.finding(ledger.endpoint(), "$.price"))
    sampled(ledger)
    words = ["verdict", "--max-mismatch", "0.1%", "--confidence", "95%", "--address", f"127.0.0.1:{sidecar.port}"]

    result = await asyncio.to_thread(CliRunner().invoke, abreast, words)

    assert result.exit_code == code
    assert f"{word}  shop" in result.stdout
    assert "pairs have unexplained mismatches" in result.stdout
    assert ("more pairs to pass" in result.stdout) is (code == 2)
