"""Evidence for guard and ramp, written to a ledger."""

from __future__ import annotations

import datetime as dt
from typing import Any

from google.protobuf.duration_pb2 import Duration
from psycopg.types.json import Jsonb

from abreast.v1 import rollout_pb2 as pb
from abreast.v1 import traffic_pb2
from support_serve import Ledger, RunningSidecar

NOW = Duration()
ROWS = """
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, old_status, new_status, old_us, new_us, findings, failed_over,
                          waits_match, baseline_waits_match)
select (clock_timestamp() at time zone 'utc')::date, gen_random_uuid()::text, clock_timestamp(), %s, %s, %s, %s, %s, %s, %s, %s, %s, true, true
from generate_series(1, %s)
"""
TALLY = """
insert into abreast.outcome_count (service, day, outcome, pairs) values ('shop', current_date, %s, %s)
on conflict (service, day, outcome) do update set pairs = outcome_count.pairs + excluded.pairs
"""
ENVOY = """
insert into abreast.envoy_report (node, service, seen, totals, last_reading)
values ('edge@127.0.0.1:1', 'shop', clock_timestamp() - %s * interval '1 second', %s, '{}')
on conflict (node, service) do update set totals = excluded.totals, seen = excluded.seen
"""


def add(ledger: Ledger, count: int, **fields: Any) -> None:
    """Insert pairs of the present time, equal by default."""
    row = {
        "outcome": "match",
        "live": "old",
        "old_status": 200,
        "new_status": 200,
        "old_us": 1000,
        "new_us": 1000,
        "findings": [],
        "failed_over": False,
        **fields,
    }
    ledger.execute("select abreast.open_day((clock_timestamp() at time zone 'utc')::date)")
    ledger.execute(ROWS, ledger.endpoint(), *row.values(), count)
    ledger.execute(TALLY, row["outcome"], count)


def sampled(ledger: Ledger, beyond: int = 0, *, age: float = 0.0) -> None:
    """Set Envoy's count to the number of pairs in the ledger plus `beyond`."""
    (pair_count,) = ledger.execute("select coalesce(sum(pairs), 0)::int from abreast.outcome_count")[0]
    ledger.execute(ENVOY, age, Jsonb({"sampled": pair_count + beyond}))


async def set_share(sidecar: RunningSidecar, share: float, actor: str = "ada") -> None:
    await sidecar.traffic.UpdateTraffic(
        traffic_pb2.UpdateTrafficRequest(new_share=share, actor=actor, reason="because", wait=NOW, force=True)
    )


async def set_guard(sidecar: RunningSidecar, mode: str, **rules: Any) -> None:
    policy = pb.GuardPolicy(mode=pb.GuardMode.Value(f"GUARD_MODE_{mode}"), **rules)
    await sidecar.rollout.SetGuard(pb.SetGuardRequest(policy=policy, actor="ada", reason="because"))


async def events(sidecar: RunningSidecar) -> list[traffic_pb2.TrafficEvent]:
    """Return the events, the newest first."""
    request = traffic_pb2.ListTrafficEventsRequest()
    return list((await sidecar.traffic.ListTrafficEvents(request)).events)


def moment() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
