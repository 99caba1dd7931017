"""Servers and processes whose clock a test sets while they run: what the wall shows, never how fast time goes by."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from abreast_sidecar.stack.process import chown_to_server_user, create_private_folder, remove_folder
from abreast_sidecar.stack.servers import PostgresServer, RedisServer, find_bundled_redis

LIBRARY = "faketime/libfaketimeMT.so.1"


def library() -> Path | None:
    return next(Path("/usr/lib").glob(f"*/{LIBRARY}"), None)


class Clock:
    """Use as a context manager. `environment` is for the processes that go by it."""

    def __init__(self) -> None:
        library_path = library()
        assert library_path, "libfaketime is needed: apt-get install libfaketime"
        self.folder = create_private_folder("abreast-clock-")
        self.environment = {
            "LD_PRELOAD": str(library_path),
            "FAKETIME_TIMESTAMP_FILE": str(self.folder / "offset"),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DISABLE_SHM": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        self.jump("+0")

    def jump(self, offset: str) -> None:
        """Show the time as much before or after the machine's, such as -1h or +400d."""
        draft = self.folder / "draft"
        draft.write_text(f"{offset}\n")
        chown_to_server_user(draft)
        draft.rename(self.folder / "offset")

    def program(self, path: Path) -> Path:
        """Write a program that runs another one by this clock, under its name."""
        link = self.folder / path.name
        lines = [f"export {name}='{value}'" for name, value in self.environment.items()]
        link.write_text("\n".join(("#!/bin/sh", *lines, f'exec {path} "$@"\n')))
        link.chmod(0o755)
        chown_to_server_user(link)
        return link

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        remove_folder(self.folder)


@contextmanager
def redis_by(clock: Clock) -> Iterator[RedisServer]:
    """Return the bundled server: jemalloc, which others use, asks for the time before the library is ready."""
    with RedisServer(binary=clock.program(find_bundled_redis())) as server:
        yield server


@contextmanager
def postgres_by(clock: Clock) -> Iterator[PostgresServer]:
    chosen = os.environ.get("ABREAST_TEST_POSTGRES")
    real = PostgresServer(binaries=Path(chosen) if chosen else None).binaries
    for name in ("initdb", "postgres"):
        clock.program(real / name)
    with PostgresServer(binaries=clock.folder, options=("max_connections=100",)) as server:
        yield server


def python_by(clock: Clock) -> Path:
    return clock.program(Path(sys.executable))
