# ruff: noqa: ARG002, N802  # names and shapes are the API's
from __future__ import annotations

import asyncio
from typing import Any

from abreast.v1 import common_pb2, latency_pb2_grpc
from abreast.v1 import latency_pb2 as pb
from abreast_sidecar.compare.paired import PairedLatency, measure_paired_latency, split_cold_pairs
from abreast_sidecar.control import TrafficController
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.serve import arguments
from abreast_sidecar.serve.values import to_duration
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.latencies import read_timings
from abreast_sidecar.store.results import Endpoint

DEFAULT_CONFIDENCE = 0.95


class LatencyServicer(latency_pb2_grpc.LatencyServiceServicer):
    def __init__(self, database: Database, control: TrafficController) -> None:
        self.database = database
        self.control = control

    async def GetLatency(self, request: pb.GetLatencyRequest, context: Any) -> pb.GetLatencyResponse:
        window, confidence = arguments.parse_window(request), request.confidence or DEFAULT_CONFIDENCE
        if not 0 < confidence < 1:
            raise ArgumentError(f"confidence must lie above 0 and below 1, got {confidence:g}")
        endpoint = Endpoint(
            await self.control.resolve_service(arguments.check_text("service", request.service)),
            arguments.check_text("method", request.method).upper(),
            arguments.check_text("route", request.route),
        )
        pair_timings, is_truncated = await read_timings(self.database, endpoint, window)
        cold, warm = split_cold_pairs(pair_timings)
        return pb.GetLatencyResponse(
            endpoint=common_pb2.Endpoint(
                service=endpoint.service, method=endpoint.method, route=endpoint.route
            ),
            warm=_to_latency_message(await asyncio.to_thread(measure_paired_latency, warm, confidence)),
            cold=_to_latency_message(await asyncio.to_thread(measure_paired_latency, cold, confidence)),
            confidence=confidence,
            cut=is_truncated,
        )


def _to_latency_message(latency: PairedLatency) -> pb.PairedLatency:
    return pb.PairedLatency(
        pairs=latency.pairs,
        percentiles=[
            pb.LatencyPercentile(
                share=quantile.share, old=to_duration(quantile.old_us), new=to_duration(quantile.new_us)
            )
            for quantile in latency.percentiles
        ],
        differences=[
            pb.LatencyDifference(
                share=quantile.share,
                value=to_duration(quantile.value),
                low=to_duration(quantile.low),
                high=to_duration(quantile.high),
            )
            for quantile in latency.differences_us
        ],
        ratios=[
            pb.LatencyRatio(share=quantile.share, value=quantile.value, low=quantile.low, high=quantile.high)
            for quantile in latency.ratios
        ],
        copies=latency.copies,
    )
