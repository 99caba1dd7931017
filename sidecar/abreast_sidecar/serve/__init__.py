"""What the sidecar offers: gRPC for people, tools and Envoys; health, metrics and a page over HTTP."""

from abreast_sidecar.serve.comparison import ComparisonServicer
from abreast_sidecar.serve.grpc_server import GrpcServer
from abreast_sidecar.serve.http_server import HttpServer
from abreast_sidecar.serve.interceptor import Interceptor
from abreast_sidecar.serve.latency import LatencyServicer
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.pending import PairBacklog
from abreast_sidecar.serve.readiness import NotReadyError, Readiness
from abreast_sidecar.serve.rules import RuleServicer
from abreast_sidecar.serve.steering import RolloutServicer
from abreast_sidecar.serve.traffic import TrafficServicer
from abreast_sidecar.serve.web import WebApp

__all__ = [
    "ComparisonServicer",
    "GrpcServer",
    "HttpServer",
    "Interceptor",
    "LatencyServicer",
    "Metrics",
    "NotReadyError",
    "PairBacklog",
    "Readiness",
    "RolloutServicer",
    "RuleServicer",
    "TrafficServicer",
    "WebApp",
]
