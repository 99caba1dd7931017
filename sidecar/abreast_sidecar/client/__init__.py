"""Client of the sidecar's gRPC API, and the terminal output that the commands and the demo share."""
