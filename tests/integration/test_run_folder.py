"""Folders of runs, and where runs say that their parts are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack import data as folder
from abreast_sidecar.stack.data import DataDirectory, RunRegistry, find_run, remove_killed_runs
from support import eventually, find_free_port

HOLD = (
    "import subprocess, sys, time; from pathlib import Path\n"
    "from abreast_sidecar.stack.data import DataDirectory\n"
    "run = DataDirectory(Path(sys.argv[1]) if len(sys.argv) > 1 else None).__enter__()\n"
    "server = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, pass_fds=[run.servers_lock])\n"
    "print(run.path, server.pid, flush=True); time.sleep(600)"
)


def holder(*words: str) -> tuple[subprocess.Popen[str], Path, int]:
    """A process that holds a folder, the folder, and the process id of a server that it started."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path, pid = process.stdout.readline().split()
    return process, Path(path), int(pid)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_kept_folder_stays_and_a_temporary_one_goes(tmp_path: Path) -> None:
    with DataDirectory(tmp_path / "kept") as kept, DataDirectory() as temporary:
        (kept.create_part("redis") / "data").touch()
        assert temporary.path.is_dir()

    assert (tmp_path / "kept" / "redis" / "data").exists()
    assert not temporary.path.exists()


def test_two_runs_on_one_folder_are_refused_with_who_holds_it(tmp_path: Path) -> None:
    with DataDirectory(tmp_path), pytest.raises(ServerError, match=rf"in use by another run \(process {os.getpid()}\)"):
        DataDirectory(tmp_path).__enter__()


def test_a_folder_can_be_used_again(tmp_path: Path) -> None:
    for _ in range(2):
        with DataDirectory(tmp_path):
            pass


def test_a_killed_run_stops_nobody_once_its_servers_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, _path, server = holder(str(tmp_path))
    kill(process)
    monkeypatch.setattr(folder, "SERVERS_END_TIMEOUT_S", 0.1)
    with pytest.raises(ServerError, match="servers of an earlier run"):
        DataDirectory(tmp_path).__enter__()
    os.kill(server, signal.SIGKILL)
    monkeypatch.setattr(folder, "SERVERS_END_TIMEOUT_S", 10.0)

    with DataDirectory(tmp_path) as again:
        assert again.path == tmp_path


def test_folders_of_killed_runs_are_cleared_away_and_those_in_use_are_not() -> None:
    killed, left, server = holder()
    kill(killed)
    alive, used, other = holder()
    try:
        remove_killed_runs()
        assert left.exists()  # its server still runs
        os.kill(server, signal.SIGKILL)
        eventually(lambda: remove_killed_runs() is None and not left.exists(), what="the folder goes")  # type: ignore[func-returns-value]

        assert used.exists()
    finally:
        kill(alive)
        os.kill(other, signal.SIGKILL)
        eventually(lambda: remove_killed_runs() is None and not used.exists(), what="the folder goes")  # type: ignore[func-returns-value]


def test_a_file_in_place_of_the_folder_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match=r"can't use .*file as data folder"):
        DataDirectory(tmp_path / "file").__enter__()


def test_a_run_is_found_by_its_address_while_it_lasts() -> None:
    address = f"127.0.0.1:{find_free_port()}"
    with RunRegistry(address, {"ABREAST_REDIS_URL": "redis://a"}):
        assert find_run(address) == {"ABREAST_REDIS_URL": "redis://a"}
        assert find_run(address.replace("127.0.0.1", "localhost")) == {"ABREAST_REDIS_URL": "redis://a"}

    assert find_run(address) == {}


def test_the_record_of_a_killed_run_is_not_believed() -> None:
    address = f"127.0.0.1:{find_free_port()}"
    program = (
        "import sys, time; from abreast_sidecar.stack.data import RunRegistry\n"
        "RunRegistry(sys.argv[1], {'a': 'b'}).__enter__(); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, address], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    found = find_run(address)
    kill(process)

    assert found == {"a": "b"}
    assert find_run(address) == {}
    with RunRegistry(address, {"a": "c"}):  # and its file is in nobody's way
        assert find_run(address) == {"a": "c"}
