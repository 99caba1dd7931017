"""The worker: read, compare, commit, acknowledge. Any number may run, in any number of processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

import structlog

from abreast_sidecar.again import Again, AgainSettings
from abreast_sidecar.apart import SUSPECT, Apart
from abreast_sidecar.compare import Rules
from abreast_sidecar.ending import ended
from abreast_sidecar.errors import LedgerError, RedisError, RefusedError, StaleRulesError
from abreast_sidecar.judging import judged, undecodable
from abreast_sidecar.outage import Outage, pause
from abreast_sidecar.read import Entry, Reader
from abreast_sidecar.rulebook import Rulebook
from abreast_sidecar.settings import Settings
from abreast_sidecar.store import Judged, Ledger

BREATHER = 0.01  # seconds between small batches: each commit has a cost of its own

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Batch:
    entries: Sequence[Entry]
    judged: Sequence[Judged]
    rules: int  # their version


class Worker:
    """`last_beat` is when it last read or committed (time.monotonic); `alive` is whether it runs."""

    def __init__(self, settings: Settings, *, name: str) -> None:
        self.name = name
        self.alive = False
        self.last_beat = 0.0
        self._settings = settings
        rules = Rules.ignoring(settings.volatile_headers)
        self._book = Rulebook(settings.postgres_url, rules, session=settings.session_url)
        again = AgainSettings.of(settings)
        self._again = Again(again, rules, settings.postgres_url) if again else None
        self._redis = Outage("redis", worker=name)
        self._postgres = Outage("postgres", worker=name)
        self._apart = Apart()
        self._small = False

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set and what was read is committed, or its time is over. Lost servers are waited for."""
        reader = Reader(
            self._settings.redis_url,
            name=self.name,
            batch_size=self._settings.batch_size,
            claim_idle=self._settings.claim_idle,
            batch_bytes=self._settings.batch_bytes,
        )
        asking = self._begin_asking(stop)
        ledger = Ledger(self._settings.postgres_url, examples_per_finding=self._settings.examples_per_finding)
        self.alive = True
        try:
            await self._book.open()
            await _until(stop, self._work(reader, ledger, stop), grace=self._settings.shutdown_timeout)
        finally:
            self.alive = False
            await ended(asking)
            await ledger.close()
            await self._apart.close()
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
        """The next batch is read and compared while this one is committed. Nothing is judged by unknown rules."""
        if not await self._book.known(stop):
            return
        ahead = asyncio.create_task(self._judged(reader, stop))
        try:
            while batch := await ahead:
                ahead = asyncio.create_task(self._judged(reader, stop))
                await self._settle(batch, reader, ledger, stop)
        finally:
            await ended(ahead)

    async def _judged(self, reader: Reader, stop: asyncio.Event) -> Batch | None:
        """The next batch; none when it is time to stop."""
        while entries := await self._next(reader, stop):
            try:
                return await self._judge(entries)
            except Exception as error:  # noqa: BLE001  # logged with its traceback
                await self._read_again(entries, error, reader, stop)
        return None

    async def _read_again(
        self, entries: Sequence[Entry], error: Exception, reader: Reader, stop: asyncio.Event
    ) -> None:
        log.error(
            "a batch failed and will be read again", worker=self.name, pairs=len(entries), exc_info=error
        )
        reader.recover()
        await self._postgres.wait(stop)

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

    async def _settle(self, batch: Batch, reader: Reader, ledger: Ledger, stop: asyncio.Event) -> None:
        try:
            await self._commit_by_the_rules(batch, ledger, stop)
        except Exception as error:  # noqa: BLE001  # logged with its traceback
            await self._read_again(batch.entries, error, reader, stop)
            return
        self.last_beat = time.monotonic()
        try:
            await reader.acknowledge(batch.entries)
        except RedisError as error:  # they come again, and count once
            self._redis.begin(error)
            reader.recover()

    async def _commit_by_the_rules(self, batch: Batch, ledger: Ledger, stop: asyncio.Event) -> None:
        """Judge again where the rules changed in between; what was committed of it already counts once."""
        while True:
            try:
                await self._commit(batch.judged, batch.entries, batch.rules, ledger, stop)
            except StaleRulesError:
                await self._book.refresh()
                batch = await self._judge(batch.entries)
            else:
                if self._again is not None:
                    self._again.offer(batch.judged)
                return

    async def _judge(self, entries: Sequence[Entry]) -> Batch:
        """In a thread: a large body takes its time, and others on the loop must have theirs."""
        rules, version = self._book.rules, self._book.version
        sound = [entry for entry in entries if entry.deliveries < SUSPECT]
        known = iter(await asyncio.to_thread(lambda: [judged(entry, rules) for entry in sound]))
        batch = [
            next(known) if entry.deliveries < SUSPECT else await self._apart.judged(entry, rules)
            for entry in entries
        ]
        if len(sound) < len(entries):
            await self._apart.close()
        for one in batch:
            if one.poison is not None:
                self._put_apart(one)
        return Batch(entries, batch, version)

    async def _commit(
        self,
        batch: Sequence[Judged],
        entries: Sequence[Entry],
        rules: int,
        ledger: Ledger,
        stop: asyncio.Event,
    ) -> None:
        """A batch that Postgres refuses is halved until the entry is found that it can't hold."""
        try:
            await self._write(batch, rules, ledger, stop)
        except RefusedError as error:
            if len(batch) == 1:
                await self._commit_poison(entries[0], str(error), rules, ledger, stop)
                return
            middle = len(batch) // 2
            await self._commit(batch[:middle], entries[:middle], rules, ledger, stop)
            await self._commit(batch[middle:], entries[middle:], rules, ledger, stop)

    async def _commit_poison(
        self, entry: Entry, reason: str, rules: int, ledger: Ledger, stop: asyncio.Event
    ) -> None:
        poison = undecodable(entry, reason)
        self._put_apart(poison)
        await self._write([poison], rules, ledger, stop)

    async def _write(self, batch: Sequence[Judged], rules: int, ledger: Ledger, stop: asyncio.Event) -> None:
        """Try until Postgres takes it or refuses it. What is not committed stays pending in Redis."""
        while True:
            try:
                await ledger.write(batch, rules=rules)
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
        await ended(task, stopped)
