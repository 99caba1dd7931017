# ruff: noqa: ARG002, N802  # names and shapes are the API's
from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from abreast.v1 import traffic_pb2 as pb
from abreast.v1 import traffic_pb2_grpc
from abreast_sidecar.control import Change, Control
from abreast_sidecar.serve import arguments, messages
from abreast_sidecar.serve.status import StoppingError
from abreast_sidecar.store import pages


class TrafficControl(traffic_pb2_grpc.TrafficServiceServicer):
    def __init__(self, control: Control) -> None:
        self.control = control

    async def GetTraffic(self, request: pb.GetTrafficRequest, context: Any) -> pb.GetTrafficResponse:
        traffic = await self.control.read(await self._service(request))
        roll = await self.control.roster.all(traffic.service)
        return pb.GetTrafficResponse(**messages.roll(roll, traffic))

    async def UpdateTraffic(self, request: pb.UpdateTrafficRequest, context: Any) -> pb.UpdateTrafficResponse:
        return pb.UpdateTrafficResponse(**await self._change(request, arguments.change(request), context))

    async def Rollback(self, request: pb.RollbackRequest, context: Any) -> pb.RollbackResponse:
        wait = arguments.wait(request)
        note = arguments.note(request, context.peer())
        done = await self.control.rollback(arguments.text("service", request.service), note)
        if done.not_recorded:
            await self.control.envoys.wait_settled(done.traffic, wait)
            roll = self.control.roster.here(done.traffic.service, "the ledger, where they are kept, is away")
        else:
            roll = await self.control.roster.settled(done.traffic, wait)
        return pb.RollbackResponse(
            **messages.roll(roll, done.traffic),
            previous=messages.traffic(done.before) if done.before else None,
            not_recorded=done.not_recorded,
        )

    async def Promote(self, request: pb.PromoteRequest, context: Any) -> pb.PromoteResponse:
        return pb.PromoteResponse(**await self._change(request, Change.promote(), context))

    async def WatchTraffic(
        self,
        request: pb.WatchTrafficRequest,
        context: Any,
    ) -> AsyncIterator[pb.WatchTrafficResponse]:
        service = await self._service(request)
        await self.control.read(service)
        last = None
        while not self.control.closing.is_set():
            held = self.control.held(service)
            if held is None or held.traffic == last:
                await self.control.news.wait()
                continue
            last = held.traffic
            yield pb.WatchTrafficResponse(**messages.roll(await self.control.roster.all(service), last))
        raise StoppingError

    async def ListTrafficEvents(
        self,
        request: pb.ListTrafficEventsRequest,
        context: Any,
    ) -> pb.ListTrafficEventsResponse:
        page = arguments.page(request)
        service = await self._service(request)
        filters = {"service": service}
        (before,) = pages.decode("events", filters, page.token) if page.token else (None,)
        found = await self.control.journal.events(service, before_id=before, limit=page.size + 1)
        shown = found[: page.size]
        return pb.ListTrafficEventsResponse(
            events=[messages.event(one) for one in shown],
            next_page_token=pages.encode("events", filters, [shown[-1].id]) if len(found) > page.size else "",
        )

    async def _service(self, request: Any) -> str:
        return await self.control.resolve(arguments.text("service", request.service))

    async def _change(self, request: Any, change: Change, context: Any) -> dict[str, Any]:
        """All arguments are checked before anything is changed."""
        wait = arguments.wait(request)
        note = arguments.note(request, context.peer())
        traffic = await self.control.change(await self._service(request), change, note)
        return messages.roll(await self.control.roster.settled(traffic, wait), traffic)
