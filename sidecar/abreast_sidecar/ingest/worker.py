"""The worker reads, compares, commits and acknowledges. Any number may run, in any number of processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

import structlog

from abreast_sidecar.aio import Outage, cancel_and_wait, wait_or_stop
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.errors import LedgerError, RedisError, RefusedError, StaleRulesError, locate_error
from abreast_sidecar.ingest.evaluate import MIN_SUSPECT_DELIVERIES, IsolatedComparer, evaluate_entry, undecodable_record
from abreast_sidecar.ingest.recheck import Rechecker, RecheckSettings
from abreast_sidecar.ingest.stream import StreamConsumer, StreamEntry
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database, listen
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.rules import RULES_CHANNEL, RuleStore
from abreast_sidecar.store.writer import PairWriter

SMALL_BATCH_DELAY_S = 0.25  # collects entries for a larger batch, because each commit is expensive
RULES_PROBE_INTERVAL_S = 60.0  # a commit notices old rules too
COMMIT_RETRY_DELAY_S = 0.1  # while stopping
MAX_ENTRY_FAILURES = 3  # one entry in one worker; it becomes a dead letter then
ENTRY_RETRY_DELAY_S = 0.1

log = structlog.get_logger(__name__)


class RuleCache:
    """The rules and templates in force. `version` is -1 until they are read once; until then, don't compare."""

    def __init__(self, database: Database, rules: CompareOptions, *, direct_url: str = "") -> None:
        """Take compare options without rules. `direct_url`: Postgres without a pooler, for notifications."""
        self._direct_url = direct_url or database.conninfo
        self._store = RuleStore(database)
        self._rules = rules
        self._loaded = asyncio.Event()
        self._listener_task: asyncio.Task[None] | None = None
        self.version = -1

    @property
    def rules(self) -> CompareOptions:
        return self._rules

    def start(self) -> None:
        self._listener_task = asyncio.create_task(
            listen(
                self._direct_url,
                {RULES_CHANNEL: self.refresh},
                name="abreast rules",
                probe_interval_s=RULES_PROBE_INTERVAL_S,
            )
        )

    async def close(self) -> None:
        if self._listener_task is not None:
            await cancel_and_wait(self._listener_task)

    async def wait_loaded(self, stop: asyncio.Event) -> bool:
        """Wait until the rules are read, or for `stop`; return whether they are read."""
        tasks = [asyncio.create_task(event.wait()) for event in (self._loaded, stop)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(*tasks)
        return self._loaded.is_set()

    async def refresh(self) -> None:
        """Read the rules. Raise LedgerError while Postgres is away; the cached rules stay."""
        current = await self._store.get_active()
        if current.version <= self.version:
            return
        self._rules = current.apply(self._rules)
        self.version = current.version
        self._loaded.set()
        log.info("rules read", version=current.version, rules=len(current.rules.rules))


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
        self._rechecker = (
            Rechecker(recheck_settings, lambda: self._rule_cache.rules, database) if recheck_settings else None
        )
        self._redis = Outage("redis", worker=name)
        self._postgres = Outage("postgres", worker=name)
        self._isolated_comparer = IsolatedComparer()
        self._reader = StreamConsumer(
            settings.redis_url,
            name=name,
            batch_size=settings.batch_size,
            claim_idle_s=settings.claim_idle,
            batch_bytes=settings.batch_bytes,
        )
        self._writer = PairWriter(settings.postgres_url, examples_per_finding=settings.examples_per_finding)
        self._last_batch_small = False

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set and all read entries are committed, or the shutdown timeout passes.

        Retry while a server is away.
        """
        recheck_task = asyncio.create_task(self._run_rechecker(stop))
        self.is_running = True
        try:
            self._rule_cache.start()
            await _run_until_stopped(stop, self._process_batches(stop), grace_s=self._settings.shutdown_timeout)
        finally:
            self.is_running = False
            await cancel_and_wait(recheck_task)
            await self._writer.close()
            await self._isolated_comparer.close()
            await self._rule_cache.close()
            try:
                await self._reader.close()
            except RedisError as error:
                log.info("redis was away when the worker stopped", worker=self.name, error=str(error))

    async def _run_rechecker(self, stop: asyncio.Event) -> None:
        if self._rechecker is None:
            return
        try:
            await self._rechecker.run(stop)
        except Exception:
            log.exception("rechecks stopped", worker=self.name)

    async def _process_batches(self, stop: asyncio.Event) -> None:
        """Read and compare each batch while the former one is committed. Wait for the rules first."""
        if not await self._rule_cache.wait_loaded(stop):
            return
        upcoming = asyncio.create_task(self._next_batch(stop))
        try:
            while batch := await upcoming:
                upcoming = asyncio.create_task(self._next_batch(stop))
                await self._commit_and_ack(batch, stop)
        finally:
            await cancel_and_wait(upcoming)

    async def _next_batch(self, stop: asyncio.Event) -> Batch | None:
        """Read and compare the next batch. Return None when stopping."""
        while entries := await self._wait_for_entries(stop):
            try:
                return await self._evaluate(entries)
            except Exception as error:  # noqa: BLE001  # logged
                await self._retry_batch(entries, error, stop)
        return None

    async def _retry_batch(self, entries: Sequence[StreamEntry], error: Exception, stop: asyncio.Event) -> None:
        # Without the traceback, whose messages may contain captured values.
        log.error("a batch failed; retrying", worker=self.name, pairs=len(entries), error=locate_error(error))
        self._reader.reread_pending()
        await self._postgres.back_off(stop)

    async def _wait_for_entries(self, stop: asyncio.Event) -> list[StreamEntry]:
        """Wait for entries. Return none when stopping."""
        if self._last_batch_small:
            await wait_or_stop(stop, SMALL_BATCH_DELAY_S)
        while not stop.is_set():
            try:
                entries = await self._reader.read()
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

    async def _commit_and_ack(self, batch: Batch, stop: asyncio.Event) -> None:
        try:
            await self._commit_with_current_rules(batch, stop)
        except Exception as error:  # noqa: BLE001  # logged
            await self._retry_batch(batch.entries, error, stop)
            return
        self.last_heartbeat = time.monotonic()
        try:
            await self._reader.acknowledge(batch.entries)
        except RedisError as error:  # they are delivered again, and count once
            self._redis.record_failure(error)
            self._reader.reread_pending()

    async def _commit_with_current_rules(self, batch: Batch, stop: asyncio.Event) -> None:
        """Commit a batch; if the rules changed, compare it again first."""
        while True:
            try:
                await self._commit(batch, stop)
            except StaleRulesError:
                await self._rule_cache.refresh()
                batch = await self._evaluate(batch.entries)
            else:
                self._offer_rechecks(batch.records)
                return

    def _offer_rechecks(self, records: Sequence[PairRecord]) -> None:
        if self._rechecker is None:
            return
        try:
            self._rechecker.offer(records)
        except Exception as error:  # noqa: BLE001  # the pairs are committed
            log.warning("pairs can't be rechecked", worker=self.name, error=locate_error(error))

    async def _evaluate(self, entries: Sequence[StreamEntry]) -> Batch:
        """Compare in a thread: small bodies may need long too, and a rollback must not wait for the event loop."""
        rules, rules_version = self._rule_cache.rules, self._rule_cache.version
        regular_entries = [entry for entry in entries if entry.delivery_count < MIN_SUSPECT_DELIVERIES]
        regular_records = iter(
            await asyncio.to_thread(lambda: [evaluate_repeatedly(entry, rules) for entry in regular_entries])
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

    async def _commit(self, batch: Batch, stop: asyncio.Event) -> None:
        """Commit records. Halve a batch that can't be written, until the entry that causes it is alone."""
        try:
            await self._write(batch.records, batch.rules_version, stop)
        except StaleRulesError:
            raise
        except Exception as error:  # noqa: BLE001  # stored with the dead letter
            if len(batch.records) == 1:
                await self._commit_failing(batch, error, stop)
                return
            middle = len(batch.records) // 2
            for half in (slice(None, middle), slice(middle, None)):
                await self._commit(Batch(batch.entries[half], batch.records[half], batch.rules_version), stop)

    async def _commit_failing(self, batch: Batch, error: Exception, stop: asyncio.Event) -> None:
        """Try the one entry of a batch again, unless Postgres rejects it, and then make it a dead letter."""
        for _ in range(MAX_ENTRY_FAILURES - 1):
            if isinstance(error, RefusedError):
                break
            await wait_or_stop(stop, ENTRY_RETRY_DELAY_S)
            try:
                await self._write(batch.records, batch.rules_version, stop)
            except StaleRulesError:
                raise
            except Exception as failure:  # noqa: BLE001  # stored with the dead letter
                error = failure
            else:
                return
        reason = f"it can't be written to the ledger: {locate_error(error)}"
        record = undecodable_record(batch.entries[0], str(error) if isinstance(error, RefusedError) else reason)
        self._log_dead_letter(record)
        await self._write([record], batch.rules_version, stop)

    async def _write(self, records: Sequence[PairRecord], rules_version: int, stop: asyncio.Event) -> None:
        """Retry until Postgres accepts or rejects the records. Uncommitted entries stay pending in Redis."""
        while True:
            try:
                await self._writer.write(records, rules_version=rules_version)
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


def evaluate_repeatedly(entry: StreamEntry, rules: CompareOptions) -> PairRecord:
    """Evaluate an entry that must not stop the others: after MAX_ENTRY_FAILURES it becomes a dead letter."""
    for _ in range(MAX_ENTRY_FAILURES):
        try:
            return evaluate_entry(entry, rules)
        except Exception as error:  # noqa: BLE001  # stored with the dead letter
            reason = f"its evaluation raised {locate_error(error)}"
    return undecodable_record(entry, reason)


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
