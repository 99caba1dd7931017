"""Ledgers with many rows, and their verdicts over gRPC."""

from __future__ import annotations

import datetime as dt
from typing import Any

from psycopg.types.json import Jsonb

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.stats.latency import TimeCounts, count_blocks
from support_serve import NOON, Ledger, RunningSidecar

ROWS = """
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, old_status, new_status, old_us, new_us, findings,
                          waits_match, baseline_waits_match)
select %s, 'pair ' || %s || ' ' || n, %s + n * interval '1 ms', %s, %s, 'old', %s, %s, 10000, 9000 + (n * 7919) %% 2000, %s, true, true
from generate_series(1, %s) as n
"""
TALLY = """
insert into abreast.outcome_count (service, day, outcome, pairs)
values ('shop', %s, %s, %s)
on conflict (service, day, outcome) do update set pairs = outcome_count.pairs + excluded.pairs
"""
ENVOY = """
insert into abreast.envoy_report (node, service, seen, totals, last_reading)
values ('envoy', 'shop', now(), %s, '{}')
on conflict (node, service) do update set totals = excluded.totals
"""


def spread(n: int, slower: int) -> TimeCounts:
    """Return times of n pairs, of which some are slower, evenly over time."""
    return TimeCounts(n, slower, count_blocks([(k + 1) * slower // n > k * slower // n for k in range(n)]))


def add(ledger: Ledger, count: int, *findings: int, at: dt.datetime = NOON, **options: Any) -> None:
    """Add pairs with random times from the same distribution. `options`: endpoint, outcome and statuses."""
    outcome = options.get("outcome", "mismatch" if findings else "match")
    endpoint = options.get("endpoint") or ledger.endpoint()
    statuses = options.get("statuses", (200, 200))
    before = ledger.execute("select count(*) from abreast.pair")[0][0]
    ledger.execute("select abreast.open_day(%s)", at.date())
    ledger.execute(ROWS, at.date(), str(before), at, endpoint, outcome, *statuses, list(findings), count)
    ledger.execute("update abreast.finding set count = count + %s where id = any(%s)", count, list(findings))
    ledger.execute(TALLY, at.date(), outcome, count)


def sampled(ledger: Ledger, count: int | None = None) -> None:
    """Set Envoy's count, by default to the number of rows."""
    pair_count = ledger.execute("select coalesce(sum(pairs), 0)::int from abreast.outcome_count")[0][0]
    ledger.execute(ENVOY, Jsonb({"sampled": pair_count if count is None else count}))


async def verdict(
    sidecar: RunningSidecar, window: common.TimeWindow | None = None, **budget: Any
) -> pb.GetVerdictResponse:
    request = pb.GetVerdictRequest(service="shop", window=window, budget=pb.Budget(**budget))
    response: pb.GetVerdictResponse = await sidecar.comparison.GetVerdict(request)
    return response


def state(item: pb.GetVerdictResponse | pb.EndpointVerdict | pb.VerdictReason) -> str:
    return pb.VerdictState.Name(item.state).removeprefix("VERDICT_STATE_")


def reason(response: pb.GetVerdictResponse, subject: str) -> pb.VerdictReason:
    number = pb.VerdictSubject.Value(f"VERDICT_SUBJECT_{subject}")
    return next(item for item in response.reasons if item.subject == number)
