"""`abreast compare`: two responses in files."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import brotli  # type: ignore[import-untyped]  # it has no types
import click
import zstandard

from abreast.protocol.capture import Answer, Body, Capture, Headers, Request, Version
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import json_option
from abreast_sidecar.client.output import format_quantity, to_printable
from abreast_sidecar.compare.content import decode_content
from abreast_sidecar.compare.model import ComparisonResult, Difference
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rule_document import RuleError, parse_rules
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.values import NotJsonError, parse
from abreast_sidecar.errors import ArgumentError

JSON_MEDIA_TYPE = "application/json"
STDIN_NAME = "-"
MAX_VALUE_CHARS = 160
JSON_FIELDS = ("part", "path", "exact_path", "kind", "old", "new", "impact")
IMPACT_COLOURS = {"breaking": "red", "value": "yellow", "additive": "cyan"}
STATUS_LINE_PATTERN = re.compile(rb"HTTP/[0-9.]+ ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")
CONTENT_ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "br": brotli.compress,
    "deflate": zlib.compress,
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "zstd": zstandard.compress,
}
CHUNK_PATTERN = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,100}\r?\n")


@click.command()
@click.argument("old")
@click.argument("new")
@click.option("--http", "is_http", is_flag=True, help="The files are complete HTTP responses, as curl -i prints them.")
@click.option(
    "--type",
    "kind",
    default=JSON_MEDIA_TYPE,
    show_default=True,
    help="Content type of the bodies. An empty value detects it.",
)
@click.option("--rules", "rules_file", help="YAML file of rules.")
@click.option("--endpoint", default="GET /", help="Endpoint for the rules, such as GET /products/{id}.")
@click.option("--url", default="", help="URL of the request, to compare redirects.")
@click.option("--service", default="", help="Service for the rules.")
@click.option("--release", default="", help="Release of new for the rules.")
@json_option
def compare_command(
    old: str,
    new: str,
    is_http: bool,
    kind: str,
    rules_file: str | None,
    endpoint: str,
    url: str,
    service: str,
    release: str,
    as_json: bool,
) -> int:
    """Compare two files: JSON bodies, or complete responses with --http. `-` is stdin.

    Exits with 0 if rules explain all differences, 1 if they don't, and 2 if the files can't be compared.
    """
    if (old, new, rules_file).count(STDIN_NAME) > 1:
        raise ArgumentError("only one of the files can be stdin")
    options = _load_rules(rules_file)
    request = _build_request(endpoint, url)
    captures = []
    versions: tuple[tuple[Version, str], ...] = (("old", old), ("new", new))
    for version, name in versions:
        data = read_file(name)
        response = parse_http_file(data, name) if is_http else parse_body_file(data, name, kind)
        captures.append(
            Capture(
                pair="",
                service=service,
                version=version,
                role="live",
                request=request,
                answer=response,
                release=release,
            )
        )
    result = compare_pair(captures, options)
    click.echo(json.dumps(to_json_record(result), indent=2) if as_json else format_result(result))
    if result.differences:
        return ExitCode.CHECK_FAILED
    return ExitCode.OK if result.outcome == "match" else ExitCode.USAGE


def _load_rules(name: str | None) -> CompareOptions:
    if name is None:
        return CompareOptions()
    try:
        text = read_file(name).decode()
        return CompareOptions(rule_set=parse_rules(text, name).active_on(dt.datetime.now(dt.UTC).date()))
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name} is not UTF-8: {error}") from error
    except RuleError as error:
        raise ArgumentError(str(error)) from error


def _build_request(endpoint: str, url: str) -> Request:
    method, _, route = endpoint.strip().partition(" ")
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise ArgumentError(f"--url must be an address such as https://shop.example/products/7, got {url!r}") from error
    headers: Headers = (("host", address.netloc),) if address.netloc else ()
    return Request(method=method.upper(), path=address.path or "/", route=route.strip() or "/", headers=headers)


def read_file(name: str) -> bytes:
    """Read a file, or stdin for `-`. Raise ArgumentError."""
    try:
        return sys.stdin.buffer.read() if name == STDIN_NAME else Path(name).read_bytes()
    except OSError as error:
        raise ArgumentError(f"{name} can't be read: {error.strerror or error}") from error


def parse_body_file(data: bytes, name: str, kind: str) -> Answer:
    """Build the response of a body file. Raise ArgumentError for invalid JSON. An empty body is valid."""
    if kind == JSON_MEDIA_TYPE and data:
        try:
            parse(data.removeprefix(b"\xef\xbb\xbf"))
        except NotJsonError as error:
            raise ArgumentError(
                f"{name} is not valid JSON ({error}); set its type with --type, or use --http"
            ) from error
    return Answer(200, (("content-type", kind),) if kind else (), Body(content=data, length=len(data)))


def parse_http_file(data: bytes, name: str) -> Answer:
    """Parse the last response in the file. Raise ArgumentError.

    Before it, curl prints 100 Continue, the response of a proxy, and redirects.
    """
    status_line = STATUS_LINE_PATTERN.match(data)
    if status_line is None:
        raise ArgumentError(f"{name} must start with a status line such as HTTP/1.1 200 OK, as curl -i prints it")
    head, blank, remainder = _split_head(data[status_line.end() :])
    while next_status_line := STATUS_LINE_PATTERN.match(remainder):
        status_line = next_status_line
        head, blank, remainder = _split_head(remainder[status_line.end() :])
    headers = tuple(_parse_header_line(line, name) for line in head.splitlines() if line.strip())
    if not blank and remainder:
        raise ArgumentError(f"{name} has no empty line between headers and body")
    body = _decode_file_body(remainder, headers)
    encoded = _restore_content_coding(body, dict(headers).get("content-encoding", "").strip().lower())
    if encoded != body:
        body, headers = encoded, tuple(header for header in headers if header[0] != "content-length")
    return Answer(int(status_line[1]), headers, Body(content=body, length=len(body)))


def _split_head(data: bytes) -> tuple[bytes, bytes, bytes]:
    if data.startswith((b"\r\n", b"\n")):
        return b"", b"\n", data[2 if data.startswith(b"\r") else 1 :]
    separators = [(position, blank) for blank in (b"\r\n\r\n", b"\n\n") if (position := data.find(blank)) >= 0]
    if not separators:
        return data, b"", b""
    position, blank = min(separators)
    return data[:position], blank, data[position + len(blank) :]


def _parse_header_line(line: bytes, name: str) -> tuple[str, str]:
    key, colon, value = line.decode("latin-1").partition(":")
    if not colon or not key.strip():
        raise ArgumentError(f"{name} has a header line without a colon: {line[:60]!r}")
    return key.strip().lower(), value.strip()


def _decode_file_body(data: bytes, headers: Headers) -> bytes:
    header_values = dict(headers)
    if "chunked" in header_values.get("transfer-encoding", "").lower():
        return _decode_chunks(data)
    length = header_values.get("content-length", "")
    if length.isdecimal() and data.endswith(b"\n") and len(data.rstrip(b"\r\n")) <= int(length[:18]) < len(data):
        return data[: int(length[:18])]  # without a newline that an editor added
    return data


def _restore_content_coding(data: bytes, coding: str) -> bytes:
    """Compress a body that is plain text although its header states a coding: curl --compressed prints it so."""
    if (
        coding not in CONTENT_ENCODERS
        or decode_content(data, coding, CompareOptions().max_decoded_bytes).problem != "corrupt"
    ):
        return data
    try:
        data.decode()
    except UnicodeDecodeError:
        return data
    return CONTENT_ENCODERS[coding](data)


def _decode_chunks(data: bytes) -> bytes:
    """Decode a chunked body. Return it unchanged if it has no chunks: curl decodes them before it prints a body."""
    pieces: list[bytes] = []
    position = 0
    while chunk := CHUNK_PATTERN.match(data, position):
        size = int(chunk[1], 16)
        if size == 0:
            return b"".join(pieces)
        end = chunk.end() + size
        if data[end : end + 2] != b"\r\n" and data[end : end + 1] != b"\n":
            return data
        pieces.append(data[chunk.end() : end])
        position = end + (2 if data[end : end + 1] == b"\r" else 1)
    return data


def to_json_record(result: ComparisonResult) -> dict[str, object]:
    differences = [
        {name: getattr(difference, name) for name in JSON_FIELDS}
        | {name: getattr(difference, name) or None for name in ("explained_by", "hint")}
        for difference in (*result.differences, *result.explained_differences)
    ]
    return {
        "outcome": result.outcome,
        **({"reason": result.reason} if result.reason else {}),
        "differences": differences,
    }


def format_result(result: ComparisonResult) -> str:
    differences = (*result.differences, *result.explained_differences)
    lines = [line for difference in differences for line in _format_difference(difference)]
    return "\n".join([*lines, _format_result_summary(result)])


def _format_difference(difference: Difference) -> list[str]:
    location = f"{difference.part} {difference.exact_path or difference.path}".strip()
    remark = f"explained by {difference.explained_by}" if difference.explained_by else difference.impact
    colour = "bright_black" if difference.explained_by else IMPACT_COLOURS[difference.impact]
    lines = [f"{to_printable(location)}  {click.style(f'{difference.kind}, {to_printable(remark)}', fg=colour)}"]
    lines += [
        f"  {sign} {to_printable(value, MAX_VALUE_CHARS)}"
        for sign, value in (("-", difference.old), ("+", difference.new))
        if value
    ]
    if difference.hint and not difference.explained_by:
        lines.append(f"  suggested rule: {to_printable(difference.hint)}, for the path {to_printable(difference.path)}")
    return lines


def _format_result_summary(result: ComparisonResult) -> str:
    reason = f" ({to_printable(result.reason)})" if result.reason else ""
    if not result.differences and result.outcome != "match":
        return f"not compared{reason}"
    if explained := len(result.explained_differences):
        reason = f", {format_quantity(explained, 'difference')} explained{reason}"
    if result.differences:
        return f"{format_quantity(len(result.differences), 'difference')}{reason}"
    return f"no unexplained difference{reason}" if explained else f"no difference{reason}"
