"""A server process that is ours: it dies with us, and stops in a stated time."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from abreast_sidecar.errors import ServerError

if TYPE_CHECKING:
    pass


PR_SET_PDEATHSIG = 1
SERVER_START_TIMEOUT_S = 60.0  # seconds
PROCESS_POLL_S = 0.01  # seconds
UNPRIVILEGED_USER = "nobody"
STABLE_PORT_RANGE = range(20_000, 32_000)  # below what Linux and macOS use for outgoing connections


def find_free_port() -> int:
    """One that is likely to stay free until its server listens, and while it is away.

    From the system's own range, any client's connection may be given that very port.
    """
    for _ in range(100):
        port = secrets.choice(STABLE_PORT_RANGE)
        if is_port_free("127.0.0.1", port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        probe_port: int = probe.getsockname()[1]
        return probe_port


def is_port_free(host: str, port: int) -> bool:
    """Whether nobody listens there. Envoy and gRPC share a port without a word, so ask before they start."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ServerError(f"can't listen on {host}:{port}: {(error.strerror or str(error)).lower()}") from error
    return True


def is_reachable_by_others(path: Path) -> bool:
    """Whether any user may pass every folder above the path."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)


def get_unprivileged_identity() -> dict[str, Any]:
    """Arguments for subprocess that drop root's rights; empty for an ordinary user."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam(UNPRIVILEGED_USER)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def create_private_folder(prefix: str) -> Path:
    """A new folder that only the server's user may read, in a place it may pass.

    Short, since a socket's path may have 107 bytes only.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))  # mkdtemp is safe there; TMPDIR may be too long
    chown_to_server_user(folder)
    return folder


def chown_to_server_user(path: Path) -> None:
    identity = get_unprivileged_identity()
    if identity:
        os.chown(path, identity["user"], identity["group"])


def _build_death_signal_hook(parent: int, death_signal: signal.Signals) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:  # runs after the change of user, which would clear it
        libc.prctl(PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:
            os._exit(1)

    return prepare


@dataclass
class ServerProcess:
    """Start from the main thread: the death signal follows the thread that started the server."""

    name: str
    popen: subprocess.Popen[bytes]
    log_path: Path
    stop_signal: signal.Signals = signal.SIGTERM

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str | Path],
        log_path: Path,
        *,
        is_ready: Callable[[int], bool],
        stop_signal: signal.Signals = signal.SIGTERM,
        environment: Mapping[str, str] | None = None,
        identity: Mapping[str, Any] | None = None,
        timeout_s: float = SERVER_START_TIMEOUT_S,
        inherited_fds: Sequence[int] = (),
    ) -> ServerProcess:
        """Return once `ready(pid)` is true. Raise ServerError with the end of the log otherwise.

        The process inherits the file descriptors `keep_open`: a lock on one of them lasts as long as the process.
        """
        with log_path.open("ab") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **(environment or {})},
                preexec_fn=_build_death_signal_hook(os.getpid(), stop_signal),  # noqa: PLW1509  # no threads at work yet
                start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
                pass_fds=tuple(inherited_fds),
                **(identity or {}),
            )
        server = cls(name, process, log_path, stop_signal)
        try:
            server.wait_until(is_ready, timeout_s)
        except BaseException:  # an interrupt too: nobody else knows this process yet
            server.stop()
            raise
        return server

    def wait_until(self, is_ready: Callable[[int], bool], timeout_s: float = SERVER_START_TIMEOUT_S) -> None:
        """Raise ServerError if the process ends first, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout_s
        while not is_ready(self.popen.pid):
            if self.popen.poll() is not None:
                raise ServerError(
                    f"{self.name} ended at its start; the end of {self.log_path}:\n{self.read_log_tail()}"
                )
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} was not ready after {timeout_s:g} s; the end of {self.log_path}:\n{self.read_log_tail()}"
                )
            time.sleep(PROCESS_POLL_S)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_alive(self) -> bool:
        return self.popen.poll() is None

    def read_log_tail(self, lines: int = 12) -> str:
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def stop(self, timeout_s: float = 15.0) -> None:
        if self.popen.poll() is not None:
            return
        self.popen.send_signal(self.stop_signal)
        self.popen.send_signal(signal.SIGCONT)  # a stopped server hears nothing else
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(timeout_s)


def is_answering(host: str, port: int, request: bytes, expected: bytes) -> bool:
    """Whether a server at host:port answers the question with what is wanted."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            connection.sendall(request)
            return expected in connection.recv(4096)
    except OSError:
        return False


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


class LocalServer:
    """The life of a server of ours: `start` once, `stop` as often as one likes; a context manager of both."""

    def __init__(self) -> None:
        self.process: ServerProcess | None = None
        self._temporary: Path | None = None  # where its files are, and removed with it, unless it has a folder

    def start(self) -> Self:
        """Return once it answers. Raise ServerError otherwise."""
        raise NotImplementedError

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._temporary is not None:
            remove_folder(self._temporary)
