"""What the sidecar offers: gRPC for people, tools and Envoys; health, metrics and a page over HTTP."""

from abreast_sidecar.serve.comparison import Comparison
from abreast_sidecar.serve.grpc_server import GrpcServer
from abreast_sidecar.serve.http_server import HttpServer
from abreast_sidecar.serve.interceptor import Interceptor
from abreast_sidecar.serve.latency import Latency
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.pending import Pending
from abreast_sidecar.serve.readiness import NotReadyError, Readiness
from abreast_sidecar.serve.rules import RuleControl
from abreast_sidecar.serve.steering import SteeringControl
from abreast_sidecar.serve.traffic import TrafficControl
from abreast_sidecar.serve.web import Web

__all__ = [
    "Comparison",
    "GrpcServer",
    "HttpServer",
    "Interceptor",
    "Latency",
    "Metrics",
    "NotReadyError",
    "Pending",
    "Readiness",
    "RuleControl",
    "SteeringControl",
    "TrafficControl",
    "Web",
]
