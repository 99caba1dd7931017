from __future__ import annotations

import socket

from abreast_sidecar.errors import ServerError

LISTEN_BACKLOG = 128


def bind_socket(listen: str, purpose: str, setting: str) -> socket.socket:
    """A socket that listens on host:port. Raise ServerError, in words for people, when the port is taken."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(LISTEN_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ServerError(
            f"can't listen on {listen} for {purpose}: {error.strerror}; choose another with {setting}"
        ) from error
    return listener
