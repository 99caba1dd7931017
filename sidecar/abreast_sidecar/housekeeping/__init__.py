"""What has to be done now and then: sweep, reports, Envoy's counts, noise, latency, retention."""

from abreast_sidecar.housekeeping.housekeeping import JobRunner

__all__ = ["JobRunner"]
