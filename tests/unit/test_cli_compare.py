"""`abreast compare`, from files to exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from abreast_sidecar.cli import abreast
from abreast_sidecar.cli.compare import parse_http_file
from abreast_sidecar.errors import ArgumentError

DOC = Path(__file__).parents[2] / "docs/compare.md"


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(abreast, ["compare", *arguments], input=stdin)


def files(folder: Path, old: Any, new: Any) -> tuple[str, str]:
    for name, content in (("old", old), ("new", new)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(folder / "old"), str(folder / "new")


def test_compare_equal_files_exits_with_0(tmp_path: Path) -> None:
    result = run(*files(tmp_path, b'{"a": 1}', b'{"a":1}\n'))

    assert (result.exit_code, result.stdout) == (0, "no difference\n")


def test_compare_different_files_exits_with_1(tmp_path: Path) -> None:
    result = run(*files(tmp_path, {"a": [{"b": 1}]}, {"a": [{"b": "1"}]}))

    assert result.exit_code == 1
    assert result.stdout == 'body $.a[0].b  type, breaking\n  - 1\n  + "1"\n1 difference\n'


def test_compare_prints_json(tmp_path: Path) -> None:
    result = run("--json", *files(tmp_path, {"a": 1}, {"a": 2}))

    assert json.loads(result.stdout) == {
        "outcome": "mismatch",
        "differences": [
            {
                "part": "body",
                "path": "$.a",
                "exact_path": "$.a",
                "kind": "changed",
                "old": "1",
                "new": "2",
                "impact": "value",
                "explained_by": None,
                "hint": None,
            }
        ],
    }


def test_compare_reads_stdin(tmp_path: Path) -> None:
    old, _ = files(tmp_path, {"a": 1}, {})

    assert run(old, "-", stdin='{"a":1}').exit_code == 0
    assert run("-", old, stdin='{"a":2}').exit_code == 1
    assert run("-", "-", stdin="{}").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "nowhere"], "nowhere can't be read: No such file or directory"),
        (["text", "text"], "text is not valid JSON"),
        (["--http", "text", "text"], "text must start with a status line"),
        (["--rules", "text", "json", "json"], "text:1: the file must be a mapping"),
        (["--rules", "nowhere", "json", "json"], "nowhere can't be read"),
        (["--rules", "bytes", "json", "json"], "bytes is not UTF-8"),
        (["--rules", "-", "json", "-"], "only one of the files can be stdin"),
        (["--url", "http://[shop", "json", "json"], "--url must be an address"),
        ([".", "json"], ". can't be read: Is a directory"),
    ],
)
def test_compare_invalid_arguments_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("hello")
    Path("bytes").write_bytes(b"\xff")
    Path("json").write_text("{}")
    result = run(*arguments)

    assert result.exit_code == 2
    assert result.stderr.startswith(f"abreast: {message}")


def test_compare_accepts_empty_bodies(tmp_path: Path) -> None:
    assert run(*files(tmp_path, b"", b"")).exit_code == 0
    assert run(*files(tmp_path, b"{}", b"")).stdout.startswith("body  removed, breaking\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_compare_exits_if_stdout_is_closed(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("abreast")), "compare", *files(tmp_path, {}, {})]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert (process.returncode, process.stderr) == (
        2,
        "abreast: the output can't be written: No space left on device\n",
    )


def test_compare_uses_the_content_type_option(tmp_path: Path) -> None:
    result = run("--type", "text/plain", *files(tmp_path, b"a\nb\n", b"a\nc\n"))

    assert result.exit_code == 1
    assert "lines[1]" in result.stdout


def test_compare_prints_explained_differences(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("rules:\n- {name: clock, action: ignore, path: $.at}\n")
    names = files(tmp_path, {"at": 1, "a": 1}, {"at": 2, "a": 1})
    result = run("--rules", str(tmp_path / "rules"), *names)

    assert result.exit_code == 0
    assert "explained by clock" in result.stdout
    assert result.stdout.endswith("no unexplained difference, 1 difference explained\n")
    document = json.loads(run("--json", "--rules", str(tmp_path / "rules"), *names).stdout)
    assert [difference["explained_by"] for difference in document["differences"]] == ["clock"]


def test_compare_ignores_rules_of_other_endpoints(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("rules:\n- {action: ignore, path: $.a, endpoint: GET /other}\n")
    names = ("--rules", str(tmp_path / "rules"), *files(tmp_path, {"a": 1}, {"a": 2}))

    assert run(*names, "--endpoint", "GET /this").exit_code == 1
    assert run(*names, "--endpoint", "GET /other").exit_code == 0


def test_compare_reads_http_files(tmp_path: Path) -> None:
    old = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncache-control: no-store\r\n\r\n{"a":1}'
    new = b'HTTP/2 200\ncontent-type: application/json\ndate: now\n\n{"a":1}\n'
    result = run("--http", *files(tmp_path, old, new))

    assert result.exit_code == 1
    assert result.stdout.startswith("header cache-control  removed, breaking\n")
    assert run("--http", *files(tmp_path, old, old)).exit_code == 0


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_compare_reads_decoded_bodies_of_curl_compressed(tmp_path: Path, coding: str) -> None:
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: {coding}\r\ncontent-length: 27\r\n\r\n"
    )
    old, new, plain = (
        f"{start}{body}".encode()
        for start, body in (
            (head, '{"a":1}'),
            (head, '{"a":2}'),
            (head.replace(coding, "identity").replace("27", "7"), '{"a":1}'),
        )
    )

    assert run("--http", *files(tmp_path, old, old)).exit_code == 0
    assert run("--http", *files(tmp_path, old, new)).stdout.startswith("body $.a  changed")
    assert run("--http", *files(tmp_path, old, plain)).stdout.startswith("header content-encoding")


def test_compare_reads_decoded_chunks(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"

    assert run("--http", *files(tmp_path, head + b'{"a":1}', head + b'{"a":2}')).stdout.startswith("body $.a  changed")


def test_compare_reports_load_shedding_as_not_compared(tmp_path: Path) -> None:
    result = run("--http", *files(tmp_path, b"HTTP/1.1 200 OK\n\n1", b"HTTP/1.1 429 Too Many Requests\n\n"))

    assert (result.exit_code, result.stdout) == (2, "not compared (new was shedding load)\n")


def test_compare_escapes_control_characters(tmp_path: Path) -> None:
    result = run(*files(tmp_path, {"a\x1b[31m": "\x1b[2J"}, {}))

    assert "\x1b" not in result.stdout
    assert "\x1b" not in run("--type", "text/x;\x1b[2J", *files(tmp_path, {"a": 1}, {"a": 2})).stdout
    assert "\x1b" not in run("--type", "text/\x1b[2J", *files(tmp_path, {"a": 1}, {"a": 2})).stdout


@pytest.mark.parametrize(
    ("data", "status", "headers", "body"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, (), b""),
        (b"HTTP/1.1 200 OK\r\na: 1\r\nA:2\r\n\r\nx\r\n\r\ny", 200, (("a", "1"), ("a", "2")), b"x\r\n\r\ny"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx", 200, (), b"x"),
        (b"HTTP/1.1 302 Found\r\nlocation: /b\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx", 200, (), b"x"),
        (b"HTTP/1.1 200 Connection established\n\n" * 5000 + b"HTTP/2 404 \n\nx", 404, (), b"x"),
        (b"HTTP/1.1 200 OK\ncontent-length: 1\n\nx\n", 200, (("content-length", "1"),), b"x"),
        (
            b"HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
            200,
            (("transfer-encoding", "chunked"),),
            b"abcde",
        ),
        (b"HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\nabc", 200, (("transfer-encoding", "chunked"),), b"abc"),
    ],
)
def test_parse_http_file_reads_status_headers_and_body(data: bytes, status: int, headers: Any, body: bytes) -> None:
    answer = parse_http_file(data, "file")

    assert (answer.status, answer.headers, answer.body.content) == (status, headers, body)


@pytest.mark.parametrize("data", [b"", b"200 OK", b"HTTP/1.1 999 x\r\n\r\n", b"HTTP/1.1 200 OK\nno colon\n\n"])
def test_parse_http_file_refuses_invalid_responses(data: bytes) -> None:
    with pytest.raises(ArgumentError):
        parse_http_file(data, "file")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", DOC.read_text(), re.DOTALL)


def test_compare_examples_in_docs_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in blocks("json"):
        name, _, text = content.partition("\n")
        Path(name.removeprefix("// ")).write_text(text)
    for content in blocks("yaml"):
        Path(content.partition("\n")[0].removeprefix("# ")).write_text(content)
    sessions = [block.partition("\n") for block in blocks("console")]

    assert len(sessions) >= 2
    for command, _, expected in sessions:
        assert run(*command.removeprefix("$ abreast compare ").split()).stdout == expected


def test_rules_in_docs_are_valid() -> None:
    from abreast_sidecar.compare.rule_document import parse_rules
    from abreast_sidecar.compare.rules import ACTIONS

    rules = [rule for content in blocks("yaml") for rule in parse_rules(content).rules]

    assert {rule.action for rule in rules} == set(ACTIONS)
