"""Steers Envoys: the settings of a service's traffic, and Envoy's runtime over gRPC."""

from abreast_sidecar.control.control import RollbackResult, TrafficController
from abreast_sidecar.control.discovery import RtdsServer
from abreast_sidecar.control.envoys import EnvoyState
from abreast_sidecar.control.journal import TrafficEvent
from abreast_sidecar.control.roster import EnvoyFleet
from abreast_sidecar.control.traffic import (
    MILLION,
    TOTAL_WEIGHT,
    AuditNote,
    Shares,
    Traffic,
    TrafficChange,
    to_fixed_point,
)

__all__ = [
    "MILLION",
    "TOTAL_WEIGHT",
    "AuditNote",
    "EnvoyFleet",
    "EnvoyState",
    "RollbackResult",
    "RtdsServer",
    "Shares",
    "Traffic",
    "TrafficChange",
    "TrafficController",
    "TrafficEvent",
    "to_fixed_point",
]
