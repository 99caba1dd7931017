"""The sidecar's interfaces: gRPC services for clients and Envoys, and health, metrics and a web page over HTTP."""
