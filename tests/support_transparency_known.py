"""Differences that remain, each with its cases and the causes that these may have. docs/transparency.md gives the reasons."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from support_transparency import CASES
from support_transparency_services import ECHO_CASES, HTTPBIN_CASES

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "transparency.md"
REFUSED = (r"service: 1 → 0 messages", r"client: status (200|nothing) → (400|404|501)", r"client: connection .*")
UNREADABLE = (r"service: 1 → 2 messages", r"client: status (\d+|nothing) → 50[23]", r"client: connection .*")
CLOSE_DELIMITED = (
    *(
        r"client: header transfer-encoding added",
        r"client: framing close → chunked",
        r"client: connection closed → open",
    ),
    *(r"client: header connection removed", r"client: version in the first line"),
)

# Patterns of cases, and regular expressions of causes
KNOWN: dict[str, Sequence[str]] = {
    # Requests that Envoy refuses
    "target_*non_ascii*": REFUSED,
    "target_fragment*": REFUSED,
    "target_no_slash": REFUSED,
    "target_options_star": REFUSED,
    "target_space": REFUSED,
    "target_tab": REFUSED,
    "method_connect": REFUSED,
    "*_query": REFUSED,
    "host_non_ascii": REFUSED,
    "host_missing": REFUSED,
    "host_slash": REFUSED,
    "header_control": REFUSED,
    "header_delete_character": REFUSED,
    "header_no_*": REFUSED,
    "header_space_before_colon": REFUSED,
    "irregular_*": (*REFUSED, r"service: header (content-length|transfer-encoding) .*", r"service: framing .*"),
    "echo_headers_93": (r"client: status 200 → 431", *REFUSED),
    "version_lower": REFUSED,
    # Requests that a service receives differently
    "method_*": (r"service: header content-length added", r"service: framing none → length"),
    "body_*_nothing": (r"service: header content-length added", r"service: framing none → length"),
    "*_absolute*": (
        r"service: target in the first line",
        r"service: header host changed",
        r"client: header content-length changed",
        r"client: body",
    ),
    "repeated_*": (r"service: header \S+ changed",),
    "header_folded": (r"service: header  b removed", r"service: header x-a changed"),
    "connection_*": (r"service: header \S+ removed",),
    "pipelined_close_first": (r"service: header connection removed",),
    "keep_alive_header": (r"service: header keep-alive removed",),
    "proxy_connection": (r"service: header proxy-connection removed",),
    "te_gzip": (r"service: header te changed",),
    "upgrade_*": (r"service: header (connection|upgrade|http2-settings) removed",),
    "version_*": (
        *(r"service: 1 → 0 messages", r"service: header connection removed", r"service: header host added"),
        *(r"(service|client): version in the first line", r"client: connection .*"),
        *(r"client: (header transfer-encoding added|framing close → chunked|header connection removed)",),
    ),
    "*_version_10*": (
        r"(service|client): version in the first line",
        r"client: connection .*",
        r"client: header connection (changed|removed)",
    ),
    "target_two_spaces": (*REFUSED, r"service: target and version in the first line"),
    "chunked_trailer*": (r"service: trailers",),
    "forwarded_*": (r"service: header x-forwarded-for changed",),
    "header_client_cert": (r"service: header x-forwarded-client-cert removed",),
    "header_envoy_*": (r"service: header x-envoy-\S+ removed",),
    "header_abreast_forged": (r"service: header x-abreast-role changed",),
    # Responses that a client receives differently
    "framing_close*": CLOSE_DELIMITED,
    "truncated_*close*": CLOSE_DELIMITED,
    "truncated_*": UNREADABLE,
    "unreadable_*": (*UNREADABLE, *CLOSE_DELIMITED, r"client: framing malformed → cut"),
    "response_header_control": UNREADABLE,
    "no_body_204_length*": (*UNREADABLE, r"client: header content-length removed"),
    "head_*_neither": (r"client: header transfer-encoding added",),
    "httpbin_method_head": (r"client: header transfer-encoding added",),
    "httpbin_head_*": (r"client: header transfer-encoding added",),
    "reason_empty": (r"client: reason in the first line",),
    "reason_missing": (r"client: reason in the first line",),
    "interim_199*": (r"client: interim 199 → nothing",),
    "interim_*_twice*": (r"client: interim \d+ → \d+",),
    "framing_chunked_trailer": (r"client: trailers",),
    "httpbin_trailers": (r"client: trailers", r"client: body"),
    "response_header_folded": (r"client: header  b removed", r"client: header x-a changed"),
    "response_header_set_cookie_case": (r"client: header \S+ (removed|changed)",),
    "response_header_*_twice": (r"client: header \S+ changed",),
    "response_header_upgrade*": (r"client: header (connection|upgrade) removed",),
    "response_connection_*": (
        r"client: header (connection|keep-alive|proxy-connection) removed",
        r"client: connection closed → open",
    ),
    "response_version_*": (
        r"client: version in the first line",
        r"client: connection .*",
        r"client: header connection removed",
    ),
    "*_own_method": CLOSE_DELIMITED,
    "*_header_64k": (*CLOSE_DELIMITED, r"client: framing cut → chunked"),
    "websocket_ignored_*": (
        r"client: status 200 → 502",
        *(r"client: header (content-length|transfer-encoding) .*", r"client: framing .*", r"client: body"),
        r"client: connection open → closed",
    ),
    "websocket_refused_*": (r"client: connection open → closed",),
    # Connections and time
    "framing_chunked_close": (r"client: connection closed → open",),
    "idle_service_closes_at_once": (r"client: connection closed → open",),
    "half_closed*": (
        r"service: 1 → 0 messages",
        r"service: framing .*",
        r"client: status \d+ → nothing",
        r"client: connection .*",
    ),
    "early_response_*": (
        *(r"service: (1 → 0 messages|framing .*|body)", r"client: connection .*", r"client: (body|framing .*)"),
        r"client: status (200|413) → nothing",
    ),
}
# If new responds: safe requests that fail, and those that take longer than ABREAST_PER_TRY_TIMEOUT, also go to old.
KNOWN_NEW: dict[str, Sequence[str]] = {
    **KNOWN,
    "status_50*": (r"service: 1 → 2 messages",),
    "slow_response_12s": (r"service: 1 → 2 messages",),
}
KNOWN_COPIES: dict[str, Sequence[str]] = {
    "body_get_chunked_empty": (r"header transfer-encoding removed; framing chunked → none",),
    "irregular_length_zeros": (r"header content-length changed",),
    "expect_100_refused_*": ("missing",),
    "body_*_9m_chunked": ("missing",),
    "half_closed*": ("missing",),
    "early_response_*": ("missing",),
    "irregular_chunk_*": ("missing",),
}


def unknown_causes(case: str, causes: Sequence[str], known: dict[str, Sequence[str]] = KNOWN) -> list[str]:
    """Return the causes of a case that the documentation does not name."""
    patterns = [cause for cases, expected in known.items() if fnmatchcase(case, cases) for cause in expected]
    return [cause for cause in causes if not any(re.fullmatch(pattern, cause) for pattern in patterns)]


def find_rows() -> list[tuple[list[str], list[str]]]:
    """Return the cells of each row in the tables of docs/transparency.md, and the patterns of cases in its last cell."""
    lines = [line for line in DOCUMENTATION.read_text().splitlines() if line.startswith("|")]
    is_body = [not set(line) <= set("|- ") and not line.rstrip("| ").endswith("cases") for line in lines]
    rows = [line.strip("| ").split(" | ") for line, body in zip(lines, is_body, strict=True) if body]
    return [(row, re.findall(r"`([a-z0-9_*+-]+)`", row[-1])) for row in rows]


def documented_patterns() -> list[str]:
    return [pattern for _, patterns in find_rows() for pattern in patterns]


def matching_cases(pattern: str) -> list[str]:
    names = [*CASES, *HTTPBIN_CASES, *ECHO_CASES]
    return [name for name in names if fnmatchcase(name, pattern)]
