"""Steers Envoys: the settings of a service's traffic, and Envoy's runtime over gRPC."""
