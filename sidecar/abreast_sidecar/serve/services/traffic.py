from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from abreast.v1 import traffic_pb2 as pb
from abreast.v1 import traffic_pb2_grpc
from abreast_sidecar.serve import messages
from abreast_sidecar.serve import validate as arguments
from abreast_sidecar.serve.errors import StoppingError
from abreast_sidecar.store import reader as pages
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import TrafficChange

# ruff: noqa: ARG002, N802  # names and shapes are the API's


class TrafficServicer(traffic_pb2_grpc.TrafficServiceServicer):
    def __init__(self, control: TrafficController) -> None:
        self.control = control

    async def GetTraffic(self, request: pb.GetTrafficRequest, context: Any) -> pb.GetTrafficResponse:
        traffic = await self.control.read(await self._resolve_service(request))
        fleet = await self.control.registry.list_all(traffic.service)
        return pb.GetTrafficResponse(**messages.to_traffic_fields(fleet, traffic))

    async def UpdateTraffic(self, request: pb.UpdateTrafficRequest, context: Any) -> pb.UpdateTrafficResponse:
        return pb.UpdateTrafficResponse(**await self._change(request, arguments.parse_traffic_change(request), context))

    async def Rollback(self, request: pb.RollbackRequest, context: Any) -> pb.RollbackResponse:
        wait = arguments.parse_wait(request)
        note = arguments.parse_note(request, context.peer())
        result = await self.control.rollback(arguments.check_text("service", request.service), note)
        if result.unrecorded_reason:
            await self.control.connections.wait_acknowledged(result.traffic, wait)
            fleet = self.control.registry.list_local(result.traffic.service, "the ledger, where they are kept, is away")
        else:
            fleet = await self.control.registry.wait_acknowledged(result.traffic, wait)
        return pb.RollbackResponse(
            **messages.to_traffic_fields(fleet, result.traffic),
            previous=messages.to_traffic_message(result.previous) if result.previous else None,
            recording_error=result.unrecorded_reason,
        )

    async def Promote(self, request: pb.PromoteRequest, context: Any) -> pb.PromoteResponse:
        return pb.PromoteResponse(**await self._change(request, TrafficChange.promote(), context))

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
            yield pb.WatchTrafficResponse(
                **messages.to_traffic_fields(await self.control.registry.list_all(service), last_traffic)
            )
        raise StoppingError

    async def ListTrafficEvents(
        self, request: pb.ListTrafficEventsRequest, context: Any
    ) -> pb.ListTrafficEventsResponse:
        page = arguments.parse_page(request)
        service = await self._resolve_service(request)
        filters = {"service": service}
        (before_id,) = pages.decode_cursor("events", filters, page.token) if page.token else (None,)
        events = await self.control.repository.list_events(service, before_id=before_id, limit=page.size + 1)
        page_events = events[: page.size]
        return pb.ListTrafficEventsResponse(
            events=[messages.to_traffic_event_message(event) for event in page_events],
            next_page_token=pages.encode_cursor("events", filters, [page_events[-1].id])
            if len(events) > page.size
            else "",
        )

    async def _resolve_service(self, request: Any) -> str:
        return await self.control.resolve_service(arguments.check_text("service", request.service))

    async def _change(self, request: Any, change: TrafficChange, context: Any) -> dict[str, Any]:
        """All arguments are checked before anything is changed."""
        wait = arguments.parse_wait(request)
        note = arguments.parse_note(request, context.peer())
        traffic = await self.control.change(await self._resolve_service(request), change, note)
        return messages.to_traffic_fields(await self.control.registry.wait_acknowledged(traffic, wait), traffic)
