"""The gRPC server: the API, Envoy's discovery, health and reflection, on one port."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from abreast.v1 import (
    comparison_pb2,
    comparison_pb2_grpc,
    latency_pb2,
    latency_pb2_grpc,
    rule_pb2,
    rule_pb2_grpc,
    steering_pb2,
    steering_pb2_grpc,
    traffic_pb2,
    traffic_pb2_grpc,
)
from abreast_sidecar.control import RtdsServer
from abreast_sidecar.errors import ServerError
from abreast_sidecar.serve.comparison import ComparisonServicer
from abreast_sidecar.serve.interceptor import Interceptor
from abreast_sidecar.serve.latency import LatencyServicer
from abreast_sidecar.serve.listen import bind_socket
from abreast_sidecar.serve.rules import RuleServicer
from abreast_sidecar.serve.steering import RolloutServicer
from abreast_sidecar.serve.traffic import TrafficServicer

GRPC_SERVICE_NAMES = (
    comparison_pb2.DESCRIPTOR.services_by_name["ComparisonService"].full_name,
    latency_pb2.DESCRIPTOR.services_by_name["LatencyService"].full_name,
    rule_pb2.DESCRIPTOR.services_by_name["RuleService"].full_name,
    traffic_pb2.DESCRIPTOR.services_by_name["TrafficService"].full_name,
    steering_pb2.DESCRIPTOR.services_by_name["SteeringService"].full_name,
)
GRPC_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port in use must fail
    ("grpc.max_send_message_length", 64 * 1024 * 1024),  # examples carry bodies
    ("grpc.keepalive_time_ms", 10_000),  # an Envoy whose machine is gone says no goodbye
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients may ping as often
)


class GrpcServer:
    def __init__(
        self,
        listen: str,
        *,
        comparison: ComparisonServicer,
        traffic: TrafficServicer,
        latency: LatencyServicer,
        rules: RuleServicer,
        rollout: RolloutServicer,
        discovery: RtdsServer,
        interceptor: Interceptor,
    ) -> None:
        self.listen = listen
        self.port = 0
        self.health = health.aio.HealthServicer()
        self._server = grpc.aio.server(interceptors=(interceptor,), options=GRPC_SERVER_OPTIONS)
        comparison_pb2_grpc.add_ComparisonServiceServicer_to_server(comparison, self._server)
        traffic_pb2_grpc.add_TrafficServiceServicer_to_server(traffic, self._server)
        latency_pb2_grpc.add_LatencyServiceServicer_to_server(latency, self._server)
        rule_pb2_grpc.add_RuleServiceServicer_to_server(rules, self._server)
        steering_pb2_grpc.add_SteeringServiceServicer_to_server(rollout, self._server)
        self._server.add_generic_rpc_handlers((discovery.build_handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection(
            (*GRPC_SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> None:
        """Raise ServerError when the port is taken."""
        await self.set_ready(False)
        bind_socket(
            self.listen, "gRPC", "ABREAST_GRPC_LISTEN"
        ).close()  # gRPC itself does not say what is wrong
        try:
            self.port = self._server.add_insecure_port(self.listen)
        except RuntimeError as error:
            raise ServerError(
                f"can't listen on {self.listen} for gRPC; choose another with ABREAST_GRPC_LISTEN"
            ) from error
        await self._server.start()

    async def set_ready(self, ready: bool) -> None:
        state = health_pb2.HealthCheckResponse
        for name in ("", *GRPC_SERVICE_NAMES):
            await self.health.set(name, state.SERVING if ready else state.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and give those under way so many seconds."""
        await self._server.stop(grace_s)
