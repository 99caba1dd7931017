"""Asks the sidecar over gRPC, as any program can that installs abreast[client]."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc

from abreast.v1 import common_pb2, comparison_pb2, comparison_pb2_grpc, traffic_pb2, traffic_pb2_grpc
from abreast_demo.planted_changes import FindingLocation, LedgerCounts, ReportedFinding, find_missed_changes
from abreast_sidecar.client.sidecar_client import CHANNEL_OPTIONS, to_cli_error

MAX_DEMO_PAGE_ROWS = 1000
SETTLE_TIMEOUT_S = 30.0  # seconds; a pair waits at most 10 for a copy that never comes
SETTLE_POLL_S = 0.2
MAX_JOIN_WAIT_S = 12.0  # seconds after which no pair waits for a copy any more
QUIESCENT_AFTER_S = 2.5  # seconds; Envoy is asked for its count once a second
FIND_TIMEOUT_S = 12.0  # the sidecar looks for slower endpoints every 5 seconds
DEMO_CALL_TIMEOUT_S = 10.0


class DemoClient:
    """Use as an async context manager."""

    def __init__(self, address: str, service: str) -> None:
        self.service = service
        self.address = address
        self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.comparison = comparison_pb2_grpc.ComparisonServiceStub(self.channel)
        self.traffic = traffic_pb2_grpc.TrafficServiceStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close()
        if isinstance(error, grpc.aio.AioRpcError):
            raise to_cli_error(error, self.address, DEMO_CALL_TIMEOUT_S) from error

    async def set_new_share(self, new_share: float, actor: str = "demo") -> None:
        request = traffic_pb2.UpdateTrafficRequest(
            service=self.service, new_share=new_share, actor=actor, reason=f"a step of the {actor}"
        )
        await self.traffic.UpdateTraffic(request, timeout=DEMO_CALL_TIMEOUT_S)

    async def get_traffic(self) -> traffic_pb2.Traffic:
        request = traffic_pb2.GetTrafficRequest(service=self.service)
        return (await self.traffic.GetTraffic(request, timeout=DEMO_CALL_TIMEOUT_S)).traffic

    async def get_ledger_counts(self) -> LedgerCounts:
        request = comparison_pb2.GetSummaryRequest(service=self.service)
        summary = await self.comparison.GetSummary(request, timeout=DEMO_CALL_TIMEOUT_S)
        return LedgerCounts(
            outcomes={_short_name(common_pb2.Outcome.Name(row.outcome)): row.count for row in summary.outcomes},
            envoy_sampled=summary.envoy_sampled if summary.HasField("envoy_sampled") else None,
            unaccounted=summary.unaccounted if summary.HasField("unaccounted") else None,
            pending=summary.pending if summary.HasField("pending") else None,
            explained_pairs=summary.explained,
            drops={f"{row.stage} {row.reason}": row.count for row in summary.drops},
        )

    async def wait_until_settled(self, sent_requests: int) -> LedgerCounts:
        """The ledger once it sums up to what Envoy counted, or as it is when that takes too long."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            counts = await self.get_ledger_counts()
            if counts.is_settled(sent_requests) or time.monotonic() > deadline:
                return counts
            await asyncio.sleep(SETTLE_POLL_S)

    async def wait_until_quiescent(self) -> LedgerCounts:
        """The ledger once it sums up, or does not change any more: something may be missing from before."""
        counts, unchanged_since, started_at = (await self.get_ledger_counts(), time.monotonic(), time.monotonic())
        while not counts.is_settled(0) and time.monotonic() - started_at < MAX_JOIN_WAIT_S:
            await asyncio.sleep(SETTLE_POLL_S)
            new_counts = await self.get_ledger_counts()
            if new_counts != counts:
                counts, unchanged_since = new_counts, time.monotonic()
            elif not new_counts.pending and time.monotonic() - unchanged_since > QUIESCENT_AFTER_S:
                break
        return counts

    async def wait_until_complete(self, before: LedgerCounts) -> LedgerCounts:
        """The ledger once all that Envoy has counted since is in it, or as it is when that takes too long."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            counts = await self.get_ledger_counts()
            if counts.is_complete_since(before) or time.monotonic() > deadline:
                return counts
            await asyncio.sleep(SETTLE_POLL_S)

    async def wait_for_planted_findings(self) -> tuple[ReportedFinding, ...]:
        """The findings once all that was planted is among them, or as they are when that takes too long."""
        deadline = time.monotonic() + FIND_TIMEOUT_S
        while True:
            findings = await self.list_findings()
            if not find_missed_changes(findings) or time.monotonic() > deadline:
                return findings
            await asyncio.sleep(SETTLE_POLL_S)

    async def list_findings(self) -> tuple[ReportedFinding, ...]:
        request = comparison_pb2.ListFindingsRequest(
            service=self.service, include_noise=True, page_size=MAX_DEMO_PAGE_ROWS
        )
        response = await self.comparison.ListFindings(request, timeout=DEMO_CALL_TIMEOUT_S)
        return tuple(_to_reported_finding(finding) for finding in response.findings)

    async def get_example_pair_id(self, finding_id: int) -> str:
        """The id of a pair that shows the finding and is kept whole; empty for none."""
        request = comparison_pb2.GetFindingRequest(id=finding_id)
        response = await self.comparison.GetFinding(request, timeout=DEMO_CALL_TIMEOUT_S)
        return response.examples[0].pair.id if response.examples else ""


def _to_reported_finding(finding: comparison_pb2.Finding) -> ReportedFinding:
    return ReportedFinding(
        id=finding.id,
        location=FindingLocation(
            endpoint=f"{finding.endpoint.method} {finding.endpoint.route}",
            part=_short_name(common_pb2.Part.Name(finding.part)),
            path=finding.path,
            kind=_short_name(common_pb2.Kind.Name(finding.kind)),
        ),
        impact=_short_name(common_pb2.Impact.Name(finding.impact)),
        noise=finding.noise,
        count=finding.count,
        baseline_count=finding.baseline_count,
        summary=finding.summary,
    )


def _short_name(name: str) -> str:
    """OUTCOME_ONLY_OLD → only_old"""
    return name.partition("_")[2].lower()
