"""The worker: read, compare, commit, acknowledge. Any number may run, in any number of processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence

import structlog

from abreast_sidecar.again import Again, AgainSettings
from abreast_sidecar.compare import Rules
from abreast_sidecar.errors import LedgerError, RedisError, RefusedError, StaleRulesError
from abreast_sidecar.judging import judged, undecodable
from abreast_sidecar.outage import Outage, pause
from abreast_sidecar.read import Entry, Reader
from abreast_sidecar.rulebook import Rulebook
from abreast_sidecar.settings import Settings
from abreast_sidecar.store import Judged, Ledger

BREATHER = 0.01  # seconds between small batches: each commit has a cost of its own

log = structlog.get_logger()


class Worker:
    """`last_beat` is when it last read or committed (time.monotonic); `alive` is whether it runs."""

    def __init__(self, settings: Settings, *, name: str) -> None:
        self.name = name
        self.alive = False
        self.last_beat = 0.0
        self._settings = settings
        self._book = Rulebook(settings.postgres_url, Rules.ignoring(settings.volatile_headers))
        again = AgainSettings.of(settings)
        rules = Rules.ignoring(settings.volatile_headers)
        self._again = Again(again, rules, settings.postgres_url) if again else None
        self._redis = Outage("redis", worker=name)
        self._postgres = Outage("postgres", worker=name)
        self._small = False

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set and what was read is committed, or its time is over. Lost servers are waited for."""
        reader = Reader(
            self._settings.redis_url,
            name=self.name,
            batch_size=self._settings.batch_size,
            claim_idle=self._settings.claim_idle,
        )
        asking = self._begin_asking(stop)
        ledger = Ledger(self._settings.postgres_url, examples_per_finding=self._settings.examples_per_finding)
        self.alive = True
        try:
            await self._book.open()
            await _until(stop, self._work(reader, ledger, stop), grace=self._settings.shutdown_timeout)
        finally:
            self.alive = False
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await ledger.close()
            await self._book.close()
            try:
                await reader.close()
            except RedisError as error:
                log.info("redis was away at the end", worker=self.name, error=str(error))

    def _begin_asking(self, stop: asyncio.Event) -> asyncio.Task[None]:
        """Beside the work, which does not wait for it."""

        async def asking() -> None:
            if self._again is None:
                return
            try:
                await self._again.run(stop)
            except Exception:
                log.exception("pairs are not asked again any more", worker=self.name)

        return asyncio.create_task(asking())

    async def _work(self, reader: Reader, ledger: Ledger, stop: asyncio.Event) -> None:
        """The next batch is read while this one is compared and committed. Nothing is judged by unknown rules."""
        if not await self._book.known(stop):
            return
        ahead = asyncio.create_task(self._next(reader, stop))
        try:
            while entries := await ahead:
                ahead = asyncio.create_task(self._next(reader, stop))
                await self._handle(entries, reader, ledger, stop)
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    async def _next(self, reader: Reader, stop: asyncio.Event) -> list[Entry]:
        """Wait for entries; none when it is time to stop."""
        if self._small:
            await pause(stop, BREATHER)
        while not stop.is_set():
            try:
                entries = await reader.read()
            except RedisError as error:
                self._redis.begin(error)
                await self._redis.wait(stop)
                continue
            self._redis.end()
            self.last_beat = time.monotonic()
            if entries:
                self._small = len(entries) < self._settings.batch_size // 2
                return entries
        return []

    async def _handle(
        self, entries: Sequence[Entry], reader: Reader, ledger: Ledger, stop: asyncio.Event
    ) -> None:
        try:
            await self._judge_and_commit(entries, ledger, stop)
        except Exception:
            log.exception("a batch failed and will be read again", worker=self.name, pairs=len(entries))
            reader.recover()
            await self._postgres.wait(stop)
            return
        self.last_beat = time.monotonic()
        try:
            await reader.acknowledge(entries)
        except RedisError as error:  # they come again, and count once
            self._redis.begin(error)
            reader.recover()

    async def _judge_and_commit(self, entries: Sequence[Entry], ledger: Ledger, stop: asyncio.Event) -> None:
        """Again where the rules changed in between; what was committed of it already counts once."""
        while True:
            rules, version = self._book.rules, self._book.version
            batch = await self._judge(entries, rules)
            try:
                await self._commit(batch, entries, version, ledger, stop)
            except StaleRulesError:
                await self._book.refresh()
            else:
                if self._again is not None:
                    self._again.offer(batch)
                return

    async def _judge(self, entries: Sequence[Entry], rules: Rules) -> list[Judged]:
        """In a thread: a large body takes its time, and others on the loop must have theirs."""
        batch = await asyncio.to_thread(lambda: [judged(entry, rules) for entry in entries])
        for one in batch:
            if one.poison is not None:
                self._put_apart(one)
        return batch

    async def _commit(
        self,
        batch: Sequence[Judged],
        entries: Sequence[Entry],
        version: int,
        ledger: Ledger,
        stop: asyncio.Event,
    ) -> None:
        """A batch that Postgres refuses is halved until the entry is found that it can't hold."""
        try:
            await self._write(batch, version, ledger, stop)
        except RefusedError as error:
            if len(batch) == 1:
                await self._commit_poison(entries[0], str(error), version, ledger, stop)
                return
            middle = len(batch) // 2
            await self._commit(batch[:middle], entries[:middle], version, ledger, stop)
            await self._commit(batch[middle:], entries[middle:], version, ledger, stop)

    async def _commit_poison(
        self, entry: Entry, reason: str, version: int, ledger: Ledger, stop: asyncio.Event
    ) -> None:
        poison = undecodable(entry, reason)
        self._put_apart(poison)
        await self._write([poison], version, ledger, stop)

    async def _write(
        self, batch: Sequence[Judged], version: int, ledger: Ledger, stop: asyncio.Event
    ) -> None:
        """Try until Postgres takes it or refuses it. What is not committed stays pending in Redis."""
        while True:
            try:
                await ledger.write(batch, rules=version)
            except RefusedError:
                raise
            except LedgerError as error:
                self._postgres.begin(error)
                await self._postgres.wait(stop)
                if stop.is_set():
                    await asyncio.sleep(0.1)  # `wait` returns at once now
            else:
                self._postgres.end()
                return

    def _put_apart(self, poison: Judged) -> None:
        log.warning(
            "an entry can't be read and is put apart",
            worker=self.name,
            service=poison.service,
            pair=poison.pair,
            entry=poison.entry,
            reason=poison.judgement.reason,
        )


async def _until(stop: asyncio.Event, work: Coroutine[None, None, None], *, grace: float) -> None:
    """Run `work` to its end; when `stop` is set it has `grace` seconds left."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        done, _ = await asyncio.wait({task}, timeout=grace)
        if done:
            task.result()
        else:
            log.warning("the time to finish is over; the rest stays in redis", seconds=grace)
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
