"""Processes of local servers: they end with the process that started them."""

from __future__ import annotations

import contextlib
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
from typing import Any, Self

import psutil

from abreast_sidecar.errors import ServerError

PR_SET_PDEATHSIG = 1
SERVER_START_TIMEOUT_S = 60.0
PROCESS_POLL_S = 0.01
KILL_TIMEOUT_S = 5.0
UNPRIVILEGED_USER = "nobody"
STABLE_PORT_RANGE = range(20_000, 32_000)  # below the ports that Linux and macOS use for outgoing connections


def find_free_port() -> int:
    """Return a port that is likely to stay free until its server listens, and while the server restarts.

    The system may use a port of its ephemeral range for any outgoing connection.
    """
    for _ in range(100):
        port = secrets.choice(STABLE_PORT_RANGE)
        if is_port_free("127.0.0.1", port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_port_free(host: str, port: int) -> bool:
    """Return True if no server listens there. Envoy and gRPC would share the port without an error.

    Binding also reports addresses that this machine does not have, and needs no rights. psutil can do neither.
    """
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
    """Return True if all users may enter the folders above the path."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)


def get_unprivileged_identity() -> dict[str, Any]:
    """Return arguments for subprocess that drop root's rights, or nothing for an ordinary user."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam(UNPRIVILEGED_USER)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def create_private_folder(prefix: str) -> Path:
    """Create a folder that only the server's user may read.

    The path is short, because the path of a socket has at most 107 bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))  # TMPDIR may be too long
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

    def prepare() -> None:  # runs after the change of the user, which would clear the signal
        libc.prctl(PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:
            os._exit(1)

    return prepare


@dataclass
class ServerProcess:
    """A running server. Start it from the main thread: it receives `stop_signal` when the thread that started it ends."""

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
        """Start the server and return once `is_ready(pid)` is true. Raise ServerError with the end of the log.

        The process inherits `inherited_fds`: a lock on one of these file descriptors lasts as long as the process.
        """
        with log_path.open("ab") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **(environment or {})},
                preexec_fn=_build_death_signal_hook(os.getpid(), stop_signal),  # noqa: PLW1509  # no other thread runs yet
                start_new_session=True,  # so that Ctrl-C in the terminal does not reach it
                pass_fds=tuple(inherited_fds),
                **(identity or {}),
            )
        server = cls(name, process, log_path, stop_signal)
        try:
            server.wait_until(is_ready, timeout_s)
        except BaseException:  # also KeyboardInterrupt
            server.stop()
            raise
        return server

    def wait_until(self, is_ready: Callable[[int], bool], timeout_s: float = SERVER_START_TIMEOUT_S) -> None:
        """Raise ServerError if the process ends first, or after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while not is_ready(self.popen.pid):
            has_ended = self.popen.poll() is not None
            if has_ended or time.monotonic() > deadline:
                problem = "ended at its start" if has_ended else f"was not ready after {timeout_s:g} s"
                raise ServerError(f"{self.name} {problem}; the end of {self.log_path}:\n{self.read_log_tail()}")
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
        self.popen.send_signal(signal.SIGCONT)  # a suspended process handles no other signal
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(timeout_s)


def is_answering(host: str, port: int, request: bytes, expected: bytes) -> bool:
    """Return True if the server's first 4 KiB in response to the request contain `expected`."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            connection.sendall(request)
            return expected in connection.recv(4096)
    except OSError:
        return False


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


class LocalServer:
    """Base of the servers. `start` returns once the server is ready, and `stop` may be called more than once.

    Without a `folder`, the server's files are in a temporary folder that the end of the context removes.
    """

    def __init__(self, name: str, folder: Path | None, inherited_fds: Sequence[int]) -> None:
        self.name = name
        self.folder = folder
        self.inherited_fds = inherited_fds
        self.process: ServerProcess | None = None
        self._temporary: Path | None = None

    def start(self) -> Self:
        """Return once the server is ready. Raise ServerError."""
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

    def _prepare_folder(self) -> Path:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder
        self._temporary = self._temporary or create_private_folder(f"abreast-{self.name}-")
        return self._temporary


def process_tree(pid: int) -> list[psutil.Process]:
    """Return the process and all of its descendants, such as the workers of a server."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_tree(pid: int) -> None:
    """Kill a process and all of its descendants, and wait until the kernel has ended them."""
    processes = process_tree(pid)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=KILL_TIMEOUT_S)
