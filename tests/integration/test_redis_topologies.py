"""Services and sidecars on Redis in its larger forms, and with no more rights than they need."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from abreast.settings import Settings as ServiceSettings
from abreast_sidecar.cli.doctor import servers as redis_checks
from abreast_sidecar.redis_client import PairBacklog, connect_redis
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import RedisServer
from support import eventually_async
from support_certificate import self_signed
from support_load import Load, agrees, complete, loading
from support_pairs import SERVICE, query_value, rows, run_jobs, run_worker
from support_redis import admin, behind_tls, cluster, server, watched

pytestmark = pytest.mark.redis

PAIRS = 300
DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"


async def test_cluster_of_three_delivers_all_pairs(postgres_url: str) -> None:
    """Six shards, which lie on all nodes; two sidecars share them."""
    with cluster() as servers:
        settings = Settings(redis_url=servers.url, postgres_url=postgres_url, claim_idle=0.5, batch_size=20)
        load = Load(servers.url, service=ServiceSettings(service=SERVICE, redis_url=servers.url, shards=6))
        stop = asyncio.Event()
        housekeeping = asyncio.create_task(run_jobs(settings, stop))
        async with run_worker(settings, "one"), run_worker(settings, "two"), loading(load, PAIRS):
            pass
        async with run_worker(settings):
            await complete(postgres_url, load)
        await eventually_async(lambda: reported(postgres_url, 2 * PAIRS), description="the shards' reports")
        stop.set()
        await housekeeping
        client = connect_redis(servers.url)
        waiting = await PairBacklog(client).count(SERVICE)
        await client.aclose()
        used = [keys for node in servers.nodes for keys in stats_of(node)]
        facts = await asyncio.to_thread(redis_checks.read_redis_facts, servers.url)

    assert waiting == 0
    assert len(used) == 6
    assert facts.total_counter(SERVICE, "received") == 2 * PAIRS
    assert len(facts.shards[SERVICE]) == 6


async def reported(url: str, captures: int) -> bool:
    return bool(query_value(url, "select sum((report->>'received')::int) from abreast.shard_report") == captures)


def stats_of(node: Any) -> list[str]:
    with admin(node) as client:
        keys = client.keys("abreast:*:stats")
        assert keys, "each node holds some shard"
        return list(keys)


async def test_sentinel_failover_counts_nothing_twice(postgres_url: str) -> None:
    """Writes that had not reached the replica are lost and counted as missing. No pair counts twice."""
    with watched() as servers:
        settings = Settings(redis_url=servers.url, postgres_url=postgres_url, claim_idle=0.5, batch_size=20)
        load = Load(servers.url, pace=0.005)
        async with run_worker(settings):
            async with loading(load, 2 * PAIRS):
                await eventually_async(lambda: some(postgres_url, PAIRS // 2), description="the first rows")
                assert servers.primary.process is not None
                servers.primary.process.popen.kill()
                before = set(load.pairs)
            await eventually_async(lambda: all_after(postgres_url, load, before), description="the rest arrives")
        facts = await asyncio.to_thread(redis_checks.read_redis_facts, servers.url)

    stored = {pair for (pair,) in rows(postgres_url, "select id from abreast.pair")}
    agrees(postgres_url)
    assert stored <= set(load.pairs)
    assert len(set(load.pairs) - stored) <= 5
    assert load.errors > 0
    assert facts.shards[SERVICE]


async def some(url: str, count: int) -> bool:
    return int(query_value(url, "select count(*) from abreast.pair")) >= count


async def all_after(url: str, load: Load, before: set[str]) -> bool:
    stored = {pair for (pair,) in rows(url, "select id from abreast.pair")}
    return set(load.pairs) - before <= stored


def documented() -> dict[str, list[str]]:
    """Return the ACL rules of the docs, by user."""
    rules = re.findall(r"^ACL SETUSER (\S+) (.*)$", DOCS.read_text(), re.MULTILINE)
    return {user: rules.split() for user, rules in rules}


async def test_documented_acl_rights_suffice(postgres_url: str) -> None:
    with server() as started, admin(started) as client:
        for user, rules in documented().items():
            client.execute_command("ACL", "SETUSER", user, *(rule.replace(">…", ">secret") for rule in rules))
        service, sidecar = (started.url.replace("//", f"//{user}:secret@") for user in ("service", "sidecar"))
        settings = Settings(redis_url=sidecar, postgres_url=postgres_url, claim_idle=0.5)
        load = Load(service)
        stop = asyncio.Event()
        housekeeping = asyncio.create_task(run_jobs(settings, stop))
        async with run_worker(settings), loading(load, 50):
            pass
        async with run_worker(settings):
            await complete(postgres_url, load)
        await eventually_async(lambda: reported(postgres_url, 100), description="the shard's report")
        stop.set()
        await housekeeping
        facts = await asyncio.to_thread(redis_checks.read_redis_facts, sidecar)
        denied = client.acl_log()

    denied_commands = {entry["object"] for entry in denied if entry["username"] in {"service", "sidecar"}}
    assert denied_commands - {"client|setinfo"} == {"config|get"}
    assert facts.total_counter(SERVICE, "received") == 100


async def test_tls_delivers_all_pairs(
    postgres_url: str, redis_server: RedisServer, redis_url: str, tmp_path: Path
) -> None:
    assert redis_url == redis_server.url  # and empty
    certificate = self_signed(tmp_path, "localhost")
    async with behind_tls(redis_server, certificate) as port:
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={certificate.certificate}"
        load = Load(url)
        async with run_worker(Settings(redis_url=url, postgres_url=postgres_url)), loading(load, 20):
            pass
        async with run_worker(Settings(redis_url=url, postgres_url=postgres_url)):
            await complete(postgres_url, load)
        facts = await asyncio.to_thread(redis_checks.read_redis_facts, url)

    assert facts.total_counter(SERVICE, "received") == 40
