"""Data directories of runs, and the registry of running ones."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack import data
from abreast_sidecar.stack.data import DataDirectory, RunRegistry, find_run, list_runs, remove_killed_runs
from support import eventually, find_free_port

HOLDER_SCRIPT = (
    "import subprocess, sys, time; from pathlib import Path\n"
    "from abreast_sidecar.stack.data import DataDirectory\n"
    "run = DataDirectory(Path(sys.argv[1]) if len(sys.argv) > 1 else None).__enter__()\n"
    "server = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, pass_fds=[run.servers_lock])\n"
    "print(run.path, server.pid, flush=True); time.sleep(600)"
)


def start_holder(*words: str) -> tuple[subprocess.Popen[str], Path, int]:
    """Start a process that locks a directory. Return it, the directory, and the process id of a server that it started."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER_SCRIPT, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path, pid = process.stdout.readline().split()
    return process, Path(path), int(pid)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_data_directory_is_kept_unless_temporary(tmp_path: Path) -> None:
    with DataDirectory(tmp_path / "kept") as permanent, DataDirectory() as temporary:
        (permanent.create_part("redis") / "data").touch()
        assert temporary.path.is_dir()

    assert (tmp_path / "kept" / "redis" / "data").exists()
    assert not temporary.path.exists()


def test_data_directory_in_use_names_the_other_run(tmp_path: Path) -> None:
    with DataDirectory(tmp_path), pytest.raises(ServerError, match=rf"in use by another run \(process {os.getpid()}\)"):
        DataDirectory(tmp_path).__enter__()


def test_data_directory_can_be_reused(tmp_path: Path) -> None:
    for _ in range(2):
        with DataDirectory(tmp_path):
            pass


def test_data_directory_of_killed_run_is_free_once_its_servers_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _path, server = start_holder(str(tmp_path))
    kill(process)
    monkeypatch.setattr(data, "SERVERS_END_TIMEOUT_S", 0.1)
    with pytest.raises(ServerError, match="servers of an earlier run"):
        DataDirectory(tmp_path).__enter__()
    os.kill(server, signal.SIGKILL)
    monkeypatch.setattr(data, "SERVERS_END_TIMEOUT_S", 10.0)

    with DataDirectory(tmp_path) as directory:
        assert directory.path == tmp_path


def test_remove_killed_runs_spares_directories_in_use() -> None:
    killed, spared, server = start_holder()
    kill(killed)
    alive, used, other = start_holder()
    try:
        remove_killed_runs()
        assert spared.exists()  # its server is still running
        os.kill(server, signal.SIGKILL)
        eventually(lambda: remove_killed_runs() is None and not spared.exists(), description="the folder goes")  # type: ignore[func-returns-value]

        assert used.exists()
    finally:
        kill(alive)
        os.kill(other, signal.SIGKILL)
        eventually(lambda: remove_killed_runs() is None and not used.exists(), description="the folder goes")  # type: ignore[func-returns-value]


def test_data_directory_reports_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match=r"can't use .*file as data directory"):
        DataDirectory(tmp_path / "file").__enter__()


def test_find_run_returns_settings_while_the_run_lasts() -> None:
    address = f"127.0.0.1:{find_free_port()}"
    with RunRegistry(address, {"ABREAST_REDIS_URL": "redis://a"}):
        assert find_run(address) == {"ABREAST_REDIS_URL": "redis://a"}
        assert address in list_runs()
        assert find_run(address.replace("127.0.0.1", "localhost")) == {"ABREAST_REDIS_URL": "redis://a"}

    assert find_run(address) == {}
    assert address not in list_runs()


def test_find_run_ignores_killed_run() -> None:
    address = f"127.0.0.1:{find_free_port()}"
    program = (
        "import sys, time; from abreast_sidecar.stack.data import RunRegistry\n"
        "RunRegistry(sys.argv[1], {'a': 'b'}).__enter__(); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, address], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    settings = find_run(address)
    kill(process)

    assert settings == {"a": "b"}
    assert find_run(address) == {}
    with RunRegistry(address, {"a": "c"}):  # the stale file does not block it
        assert find_run(address) == {"a": "c"}


def test_edge_key_is_generated_once_and_readable_for_its_owner_only(tmp_path: Path) -> None:
    with DataDirectory(tmp_path / "kept") as kept:
        key = kept.load_key("edge-key")
        mode = stat.S_IMODE((kept.path / "edge-key").stat().st_mode)
    with DataDirectory(tmp_path / "kept") as again, DataDirectory() as temporary:
        keys = again.load_key("edge-key"), temporary.load_key("edge-key")

    assert mode == 0o600
    assert keys[0] == key != keys[1]
    assert EnvoySettings.from_environment({"ABREAST_EDGE_KEY": key}).edge_key == key


def make_world_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (make_world_writable, "is writable for other users; run `chmod go-w"),
        (lambda path: path.symlink_to(path.parent), "is a symbolic link"),
    ],
)
def test_data_directory_that_others_can_change_is_refused(
    prepare: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    prepare(path)

    with pytest.raises(ServerError, match=message), DataDirectory(path):
        pass


def test_data_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)

    with pytest.raises(ServerError, match="belongs to another user"), DataDirectory(path):
        pass


def test_symbolic_link_as_lock_is_not_followed(tmp_path: Path) -> None:
    path, target = tmp_path / "data", tmp_path / "target"
    path.mkdir()
    target.write_text("untouched")
    (path / "lock").symlink_to(target)

    with pytest.raises(ServerError, match="can't use"), DataDirectory(path):
        pass

    assert target.read_text() == "untouched"
