"""Where the parts of a run are, for commands on the same machine: `abreast doctor` needs no flags then.

One file a run, named after the sidecar's gRPC address, in a folder that only this user may read: it holds the
database's password. The run holds a lock on it, so the file of a killed run is known as such.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from abreast_sidecar.embedded.folder import TEMPORARY_ROOT


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
