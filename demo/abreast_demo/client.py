"""The demo's calls to its sidecar, and waits for what they return."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from abreast.v1 import common_pb2, comparison_pb2, traffic_pb2
from abreast_demo.planted_changes import FindingLocation, LedgerCounts, ReportedFinding, find_missed_changes
from abreast_sidecar.client.output import impact_name, kind_name, part_name
from abreast_sidecar.client.sidecar_client import MAX_PAGE_ROWS, Calls, SidecarClient

CALL_TIMEOUT_S = 10.0
SETTLE_TIMEOUT_S = 30.0  # a pair waits at most 10 s for a capture that never arrives
JOIN_TIMEOUT_S = 12.0  # after this time, no pair waits for a capture
QUIESCENT_AFTER_S = 2.5  # the sidecar reads Envoy's counters every second
FINDINGS_TIMEOUT_S = 12.0  # the sidecar looks for slow endpoints every 5 s
POLL_INTERVAL_S = 0.2

Value = TypeVar("Value")


@asynccontextmanager
async def connect(address: str, service: str) -> AsyncIterator[DemoClient]:
    """Open a channel to the sidecar. Calls raise SidecarError when the context ends."""
    async with SidecarClient(address, CALL_TIMEOUT_S).connect() as calls:
        yield DemoClient(calls, service)


@dataclass(frozen=True)
class DemoClient:
    calls: Calls
    service: str

    async def set_new_share(self, new_share: float, actor: str = "demo") -> None:
        request = traffic_pb2.UpdateTrafficRequest(
            service=self.service, new_share=new_share, actor=actor, reason=f"a step of the {actor}"
        )
        await self.calls.traffic.UpdateTraffic(request, timeout=CALL_TIMEOUT_S)

    async def get_ledger_counts(self) -> LedgerCounts:
        request = comparison_pb2.GetSummaryRequest(service=self.service)
        summary = await self.calls.comparison.GetSummary(request, timeout=CALL_TIMEOUT_S)
        return LedgerCounts(
            outcomes={
                common_pb2.Outcome.Name(row.outcome).removeprefix("OUTCOME_").lower(): row.count
                for row in summary.outcomes
            },
            envoy_sampled=summary.envoy_sampled if summary.HasField("envoy_sampled") else None,
            unaccounted=summary.unaccounted if summary.HasField("unaccounted") else None,
            pending=summary.pending if summary.HasField("pending") else None,
            explained_pairs=summary.explained,
            drops={f"{row.stage} {row.reason}": row.count for row in summary.drops},
        )

    async def list_findings(self) -> tuple[ReportedFinding, ...]:
        request = comparison_pb2.ListFindingsRequest(service=self.service, include_noise=True, page_size=MAX_PAGE_ROWS)
        response = await self.calls.comparison.ListFindings(request, timeout=CALL_TIMEOUT_S)
        return tuple(
            ReportedFinding(
                id=finding.id,
                location=FindingLocation(
                    endpoint=f"{finding.endpoint.method} {finding.endpoint.route}",
                    part=part_name(finding.part),
                    path=finding.path,
                    kind=kind_name(finding.kind),
                ),
                impact=impact_name(finding.impact),
                noise=finding.noise,
                count=finding.count,
                baseline_count=finding.baseline_count,
                summary=finding.summary,
            )
            for finding in response.findings
        )

    async def get_example_pair_id(self, finding_id: int) -> str:
        """Return the id of a stored pair that shows the finding, or an empty string."""
        request = comparison_pb2.GetFindingRequest(id=finding_id)
        response = await self.calls.comparison.GetFinding(request, timeout=CALL_TIMEOUT_S)
        return response.examples[0].pair.id if response.examples else ""

    async def wait_until_settled(self, sent_requests: int) -> LedgerCounts:
        """Wait until the ledger holds every request that Envoy sampled. Return the last counts on timeout."""
        return await _poll(
            self.get_ledger_counts, lambda counts: counts.is_settled(sent_requests), timeout_s=SETTLE_TIMEOUT_S
        )

    async def wait_until_complete(self, before: LedgerCounts) -> LedgerCounts:
        """Wait until the ledger holds every request sampled since `before`. Return the last counts on timeout."""
        return await _poll(
            self.get_ledger_counts, lambda counts: counts.is_complete_since(before), timeout_s=SETTLE_TIMEOUT_S
        )

    async def wait_until_quiescent(self) -> LedgerCounts:
        """Wait until the ledger is settled, or stops changing because earlier requests were lost."""
        previous_counts, changed_at = await self.get_ledger_counts(), time.monotonic()

        def is_quiescent(counts: LedgerCounts) -> bool:
            nonlocal previous_counts, changed_at
            if counts != previous_counts:
                previous_counts, changed_at = counts, time.monotonic()
            is_stable = not counts.pending and time.monotonic() - changed_at > QUIESCENT_AFTER_S
            return counts.is_settled(0) or is_stable

        return await _poll(self.get_ledger_counts, is_quiescent, timeout_s=JOIN_TIMEOUT_S)

    async def wait_for_planted_findings(self) -> tuple[ReportedFinding, ...]:
        """Wait until every planted regression is reported. Return the last findings on timeout."""
        return await _poll(
            self.list_findings, lambda findings: not find_missed_changes(findings), timeout_s=FINDINGS_TIMEOUT_S
        )


async def _poll(fetch: Callable[[], Awaitable[Value]], is_done: Callable[[Value], bool], *, timeout_s: float) -> Value:
    deadline = time.monotonic() + timeout_s
    while True:
        value = await fetch()
        if is_done(value) or time.monotonic() > deadline:
            return value
        await asyncio.sleep(POLL_INTERVAL_S)
