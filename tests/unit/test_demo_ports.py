from __future__ import annotations

import socket

from abreast_demo.deploy import LOOPBACK, PortReservations
from support import find_free_port


def test_a_free_port_is_taken_as_it_is() -> None:
    port = find_free_port()
    with PortReservations() as ports:
        assert ports.reserve(port) == port


def test_two_demos_that_start_together_get_different_ports() -> None:
    port = find_free_port()
    with PortReservations() as first, PortReservations() as second:
        assert first.reserve(port) == port
        assert second.reserve(port) != port


def test_a_port_is_free_again_when_its_demo_has_ended() -> None:
    port = find_free_port()
    with PortReservations() as ports:
        ports.reserve(port)
    with PortReservations() as ports:
        assert ports.reserve(port) == port


def test_a_port_that_another_program_listens_on_is_left_alone() -> None:
    with socket.socket() as other, PortReservations() as ports:
        other.bind((LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]

        assert ports.reserve(port) != port
