from __future__ import annotations

import socket

from abreast_demo.deploy import LOOPBACK, PortReservations
from support import find_free_port


def test_port_reservations_keep_a_free_port() -> None:
    port = find_free_port()
    with PortReservations() as ports:
        assert ports.reserve(port) == port


def test_port_reservations_at_the_same_time_differ() -> None:
    port = find_free_port()
    with PortReservations() as first, PortReservations() as second:
        assert first.reserve(port) == port
        assert second.reserve(port) != port


def test_port_reservations_end_with_their_context() -> None:
    port = find_free_port()
    with PortReservations() as ports:
        ports.reserve(port)
    with PortReservations() as ports:
        assert ports.reserve(port) == port


def test_port_reservations_avoid_a_port_in_use() -> None:
    with socket.socket() as other, PortReservations() as ports:
        other.bind((LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]

        assert ports.reserve(port) != port
