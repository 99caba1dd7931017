"""Client of the sidecar's gRPC API, shared by the command line and the demo."""
