from __future__ import annotations

import socket

from abreast_demo.ports import LOOPBACK, Ports
from support import free_port


def test_a_free_port_is_taken_as_it_is() -> None:
    port = free_port()
    with Ports() as ports:
        assert ports.prefer(port) == port


def test_two_demos_that_start_together_get_different_ports() -> None:
    port = free_port()
    with Ports() as first, Ports() as second:
        assert first.prefer(port) == port
        assert second.prefer(port) != port


def test_a_port_is_free_again_when_its_demo_has_ended() -> None:
    port = free_port()
    with Ports() as ports:
        ports.prefer(port)
    with Ports() as ports:
        assert ports.prefer(port) == port


def test_a_port_that_another_program_listens_on_is_left_alone() -> None:
    with socket.socket() as other, Ports() as ports:
        other.bind((LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]

        assert ports.prefer(port) != port
