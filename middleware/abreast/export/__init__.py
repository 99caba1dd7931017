"""Export of captures to Redis, off the request path."""
