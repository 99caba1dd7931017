from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from abreast_demo.console_output import program_command

ABREAST = Path(sys.executable).with_name("abreast")


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    command = [str(ABREAST), "demo", "--once", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--listen", "nowhere"), "127.0.0.1:8080"),
        (("--seconds", "1"), "5<=x<=600"),
        (("--rate", "many"), "not a valid float"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_told_before_anything_starts(options: tuple[str, ...], wanted: str) -> None:
    done = demo(*options)

    assert done.returncode == 2
    assert wanted in done.stderr
    assert "starting" not in done.stdout + done.stderr


def test_an_address_that_is_asked_for_and_taken_is_an_error_not_another_address() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = demo("--json", "--listen", address)

    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(f"abreast: {address}")
    assert "Traceback" not in done.stderr


def test_proposals_begin_with_the_program_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "a venv" / "bin" / "abreast"
    called.parent.mkdir(parents=True)
    called.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")

    monkeypatch.setattr(sys, "argv", ["a venv/bin/abreast"])
    assert program_command() == "'a venv/bin/abreast'"
    monkeypatch.setenv("PATH", str(called.parent))
    assert program_command() == "abreast"
    monkeypatch.setattr(sys, "argv", [str(ABREAST)])
    assert program_command() == str(ABREAST)  # what is on the PATH is another one
    monkeypatch.setattr(sys, "argv", ["/lib/abreast_sidecar/__main__.py"])
    assert program_command() == f"{sys.executable} -m abreast_sidecar"
