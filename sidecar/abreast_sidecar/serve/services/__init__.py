"""gRPC services of the API."""
