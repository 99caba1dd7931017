from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from abreast_demo.run import program_command

ABREAST = Path(sys.executable).with_name("abreast")


def run_demo(*options: str) -> subprocess.CompletedProcess[str]:
    command = [str(ABREAST), "demo", "--once", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("options", "expected_text"),
    [
        (("--listen", "nowhere"), "127.0.0.1:8080"),
        (("--seconds", "1"), "5<=x<=600"),
        (("--rate", "many"), "not a valid float"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_demo_rejects_invalid_options_before_it_starts_servers(options: tuple[str, ...], expected_text: str) -> None:
    result = run_demo(*options)

    assert result.returncode == 2
    assert expected_text in result.stderr
    assert "starting" not in result.stdout + result.stderr


def test_demo_fails_if_its_listen_address_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        result = run_demo("--json", "--listen", address)

    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr.startswith(f"abreast: {address}")
    assert "Traceback" not in result.stderr


def test_program_command_is_how_the_user_called_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "a venv" / "bin" / "abreast"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")

    monkeypatch.setattr(sys, "argv", ["a venv/bin/abreast"])
    assert program_command() == "'a venv/bin/abreast'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert program_command() == "abreast"
    monkeypatch.setattr(sys, "argv", [str(ABREAST)])
    assert program_command() == str(ABREAST)  # the PATH has a different one
    monkeypatch.setattr(sys, "argv", ["/lib/abreast_sidecar/__main__.py"])
    assert program_command() == f"{sys.executable} -m abreast_sidecar"
