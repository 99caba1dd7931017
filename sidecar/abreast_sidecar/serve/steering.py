# ruff: noqa: N802  # names and shapes are the API's
from __future__ import annotations

from typing import Any

from abreast.v1 import steering_pb2 as pb
from abreast.v1 import steering_pb2_grpc
from abreast_sidecar.control import Control, Note
from abreast_sidecar.control.steerers import Steerers
from abreast_sidecar.serve import arguments, steering_messages


class SteeringControl(steering_pb2_grpc.SteeringServiceServicer):
    def __init__(self, control: Control, steerers: Steerers) -> None:
        self.control = control
        self.steerers = steerers

    async def GetGuard(self, request: pb.GetGuardRequest, context: Any) -> pb.GetGuardResponse:  # noqa: ARG002
        found = await self.steerers.guard(await self._service(request))
        return pb.GetGuardResponse(guard=steering_messages.guard(found))

    async def SetGuard(self, request: pb.SetGuardRequest, context: Any) -> pb.SetGuardResponse:
        note = arguments.note(request, context.peer())
        change = steering_messages.change(request.policy)
        made = await self.steerers.set_guard(await self._service(request), change, note)
        return pb.SetGuardResponse(guard=steering_messages.guard(made))

    async def GetRamp(self, request: pb.GetRampRequest, context: Any) -> pb.GetRampResponse:  # noqa: ARG002
        service = await self._service(request)
        found = await self.steerers.ramp(service)
        return pb.GetRampResponse(service=service, ramp=steering_messages.ramp(found) if found else None)

    async def StartRamp(self, request: pb.StartRampRequest, context: Any) -> pb.StartRampResponse:
        note, plan = arguments.note(request, context.peer()), steering_messages.plan(request.plan)
        made = await self.steerers.start(await self._service(request), plan, note)
        return pb.StartRampResponse(ramp=steering_messages.ramp(made))

    async def PauseRamp(self, request: pb.PauseRampRequest, context: Any) -> pb.PauseRampResponse:
        made = await self.steerers.pause(*await self._asked(request, context))
        return pb.PauseRampResponse(ramp=steering_messages.ramp(made))

    async def ResumeRamp(self, request: pb.ResumeRampRequest, context: Any) -> pb.ResumeRampResponse:
        made = await self.steerers.resume(*await self._asked(request, context))
        return pb.ResumeRampResponse(ramp=steering_messages.ramp(made))

    async def AbortRamp(self, request: pb.AbortRampRequest, context: Any) -> pb.AbortRampResponse:
        made = await self.steerers.abort(*await self._asked(request, context))
        return pb.AbortRampResponse(ramp=steering_messages.ramp(made))

    async def _asked(self, request: Any, context: Any) -> tuple[str, Note]:
        note = arguments.note(request, context.peer())
        return await self._service(request), note

    async def _service(self, request: Any) -> str:
        return await self.control.resolve(arguments.text("service", request.service))
