"""Periodic jobs: expiry of pairs, reports, Envoy's counts, noise, detectors and retention."""
