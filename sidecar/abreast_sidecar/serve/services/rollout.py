from __future__ import annotations

from typing import Any

from abreast.v1 import rollout_pb2 as pb
from abreast.v1 import rollout_pb2_grpc
from abreast_sidecar.rollout.service import RolloutService
from abreast_sidecar.serve import rollout_messages as steering_messages
from abreast_sidecar.serve import validate as arguments
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import AuditNote

# ruff: noqa: N802  # names and shapes are the API's


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    def __init__(self, control: TrafficController, rollout: RolloutService) -> None:
        self.control = control
        self.rollout = rollout

    async def GetGuard(self, request: pb.GetGuardRequest, context: Any) -> pb.GetGuardResponse:  # noqa: ARG002
        guard = await self.rollout.get_guard(await self._resolve_service(request))
        return pb.GetGuardResponse(guard=steering_messages.to_guard_message(guard))

    async def SetGuard(self, request: pb.SetGuardRequest, context: Any) -> pb.SetGuardResponse:
        note = arguments.parse_note(request, context.peer())
        change = steering_messages.parse_policy_change(request.policy)
        guard = await self.rollout.set_guard(await self._resolve_service(request), change, note)
        return pb.SetGuardResponse(guard=steering_messages.to_guard_message(guard))

    async def GetRamp(self, request: pb.GetRampRequest, context: Any) -> pb.GetRampResponse:  # noqa: ARG002
        service = await self._resolve_service(request)
        ramp = await self.rollout.get_ramp(service)
        return pb.GetRampResponse(service=service, ramp=steering_messages.to_ramp_message(ramp) if ramp else None)

    async def StartRamp(self, request: pb.StartRampRequest, context: Any) -> pb.StartRampResponse:
        note, plan = arguments.parse_note(request, context.peer()), steering_messages.parse_plan(request.plan)
        ramp = await self.rollout.start_ramp(await self._resolve_service(request), plan, note)
        return pb.StartRampResponse(ramp=steering_messages.to_ramp_message(ramp))

    async def PauseRamp(self, request: pb.PauseRampRequest, context: Any) -> pb.PauseRampResponse:
        ramp = await self.rollout.pause_ramp(*await self._parse_request(request, context))
        return pb.PauseRampResponse(ramp=steering_messages.to_ramp_message(ramp))

    async def ResumeRamp(self, request: pb.ResumeRampRequest, context: Any) -> pb.ResumeRampResponse:
        ramp = await self.rollout.resume_ramp(*await self._parse_request(request, context))
        return pb.ResumeRampResponse(ramp=steering_messages.to_ramp_message(ramp))

    async def AbortRamp(self, request: pb.AbortRampRequest, context: Any) -> pb.AbortRampResponse:
        ramp = await self.rollout.abort_ramp(*await self._parse_request(request, context))
        return pb.AbortRampResponse(ramp=steering_messages.to_ramp_message(ramp))

    async def _parse_request(self, request: Any, context: Any) -> tuple[str, AuditNote]:
        note = arguments.parse_note(request, context.peer())
        return await self._resolve_service(request), note

    async def _resolve_service(self, request: Any) -> str:
        return await self.control.resolve_service(arguments.check_text("service", request.service))
