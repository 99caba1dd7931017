"""What has to be done now and then: sweep, reports, Envoy's counts, noise, latency, retention."""
