"""The worker reads, compares, commits and acknowledges. Any number may run, in any number of processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

import structlog

from abreast_sidecar.aio import Outage, cancel_and_wait, wait_or_stop
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.errors import LedgerError, RedisError, RefusedError, StaleRulesError
from abreast_sidecar.ingest.evaluate import evaluate_entry, undecodable_record
from abreast_sidecar.ingest.isolated import MIN_SUSPECT_DELIVERIES, IsolatedComparer
from abreast_sidecar.ingest.recheck import Rechecker, RecheckSettings
from abreast_sidecar.ingest.stream import StreamConsumer, StreamEntry
from abreast_sidecar.rules.cache import RuleCache
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.writer import PairWriter

SMALL_BATCH_DELAY_S = 0.01  # collects entries for a larger batch, because each commit is expensive
COMMIT_RETRY_DELAY_S = 0.1  # while stopping

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    entries: Sequence[StreamEntry]
    records: Sequence[PairRecord]
    rules_version: int  # for the records


class Worker:
    """Processes one stream of batches. `last_heartbeat` (monotonic) is the last read or commit."""

    def __init__(self, settings: Settings, database: Database, *, name: str) -> None:
        self.name = name
        self.is_running = False
        self.last_heartbeat = 0.0
        self._settings = settings
        rules = CompareOptions.with_ignored_headers(settings.volatile_headers)
        self._rule_cache = RuleCache(database, rules, direct_url=settings.direct_url)
        recheck_settings = RecheckSettings.from_settings(settings)
        self._rechecker = Rechecker(recheck_settings, rules, database) if recheck_settings else None
        self._redis = Outage("redis", worker=name)
        self._postgres = Outage("postgres", worker=name)
        self._isolated_comparer = IsolatedComparer()
        self._last_batch_small = False

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set and all read entries are committed, or the shutdown timeout passes.

        Retry while a server is away.
        """
        reader = StreamConsumer(
            self._settings.redis_url,
            name=self.name,
            batch_size=self._settings.batch_size,
            claim_idle_s=self._settings.claim_idle,
            batch_bytes=self._settings.batch_bytes,
        )
        recheck_task = asyncio.create_task(self._run_rechecker(stop))
        writer = PairWriter(self._settings.postgres_url, examples_per_finding=self._settings.examples_per_finding)
        self.is_running = True
        try:
            self._rule_cache.start()
            await _run_until_stopped(
                stop, self._process_batches(reader, writer, stop), grace_s=self._settings.shutdown_timeout
            )
        finally:
            self.is_running = False
            await cancel_and_wait(recheck_task)
            await writer.close()
            await self._isolated_comparer.close()
            await self._rule_cache.close()
            try:
                await reader.close()
            except RedisError as error:
                log.info("redis was away when the worker stopped", worker=self.name, error=str(error))

    async def _run_rechecker(self, stop: asyncio.Event) -> None:
        if self._rechecker is None:
            return
        try:
            await self._rechecker.run(stop)
        except Exception:
            log.exception("rechecks stopped", worker=self.name)

    async def _process_batches(self, reader: StreamConsumer, writer: PairWriter, stop: asyncio.Event) -> None:
        """Read and compare each batch while the former one is committed. Wait for the rules first."""
        if not await self._rule_cache.wait_loaded(stop):
            return
        upcoming = asyncio.create_task(self._next_batch(reader, stop))
        try:
            while batch := await upcoming:
                upcoming = asyncio.create_task(self._next_batch(reader, stop))
                await self._commit_and_ack(batch, reader, writer, stop)
        finally:
            await cancel_and_wait(upcoming)

    async def _next_batch(self, reader: StreamConsumer, stop: asyncio.Event) -> Batch | None:
        """Read and compare the next batch. Return None when stopping."""
        while entries := await self._wait_for_entries(reader, stop):
            try:
                return await self._evaluate(entries)
            except Exception as error:  # noqa: BLE001  # logged with its traceback
                await self._retry_batch(entries, error, reader, stop)
        return None

    async def _retry_batch(
        self, entries: Sequence[StreamEntry], error: Exception, reader: StreamConsumer, stop: asyncio.Event
    ) -> None:
        log.error("a batch failed; retrying", worker=self.name, pairs=len(entries), exc_info=error)
        reader.reread_pending()
        await self._postgres.back_off(stop)

    async def _wait_for_entries(self, reader: StreamConsumer, stop: asyncio.Event) -> list[StreamEntry]:
        """Wait for entries. Return none when stopping."""
        if self._last_batch_small:
            await wait_or_stop(stop, SMALL_BATCH_DELAY_S)
        while not stop.is_set():
            try:
                entries = await reader.read()
            except RedisError as error:
                self._redis.record_failure(error)
                await self._redis.back_off(stop)
                continue
            self._redis.record_success()
            self.last_heartbeat = time.monotonic()
            if entries:
                self._last_batch_small = len(entries) < self._settings.batch_size // 2
                return entries
        return []

    async def _commit_and_ack(
        self, batch: Batch, reader: StreamConsumer, writer: PairWriter, stop: asyncio.Event
    ) -> None:
        try:
            await self._commit_with_current_rules(batch, writer, stop)
        except Exception as error:  # noqa: BLE001  # logged with its traceback
            await self._retry_batch(batch.entries, error, reader, stop)
            return
        self.last_heartbeat = time.monotonic()
        try:
            await reader.acknowledge(batch.entries)
        except RedisError as error:  # they are delivered again, and count once
            self._redis.record_failure(error)
            reader.reread_pending()

    async def _commit_with_current_rules(self, batch: Batch, writer: PairWriter, stop: asyncio.Event) -> None:
        """Commit a batch; if the rules changed, compare it again first."""
        while True:
            try:
                await self._commit(batch.records, batch.entries, batch.rules_version, writer, stop)
            except StaleRulesError:
                await self._rule_cache.refresh()
                batch = await self._evaluate(batch.entries)
            else:
                if self._rechecker is not None:
                    self._rechecker.offer(batch.records)
                return

    async def _evaluate(self, entries: Sequence[StreamEntry]) -> Batch:
        """Compare in a thread, so that large bodies don't block the event loop."""
        rules, rules_version = self._rule_cache.rules, self._rule_cache.version
        regular_entries = [entry for entry in entries if entry.delivery_count < MIN_SUSPECT_DELIVERIES]
        regular_records = iter(
            await asyncio.to_thread(lambda: [evaluate_entry(entry, rules) for entry in regular_entries])
        )
        records = [
            next(regular_records)
            if entry.delivery_count < MIN_SUSPECT_DELIVERIES
            else await self._isolated_comparer.compare(entry, rules)
            for entry in entries
        ]
        if len(regular_entries) < len(entries):
            await self._isolated_comparer.close()
        for record in records:
            if record.dead_letter is not None:
                self._log_dead_letter(record)
        return Batch(entries, records, rules_version)

    async def _commit(
        self,
        records: Sequence[PairRecord],
        entries: Sequence[StreamEntry],
        rules_version: int,
        writer: PairWriter,
        stop: asyncio.Event,
    ) -> None:
        """Commit records. Halve a batch that Postgres rejects, until the rejected entry is alone."""
        try:
            await self._write(records, rules_version, writer, stop)
        except RefusedError as error:
            if len(records) == 1:
                await self._commit_dead_letter(entries[0], str(error), rules_version, writer, stop)
                return
            middle = len(records) // 2
            await self._commit(records[:middle], entries[:middle], rules_version, writer, stop)
            await self._commit(records[middle:], entries[middle:], rules_version, writer, stop)

    async def _commit_dead_letter(
        self, entry: StreamEntry, reason: str, rules_version: int, writer: PairWriter, stop: asyncio.Event
    ) -> None:
        record = undecodable_record(entry, reason)
        self._log_dead_letter(record)
        await self._write([record], rules_version, writer, stop)

    async def _write(
        self, records: Sequence[PairRecord], rules_version: int, writer: PairWriter, stop: asyncio.Event
    ) -> None:
        """Retry until Postgres accepts or rejects the records. Uncommitted entries stay pending in Redis."""
        while True:
            try:
                await writer.write(records, rules_version=rules_version)
            except RefusedError:
                raise
            except LedgerError as error:
                self._postgres.record_failure(error)
                await self._postgres.back_off(stop)
                if stop.is_set():
                    await asyncio.sleep(COMMIT_RETRY_DELAY_S)  # the backoff returns at once
            else:
                self._postgres.record_success()
                return

    def _log_dead_letter(self, record: PairRecord) -> None:
        log.warning(
            "an entry can't be processed and becomes a dead letter",
            worker=self.name,
            service=record.service,
            pair=record.pair_id,
            entry=record.entry_id,
            reason=record.result.reason,
        )


async def _run_until_stopped(stop: asyncio.Event, work: Coroutine[None, None, None], *, grace_s: float) -> None:
    """Run `work` to its end, but at most `grace_s` seconds after `stop` is set."""
    work_task = asyncio.create_task(work)
    stop_task = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work_task, stop_task}, return_when=asyncio.FIRST_COMPLETED)
        done, _ = await asyncio.wait({work_task}, timeout=grace_s)
        if done:
            work_task.result()
        else:
            log.warning("the shutdown timeout is over; uncommitted entries stay in redis", seconds=grace_s)
    finally:
        await cancel_and_wait(work_task, stop_task)
