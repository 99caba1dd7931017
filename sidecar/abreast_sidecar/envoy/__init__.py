"""Envoy's configuration: its settings, its template, and the Envoy binary that validates it."""
