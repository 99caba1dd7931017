"""Steers Envoys: the settings of a service's traffic, and Envoy's runtime over gRPC."""

from abreast_sidecar.control.control import Control, RolledBack
from abreast_sidecar.control.discovery import RuntimeDiscovery
from abreast_sidecar.control.envoys import EnvoyState
from abreast_sidecar.control.journal import Event
from abreast_sidecar.control.roster import Roll
from abreast_sidecar.control.traffic import MILLION, WEIGHTS, Change, Note, Shares, Traffic, parts

__all__ = [
    "MILLION",
    "WEIGHTS",
    "Change",
    "Control",
    "EnvoyState",
    "Event",
    "Note",
    "Roll",
    "RolledBack",
    "RuntimeDiscovery",
    "Shares",
    "Traffic",
    "parts",
]
