"""Values of options: times, spans, addresses and URLs."""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict

import click
import pytest
from click.testing import CliRunner

from abreast_sidecar.cli import options
from abreast_sidecar.cli.rollout import ramp_command
from abreast_sidecar.cli.up import parse_upstream
from abreast_sidecar.cli.verdict import report_command, verdict_command
from abreast_sidecar.client.sidecar_client import SidecarClient
from abreast_sidecar.stats.verdict import Budget


@pytest.mark.parametrize(("text", "ago"), [("90s", 90), ("15m", 900), ("1h", 3600), ("2d", 172_800), ("now", 0)])
def test_parse_moment_accepts_spans(text: str, ago: float) -> None:
    elapsed = dt.datetime.now(dt.UTC) - options.parse_moment(text)

    assert elapsed.total_seconds() == pytest.approx(ago, abs=5)


def test_parse_moment_accepts_times() -> None:
    assert options.parse_moment("2026-01-31T09:30Z") == dt.datetime(2026, 1, 31, 9, 30, tzinfo=dt.UTC)


def test_verdict_report_and_ramp_accept_the_same_budgets() -> None:
    names = tuple(Budget.__dataclass_fields__)
    words = [
        "--max-mismatch",
        "0.5%",
        "--max-error",
        "0",
        "--max-slower",
        "250%",
        "--min-completeness",
        "0.9",
        "--confidence",
        "99.5%",
        "--max-blind",
        "5%",
    ]
    parsed = []
    for command in (verdict_command, report_command, ramp_command.commands["start"]):
        extra = ["--steps", "1,100", "--reason", "release 2"] if command.name == "start" else []
        parameters = command.make_context("test", [*extra, *words]).params
        parsed.append({name: parameters[name] for name in names})

    assert parsed == [asdict(Budget(0.005, 0.0, 2.5, 0.9, 0.995, 0.05))] * 3


@pytest.mark.parametrize("text", ["6h", "2d"])
def test_parse_window_start_rounds_long_spans_to_full_hour(text: str) -> None:
    moment, start = options.parse_moment(text), options.parse_window_start(text)

    assert start == moment.replace(minute=0, second=0, microsecond=0)


@pytest.mark.parametrize(("text", "ago"), [("90s", 90), ("5h", 18_000)])
def test_parse_window_start_keeps_short_spans(text: str, ago: float) -> None:
    elapsed = dt.datetime.now(dt.UTC) - options.parse_window_start(text)

    assert elapsed.total_seconds() == pytest.approx(ago, abs=5)


def test_parse_window_start_keeps_times() -> None:
    assert options.parse_window_start("2026-01-31T09:30Z") == dt.datetime(2026, 1, 31, 9, 30, tzinfo=dt.UTC)


@pytest.mark.parametrize("text", ["", "soon", "3q", "1h2m", "99999999999d"])
def test_parse_moment_rejects_other_text_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="such as 90s, 15m"):
        options.parse_moment(text)


@pytest.mark.parametrize("text", ["127.0.0.1:50051", "sidecar.internal:443", "[::1]:50051"])
def test_parse_target_accepts_host_and_port(text: str) -> None:
    assert options.parse_target(text) == text


@pytest.mark.parametrize("text", ["", "50051", ":50051", "http://127.0.0.1:50051", "host:0", "host:99999", "::1:50051"])
def test_parse_target_rejects_other_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="such as"):
        options.parse_target(text)


@pytest.mark.parametrize(
    ("text", "host", "port", "tls"),
    [
        ("http://127.0.0.1:8001", "127.0.0.1", 8001, ""),
        ("http://shop.internal/", "shop.internal", 80, ""),
        ("https://shop.internal", "shop.internal", 443, "shop.internal"),
        ("127.0.0.1:8001", "127.0.0.1", 8001, ""),
        ("http://[::1]:8001", "::1", 8001, ""),
    ],
)
def test_parse_upstream_accepts_urls(text: str, host: str, port: int, tls: str) -> None:
    assert parse_upstream(text) == ((host, port), tls)


@pytest.mark.parametrize("text", ["", "ftp://a:1", "http://a:1/path", "http://a:x", "http://user@a:1"])
def test_parse_upstream_rejects_other_urls(text: str) -> None:
    with pytest.raises(ValueError, match="such as"):
        parse_upstream(text)


@pytest.mark.parametrize(
    ("runs", "words", "expected"),
    [
        ([], [], "127.0.0.1:50051"),
        (["127.0.0.1:7001"], [], "127.0.0.1:7001"),
        (["127.0.0.1:7001"], ["--address", "127.0.0.1:9"], "127.0.0.1:9"),
        (["127.0.0.1:7001", "127.0.0.1:7002"], ["--address", "127.0.0.1:9"], "127.0.0.1:9"),
        (["127.0.0.1:7001", "127.0.0.1:7002"], ["inner", "--address", "127.0.0.1:9"], "127.0.0.1:9"),
        (["127.0.0.1:7001", "127.0.0.1:7002"], [], "several stacks run: 127.0.0.1:7001, 127.0.0.1:7002"),
        (["127.0.0.1:7001", "127.0.0.1:7002"], ["inner"], "several stacks run: 127.0.0.1:7001, 127.0.0.1:7002"),
    ],
)
def test_commands_use_the_only_running_stack(
    runs: list[str], words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ABREAST_SIDECAR", raising=False)
    monkeypatch.setattr("abreast_sidecar.stack.data.list_runs", lambda: runs)

    @click.group(invoke_without_command=True)
    @options.connection_options
    def show(link: SidecarClient) -> None:
        if not words or words[0] != "inner":
            click.echo(link.address)

    @show.command()
    @options.connection_options
    def inner(link: SidecarClient) -> None:
        click.echo(link.address)

    result = CliRunner().invoke(show, words)

    assert expected in (result.stdout or str(result.exception))


@pytest.mark.parametrize("text", ["36526d", "99999999999999d", "soon"])
def test_span_is_at_most_100_years(text: str) -> None:
    assert options.parse_span("36525d").days == 36_525
    with pytest.raises(ValueError, match="of at most 100 years"):
        options.parse_span(text)
