"""An endpoint whose answers are never complete, from Redis to the verdict and the report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from abreast.protocol.capture import Answer, Body, Capture
from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.cli import abreast
from support import eventually_async
from support_pairs import outcomes, pair_of, send
from support_serve import RunningSidecar, run_sidecar
from support_verdict import add, reason, sampled, state, verdict

pytestmark = pytest.mark.postgres

WAIVE = (
    "rules add waive-coverage --endpoint",
    "GET /events",
    "--owner shop --expires 2099-01-31 --reason",
    "clients leave streams",
)


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url) as sidecar:
        yield sidecar


def streamed(live_items: Sequence[object], shadow_items: Sequence[object]) -> list[Capture]:
    """Return a pair of which the user received some events of old and left. The copy of new continued."""
    old, new = pair_of(route="/events")
    leaving = replace(old, answer=_events(live_items), complete=False, client_left=True)
    return [leaving, replace(new, answer=_events(shadow_items))]


def with_baseline(pair: list[Capture], items: Sequence[object]) -> list[Capture]:
    """Return a pair with a second copy to old, which got these events."""
    old, new = pair
    baseline = replace(old, role="baseline", answer=_events(items), complete=True, client_left=False)
    return [replace(capture, expected_captures=3) for capture in (old, new, baseline)]


def _events(values: Sequence[object]) -> Answer:
    content = b"".join(b"data: %b\n\n" % json.dumps(value).encode() for value in values)
    return Answer(200, (("content-type", "text/event-stream"),), Body(content, len(content)))


async def send_pairs(sidecar: RunningSidecar, pairs: Sequence[list[Capture]], redis_url: str) -> None:
    send(redis_url, [capture for pair in pairs for capture in pair])
    await eventually_async(
        lambda: _is(sum(outcomes(sidecar.postgres_url).values()) >= len(pairs)), description="the pairs are compared"
    )


async def _is(value: bool) -> bool:  # a condition
    return value


async def run(sidecar: RunningSidecar, *words: str) -> Result:
    split = [part for word in words for part in (word.split() if word.startswith(("rules", "--")) else [word])]
    return await asyncio.to_thread(CliRunner().invoke, abreast, [*split, "--address", f"127.0.0.1:{sidecar.port}"])


async def test_difference_before_a_disconnect_is_a_finding_and_fails(sidecar: RunningSidecar, redis_url: str) -> None:
    pairs = [
        with_baseline(
            streamed([{"n": n}, {"price": 1}], [{"n": n}, {"price": n % 4 or 1}, {"n": 3}]),
            [{"n": n}, {"price": 1}, {"n": 3}],
        )
        for n in range(60)
    ]
    await send_pairs(sidecar, pairs, redis_url)
    sampled(sidecar.ledger())

    assert outcomes(sidecar.postgres_url) == {"partial": 60}
    (finding,) = (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings
    assert (finding.path, finding.kind, finding.count) == ("events[*].data.price", common.KIND_CHANGED, 30)
    detail = await sidecar.comparison.GetFinding(pb.GetFindingRequest(id=finding.id))
    assert detail.examples[0].pair.outcome == common.OUTCOME_PARTIAL
    await eventually_async(lambda: _fails(sidecar), description="the finding is no noise")


async def _fails(sidecar: RunningSidecar) -> bool:
    result = await verdict(sidecar, max_mismatch=0.01)
    return state(result) == "FAIL" and "60 compared in part" in reason(result, "MISMATCHES").text


async def test_coverage_waiver_is_explicit(sidecar: RunningSidecar, redis_url: str, tmp_path: Path) -> None:
    ledger = sidecar.ledger()
    await send_pairs(sidecar, [streamed([1, 2], [1, 2, 3]) for _ in range(20)], redis_url)
    add(ledger, 9000)
    ledger.execute("update abreast.pair set new_release = 'new-1'")
    sampled(ledger)
    before = await verdict(sidecar)
    waive = await run(sidecar, *WAIVE)
    after, rules_output = await verdict(sidecar), await run(sidecar, "rules list")
    output = await run(sidecar, "verdict")
    await run(sidecar, "report", "--output", str(tmp_path / "r"))
    await run(sidecar, "rules delete 1")

    assert (state(before), before.reasons[0].endpoint.route) == ("INCONCLUSIVE", "/events")
    assert before.reasons[0].text.startswith("none of 20 requests could be compared in full, 20 in part")
    assert waive.exit_code == 0, waive.output
    assert state(after) == "PASS"
    assert (reason(after, "COVERAGE").endpoint.route, state(reason(after, "COVERAGE"))) == ("/events", "PASS")
    waived = "waived by rule 1 of shop until 2099-01-31: clients leave streams"
    assert reason(after, "COVERAGE").text.endswith(waived)
    assert "coverage only" in rules_output.stdout
    assert (output.exit_code, waived in " ".join(output.stdout.split())) == (0, True)
    page, record = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())
    assert waived in page
    assert "waive-coverage endpoint GET /events" in page
    assert [rule["action"] for rule in record["rules"]] == ["RULE_ACTION_WAIVE_COVERAGE"]
    assert state(await verdict(sidecar)) == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [("--service shop", "PASS"), ("--service other", "INCONCLUSIVE"), ("--release 7", "INCONCLUSIVE")],
)
async def test_waiver_applies_within_its_limits(sidecar: RunningSidecar, limits: str, expected: str) -> None:
    ledger = sidecar.ledger()
    add(ledger, 9000)
    add(ledger, 5, endpoint=ledger.endpoint(route="/events"), outcome="aborted")
    sampled(ledger)
    waive = await run(sidecar, *WAIVE, limits)

    assert (waive.exit_code, state(await verdict(sidecar))) == (0, expected)


async def test_waiver_applies_to_one_endpoint_and_no_finding(sidecar: RunningSidecar) -> None:
    finding = sidecar.ledger().finding(sidecar.ledger().endpoint(), "$.price")
    wildcard_output = await run(sidecar, WAIVE[0], "GET /*", *WAIVE[2:])
    made_for = await run(sidecar, *WAIVE, f"--for {finding}")
    output = await run(sidecar, "rules preview waive-coverage --endpoint", "GET /events")

    assert (wildcard_output.exit_code, "needs an endpoint without *" in wildcard_output.output) == (2, True)
    assert (made_for.exit_code, "explains no finding" in made_for.output) == (2, True)
    assert (output.exit_code, "the rule hides no differences" in output.output) == (0, True)
