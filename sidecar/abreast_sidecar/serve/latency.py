# ruff: noqa: ARG002, N802  # names and shapes are the API's
from __future__ import annotations

import asyncio
from typing import Any

from abreast.v1 import common_pb2, latency_pb2_grpc
from abreast.v1 import latency_pb2 as pb
from abreast_sidecar.compare.paired import Paired, paired, split
from abreast_sidecar.control import Control
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.serve import arguments
from abreast_sidecar.serve.values import duration
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.latencies import timings
from abreast_sidecar.store.results import Endpoint

CONFIDENCE = 0.95


class Latency(latency_pb2_grpc.LatencyServiceServicer):
    def __init__(self, database: Database, control: Control) -> None:
        self.database = database
        self.control = control

    async def GetLatency(self, request: pb.GetLatencyRequest, context: Any) -> pb.GetLatencyResponse:
        window, confidence = arguments.window(request), request.confidence or CONFIDENCE
        if not 0 < confidence < 1:
            raise ArgumentError(f"confidence must lie above 0 and below 1, got {confidence:g}")
        endpoint = Endpoint(
            await self.control.resolve(arguments.text("service", request.service)),
            arguments.text("method", request.method).upper(),
            arguments.text("route", request.route),
        )
        found, cut = await timings(self.database, endpoint, window)
        cold, warm = split(found)
        return pb.GetLatencyResponse(
            endpoint=common_pb2.Endpoint(
                service=endpoint.service, method=endpoint.method, route=endpoint.route
            ),
            warm=_message(await asyncio.to_thread(paired, warm, confidence)),
            cold=_message(await asyncio.to_thread(paired, cold, confidence)),
            confidence=confidence,
            cut=cut,
        )


def _message(found: Paired) -> pb.PairedLatency:
    return pb.PairedLatency(
        pairs=found.pairs,
        percentiles=[
            pb.LatencyPercentile(share=one.share, old=duration(one.old_us), new=duration(one.new_us))
            for one in found.sides
        ],
        differences=[
            pb.LatencyDifference(
                share=one.share, value=duration(one.value), low=duration(one.low), high=duration(one.high)
            )
            for one in found.differences_us
        ],
        ratios=[
            pb.LatencyRatio(share=one.share, value=one.value, low=one.low, high=one.high)
            for one in found.ratios
        ],
        copies=found.copies,
    )
