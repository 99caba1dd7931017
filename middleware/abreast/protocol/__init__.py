"""Contract with the sidecar: the wire format of captures, and the join in Redis."""
