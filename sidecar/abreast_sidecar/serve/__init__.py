"""What the sidecar offers: gRPC for people, tools and Envoys; health, metrics and a page over HTTP."""
