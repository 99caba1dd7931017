"""RolloutService."""

# ruff: noqa: ARG002, N802  # gRPC gives the signatures and names

from __future__ import annotations

from typing import Any

from abreast.v1 import rollout_pb2 as pb
from abreast.v1 import rollout_pb2_grpc
from abreast_sidecar.rollout.service import RolloutService
from abreast_sidecar.serve import validate
from abreast_sidecar.serve.convert import to_message
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import AuditNote


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    def __init__(self, control: TrafficController, rollout: RolloutService) -> None:
        self.control = control
        self.rollout = rollout

    async def GetGuard(self, request: pb.GetGuardRequest, context: Any) -> pb.GetGuardResponse:
        guard = await self.rollout.get_guard(await self._resolve_service(request))
        return to_message(pb.GetGuardResponse, guard=guard)

    async def SetGuard(self, request: pb.SetGuardRequest, context: Any) -> pb.SetGuardResponse:
        note = validate.parse_note(request, context.peer())
        change = validate.parse_policy_change(request.policy)
        guard = await self.rollout.set_guard(await self._resolve_service(request), change, note)
        return to_message(pb.SetGuardResponse, guard=guard)

    async def GetRamp(self, request: pb.GetRampRequest, context: Any) -> pb.GetRampResponse:
        service = await self._resolve_service(request)
        return to_message(pb.GetRampResponse, service=service, ramp=await self.rollout.get_ramp(service))

    async def StartRamp(self, request: pb.StartRampRequest, context: Any) -> pb.StartRampResponse:
        note, plan = validate.parse_note(request, context.peer()), validate.parse_plan(request.plan)
        ramp = await self.rollout.start_ramp(await self._resolve_service(request), plan, note)
        return to_message(pb.StartRampResponse, ramp=ramp)

    async def PauseRamp(self, request: pb.PauseRampRequest, context: Any) -> pb.PauseRampResponse:
        ramp = await self.rollout.pause_ramp(*await self._parse_request(request, context))
        return to_message(pb.PauseRampResponse, ramp=ramp)

    async def ResumeRamp(self, request: pb.ResumeRampRequest, context: Any) -> pb.ResumeRampResponse:
        ramp = await self.rollout.resume_ramp(*await self._parse_request(request, context))
        return to_message(pb.ResumeRampResponse, ramp=ramp)

    async def AbortRamp(self, request: pb.AbortRampRequest, context: Any) -> pb.AbortRampResponse:
        ramp = await self.rollout.abort_ramp(*await self._parse_request(request, context))
        return to_message(pb.AbortRampResponse, ramp=ramp)

    async def _parse_request(self, request: Any, context: Any) -> tuple[str, AuditNote]:
        note = validate.parse_note(request, context.peer())
        return await self._resolve_service(request), note

    async def _resolve_service(self, request: Any) -> str:
        return await self.control.resolve_service(validate.check_text("service", request.service))
