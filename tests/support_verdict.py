"""Ledgers with many rows, and their verdicts over gRPC."""

from __future__ import annotations

import datetime as dt
from typing import Any

from psycopg.types.json import Jsonb

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from support_serve import NOON, Ledger, Running

ROWS = """
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, old_status, new_status, old_us, new_us, findings)
select %s, 'pair ' || %s || ' ' || n, %s + n * interval '1 ms', %s, %s, 'old', %s, %s, 10000, 9000 + (n * 7919) %% 2000, %s
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


def add(ledger: Ledger, many: int, *findings: int, at: dt.datetime = NOON, **options: Any) -> None:
    """Add pairs with random times from the same distribution. `options`: endpoint, outcome and statuses."""
    outcome = options.get("outcome", "mismatch" if findings else "match")
    endpoint = options.get("endpoint") or ledger.endpoint()
    statuses = options.get("statuses", (200, 200))
    before = ledger.execute("select count(*) from abreast.pair")[0][0]
    ledger.execute("select abreast.open_day(%s)", at.date())
    ledger.execute(ROWS, at.date(), str(before), at, endpoint, outcome, *statuses, list(findings), many)
    ledger.execute("update abreast.finding set count = count + %s where id = any(%s)", many, list(findings))
    ledger.execute(TALLY, at.date(), outcome, many)


def sampled(ledger: Ledger, many: int | None = None) -> None:
    """Set Envoy's count, by default to the number of rows."""
    written = ledger.execute("select coalesce(sum(pairs), 0)::int from abreast.outcome_count")[0][0]
    ledger.execute(ENVOY, Jsonb({"sampled": written if many is None else many}))


async def verdict(sidecar: Running, window: common.TimeWindow | None = None, **budget: Any) -> pb.GetVerdictResponse:
    request = pb.GetVerdictRequest(service="shop", window=window, budget=pb.Budget(**budget))
    response: pb.GetVerdictResponse = await sidecar.comparison.GetVerdict(request)
    return response


def state(item: pb.GetVerdictResponse | pb.EndpointVerdict | pb.VerdictReason) -> str:
    return pb.VerdictState.Name(item.state).removeprefix("VERDICT_STATE_")


def reason(response: pb.GetVerdictResponse, subject: str) -> pb.VerdictReason:
    number = pb.VerdictSubject.Value(f"VERDICT_SUBJECT_{subject}")
    return next(item for item in response.reasons if item.subject == number)
