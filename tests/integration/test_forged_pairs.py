"""Captures that someone writes to Redis without a request through Envoy: real Redis, Postgres, worker, guard and ramp."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from abreast.protocol.capture import Capture
from abreast.v1 import rollout_pb2 as pb
from abreast_sidecar.cli.doctor.servers import check_postgres, read_postgres_facts
from abreast_sidecar.store.migrate import load_migrations
from support import eventually_async
from support_pairs import add_stuck_entry, capture, pair_of, send
from support_rollout import ENVOY, events, set_guard, set_share
from support_serve import RunningSidecar, run_sidecar
from support_verdict import reason, state, verdict

pytestmark = pytest.mark.postgres

REAL, FORGED = 300, 1000
LOOSE: dict[str, Any] = {"max_mismatch": 0.2, "max_error": 0.2, "max_slower": 10.0}  # 300 equal pairs are enough


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url, sample_safe=1.0) as instance:
        instance.ledger().endpoint("shop")
        yield instance


def failed_pair() -> list[Capture]:
    """Return a request of a user that new failed, and old did not."""
    pair = str(uuid.uuid4())
    return [capture(pair, "new", "live", status=500), capture(pair, "old", "shadow")]


async def write_pairs(sidecar: RunningSidecar, pairs: Iterable[list[Capture]], total: int) -> None:
    send(sidecar.sidecar.settings.redis_url, [capture for captures in pairs for capture in captures])
    ledger = sidecar.ledger()

    async def are_written() -> bool:
        return bool(ledger.execute("select coalesce(sum(pairs), 0) from abreast.outcome_count")[0][0] == total)

    await eventually_async(are_written, description=f"the ledger has {total} pairs")


def set_envoy_count(sidecar: RunningSidecar, sampled: int) -> None:
    sidecar.ledger().execute(ENVOY, 0.0, Jsonb({"sampled": sampled}))


@pytest.mark.parametrize("sampled", [REAL, 520])
async def test_forged_pairs_never_lead_to_pass(sidecar: RunningSidecar, sampled: int) -> None:
    """With 520 sampled requests, the forged pairs would fill a real gap."""
    set_envoy_count(sidecar, sampled)
    await write_pairs(sidecar, (pair_of() for _ in range(REAL)), REAL)
    honest = await verdict(sidecar, **LOOSE)
    await write_pairs(sidecar, (pair_of() for _ in range(FORGED)), REAL + FORGED)
    response = await verdict(sidecar, **LOOSE)
    metrics = (await sidecar.http.get("/metrics")).text
    facts = await asyncio.to_thread(read_postgres_facts, sidecar.postgres_url)

    assert state(reason(honest, "COMPLETENESS")) == ("PASS" if sampled == REAL else "INCONCLUSIVE")
    surplus = REAL + FORGED - sampled
    assert state(response) == "INCONCLUSIVE"
    assert response.reasons[0].text == (
        f"the ledger has {surplus:,} requests more than the {sampled:,} that Envoy sampled: captures came past Envoy,"
        " or ABREAST_ENVOY_ADMIN lacks an Envoy"
    )
    assert f'abreast_surplus{{service="shop"}} {surplus}.0' in metrics
    (check,) = (check for check in check_postgres(facts, load_migrations()[-1].version) if check.name == "surplus")
    assert check.state == "fail"
    assert (
        check.found
        == f"the ledger has 1,300 pairs of shop, but Envoy sampled {sampled} requests: captures came past Envoy"
    )


async def test_forged_pairs_make_guard_blind_and_not_act(sidecar: RunningSidecar) -> None:
    await set_guard(sidecar, "ACTING")
    await set_share(sidecar, 0.5)
    set_envoy_count(sidecar, 0)

    async def keep_count_fresh() -> None:
        while True:
            set_envoy_count(sidecar, REAL)
            await asyncio.sleep(1)

    counting = asyncio.create_task(keep_count_fresh())
    try:
        await write_pairs(sidecar, (pair_of() for _ in range(REAL)), REAL)
        await write_pairs(sidecar, (failed_pair() for _ in range(FORGED)), REAL + FORGED)

        async def is_blind() -> bool:
            guard = (await sidecar.rollout.GetGuard(pb.GetGuardRequest())).guard
            return guard.state == pb.GUARD_STATE_BLIND and "captures came past Envoy" in guard.message

        await eventually_async(is_blind, description="the guard is blind and gives the reason")
    finally:
        counting.cancel()

    assert "rollback" not in {event.action for event in await events(sidecar)}


async def test_stuck_pair_makes_guard_blind_and_not_act(sidecar: RunningSidecar) -> None:
    await set_guard(sidecar, "ACTING")
    await set_share(sidecar, 0.5)
    redis_url = sidecar.sidecar.settings.redis_url
    add_stuck_entry(redis_url, age_s=31.0)
    await write_pairs(sidecar, (failed_pair() for _ in range(50)), 50)

    async def is_blind() -> bool:
        guard = (await sidecar.rollout.GetGuard(pb.GetGuardRequest())).guard
        return guard.state == pb.GUARD_STATE_BLIND and "has waited for more than 30 s" in guard.message

    await eventually_async(is_blind, description="the guard is blind and gives the reason")
    assert "rollback" not in {event.action for event in await events(sidecar)}
