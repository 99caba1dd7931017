"""Renders the pages: templates and their filters."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from typing import Any

import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined

from abreast.capture import Body, Capture
from abreast_sidecar.compare.effects import said
from abreast_sidecar.compare.value import shown
from abreast_sidecar.control import MILLION, WEIGHTS
from abreast_sidecar.serve.phrase import phrase, place
from abreast_sidecar.store.results import Finding

BODY_LIMIT = 20_000  # characters shown
REPLACEMENTS = 0.1  # the share of unreadable characters above which a body is not shown as text


def render(name: str, **values: Any) -> str:
    return _environment().get_template(f"{name}.html.j2").render(now=datetime.now(UTC), **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("abreast_sidecar.serve", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        share=share,
        time=time,
        moment=moment,
        body=body,
        phrase=phrase,
        place=place,
        words=words,
        rate=rate,
        in_order=in_order,
        said=lambda effect: shown(said(effect)),
    )
    environment.globals.update(WEIGHTS=WEIGHTS, MILLION=MILLION)
    return environment


def number(value: int) -> str:
    return f"{value:,}"


def share(part: float, whole: float) -> str:
    """A percentage that says 0% only for none and 100% only for all."""
    if not whole or not part:
        return "0%"
    percent = 100 * part / whole
    if percent < 0.01:
        return "<0.01%"
    text = f"{percent:.2f}" if percent < 1 else f"{percent:.1f}"
    if part < whole and float(text) >= 100:
        return ">99.9%"
    return text.rstrip("0").rstrip(".") + "%"


def rate(finding: Finding) -> str:
    """`6.9% (5.1% to 9.2%)`: the interval holds with 95% however often one looks. A dash where it is of no single pairs."""
    between = finding.rate
    if between is None:
        return "–"
    shown = share(min(finding.count, finding.compared), finding.compared)
    return f"{shown} ({share(between.low, 1)} to {share(between.high, 1)})"


def time(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.1f} ms"
    return f"{microseconds / 1_000_000:.2f} s"


def moment(value: datetime | None) -> str:
    return "-" if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def words(name: str) -> str:
    """The ledger's names as words: only_old is `only old`."""
    return name.replace("_", " ")


def in_order(captures: Iterable[Capture]) -> list[Capture]:
    """Old, new, then baseline copies."""
    return sorted(captures, key=lambda one: (one.role == "baseline", one.version != "old", one.attempt))


def body(found: Body) -> str:
    """As text, JSON indented; what is no text is only described."""
    if not found.length:
        return "(empty)"
    cut = "" if found.whole else f"\n… {found.length - len(found.held):,} bytes more were not captured"
    text = found.held.decode(errors="replace")
    if text.count("\ufffd") > REPLACEMENTS * len(text) or not text:
        return f"({found.length:,} bytes that are no text)"
    if found.whole:
        text = _indented(found.held) or text
    if len(text) > BODY_LIMIT:
        text = text[:BODY_LIMIT] + f"\n… {len(text) - BODY_LIMIT:,} characters more are not shown"
    return text + cut


def _indented(held: bytes) -> str:
    try:
        return orjson.dumps(orjson.loads(held), option=orjson.OPT_INDENT_2).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return ""
