"""Data directory of a run, locked while the run lasts, and the registry where commands find the run's servers."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack.process import PROCESS_POLL_S, remove_folder

TEMPORARY_ROOT = Path("/tmp")  # noqa: S108  # mkdtemp is safe, and servers without root's rights may enter
RUN_FOLDER_PREFIX = "abreast-run-"
RUN_LOCK_FILE = "lock"  # locked by the process that runs the servers; contains its process id
SERVERS_LOCK_FILE = "servers.lock"  # inherited by the servers: free once the last one has ended
KEY_BYTES = 32
REDACTION_KEY_VARIABLE = "ABREAST_REDACT_KEY_FILE"
SERVERS_END_TIMEOUT_S = 30.0  # for the servers of a killed run
DATA_DIRECTORY_MODE = (
    0o711 if os.geteuid() == 0 else 0o700
)  # as root, Postgres runs as another user, who must be able to enter


class DataDirectory:
    """A persistent directory, or a temporary one that is deleted at the end of the run.

    The kernel frees the locks of a process that dies, so that a killed run does not block the next one.
    """

    def __init__(self, persistent_path: Path | None = None) -> None:
        self.persistent_path = persistent_path
        self.path = Path()
        self._locks: list[int] = []

    @property
    def servers_lock(self) -> int:
        """Return the file descriptor that the servers inherit."""
        return self._locks[1]

    def create_part(self, name: str, mode: int = 0o700) -> Path:
        folder = self.path / name
        folder.mkdir(mode=mode, exist_ok=True)
        return folder

    def load_key(self, file_name: str) -> str:
        """Return the secret key in a file of this directory, which the first call creates. Only its owner can read it."""
        path = self.path / file_name
        if not path.exists():
            write_secret(path, secrets.token_hex(KEY_BYTES))
        return path.read_text().strip()

    def __enter__(self) -> Self:
        try:
            self.path = self._create()
            self._lock()
        except OSError as error:
            raise ServerError(
                f"can't use {self.persistent_path or TEMPORARY_ROOT} as data directory: {error.strerror}"
            ) from error
        return self

    def _create(self) -> Path:
        if self.persistent_path is None:
            remove_killed_runs()
            path = Path(tempfile.mkdtemp(prefix=RUN_FOLDER_PREFIX, dir=TEMPORARY_ROOT))
            path.chmod(DATA_DIRECTORY_MODE)
            return path
        path = self.persistent_path
        path.mkdir(mode=DATA_DIRECTORY_MODE, parents=True, exist_ok=True)
        _check_owner(path)
        return path.resolve()

    def _lock(self) -> None:
        run_lock = os.open(self.path / RUN_LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._locks.append(run_lock)
        if not _try_lock(run_lock):
            holder_pid = os.pread(run_lock, 20, 0).decode().strip()
            self._unlock()
            raise ServerError(
                f"{self.path} is in use by another run (process {holder_pid or 'unknown'}); "
                "stop it, or choose another directory with --data"
            )
        os.ftruncate(run_lock, 0)
        os.pwrite(run_lock, f"{os.getpid()}\n".encode(), 0)
        servers_lock = os.open(self.path / SERVERS_LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._locks.append(servers_lock)
        self._wait_for_servers(servers_lock)

    def _wait_for_servers(self, lock: int) -> None:
        deadline = time.monotonic() + SERVERS_END_TIMEOUT_S
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                self._unlock()
                lock_path = self.path / SERVERS_LOCK_FILE
                raise ServerError(
                    f"servers of an earlier run in {self.path} still run; end them (to list them: fuser {lock_path})"
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


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, the same one as before, so that no reader sees a part of the text."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_text(f"{text}\n")
    if path.exists():
        status = path.stat()
        os.chown(draft, status.st_uid, status.st_gid)
        draft.chmod(stat.S_IMODE(status.st_mode))
    draft.rename(path)


def remove_killed_runs() -> None:
    """Remove the temporary directories of killed runs."""
    for folder in TEMPORARY_ROOT.glob(f"{RUN_FOLDER_PREFIX}*"):
        if _is_abandoned(folder):
            remove_folder(folder)


def _is_abandoned(folder: Path) -> bool:
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return False
        # a run that is starting has not written its process id yet
        return (
            (folder / RUN_LOCK_FILE).stat().st_size > 0
            and _is_free(folder / RUN_LOCK_FILE)
            and _is_free(folder / SERVERS_LOCK_FILE)
        )
    except OSError:
        return False


def _is_free(path: Path) -> bool:
    """Return True if the lock is free. An absent one is free: the run was killed before it started a server."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        return _try_lock(file)
    finally:
        os.close(file)


def _check_owner(path: Path) -> None:
    """Raise ServerError for a directory that another user could have prepared, or could change."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise ServerError(f"{path} is a symbolic link; name the data directory itself with --data")
    if status.st_uid != os.geteuid():
        raise ServerError(f"{path} belongs to another user; choose a data directory that is yours with --data")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ServerError(f"{path} is writable for other users; run `chmod go-w {path}`, or choose another directory")


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class RunRegistry:
    """Publishes the addresses of a run to commands of the same user, while the context lasts.

    If the registry is not writable, commands need options to find the servers, and nothing fails.
    """

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
    """Return the settings of the run with this gRPC address, or nothing if no such run of this user exists."""
    try:
        file = os.open(_get_record_path(grpc_address), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return {}
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # the run is alive
        return _parse_settings(os.pread(file, 65536, 0))
    finally:
        os.close(file)
    return {}


def list_runs() -> list[str]:
    """Return the gRPC addresses of the runs of this user that are alive."""
    try:
        paths = sorted(_get_record_path("").parent.glob("*.json"))
    except OSError:
        return []
    return [path.stem for path in paths if find_run(path.stem)]


def _parse_settings(text: bytes) -> dict[str, str]:
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in document.items()} if isinstance(document, dict) else {}


def _get_record_path(grpc_address: str, *, create_folder: bool = False) -> Path:
    user = os.geteuid()
    runtime = Path(f"/run/user/{user}")
    folder = runtime / "abreast" if os.access(runtime, os.W_OK) else TEMPORARY_ROOT / f"abreast-{user}"
    if create_folder:
        folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user or status.st_mode & 0o077:
        raise PermissionError(f"other users may access {folder}; run: chmod 700 {folder}")
    return folder / (grpc_address.replace("localhost:", "127.0.0.1:").replace("/", "_") + ".json")
