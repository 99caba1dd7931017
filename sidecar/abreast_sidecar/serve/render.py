"""The templates of the web page and of the HTML report. Both show messages of the API."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

import orjson
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from abreast.v1 import common_pb2, comparison_pb2, rule_pb2
from abreast_sidecar.client.output import (
    MAX_TABLE_VALUE_CHARS,
    describe_feature,
    endpoint_name,
    format_count,
    format_decision,
    format_duration,
    format_location,
    format_percent,
    format_share_of,
    impact_label,
    kind_phrase,
    to_printable,
)
from abreast_sidecar.serve.proto import name_enum_number
from abreast_sidecar.store.access import Caller, current_caller

MAX_BODY_CHARS = 20_000
UNPRINTABLE_RUN = re.compile(
    "([\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ufff9-\\ufffb]+)"
)
MARKED_CODE = Markup("<mark>{}</mark>")
MAX_UNREADABLE_SHARE = 0.1  # share of characters above which a body counts as binary
current_csrf_token: ContextVar[str] = ContextVar("current_csrf_token", default="")  # for the forms on the page
RULE_SCOPE_FIELDS = ("path", "header", "status", "endpoint", "release", "by")


def render(name: str, **values: Any) -> str:
    """Render the template `name`. All values are escaped, and their control characters are replaced."""
    values.setdefault("now", datetime.now(UTC))
    return build_environment().get_template(f"{name}.html.j2").render(values)


def read_stylesheet() -> str:
    return (resources.files("abreast_sidecar.serve") / "templates" / "style.css").read_text()


@cache
def build_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("abreast_sidecar.serve", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: to_printable(value) if type(value) is str else value,
    )
    environment.filters.update(
        number=format_count,
        percent=format_percent,
        share=lambda part, total: format_share_of(part, total) or "–",
        moment=format_moment,
        duration=lambda message, field: format_duration(getattr(message, field)) if message.HasField(field) else "–",
        word=format_word,
        impact=impact_label,
        kind_phrase=kind_phrase,
        feature=describe_feature,
        decision=format_decision,
        short_id=shorten_id,
        place=format_place,
        shorten=lambda text: to_printable(text, MAX_TABLE_VALUE_CHARS),
        explain=format_explanation,
        scope=format_rule_scope,
        body=format_body,
        in_order=sort_captures,
        differences_of=select_differences,
        outcome_count=count_outcome,
        endpoint_name=endpoint_name,
        by_endpoint=lambda verdicts: {endpoint_name(verdict.endpoint): verdict for verdict in verdicts},
    )
    environment.globals["csrf_token"] = current_csrf_token.get
    environment.globals["user_name"] = lambda: current_caller.get(Caller()).name
    return environment


def format_moment(value: Timestamp) -> str:
    return f"{value.ToDatetime(UTC):%Y-%m-%d %H:%M:%S}"


def shorten_id(pair_id: str) -> str:
    """Return the ends of a pair's id: the ids of one Envoy begin alike, and end in a number."""
    return f"{pair_id[:4]}…{pair_id[-6:]}"


def format_word(message: Message, field: str) -> str:
    """Format the value of an enum field: `OUTCOME_ONLY_OLD` as `only old`, the unspecified value as empty text."""
    enum = message.DESCRIPTOR.fields_by_name[field].enum_type
    return name_enum_number(enum, getattr(message, field)).replace("_", " ")


def format_place(item: comparison_pb2.Finding | common_pb2.Difference) -> str:
    """Format the place of a difference: `$.items[3].price`, `header etag`, `status`."""
    exact_path = item.exact_path if isinstance(item, common_pb2.Difference) else ""
    if item.part == common_pb2.PART_STATUS:
        return "status"  # the path repeats both values
    return format_location(item.part, exact_path or item.path)


def format_explanation(explanation: comparison_pb2.FindingExplanation) -> str:
    """Format the reason: `rule 7 (cents), shop: rounding`."""
    if explanation.cause != comparison_pb2.EXPLANATION_CAUSE_RULE:
        return explanation.reason
    return f"rule {explanation.rule_id} ({explanation.rule_name}), {explanation.owner}: {explanation.reason}"


def format_rule_scope(rule: rule_pb2.Rule) -> str:
    """Format action and conditions: `ignore path $.meta.id`."""
    conditions = [f"{name} {getattr(rule, name)}" for name in RULE_SCOPE_FIELDS if getattr(rule, name)]
    return " ".join([format_word(rule, "action").replace(" ", "-"), *conditions])


def format_body(capture: comparison_pb2.CaptureDetail) -> Markup:
    """Format a body as text, with JSON indented. For a binary body give only its length."""
    if not capture.body_length:
        return escape("(empty)")
    missing_bytes = capture.body_length - len(capture.body)
    text = capture.body.decode(errors="replace")
    if not text or text.count("\ufffd") > MAX_UNREADABLE_SHARE * len(text):
        return escape(f"({capture.body_length:,} bytes of binary data)")
    if not missing_bytes:
        with suppress(orjson.JSONDecodeError, orjson.JSONEncodeError):
            text = orjson.dumps(orjson.loads(capture.body), option=orjson.OPT_INDENT_2).decode()
    if len(text) > MAX_BODY_CHARS:
        text = text[:MAX_BODY_CHARS] + f"\n… {len(text) - MAX_BODY_CHARS:,} more characters are not shown"
    if missing_bytes:
        text += f"\n… {missing_bytes:,} more bytes were not captured"
    return Markup("\n").join(mark_unprintable(line.replace("\t", "    ")) for line in text.split("\n"))


def mark_unprintable(text: str) -> Markup:
    """Escape the text, and show each unprintable or invisible character as its marked code.

    A right-to-left override in a body would otherwise reorder what follows, and look like other text.
    """
    runs = UNPRINTABLE_RUN.split(text)  # printable and unprintable runs take turns
    return Markup().join(
        MARKED_CODE.format(to_printable(run)) if index % 2 else escape(run) for index, run in enumerate(runs)
    )


def sort_captures(captures: Iterable[comparison_pb2.CaptureDetail]) -> list[comparison_pb2.CaptureDetail]:
    """Sort by version, old first, with baseline copies at the end."""
    return sorted(captures, key=lambda item: (item.role == common_pb2.ROLE_BASELINE, item.version, item.attempt))


def select_differences(
    example: comparison_pb2.PairDetail, finding: comparison_pb2.Finding
) -> list[common_pb2.Difference]:
    """Return the differences of the pair that belong to the finding."""
    key = (finding.part, finding.path, finding.kind)
    return [item for item in example.differences if (item.part, item.path, item.kind) == key]


def count_outcome(outcomes: Sequence[comparison_pb2.OutcomeCount], name: str) -> int:
    return sum(row.count for row in outcomes if format_word(row, "outcome") == name)
