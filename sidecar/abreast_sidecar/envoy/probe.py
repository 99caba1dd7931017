"""Probes a version before Envoy is configured, for the protocol that it speaks."""

from __future__ import annotations

import contextlib
import socket

from abreast_sidecar.envoy.settings import SocketAddress

PROBE_TIMEOUT_S = 1.0  # for each read and write
# With an empty SETTINGS frame, RFC 9113
H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
H2_SETTINGS_TYPE = 4
HTTP_1, HTTP_2 = "HTTP/1.1", "HTTP/2 without TLS (h2c)"


def probe_protocol(endpoint: SocketAddress, path: str) -> str:
    """Return HTTP_1 or HTTP_2, or "" if the service does not respond. HTTP_1 if it speaks both."""
    host = str(endpoint).encode()
    request = b"GET %b HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n\r\n" % (path.encode(), host)
    if _exchange(endpoint, request).startswith(b"HTTP/1"):
        return HTTP_1
    first_frame = _exchange(endpoint, H2_PREFACE)
    return HTTP_2 if first_frame[3:4] == bytes([H2_SETTINGS_TYPE]) else ""


def _exchange(endpoint: SocketAddress, content: bytes) -> bytes:
    """Send bytes, and return the first bytes of the response: at least 9, unless the connection ends."""
    response = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((endpoint.host, endpoint.port), PROBE_TIMEOUT_S) as connection,
    ):
        connection.sendall(content)
        while len(response) < 9 and (data := connection.recv(4096)):
            response += data
    return response
