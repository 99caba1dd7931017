"""A finding in one line for people. Pure."""

from __future__ import annotations

from abreast_sidecar.store.records import Finding

MAX_VALUE_CHARS = 60  # characters of a value
PART_LABELS = {"error": "the application failed", "latency": "time"}


def describe_location(finding: Finding) -> str:
    """Where: `$.items[*].price`, `header etag`, `status`, …"""
    if finding.part == "body":
        return finding.path or "body"
    if finding.part in {"header", "effect", "cache"}:
        return f"{finding.part} {finding.path}"
    return finding.path or PART_LABELS.get(finding.part, finding.part)


def summarise_finding(finding: Finding) -> str:
    """What happened there: `200 became 500`, `removed, was "max-age=60"`, `p50 3.1 ms became 41.0 ms`, …"""
    if finding.part == "latency":
        return _describe_slowdown(finding)
    if finding.part == "cache":
        return _describe_misses(finding)
    if (finding.part, finding.path) == ("error", "no capture"):
        return "old answered, new left no capture in time"
    old, new = shorten(finding.detail.get("old")), shorten(finding.detail.get("new"))
    if finding.kind == "order":
        return "same elements in another order"
    if finding.kind == "added":
        return f"added {new}".rstrip()
    if finding.kind == "removed":
        return f"removed, was {old}" if old else "removed"
    if old and new:
        return f"{old} became {new}"
    return "another type" if finding.kind == "type" else finding.kind


def _describe_slowdown(finding: Finding) -> str:
    old, new = finding.detail.get("old_p50_us"), finding.detail.get("new_p50_us")
    if old is None or new is None:
        return finding.kind
    return f"p50 {old / 1000:.1f} ms became {new / 1000:.1f} ms"


def _describe_misses(finding: Finding) -> str:
    old, new = finding.detail.get("old"), finding.detail.get("new")
    return f"{old:g} misses a request became {new:g}" if old is not None and new is not None else finding.kind


def shorten(value: str | None) -> str:
    if value is None:
        return ""
    return value if len(value) <= MAX_VALUE_CHARS else value[: MAX_VALUE_CHARS - 1] + "…"
