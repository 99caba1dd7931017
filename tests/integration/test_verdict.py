"""GetVerdict over gRPC, from a ledger with many rows."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import grpc
import psycopg
import pytest
from click.testing import CliRunner

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.cli import abreast
from support_serve import NOON, Ledger, RunningSidecar, refused
from support_verdict import TALLY, add, reason, sampled, state, verdict

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture
def sidecar(query_sidecar: RunningSidecar) -> RunningSidecar:
    return query_sidecar


@pytest.fixture
def ledger(sidecar: RunningSidecar) -> Ledger:
    return sidecar.ledger()


async def test_verdict_passes_equal_versions_with_enough_pairs(sidecar: RunningSidecar, ledger: Ledger) -> None:
    noise = ledger.finding(ledger.endpoint(), "$.id", baseline_count=9)
    additive = ledger.finding(ledger.endpoint(), "$.colour", kind="added", impact="additive")
    add(ledger, 2000)
    add(ledger, 2000, noise)
    add(ledger, 1000, additive, noise)
    sampled(ledger)

    response = await verdict(sidecar)

    assert (state(response), response.pairs_needed, response.service) == ("PASS", 0, "shop")
    assert [state(endpoint) for endpoint in response.endpoints] == ["PASS"]
    assert response.endpoints[0].endpoint.route == "/products/{id}"
    assert {state(reason) for reason in response.reasons} == {"PASS"}
    assert (response.budget.max_mismatch, response.budget.confidence) == (0.001, 0.95)


async def test_verdict_fails_one_error_in_two_thousand(sidecar: RunningSidecar, ledger: Ledger) -> None:
    broken = ledger.finding(ledger.endpoint(), "$.price")
    add(ledger, 19_990)
    add(ledger, 10, broken)
    sampled(ledger)

    strict, lenient = await verdict(sidecar, max_mismatch=0.0001), await verdict(sidecar, max_mismatch=0.002)
    (finding,) = (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings

    assert (state(strict), state(lenient)) == ("FAIL", "PASS")
    assert strict.reasons[0].subject == pb.VERDICT_SUBJECT_MISMATCHES
    assert strict.reasons[0].text.startswith("10 of 20,000 pairs have unexplained mismatches: 0.05%")
    assert finding.id == broken


@pytest.mark.parametrize("count", [0, 1, 100, 2500])
async def test_verdict_with_few_pairs_never_passes(sidecar: RunningSidecar, ledger: Ledger, count: int) -> None:
    add(ledger, count)
    sampled(ledger)

    response = await verdict(sidecar)

    assert state(response) == "INCONCLUSIVE"
    if count:
        assert 500 < response.pairs_needed < 4000


async def test_verdict_with_undecided_finding_is_inconclusive(sidecar: RunningSidecar, ledger: Ledger) -> None:
    doubtful = ledger.finding(ledger.endpoint(), "$.price", state="undecided")
    add(ledger, 5000)
    add(ledger, 100, doubtful)
    sampled(ledger)

    response = await verdict(sidecar)

    assert state(response) == "INCONCLUSIVE"
    assert "100 more are undecided" in reason(response, "MISMATCHES").text


@pytest.mark.parametrize("outcome", ["only_old", "undecodable", "shed", "baseline_only"])
async def test_verdict_counts_outcomes_without_evidence_as_lost(
    sidecar: RunningSidecar, ledger: Ledger, outcome: str
) -> None:
    add(ledger, 5000)
    add(ledger, 200, outcome=outcome)
    sampled(ledger)

    response = await verdict(sidecar)

    assert (state(response), state(reason(response, "COMPLETENESS"))) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert "200 are missing" in response.reasons[0].text


@pytest.mark.parametrize(("not_query", "expected"), [(200, "PASS"), (0, "INCONCLUSIVE")])
async def test_verdict_does_not_count_requests_that_a_rule_excludes_as_lost(
    sidecar: RunningSidecar, ledger: Ledger, not_query: int, expected: str
) -> None:
    add(ledger, 5000)
    add(ledger, 200, outcome="only_old")
    sampled(ledger)
    ledger.execute(
        "insert into abreast.envoy_count (service, at, sampled, without_copy, not_query)"
        " values ('shop', now(), 0, %s, %s) returning 1",
        not_query,
        not_query,
    )

    completeness = reason(await verdict(sidecar), "COMPLETENESS")

    assert state(completeness) == expected
    assert ("200 more, to protect a version or by a sampling rule" in completeness.text) == bool(not_query)


MUTATION, QUERY = "/graphql mutation AddToCart", "/graphql query Search"


@pytest.mark.parametrize(
    ("method", "route", "source", "not_query", "expected"),
    [
        ("POST", MUTATION, "graphql", 60, "PASS"),
        ("POST", MUTATION, "graphql", 0, "INCONCLUSIVE"),
        ("POST", MUTATION, "graphql", 40, "INCONCLUSIVE"),
        ("POST", "/graphql", "path", 60, "PASS"),  # batches
        ("POST", QUERY, "graphql", 60, "INCONCLUSIVE"),
        ("POST", "/checkout", "path", 60, "INCONCLUSIVE"),
    ],
)
async def test_verdict_does_not_require_coverage_of_requests_that_a_rule_excludes(
    sidecar: RunningSidecar, ledger: Ledger, method: str, route: str, source: str, not_query: int, expected: str
) -> None:
    add(ledger, 20_000)
    endpoint = ledger.endpoint(method=method, route=route)
    ledger.execute("update abreast.endpoint set source = %s where id = %s", source, endpoint)
    add(ledger, 60, endpoint=endpoint, outcome="only_old", statuses=(200, None))
    add(ledger, 20, endpoint=endpoint, outcome="only_new", statuses=(None, 200))
    sampled(ledger)
    ledger.execute(
        "insert into abreast.envoy_count (service, at, sampled, without_copy, not_query) values ('shop', %s, 0, %s, %s)",
        *(NOON, not_query, not_query + (20 if not_query else 0)),
    )

    response = await verdict(sidecar)

    assert state(response) == expected
    assert any(item.subject == pb.VERDICT_SUBJECT_COVERAGE for item in response.reasons) == (expected != "PASS")


async def test_verdict_counts_missing_rows_as_lost(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add(ledger, 5000)
    sampled(ledger, 6000)
    window = common.TimeWindow()
    window.start.FromDatetime(NOON - dt.timedelta(hours=1))

    for response in (await verdict(sidecar), await verdict(sidecar, window)):
        assert (state(response), response.reasons[0].subject) == ("INCONCLUSIVE", pb.VERDICT_SUBJECT_COMPLETENESS)
        assert "5,000 of 6,000 sampled requests" in response.reasons[0].text


async def test_verdict_without_envoy_count_never_passes(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add(ledger, 5000)

    response = await verdict(sidecar)

    assert state(response) == "INCONCLUSIVE"
    assert "no Envoy's count" in response.reasons[0].text


async def test_verdict_stays_fail_with_lost_requests(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add(ledger, 900)
    add(ledger, 100, ledger.finding(ledger.endpoint(), "$.price"))
    sampled(ledger, 9000)

    assert state(await verdict(sidecar)) == "FAIL"


@pytest.mark.parametrize(("interval_s", "expected"), [(10.0, "FAIL"), (0.01, "INCONCLUSIVE")])
async def test_verdict_fails_errors_of_new_in_many_periods(
    sidecar: RunningSidecar, ledger: Ledger, interval_s: float, expected: str
) -> None:
    """Errors in one period are one event."""
    broken = ledger.finding(ledger.endpoint(), "200->500", part="status", impact="breaking")
    add(ledger, 3000)
    for number in range(20):
        add(ledger, 2, broken, at=NOON + dt.timedelta(seconds=number * interval_s), statuses=(200, 500))
    add(ledger, 40, outcome="match", statuses=(503, 503))
    sampled(ledger)

    response = await verdict(sidecar, max_mismatch=0.5)

    assert state(response) == expected
    assert state(reason(response, "ERRORS")) == expected
    assert response.reasons[0].text.startswith("40 of 3,080 pairs have errors of new")


async def test_verdict_counts_periods_of_errors_over_all_endpoints(sidecar: RunningSidecar, ledger: Ledger) -> None:
    """Each endpoint fails once."""
    add(ledger, 3000)
    for number in range(30):
        endpoint = ledger.endpoint(route=f"/page-{number}")
        at = NOON + dt.timedelta(seconds=10 * number)
        add(ledger, 49, endpoint=endpoint, at=at)
        add(ledger, 1, endpoint=endpoint, at=at, outcome="mismatch", statuses=(200, 500))
    sampled(ledger)

    response = await verdict(sidecar, max_mismatch=0.5)

    assert state(response) == "FAIL"
    errors = reason(response, "ERRORS")
    assert (state(errors), errors.count, errors.endpoint.route) == ("FAIL", 30, "")


LIVE = """
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, old_status, new_status, new_release, left_by,
                          old_us, new_us, waits_match)
select %(at)s::date, %(id)s || n, %(at)s::timestamptz + n * interval '1 s' * %(step)s, %(endpoint)s, %(outcome)s,
       case when n %% 10 < %(tenths)s then 'new' else 'old' end,
       case when %(outcome)s = 'match' or n %% 10 >= %(tenths)s then 200 end,
       case when %(outcome)s = 'match' or n %% 10 < %(tenths)s then 200 end, '',
       case when %(outcome)s = 'aborted' then coalesce(%(user)s, n) end, 10000, 10000, true
from generate_series(0, %(count)s - 1) as n
"""


def add_live(
    ledger: Ledger, count: int, tenths: int, *, step: float = 0.1, leave: bool = False, **options: Any
) -> None:
    """Add live responses, so many tenths of new, one each `step` seconds. If the users leave, one may be all of them."""
    at, outcome = options.get("at", NOON), "aborted" if leave else "match"
    prefix = f"{outcome} {tenths} {at} "
    parameters = {
        "at": at, "id": prefix, "step": step, "outcome": outcome, "tenths": tenths, "count": count,
        "endpoint": ledger.endpoint(), "user": options.get("user"),
    }  # fmt: skip
    ledger.execute("select abreast.open_day(%s)", at.date())
    with psycopg.connect(ledger.url) as connection:
        connection.execute(LIVE, parameters)
    ledger.execute(TALLY, at.date(), outcome, count)


@pytest.mark.parametrize(
    ("departures", "expected"),
    [
        ([{"count": 60, "tenths": 10, "step": 5}], "FAIL"),
        ([{"count": 200, "tenths": 5, "step": 2}], "INCONCLUSIVE"),  # both versions alike
        ([{"count": 200, "tenths": 10, "step": 0.01}], "INCONCLUSIVE"),  # an outage
        ([{"count": 200, "tenths": 10, "step": 2, "user": 7}], "INCONCLUSIVE"),  # one user with a bad connection
        ([{"count": 40, "tenths": 10, "step": 10, "user": 7}], "PASS"),
        ([{"count": 5, "tenths": 10, "step": 50}], "PASS"),
    ],
)
async def test_verdict_compares_the_users_who_leave_new_with_those_of_old(
    sidecar: RunningSidecar, ledger: Ledger, departures: list[dict[str, Any]], expected: str
) -> None:
    """Half of the users are on new. Their requests are not compared."""
    add_live(ledger, 4000, 5)
    for options in departures:
        add_live(ledger, leave=True, **options)
    sampled(ledger)

    response = await verdict(sidecar)

    left = reason(response, "LEFT")
    assert (state(response), state(left)) == (expected, expected)
    assert left.count == sum(options["count"] * options["tenths"] // 10 for options in departures)
    assert left.total == 4000 + left.count


async def label_releases(ledger: Ledger) -> None:
    """Give all responses the release v2, and those without one the newest row, as a log of Envoy does."""
    for label, seen in (("v1", -1), ("v2", 0), ("", 1)):
        at = NOON + dt.timedelta(hours=seen)
        ledger.execute(
            "insert into abreast.release (service, version, label, first_seen) values ('shop', 'new', %s, %s)",
            label,
            at,
        )
    ledger.execute("update abreast.pair set new_release = 'v2' where outcome = 'match'")


async def test_verdict_of_a_release_counts_users_who_leave_without_its_label(
    sidecar: RunningSidecar, ledger: Ledger
) -> None:
    add_live(ledger, 4000, 5)
    add_live(ledger, 60, 10, step=5, leave=True)
    add_live(ledger, 30, 10, step=5, leave=True, at=NOON - dt.timedelta(minutes=30))  # v1 was the newest
    sampled(ledger)
    await label_releases(ledger)

    response = await verdict(sidecar)

    left = reason(response, "LEFT")
    assert (response.release, state(response), state(left)) == ("v2", "FAIL", "FAIL")
    assert (left.count, left.total) == (60, 4060)


async def test_verdict_of_a_release_keeps_its_requests_without_responses(
    sidecar: RunningSidecar, ledger: Ledger
) -> None:
    add(ledger, 2000)
    broken = ledger.endpoint(route="/broken")
    add(ledger, 60, endpoint=broken, outcome="only_old", statuses=(200, None), at=NOON + dt.timedelta(hours=2))
    sampled(ledger)
    await label_releases(ledger)

    response = await verdict(sidecar)

    coverage = reason(response, "COVERAGE")
    assert (response.release, coverage.endpoint.route, coverage.count) == ("v2", "/broken", 0)
    assert coverage.text.startswith("old answered 60 requests")


async def test_verdict_of_a_release_counts_responses_from_outside_of_the_middleware(
    sidecar: RunningSidecar, ledger: Ledger
) -> None:
    """A layer of the framework refuses a login, and its response names no release."""
    refused_login = ledger.finding(ledger.endpoint(), "status", part="status")
    add(ledger, 2000)
    add(ledger, 100, refused_login, statuses=(200, 401))
    sampled(ledger)
    await label_releases(ledger)

    response = await verdict(sidecar)

    mismatches = reason(response, "MISMATCHES")
    assert (response.release, state(mismatches), mismatches.count) == ("v2", "FAIL", 100)


@pytest.mark.parametrize("tenths", [1, 9])
async def test_verdict_expects_more_departures_from_the_version_with_more_users(
    sidecar: RunningSidecar, ledger: Ledger, tenths: int
) -> None:
    add_live(ledger, 4000, tenths)
    add_live(ledger, 200, tenths, step=2, leave=True, at=NOON + dt.timedelta(seconds=1))
    sampled(ledger)

    assert state(reason(await verdict(sidecar), "LEFT")) != "FAIL"
    ledger.execute("update abreast.pair set live = 'new', new_status = 200 where outcome = 'aborted'")
    assert state(reason(await verdict(sidecar), "LEFT")) == "FAIL"


async def test_verdict_bounds_departures_without_users_of_old(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add_live(ledger, 5000, 10)
    add_live(ledger, 40, 10, step=10, leave=True)
    sampled(ledger)
    few = await verdict(sidecar)
    add_live(ledger, 40, 10, step=10, leave=True, at=NOON + dt.timedelta(seconds=5))
    sampled(ledger)
    many = await verdict(sidecar)

    assert (state(few), state(many)) == ("PASS", "INCONCLUSIVE")
    assert "old answered too few users to compare with in 100% of these pairs" in reason(many, "LEFT").text


def add_noise(ledger: Ledger, path: str, *, route: str = "/products/{id}", explained: int = 0, **counts: int) -> None:
    """Add the counters of a noisy place of 5,000 pairs, of which 500 have a second copy, as a worker does."""
    endpoint = ledger.endpoint(route=route)
    finding = ledger.finding(endpoint, path, state="noise", count=counts["count"])
    ledger.execute(
        "insert into abreast.endpoint_release values (%s, 0, 0, 5000, 500) on conflict do nothing returning 1", endpoint
    )
    row = {
        "rule_id": 0,
        "finding_id": finding,
        "old_release": 0,
        "new_release": 0,
        **counts,
        "shape_explained": explained,
    }
    names = "count", "baseline_count", "shape_explained", "other_only", "same_only"
    ledger.execute(
        f"insert into abreast.finding_release (rule_id, finding_id, old_release, new_release, {', '.join(names)}, "  # noqa: S608  # constants
        "first_seen, last_seen) values (0, %s, 0, 0, %s, %s, %s, %s, %s, now(), now())",
        *(row["finding_id"], *(row[name] for name in names)),
    )


async def test_verdict_names_what_noise_may_hide(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add(ledger, 5000)
    add_noise(ledger, "$.stock", count=500, baseline_count=50, other_only=45, same_only=45)
    add_noise(ledger, "$.id", count=5000, baseline_count=500, explained=5000, other_only=0, same_only=0)
    add_noise(ledger, "$.ad", count=50, baseline_count=5, other_only=5, same_only=5)
    sampled(ledger)

    response, strict = await verdict(sidecar), await verdict(sidecar, max_blind=0.02)
    blind = reason(response, "BLIND")

    assert (state(response), state(blind), state(strict)) == ("PASS", "PASS", "INCONCLUSIVE")
    assert blind.text.startswith("noise at $.stock of GET /products/{id} may hide a regression in up to 5.")
    assert (blind.count, blind.total, round(blind.rate.high, 3)) == (278, 5000, 0.056)
    assert strict.reasons[0].text.startswith("noise at $.stock")
    assert "(limit 2%), the most of 2 noisy places; more second copies lower the bound" in strict.reasons[0].text


async def test_verdict_hides_everything_behind_a_place_that_always_differs(
    sidecar: RunningSidecar, ledger: Ledger
) -> None:
    add(ledger, 5000)
    add_noise(ledger, "$.ad", count=5000, baseline_count=500, other_only=0, same_only=0)
    sampled(ledger)

    assert "up to 100% of pairs" in reason(await verdict(sidecar), "BLIND").text


async def test_verdict_fails_slower_version(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add(ledger, 5000)
    ledger.execute("update abreast.pair set new_us = old_us * 1.2")
    sampled(ledger)

    allowed, response = await verdict(sidecar, max_slower=0.3), await verdict(sidecar)

    assert (state(allowed), state(response)) == ("PASS", "FAIL")
    assert response.reasons[0].subject == pb.VERDICT_SUBJECT_SLOWER
    assert "4,500 of 4,500 pairs" in response.reasons[0].text  # a tenth is cold


@pytest.mark.parametrize(("old_us", "new_us", "expected"), [(100, 590, "PASS"), (1000, 1600, "FAIL")])
async def test_verdict_ignores_imperceptible_slowdown(
    sidecar: RunningSidecar, ledger: Ledger, old_us: int, new_us: int, expected: str
) -> None:
    add(ledger, 5000)
    ledger.execute("update abreast.pair set old_us = %s, new_us = %s", old_us, new_us)
    sampled(ledger)

    assert state(await verdict(sidecar)) == expected


@pytest.mark.parametrize(("copies", "expected"), [(19, "FAIL"), (5000, "PASS")])
async def test_verdict_ignores_slowness_of_copies(
    sidecar: RunningSidecar, ledger: Ledger, copies: int, expected: str
) -> None:
    """Copies of old take twice as long too, where there are enough to say so."""
    add(ledger, 5000)
    ledger.execute("update abreast.pair set new_us = old_us * 2")
    ledger.execute(
        "update abreast.pair set baseline_us = new_us where id in (select id from abreast.pair order by at desc limit %s)",
        copies,
    )
    sampled(ledger)

    assert state(await verdict(sidecar)) == expected


async def test_verdict_fails_version_slower_than_copies(sidecar: RunningSidecar, ledger: Ledger) -> None:
    """The request has warmed the caches of both."""
    add(ledger, 5000)
    ledger.execute(
        "update abreast.pair set new_us = old_us / 2, baseline_us = case when old_us %% 2 = 0 then old_us / 4 end"
    )
    sampled(ledger)

    assert state(await verdict(sidecar)) == "FAIL"


async def test_verdict_with_unanswered_endpoint_never_passes(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add(ledger, 9000)
    add(ledger, 5, endpoint=ledger.endpoint(route="/gone"), outcome="only_old", statuses=(200, None))
    sampled(ledger)

    response = await verdict(sidecar)

    assert state(response) == "INCONCLUSIVE"
    assert (response.reasons[0].subject, response.reasons[0].endpoint.route) == (pb.VERDICT_SUBJECT_COVERAGE, "/gone")
    assert {endpoint.endpoint.route: state(endpoint) for endpoint in response.endpoints} == {
        "/products/{id}": "PASS",
        "/gone": "INCONCLUSIVE",
    }


@pytest.mark.parametrize(
    ("outcome", "finding_state", "expected"),
    [
        ("not_compared", "", "INCONCLUSIVE"),
        ("aborted", "", "INCONCLUSIVE"),
        ("oversize", "noise", "INCONCLUSIVE"),
        ("oversize", "real", "FAIL"),
    ],
)
async def test_verdict_with_uncompared_endpoint_never_passes(
    sidecar: RunningSidecar, ledger: Ledger, outcome: str, finding_state: str, expected: str
) -> None:
    large = ledger.endpoint(route="/large")
    findings = [ledger.finding(large, "$", state=finding_state)] if finding_state else []
    add(ledger, 9000)
    add(ledger, 50, *findings, endpoint=large, outcome=outcome)
    sampled(ledger)

    response = await verdict(sidecar)

    assert (state(response), response.reasons[0].endpoint.route) == (expected, "/large")


async def test_verdict_passes_and_names_explained_pairs(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add(ledger, 9000)
    ledger.execute("update abreast.pair set outcome = 'mismatch', explained = '{1}', explained_by = '{1}'")
    sampled(ledger)

    response = await verdict(sidecar)

    assert state(response) == "PASS"
    assert "9,000 explained by rules" in reason(response, "MISMATCHES").text


async def test_verdict_fails_with_one_bad_endpoint(sidecar: RunningSidecar, ledger: Ledger) -> None:
    rare = ledger.endpoint(route="/rare")
    add(ledger, 50_000)
    add(ledger, 20, ledger.finding(rare, "$.price"), endpoint=rare)
    sampled(ledger)

    response = await verdict(sidecar)

    assert (state(response), response.reasons[0].endpoint.route) == ("FAIL", "/rare")
    assert [(endpoint.endpoint.route, state(endpoint)) for endpoint in response.endpoints] == [
        ("/rare", "FAIL"),
        ("/products/{id}", "PASS"),
    ]


async def test_verdict_of_window_uses_its_rows(sidecar: RunningSidecar, ledger: Ledger) -> None:
    add(ledger, 1000, ledger.finding(ledger.endpoint(), "$.price"))
    add(ledger, 5000, at=NOON + dt.timedelta(hours=2))
    sampled(ledger)
    window = common.TimeWindow()
    window.start.FromDatetime(NOON + dt.timedelta(hours=1))

    assert (state(await verdict(sidecar)), state(await verdict(sidecar, window))) == ("FAIL", "PASS")


@pytest.mark.parametrize(
    "budget", [{"max_mismatch": 1.5}, {"confidence": 1.0}, {"max_slower": -1.0}, {"max_error": float("nan")}]
)
async def test_verdict_rejects_empty_budget(sidecar: RunningSidecar, budget: dict[str, Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await verdict(sidecar, **budget)
    refusal = refused(error.value)

    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert next(iter(budget)) in refusal.message


@pytest.mark.parametrize(
    ("count", "broken", "code", "word"), [(5000, 0, 0, "PASS"), (5000, 500, 1, "FAIL"), (50, 0, 10, "INCONCLUSIVE")]
)
async def test_verdict_command_exits_with_verdict(
    sidecar: RunningSidecar, ledger: Ledger, count: int, broken: int, code: int, word: str
) -> None:
    add(ledger, count)
    add(ledger, broken, ledger.finding(ledger.endpoint(), "$.price"))
    sampled(ledger)
    words = ["verdict", "--max-mismatch", "0.1%", "--confidence", "95%", "--address", f"127.0.0.1:{sidecar.port}"]

    result = await asyncio.to_thread(CliRunner().invoke, abreast, words)

    assert result.exit_code == code
    assert f"{word}  shop" in result.stdout
    assert "pairs have unexplained mismatches" in result.stdout
    assert ("more pairs to pass" in result.stdout) is (code == 10)
