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
from collections import deque
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
INTERRUPT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILL_TIMEOUT_S = 5.0
UNPRIVILEGED_USER = "nobody"
STABLE_PORT_RANGE = range(20_000, 32_000)  # below the ports that Linux and macOS use for outgoing connections
ANY_PORT = 0
MAX_RESERVED_PORTS = 64

_reservations: deque[int] = deque()  # descriptors of bound sockets


def find_free_port() -> int:
    """Return a port that stays free until its server listens, and while the server restarts.

    A bound socket reserves it, so that no call in any process returns it again soon. Servers that set SO_REUSEADDR may
    listen on it. The system may use a port of its ephemeral range for any outgoing connection.
    """
    candidates = (*(secrets.choice(STABLE_PORT_RANGE) for _ in range(100)), ANY_PORT)
    for candidate in candidates:
        reservation = socket.socket()
        try:
            reservation.bind(("127.0.0.1", candidate))
        except OSError:
            reservation.close()
            continue
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after bind, which is exclusive without it
        port = int(reservation.getsockname()[1])
        _reservations.append(reservation.detach())
        if len(_reservations) > MAX_RESERVED_PORTS:
            os.close(_reservations.popleft())
        return port
    raise ServerError("no port of 127.0.0.1 is free; stop servers that you don't need")


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


def _create_process(
    command: Sequence[str | Path], *, death_signal: signal.Signals, environment: Mapping[str, str], **options: Any
) -> subprocess.Popen[bytes]:
    """Create a process in its own session, which receives `death_signal` when this one ends.

    Interrupts wait until it exists: Python ignores the exception of a signal handler that runs in its hooks at a fork.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPT_SIGNALS)

    def prepare() -> None:  # runs after the change of the user, which would clear the signal
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, int(death_signal))
            if os.getppid() != parent:
                os._exit(1)

    try:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **environment},
            preexec_fn=prepare,  # noqa: PLW1509  # no other thread runs yet
            start_new_session=True,  # so that Ctrl-C in the terminal does not reach it
            **options,
        )
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        raise
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
    except BaseException:  # an interrupt that waited
        process.kill()
        process.wait()
        raise
    return process


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
            process = _create_process(
                command,
                death_signal=stop_signal,
                environment=environment or {},
                stdout=output,
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


def run_tool(
    command: Sequence[str | Path], *, identity: Mapping[str, Any], inherited_fds: Sequence[int]
) -> tuple[int, str]:
    """Run a command and return its exit code and output. It ends with this process, even if that is killed.

    Its children end with it if it is interrupted. They inherit `inherited_fds`.
    """
    with _create_process(
        command,
        death_signal=signal.SIGKILL,
        environment={},
        stdout=subprocess.PIPE,
        pass_fds=tuple(inherited_fds),
        **identity,
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:  # also KeyboardInterrupt
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output.decode(errors="replace")


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


def lower_priority(pid: int, niceness: int) -> None:
    """Lower the priority of a server and all of its processes, as far as the system allows.

    Linux may group processes by session and weigh the groups (sched(7), "The autogroup feature"). A server has its own
    session, so its niceness has no effect there, but that of its group has.
    """
    for process in process_tree(pid):
        with contextlib.suppress(psutil.Error, OSError):
            for thread in process.threads():
                os.setpriority(os.PRIO_PROCESS, thread.id, niceness)
            Path(f"/proc/{process.pid}/autogroup").write_text(str(niceness))


def kill_tree(pid: int) -> None:
    """Kill a process and all of its descendants, and wait until the kernel has ended them."""
    processes = process_tree(pid)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=KILL_TIMEOUT_S)
