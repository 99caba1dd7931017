"""How `abreast drill --running` breaks a part of a stack that runs: the stack's own process does it, and repairs it.

They talk over a socket that only this user may reach, one JSON object a line. A fault lasts as long as its connection: a
drill that is interrupted or killed leaves nothing broken.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from abreast_sidecar.embedded.faults import Fault
from abreast_sidecar.embedded.record import drill_socket
from abreast_sidecar.errors import ServerError

ANSWER = 30.0  # seconds that breaking or repairing may take
HELLO = 5.0  # seconds
LASTS = 120.0  # seconds, whatever becomes of the drill
LONGEST = 65_536  # bytes of a line

Find = Callable[
    [str, int], Fault
]  # by the drill's name and new's process, 0 for none named; raises ServerError


class Breaker:
    """In the stack's process. Call `serve` again and again, from the thread that started the servers.

    `facts` are told to each drill. `say` is told what is broken and repaired.
    """

    def __init__(
        self, grpc_address: str, facts: Mapping[str, Any], find: Find, say: Callable[[str], None]
    ) -> None:
        self._address = grpc_address
        self._facts = dict(facts)
        self._find = find
        self._say = say
        self._selector = selectors.DefaultSelector()
        self._listening: socket.socket | None = None
        self._drill: socket.socket | None = None
        self._broken: tuple[str, Fault] | None = None
        self._until = 0.0  # monotonic

    def __enter__(self) -> Self:
        """Where the socket can't be made there are no drills, and nothing fails."""
        with contextlib.suppress(OSError):
            path = drill_socket(self._address)  # its folder is for this user only
            path.unlink(missing_ok=True)
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listening.bind(str(path))
            listening.listen()
            listening.setblocking(False)
            self._listening = listening
            self._selector.register(listening, selectors.EVENT_READ)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        if self._listening is not None:
            self._listening.close()
            drill_socket(self._address).unlink(missing_ok=True)
        self._selector.close()

    @property
    def busy(self) -> bool:
        return self._drill is not None

    def serve(self, seconds: float) -> None:
        """For so long; at least one look."""
        end = time.monotonic() + seconds
        while True:
            left = max(end - time.monotonic(), 0.0)
            if self._listening is None:
                time.sleep(left)
                return
            for key, _events in self._selector.select(left):
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    self._hear()
            if self._broken and time.monotonic() > self._until:
                self._leave()
            if time.monotonic() >= end:
                return

    def _accept(self) -> None:
        assert self._listening is not None
        with contextlib.suppress(OSError):
            drill, _address = self._listening.accept()
            drill.settimeout(HELLO)
            if self._drill is not None:
                _tell(drill, {"error": "another drill is under way there"})
                drill.close()
                return
            self._drill = drill
            self._selector.register(drill, selectors.EVENT_READ)
            _tell(drill, self._facts)

    def _hear(self) -> None:
        assert self._drill is not None
        try:
            line = self._drill.recv(LONGEST)
        except OSError:
            line = b""
        if not line:
            self._leave()
            return
        try:
            answer = self._do(json.loads(line))
        except (ServerError, OSError, ValueError, KeyError, TypeError) as error:
            answer = {"error": str(error)}
        with contextlib.suppress(OSError):
            _tell(self._drill, answer)

    def _do(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        if asked["do"] == "repair":
            self._repair()
            return {"done": True}
        name = str(asked["drill"])
        if self._broken is not None:
            raise ServerError(f"{self._broken[0]} is not over yet")
        fault = self._find(name, int(asked["new"]))
        if asked["do"] != "break":
            return {"done": True}
        self._say(f"a drill: {name}")
        self._broken, self._until = (name, fault), time.monotonic() + LASTS
        fault.breaks()
        return {"done": True}

    def _repair(self) -> None:
        if self._broken is not None:
            (name, fault), self._broken = self._broken, None
            fault.repairs()
            self._say(f"the drill is over: {name}")

    def _leave(self) -> None:
        """The drill is gone, however."""
        if self._drill is None:
            return
        self._selector.unregister(self._drill)
        self._drill.close()
        self._drill = None
        try:
            self._repair()
        except ServerError as error:
            self._say(str(error))


class Broken:
    """In the drill's process: the other end. Use as a context manager. Raise ServerError where it is not to be had."""

    def __init__(self, grpc_address: str) -> None:
        with contextlib.ExitStack() as opening:
            self._socket = opening.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            self._socket.settimeout(HELLO)
            try:
                self._socket.connect(str(drill_socket(grpc_address)))
            except OSError as error:
                raise ServerError(
                    f"no abreast up or abreast demo of this user that takes drills runs at {grpc_address}: start one "
                    "(a demo takes them once its first traffic is over), or leave out --running"
                ) from error
            self._lines = opening.enter_context(self._socket.makefile("rb"))
            self.facts = self._answer()
            self._open = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def check(self, name: str, new_pid: int) -> None:
        """Whether it can be done."""
        self._ask({"do": "check", "drill": name, "new": new_pid})

    def breaks(self, name: str, new_pid: int) -> None:
        self._ask({"do": "break", "drill": name, "new": new_pid})

    def repairs(self) -> None:
        self._ask({"do": "repair"})

    def _ask(self, question: Mapping[str, Any]) -> None:
        self._socket.settimeout(ANSWER)
        with contextlib.suppress(OSError):  # then there is no answer either
            _tell(self._socket, question)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._lines.readline(LONGEST))
        except (OSError, ValueError) as error:
            raise ServerError("the run that was drilled does not answer; look at its terminal") from error
        if "error" in found:
            raise ServerError(str(found["error"]))
        return found


def _tell(to: socket.socket, what: Mapping[str, Any]) -> None:
    to.sendall(json.dumps(what).encode() + b"\n")
