"""TrafficService."""

# ruff: noqa: ARG002, N802  # gRPC gives the signatures and names

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from abreast.v1 import traffic_pb2 as pb
from abreast.v1 import traffic_pb2_grpc
from abreast_sidecar.serve import validate
from abreast_sidecar.serve.convert import to_message, to_traffic_fields
from abreast_sidecar.serve.errors import StoppingError
from abreast_sidecar.store.reader import decode_cursor, encode_cursor
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import TrafficChange


class TrafficServicer(traffic_pb2_grpc.TrafficServiceServicer):
    def __init__(self, control: TrafficController) -> None:
        self.control = control

    async def GetTraffic(self, request: pb.GetTrafficRequest, context: Any) -> pb.GetTrafficResponse:
        traffic = await self.control.read(await self._resolve_service(request))
        fleet = await self.control.registry.list_all(traffic.service)
        return to_message(pb.GetTrafficResponse, to_traffic_fields(fleet, traffic))

    async def UpdateTraffic(self, request: pb.UpdateTrafficRequest, context: Any) -> pb.UpdateTrafficResponse:
        fields = await self._change(request, validate.parse_traffic_change(request), context)
        return to_message(pb.UpdateTrafficResponse, fields)

    async def Rollback(self, request: pb.RollbackRequest, context: Any) -> pb.RollbackResponse:
        wait_s = validate.parse_wait(request)
        note = validate.parse_note(request, context.peer())
        result = await self.control.rollback(validate.check_text("service", request.service), note)
        if result.unrecorded_reason:
            await self.control.connections.wait_acknowledged(result.traffic, wait_s)
            fleet = self.control.registry.list_local(
                result.traffic.service, "the ledger, which lists them, can't be reached"
            )
        else:
            fleet = await self.control.registry.wait_acknowledged(result.traffic, wait_s)
        return to_message(
            pb.RollbackResponse,
            **to_traffic_fields(fleet, result.traffic),
            previous=result.previous,
            recording_error=result.unrecorded_reason,
        )

    async def Promote(self, request: pb.PromoteRequest, context: Any) -> pb.PromoteResponse:
        return to_message(pb.PromoteResponse, await self._change(request, TrafficChange.promote(), context))

    async def WatchTraffic(
        self, request: pb.WatchTrafficRequest, context: Any
    ) -> AsyncIterator[pb.WatchTrafficResponse]:
        service = await self._resolve_service(request)
        await self.control.read(service)
        last_traffic = None
        while not self.control.shutdown.is_set():
            current = self.control.current(service)
            if current is None or current.traffic == last_traffic:
                await self.control.change_notifier.wait()
                continue
            last_traffic = current.traffic
            fleet = await self.control.registry.list_all(service)
            yield to_message(pb.WatchTrafficResponse, to_traffic_fields(fleet, last_traffic))
        raise StoppingError

    async def ListTrafficEvents(
        self, request: pb.ListTrafficEventsRequest, context: Any
    ) -> pb.ListTrafficEventsResponse:
        page = validate.parse_page(request)
        service = await self._resolve_service(request)
        filters = {"service": service}
        (before_id,) = decode_cursor("events", filters, page.token) if page.token else (None,)
        events = await self.control.repository.list_events(service, before_id=before_id, limit=page.size + 1)
        is_last = len(events) <= page.size
        token = "" if is_last else encode_cursor("events", filters, [events[page.size - 1].id])
        return to_message(pb.ListTrafficEventsResponse, events=events[: page.size], next_page_token=token)

    async def _resolve_service(self, request: Any) -> str:
        return await self.control.resolve_service(validate.check_text("service", request.service))

    async def _change(self, request: Any, change: TrafficChange, context: Any) -> dict[str, Any]:
        wait_s = validate.parse_wait(request)
        note = validate.parse_note(request, context.peer())
        traffic = await self.control.change(await self._resolve_service(request), change, note)
        return to_traffic_fields(await self.control.registry.wait_acknowledged(traffic, wait_s), traffic)
