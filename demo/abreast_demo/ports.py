"""The addresses that people expect, where they are free: 8080 for users, 50051 and 8090 for the sidecar."""

from __future__ import annotations

import contextlib
import socket
from typing import Self

from abreast_sidecar.embedded import find_free_port
from abreast_sidecar.embedded.process import is_port_free

LOOPBACK = "127.0.0.1"


class PortReservations:
    """Two demos that start together must not take the same port: the UDP port of that number, which nobody needs here,
    says that it is taken. The system frees it however this process ends. Use as a context manager.
    """

    def __init__(self) -> None:
        self._reserved_sockets = contextlib.ExitStack()

    def reserve(self, port: int) -> int:
        """This port, or a free one where it is taken."""
        reservation = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            reservation.bind((LOOPBACK, port))
        except OSError:
            reservation.close()
            return find_free_port()
        self._reserved_sockets.callback(reservation.close)
        return port if is_port_free(LOOPBACK, port) else find_free_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._reserved_sockets.close()
