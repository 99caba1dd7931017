"""Asks the sidecar over gRPC, as any program can that installs abreast[client]."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc

from abreast.v1 import common_pb2, comparison_pb2, comparison_pb2_grpc, traffic_pb2, traffic_pb2_grpc
from abreast_demo.plants import Place
from abreast_demo.verdict import Ledger, Seen, missing
from abreast_sidecar.cli.connection import CHANNEL_OPTIONS, in_plain_words

PAGE = 1000
SETTLE_TIMEOUT = 30.0  # seconds; a pair waits at most 10 for a copy that never comes
SETTLE_POLL = 0.2
JOINED = 12.0  # seconds after which no pair waits for a copy any more
UNCHANGED = 2.5  # seconds; Envoy is asked for its count once a second
FIND_TIMEOUT = 12.0  # the sidecar looks for slower endpoints every 5 seconds
CALL_TIMEOUT = 10.0


class Client:
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
            raise in_plain_words(error, self.address, CALL_TIMEOUT) from error

    async def move(self, new_share: float, actor: str = "demo") -> None:
        request = traffic_pb2.UpdateTrafficRequest(
            service=self.service, new_share=new_share, actor=actor, reason=f"a step of the {actor}"
        )
        await self.traffic.UpdateTraffic(request, timeout=CALL_TIMEOUT)

    async def present(self) -> traffic_pb2.Traffic:
        request = traffic_pb2.GetTrafficRequest(service=self.service)
        return (await self.traffic.GetTraffic(request, timeout=CALL_TIMEOUT)).traffic

    async def ledger(self) -> Ledger:
        request = comparison_pb2.GetSummaryRequest(service=self.service)
        summary = await self.comparison.GetSummary(request, timeout=CALL_TIMEOUT)
        return Ledger(
            outcomes={_word(common_pb2.Outcome.Name(row.outcome)): row.count for row in summary.outcomes},
            envoy=summary.envoy_sampled if summary.HasField("envoy_sampled") else None,
            unaccounted=summary.unaccounted if summary.HasField("unaccounted") else None,
            pending=summary.pending if summary.HasField("pending") else None,
            explained=summary.explained,
            drops={f"{row.place} {row.reason}": row.count for row in summary.drops},
        )

    async def settled(self, sent: int) -> Ledger:
        """The ledger once it sums up to what Envoy counted, or as it is when that takes too long."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while True:
            ledger = await self.ledger()
            if ledger.settled(sent) or time.monotonic() > deadline:
                return ledger
            await asyncio.sleep(SETTLE_POLL)

    async def quiet(self) -> Ledger:
        """The ledger once it sums up, or does not change any more: something may be missing from before."""
        last, since, began = await self.ledger(), time.monotonic(), time.monotonic()
        while not last.settled(0) and time.monotonic() - began < JOINED:
            await asyncio.sleep(SETTLE_POLL)
            ledger = await self.ledger()
            if ledger != last:
                last, since = ledger, time.monotonic()
            elif not ledger.pending and time.monotonic() - since > UNCHANGED:
                break
        return last

    async def arrived(self, before: Ledger) -> Ledger:
        """The ledger once all that Envoy has counted since is in it, or as it is when that takes too long."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while True:
            ledger = await self.ledger()
            if ledger.complete_since(before) or time.monotonic() > deadline:
                return ledger
            await asyncio.sleep(SETTLE_POLL)

    async def all_found(self) -> tuple[Seen, ...]:
        """The findings once all that was planted is among them, or as they are when that takes too long."""
        deadline = time.monotonic() + FIND_TIMEOUT
        while True:
            seen = await self.findings()
            if not missing(seen) or time.monotonic() > deadline:
                return seen
            await asyncio.sleep(SETTLE_POLL)

    async def findings(self) -> tuple[Seen, ...]:
        request = comparison_pb2.ListFindingsRequest(service=self.service, include_noise=True, page_size=PAGE)
        answer = await self.comparison.ListFindings(request, timeout=CALL_TIMEOUT)
        return tuple(_seen(finding) for finding in answer.findings)

    async def an_example(self, finding: int) -> str:
        """The id of a pair that shows the finding and is kept whole; empty for none."""
        request = comparison_pb2.GetFindingRequest(id=finding)
        answer = await self.comparison.GetFinding(request, timeout=CALL_TIMEOUT)
        return answer.examples[0].pair.id if answer.examples else ""


def _seen(finding: comparison_pb2.Finding) -> Seen:
    return Seen(
        id=finding.id,
        place=Place(
            endpoint=f"{finding.endpoint.method} {finding.endpoint.route}",
            part=_word(common_pb2.Part.Name(finding.part)),
            path=finding.path,
            kind=_word(common_pb2.Kind.Name(finding.kind)),
        ),
        impact=_word(common_pb2.Impact.Name(finding.impact)),
        noise=finding.noise,
        count=finding.count,
        baseline_count=finding.baseline_count,
        summary=finding.summary,
    )


def _word(name: str) -> str:
    """OUTCOME_ONLY_OLD → only_old"""
    return name.partition("_")[2].lower()
