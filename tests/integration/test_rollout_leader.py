"""Leader election between sidecars in separate processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from abreast_sidecar.rollout.leader import LEADER_LOCK_ID, LeaderLease, LeadershipLostError
from abreast_sidecar.store.database import AdvisoryLock
from abreast_sidecar.store.migrate import MIGRATION_LOCK_KEY
from support import eventually
from support_replica import Replica, replica
from support_rollout import add
from support_serve import Ledger

pytestmark = pytest.mark.postgres

ACTING_GUARD = '{"mode": "acting"}'
HOLDER = (
    "select pid from pg_locks where locktype = 'advisory' and granted and classid::bigint << 32 | objid::bigint = %s"
)


@pytest.fixture
def replicas(redis_url: str, postgres_url: str, tmp_path: Path) -> Iterator[list[Replica]]:
    with (
        replica(redis_url, postgres_url, tmp_path / "first") as first,
        replica(redis_url, postgres_url, tmp_path / "second") as second,
    ):
        yield [first, second]


def one_acts(replicas: list[Replica]) -> Replica:
    eventually(lambda: any(replica.acting() for replica in replicas), description="one sidecar acts")
    (leader,) = [replica for replica in replicas if replica.acting()]
    return leader


def exposed(ledger: Ledger) -> None:
    """Users are on new, and a guard acts."""
    ledger.endpoint("shop")
    ledger.execute(
        "insert into abreast.traffic (service, new_share, sample_safe, sample_unsafe, baseline_share) "
        "values ('shop', 5000, 1000000, 0, 0)"
    )
    ledger.execute("insert into abreast.guard (service, policy) values ('shop', %s)", ACTING_GUARD)


def terminate_leader_session(ledger: Ledger) -> None:
    """End the leader's connection."""
    for (pid,) in ledger.execute(HOLDER, LEADER_LOCK_ID):
        ledger.execute("select pg_terminate_backend(%s)", pid)


def rollbacks(ledger: Ledger) -> int:
    (row,) = ledger.execute("select count(*) from abreast.traffic_event where action = 'rollback'")
    return int(row[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_leader_is_replaced_when_killed_or_frozen(
    replicas: list[Replica], postgres_url: str, how: signal.Signals
) -> None:
    """It takes seconds; the bound is for a loaded machine. A frozen leader does not act once it continues."""
    first = one_acts(replicas)
    (second,) = [replica for replica in replicas if replica is not first]
    ledger = Ledger(postgres_url)
    exposed(ledger)

    os.kill(first.pid, how)
    stopped = time.monotonic()
    add(ledger, 20, live="new", new_status=500)
    eventually(lambda: rollbacks(ledger) == 1, within=20, description="the other sidecar rolls back")
    duration = time.monotonic() - stopped

    assert second.acting()
    assert duration < 15, f"{duration:.1f} s"
    if how is signal.SIGSTOP:
        os.kill(first.pid, signal.SIGCONT)
        eventually(lambda: not first.acting(), description="the one that was frozen knows that it lost the seat")
        assert second.acting()
    assert rollbacks(ledger) == 1


async def test_lease_without_connection_rejects_transactions(postgres_url: str) -> None:
    seat, other = LeaderLease(postgres_url), LeaderLease(postgres_url)
    ledger = Ledger(postgres_url)
    assert await seat.acquire()
    assert not await other.acquire()

    terminate_leader_session(ledger)
    eventually(lambda: not ledger.execute(HOLDER, LEADER_LOCK_ID), description="the lock is free")
    assert await other.acquire()
    with pytest.raises(LeadershipLostError, match="leadership lost"):
        await seat.heartbeat()

    assert not seat.is_held
    assert not await seat.acquire()
    await other.release()
    await seat.release()


async def test_lease_expires_without_heartbeats(postgres_url: str) -> None:
    """Postgres ends the session by its own clock."""
    seat = LeaderLease(postgres_url)
    ledger = Ledger(postgres_url)
    assert await seat.acquire()

    eventually(lambda: not ledger.execute(HOLDER, LEADER_LOCK_ID), description="postgres has ended the silent session")
    with pytest.raises(LeadershipLostError):
        await seat.heartbeat()


async def test_lease_transaction_is_rolled_back_with_its_connection(postgres_url: str) -> None:
    seat = LeaderLease(postgres_url)
    ledger = Ledger(postgres_url)
    exposed(ledger)
    assert await seat.acquire()

    async def act() -> None:
        async with seat.transaction() as connection:
            await connection.execute("update abreast.traffic set new_share = 10000")
            terminate_leader_session(ledger)

    with pytest.raises(LeadershipLostError):
        await act()

    assert ledger.execute("select new_share from abreast.traffic") == [(5000,)]


async def test_lease_rejects_a_connection_without_the_lock(postgres_url: str) -> None:
    """A pooler in transaction mode gives each transaction another connection."""
    seat = LeaderLease(postgres_url)
    assert await seat.acquire()
    assert seat._connection is not None
    await seat._connection.execute("select pg_advisory_unlock_all()")

    with pytest.raises(LeadershipLostError, match="this connection does not hold"):
        await seat.heartbeat()


def test_advisory_locks_are_distinct() -> None:
    """Otherwise two jobs wait for each other, or one of them never runs."""
    locks = [LEADER_LOCK_ID, MIGRATION_LOCK_KEY, *map(int, AdvisoryLock.__members__.values())]

    assert len(locks) >= 9
    assert len(set(locks)) == len(locks)
