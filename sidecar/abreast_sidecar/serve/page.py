"""Renders the pages: templates and their filters."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from typing import Any

import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined

from abreast.capture import Body, Capture
from abreast_sidecar.compare.effects import describe_effect
from abreast_sidecar.compare.value import render_value
from abreast_sidecar.control import MILLION, TOTAL_WEIGHT
from abreast_sidecar.serve.phrase import describe_location, summarise_finding
from abreast_sidecar.store.results import Finding

MAX_BODY_CHARS = 20_000  # characters shown
MAX_UNREADABLE_SHARE = 0.1  # the share of unreadable characters above which a body is not shown as text


def render(name: str, **values: Any) -> str:
    return _build_environment().get_template(f"{name}.html.j2").render(now=datetime.now(UTC), **values)


@cache
def _build_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("abreast_sidecar.serve", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_count,
        share=format_share,
        time=format_duration,
        moment=format_time,
        body=format_body,
        phrase=summarise_finding,
        place=describe_location,
        words=format_words,
        rate=format_rate,
        in_order=sort_captures,
        said=lambda effect: render_value(describe_effect(effect)),
    )
    environment.globals.update(WEIGHTS=TOTAL_WEIGHT, MILLION=MILLION)
    return environment


def format_count(value: int) -> str:
    return f"{value:,}"


def format_share(part: float, total: float) -> str:
    """A percentage that says 0% only for none and 100% only for all."""
    if not total or not part:
        return "0%"
    percent = 100 * part / total
    if percent < 0.01:
        return "<0.01%"
    text = f"{percent:.2f}" if percent < 1 else f"{percent:.1f}"
    if part < total and float(text) >= 100:
        return ">99.9%"
    return text.rstrip("0").rstrip(".") + "%"


def format_rate(finding: Finding) -> str:
    """`6.9% (5.1% to 9.2%)`: the interval holds with 95% however often one looks. A dash where it is of no single pairs."""
    interval = finding.rate
    if interval is None:
        return "–"
    value = format_share(min(finding.count, finding.compared), finding.compared)
    return f"{value} ({format_share(interval.low, 1)} to {format_share(interval.high, 1)})"


def format_duration(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.1f} ms"
    return f"{microseconds / 1_000_000:.2f} s"


def format_time(value: datetime | None) -> str:
    return "-" if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def format_words(name: str) -> str:
    """The ledger's names as words: only_old is `only old`."""
    return name.replace("_", " ")


def sort_captures(captures: Iterable[Capture]) -> list[Capture]:
    """Old, new, then baseline copies."""
    return sorted(
        captures, key=lambda capture: (capture.role == "baseline", capture.version != "old", capture.attempt)
    )


def format_body(body: Body) -> str:
    """As text, JSON indented; what is no text is only described."""
    if not body.length:
        return "(empty)"
    truncation_note = (
        "" if body.is_complete else f"\n… {body.length - len(body.content):,} bytes more were not captured"
    )
    text = body.content.decode(errors="replace")
    if text.count("\ufffd") > MAX_UNREADABLE_SHARE * len(text) or not text:
        return f"({body.length:,} bytes that are no text)"
    if body.is_complete:
        text = _indent_json(body.content) or text
    if len(text) > MAX_BODY_CHARS:
        text = text[:MAX_BODY_CHARS] + f"\n… {len(text) - MAX_BODY_CHARS:,} characters more are not shown"
    return text + truncation_note


def _indent_json(content: bytes) -> str:
    try:
        return orjson.dumps(orjson.loads(content), option=orjson.OPT_INDENT_2).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return ""
