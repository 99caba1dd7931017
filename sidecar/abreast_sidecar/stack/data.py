"""The folder of one run: locked while it lasts; kept for the next run, or thrown away."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack.process import PROCESS_POLL_S, remove_folder

TEMPORARY_ROOT = Path("/tmp")  # noqa: S108  # mkdtemp is safe there, and a server that is not root must pass the way
RUN_FOLDER_PREFIX = "abreast-run-"
RUN_LOCK_FILE = "lock"  # held by the process that runs the servers; holds its process id
SERVERS_LOCK_FILE = "servers.lock"  # inherited by the servers: free when the last one has ended
SERVERS_END_TIMEOUT_S = 30.0  # seconds that the servers of a killed run get to end
DATA_DIRECTORY_MODE = 0o711 if os.geteuid() == 0 else 0o700  # as root, postgres runs as another user and must pass


class DataDirectory:
    """Without a path, a new folder that goes when the run ends; those of killed runs are cleared away first.

    The kernel frees the locks of a process that dies, so a killed run stops nobody.
    """

    def __init__(self, persistent_path: Path | None = None) -> None:
        self.persistent_path = persistent_path
        self.path = Path()
        self._locks: list[int] = []

    @property
    def servers_lock(self) -> int:
        """The file descriptor that the servers inherit."""
        return self._locks[1]

    def create_part(self, name: str, mode: int = 0o700) -> Path:
        folder = self.path / name
        folder.mkdir(mode=mode, exist_ok=True)
        return folder

    def __enter__(self) -> Self:
        try:
            self.path = self._create()
            self._lock()
        except OSError as error:
            raise ServerError(
                f"can't use {self.persistent_path or TEMPORARY_ROOT} as data folder: {error.strerror}"
            ) from error
        return self

    def _create(self) -> Path:
        if self.persistent_path is None:
            remove_killed_runs()
            path = Path(tempfile.mkdtemp(prefix=RUN_FOLDER_PREFIX, dir=TEMPORARY_ROOT))
            path.chmod(DATA_DIRECTORY_MODE)
            return path
        path = self.persistent_path.resolve()
        path.mkdir(mode=DATA_DIRECTORY_MODE, parents=True, exist_ok=True)
        return path

    def _lock(self) -> None:
        run_lock = os.open(self.path / RUN_LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        self._locks.append(run_lock)
        if not _try_lock(run_lock):
            holder_pid = os.pread(run_lock, 20, 0).decode().strip()
            self._unlock()
            raise ServerError(
                f"{self.path} is in use by another run (process {holder_pid or 'unknown'}); "
                "stop that one, or choose another folder with --data"
            )
        os.ftruncate(run_lock, 0)
        os.pwrite(run_lock, f"{os.getpid()}\n".encode(), 0)
        servers_lock = os.open(self.path / SERVERS_LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        self._locks.append(servers_lock)
        self._wait_for_servers(servers_lock)

    def _wait_for_servers(self, lock: int) -> None:
        deadline = time.monotonic() + SERVERS_END_TIMEOUT_S
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                self._unlock()
                raise ServerError(
                    f"servers of an earlier run in {self.path} are still running; end them (see: fuser {self.path / SERVERS_LOCK_FILE})"
                )
            time.sleep(PROCESS_POLL_S)

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.persistent_path is None:
            remove_folder(self.path)
        self._unlock()


def remove_killed_runs() -> None:
    """Remove the temporary folders of our runs that nobody holds any more."""
    for folder in TEMPORARY_ROOT.glob(f"{RUN_FOLDER_PREFIX}*"):
        if _is_abandoned(folder):
            remove_folder(folder)


def _is_abandoned(folder: Path) -> bool:
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return False
        # A run that is just beginning has not written its process id yet.
        return (
            (folder / RUN_LOCK_FILE).stat().st_size > 0
            and _is_free(folder / RUN_LOCK_FILE)
            and _is_free(folder / SERVERS_LOCK_FILE)
        )
    except OSError:
        return False


def _is_free(path: Path) -> bool:
    """An absent lock is free: its run was killed before it began a server."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        return _try_lock(file)
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class RunRegistry:
    """Tell others while the context lasts. Where that is impossible they have to be told by flags, and nothing fails."""

    def __init__(self, grpc_address: str, connection_settings: Mapping[str, str]) -> None:
        self.grpc_address = grpc_address
        self.connection_settings = dict(connection_settings)
        self._file: int | None = None

    def __enter__(self) -> Self:
        try:
            path = _get_record_path(self.grpc_address, create_folder=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(self.connection_settings).encode(), 0)
        except OSError:
            self._close()
        return self

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            _get_record_path(self.grpc_address).unlink(missing_ok=True)
            self._close()


def find_run(grpc_address: str) -> dict[str, str]:
    """What the run with this gRPC address told; empty where none runs on this machine for this user."""
    try:
        file = os.open(_get_record_path(grpc_address), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return {}
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # its run lives
        return _parse_settings(os.pread(file, 65536, 0))
    finally:
        os.close(file)
    return {}


def get_drill_socket_path(grpc_address: str) -> Path:
    """Where the run with this gRPC address takes drills."""
    return _get_record_path(grpc_address).with_suffix(".drill")


def _parse_settings(text: bytes) -> dict[str, str]:
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in document.items()} if isinstance(document, dict) else {}


def _get_record_path(grpc_address: str, *, create_folder: bool = False) -> Path:
    folder = _get_record_folder()
    if create_folder:
        folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is open to others")
    return folder / (grpc_address.replace("localhost:", "127.0.0.1:").replace("/", "_") + ".json")


def _get_record_folder() -> Path:
    user = os.geteuid()
    runtime = Path(f"/run/user/{user}")
    return runtime / "abreast" if os.access(runtime, os.W_OK) else TEMPORARY_ROOT / f"abreast-{user}"
