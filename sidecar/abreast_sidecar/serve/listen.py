from __future__ import annotations

import socket

from abreast_sidecar.errors import ServerError

BACKLOG = 128


def listening(listen: str, purpose: str, setting: str) -> socket.socket:
    """A socket that listens on host:port. Raise ServerError, in words for people, when the port is taken."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        found = socket.socket(family, kind)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(BACKLOG)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise ServerError(
            f"can't listen on {listen} for {purpose}: {error.strerror}; choose another with {setting}"
        ) from error
    return found
