"""Workers that are killed under load: every pair has one row in the end, and none counts twice."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from abreast.protocol.join import CONSUMER_GROUP, Keys
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.ingest.evaluate import IsolatedComparer
from abreast_sidecar.ingest.stream import StreamConsumer
from abreast_sidecar.settings import Settings
from support import eventually_async
from support_load import Load, complete, empty, loading, worker_process
from support_pairs import SERVICE, outcomes, pair_of, rows, run_worker, send

KILLS = 6
SEED = 4
KILLER = """
import os, signal
import abreast_sidecar.ingest.evaluate as evaluate
compare_pair = evaluate.compare_pair
def deadly(captures, *rest, **more):
    if any(b"deadly" in one.answer.body.content for one in captures):
        os.kill(os.getpid(), signal.SIGSEGV)
    return compare_pair(captures, *rest, **more)
evaluate.compare_pair = deadly
"""


@pytest.fixture
async def settings(redis_url: str, postgres_url: str) -> Settings:
    return Settings(redis_url=redis_url, postgres_url=postgres_url, claim_idle=0.3, batch_size=50)


def pending(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        if not client.exists(Keys(SERVICE, 0).ready) or not client.xinfo_groups(Keys(SERVICE, 0).ready):
            return 0
        return int(client.xpending(Keys(SERVICE, 0).ready, CONSUMER_GROUP)["pending"])


async def test_worker_killed_repeatedly_in_a_batch_loses_nothing(settings: Settings) -> None:
    generator = random.Random(SEED)
    load = Load(settings.redis_url)
    patient = replace(settings, batch_size=10)
    async with run_worker(patient, "survivor"), loading(load, 2000):
        for _ in range(KILLS):
            victim = await worker_process(settings)
            await eventually_async(lambda: holds_many(settings.redis_url), description="something is being worked on")
            await asyncio.sleep(generator.uniform(0.3, 0.7))  # it starts, reads, compares or commits
            victim.kill()
            await victim.wait()
    async with run_worker(settings):
        await complete(settings.postgres_url, load)
        await empty(settings.redis_url)


async def holds_many(url: str) -> bool:
    return pending(url) > 0


async def test_new_workers_claim_entries_of_killed_ones(settings: Settings) -> None:
    generator = random.Random(SEED)
    load = Load(settings.redis_url, pace=0.0005)
    async with loading(load, 1500):
        for _ in range(KILLS // 2):
            processes = [await worker_process(settings) for _ in range(2)]
            await eventually_async(lambda: holds_many(settings.redis_url), description="something is being worked on")
            await asyncio.sleep(generator.uniform(0, 0.05))
            for victim in processes:
                victim.kill()
                await victim.wait()
    async with run_worker(settings):
        await complete(settings.postgres_url, load)
        await empty(settings.redis_url)


async def test_new_worker_shares_the_load(settings: Settings) -> None:
    load = Load(settings.redis_url)
    small = replace(settings, batch_size=5)
    names = set()

    async def are_both_busy() -> bool:
        with redis.Redis.from_url(settings.redis_url) as client:
            for consumer in client.xinfo_consumers(Keys(SERVICE, 0).ready, CONSUMER_GROUP):
                if consumer["pending"]:
                    names.add(consumer["name"])
        return {b"first", b"later"} <= names

    async with run_worker(small, "first"), loading(load, 1000):
        await eventually_async(lambda: holds_many(settings.redis_url), description="the first works")
        async with run_worker(small, "later"):
            await eventually_async(are_both_busy, description="both work")
    async with run_worker(settings):
        await complete(settings.postgres_url, load)


async def test_entry_that_crashes_workers_becomes_dead_letter(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for number in range(40):
        send(settings.redis_url, pair_of("deadly" if number == 17 else number, number))

    deaths = 0
    while pending(settings.redis_url) or sum(outcomes(settings.postgres_url).values()) < 40:
        worker = await worker_process(settings)
        drained = asyncio.create_task(empty(settings.redis_url))
        deaths_task = asyncio.create_task(worker.wait())
        await asyncio.wait({drained, deaths_task}, return_when=asyncio.FIRST_COMPLETED)
        deaths += deaths_task.done()
        drained.cancel()
        if worker.returncode is None:
            worker.kill()
        await asyncio.gather(drained, deaths_task, return_exceptions=True)

    assert deaths == 2
    assert outcomes(settings.postgres_url)["undecodable"] == 1
    ((reason,),) = rows(settings.postgres_url, "select reason from abreast.dead_letter")
    assert reason == "its comparison ended the process (SIGSEGV); it was delivered 3 times"


async def test_entry_that_hangs_becomes_dead_letter(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLER.replace("os.kill(os.getpid(), signal.SIGSEGV)", "signal.pause()"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    send(settings.redis_url, pair_of("deadly", 1))
    send(settings.redis_url, pair_of(1, 1))
    reader = StreamConsumer(settings.redis_url, name="one", batch_size=10, claim_idle_s=30)
    entries = []

    async def has_two_rows() -> bool:
        entries.extend(await reader.read())
        return len(entries) == 2

    await eventually_async(has_two_rows, description="both entries")
    apart, rules = IsolatedComparer(timeout_s=6.0), CompareOptions.with_ignored_headers(())
    records = [await apart.compare(entry, rules) for entry in entries]
    await apart.close()
    await reader.close()

    assert [record.result.outcome for record in records] == ["undecodable", "match"]
    assert "more than 6 s" in records[0].result.reason
