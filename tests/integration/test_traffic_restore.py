"""Postgres comes back without the newest changes: restored from an older copy, or as a replica that lagged."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import grpc
import httpx
import pytest

from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.stack.servers import PostgresServer
from support import eventually_async, find_free_port
from support_database import disconnect
from support_edge import LONG, REQUESTS, acknowledged, edge, update
from support_serve import RunningSidecar, run_sidecar


class Backup:
    """A Postgres and a copy of its files."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        assert server.process is not None
        self.home = server.process.log_path.parent

    def save(self) -> None:
        self._replace("data", "copy")

    def restore(self, *, read_only: bool = False) -> None:
        self.server.options = ("default_transaction_read_only=on",) if read_only else ()
        self._replace("copy", "data")

    def _replace(self, source: str, target: str) -> None:
        self.server.stop()
        shutil.rmtree(self.home / target, ignore_errors=True)
        subprocess.run(["cp", "-a", self.home / source, self.home / target], check=True)
        self.server.start()


@pytest.fixture
def backup() -> Iterator[Backup]:
    with PostgresServer() as server:
        yield Backup(server)
        disconnect(server.url())


async def traffic(sidecar: RunningSidecar) -> pb.GetTrafficResponse:
    response: pb.GetTrafficResponse = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service="shop"))
    return response


async def roll_back(sidecar: RunningSidecar) -> pb.RollbackResponse:
    answer: pb.RollbackResponse = await sidecar.traffic.Rollback(pb.RollbackRequest(service="shop", wait=LONG))
    return answer


async def is_recorded(sidecar: RunningSidecar) -> None:
    """Wait: a slow Postgres records the rollback after the response."""

    async def settled() -> bool:
        return not sidecar.sidecar.control.pending_rollbacks.list_services()

    await eventually_async(settled, description="the rollback is recorded")


async def agree(share: float, *sidecars: RunningSidecar) -> None:
    """All sidecars show the share, and their Envoys have acknowledged it."""

    async def so() -> bool:
        try:
            answers = [await traffic(sidecar) for sidecar in sidecars]
        except grpc.aio.AioRpcError:  # Postgres starts
            return False
        return all(
            answer.traffic.new_share == share
            and answer.envoys
            and all(envoy.HasField("acknowledged_after") for envoy in answer.envoys)
            for answer in answers
        )

    await eventually_async(so, description=f"all agree on {share}")


async def test_rollback_after_a_restore_takes_effect(redis_url: str, backup: Backup) -> None:
    """The restored ledger says that all users are on old, while Envoys have half of them on new."""
    async with run_sidecar(redis_url, backup.server.url()) as sidecar, edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        await update(sidecar, new_share=1.0)
        await roll_back(sidecar)
        backup.save()
        changed = await update(sidecar, new_share=0.5)
        assert changed.traffic.new_share == 0.5
        backup.restore()
        answer = await roll_back(sidecar)
        served = await envoy.ask()
        await is_recorded(sidecar)
        response = await traffic(sidecar)

    assert (answer.traffic.new_share, answer.traffic.rolled_back) == (0.0, True)
    (state,) = answer.envoys
    assert state.HasField("acknowledged_after")
    assert served[:2] == (REQUESTS, 0)
    assert (response.traffic.new_share, list(response.warnings)) == (0.0, [])
    assert answer.traffic.version > 3


@pytest.mark.parametrize(("saved", "lost"), [(0.5, 0.0), (0.0, 0.5)])
async def test_restored_ledger_gets_the_lower_share_everywhere(
    redis_url: str, backup: Backup, saved: float, lost: float
) -> None:
    port = find_free_port()
    url = backup.server.url()
    async with run_sidecar(redis_url, url) as here, edge(here.port) as first, edge(port, node="edge-2") as second:
        async with run_sidecar(redis_url, url, grpc_port=port) as there:
            await update(here, new_share=saved, sample_safe=0.2)
            await agree(saved, here, there)
            backup.save()
            await update(here, new_share=lost)
            await agree(lost, here, there)
            backup.restore()
            await agree(0.0, here, there)
            warned = await traffic(there)
        async with run_sidecar(redis_url, url, grpc_port=port) as again:
            await agree(0.0, here, again)
            for envoy in (first, second):
                assert (await envoy.ask())[:2] == (REQUESTS, 0)
            still = await traffic(again)
            page = (await again.http.get("/", params={"service": "shop"})).text
            healed = await update(again, new_share=0.0)
            await agree(0.0, here, again)
            moved = await update(here, new_share=0.5)
            await agree(0.5, here, again)
            after = await traffic(again)

    (warning,) = warned.warnings
    assert list(still.warnings) == [warning]
    assert f"({lost * 100:g}% of users on new), which Envoys had: it was restored" in warning
    assert "which Envoys had" in page
    assert healed.traffic.version == still.traffic.version + 1
    assert {len(answer.envoys) for answer in (healed, moved, after)} == {2}
    assert not after.warnings


async def test_envoys_remember_settings_that_no_sidecar_does(redis_url: str, backup: Backup) -> None:
    """All sidecars were stopped during the restore."""
    port = find_free_port()
    async with edge(port) as envoy:
        async with run_sidecar(redis_url, backup.server.url(), grpc_port=port) as sidecar:
            await update_when_connected(sidecar, 0.5)
            backup.save()
            await update(sidecar, new_share=0.0)
        backup.restore()
        async with run_sidecar(redis_url, backup.server.url(), grpc_port=port) as again:
            await agree(0.0, again)
            served = await envoy.ask()
            response = await traffic(again)

    assert served[:2] == (REQUESTS, 0)
    assert "Postgres lacks version 3 (0% of users on new)" in response.warnings[0]


async def update_when_connected(sidecar: RunningSidecar, share: float) -> None:
    await acknowledged(sidecar)
    await update(sidecar, new_share=share)


async def test_sidecar_without_a_writable_ledger_reports_and_keeps_the_lower_share(
    redis_url: str, backup: Backup
) -> None:
    """A replica that lagged, and that nobody has promoted yet."""
    async with run_sidecar(redis_url, backup.server.url()) as sidecar, edge(sidecar.port) as envoy:
        await update_when_connected(sidecar, 0.5)
        backup.save()
        await update(sidecar, new_share=0.0)
        backup.restore(read_only=True)

        async def reported() -> bool:
            return "Postgres lacks the newest settings of shop" in (await sidecar.http.get("/readyz")).text

        await eventually_async(reported, description="the sidecar is not ready")
        response = await traffic(sidecar)
        served = await envoy.ask()
        backup.server.options = ()
        backup.server.stop()
        backup.server.start()
        await agree(0.0, sidecar)

        async def ready() -> bool:
            return (await sidecar.http.get("/readyz")).status_code == httpx.codes.OK

        await eventually_async(ready, description="the sidecar is ready")

    assert (response.traffic.new_share, served[:2]) == (0.0, (REQUESTS, 0))
    assert "Postgres lacks version 3" in response.warnings[0]
