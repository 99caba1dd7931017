"""What requests say, checked. All raise ArgumentError, which names the field and says what is wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.descriptor import EnumDescriptor

from abreast.v1 import common_pb2
from abreast.v1.comparison_pb2 import FindingStatus
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.stats.verdict import Budget
from abreast_sidecar.store.reader import PageRequest
from abreast_sidecar.store.records import SETTABLE_STATUSES, StatusChange, Window
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT, AuditNote, TrafficChange, to_fixed_point

PAIR_ID_PATTERN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MAX_NAME_CHARS = 300  # characters
MAX_ACTOR_CHARS = 200
MAX_REASON_CHARS = 2000
DEFAULT_WAIT_S = 1.0  # seconds
MAX_WAIT_S = 10.0
MAX_ID = 2**63 - 1


def check_text(name: str, value: str, max_chars: int = MAX_NAME_CHARS) -> str:
    if len(value) > max_chars:
        raise ArgumentError(f"{name} must have at most {max_chars} characters, got {len(value)}")
    if "\x00" in value:
        raise ArgumentError(f"{name} must not hold a NUL character")
    return value


def parse_window(message: Any) -> Window:
    """Of a request with a field `window`."""
    if not message.HasField("window"):
        return Window()
    bounds = message.window
    start = parse_time("window.start", bounds.start) if bounds.HasField("start") else None
    end = parse_time("window.end", bounds.end) if bounds.HasField("end") else None
    if start is not None and end is not None and end < start:
        raise ArgumentError(f"window.end must not lie before window.start, got {end:%FT%TZ} before {start:%FT%TZ}")
    return Window(start, end)


def parse_time(name: str, value: timestamp_pb2.Timestamp) -> datetime:
    try:
        return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise ArgumentError(f"{name} must be a time from year 1 to 9999: {error}") from error


def parse_page(message: Any) -> PageRequest:
    """Of a request with the fields `page_size` and `page_token`."""
    return PageRequest.from_request(message.page_size, check_text("page_token", message.page_token, 4000))


def parse_enum_names(field: str, enum: EnumDescriptor, prefix: str, values: Iterable[int]) -> list[str] | None:
    """The ledger's names of an enum's values: OUTCOME_ONLY_OLD is only_old. None for none: no filter."""
    names_by_number = {number: value.name for number, value in enum.values_by_number.items() if number}
    matches = []
    for value in values:
        if value not in names_by_number:
            choices = ", ".join(sorted(names_by_number.values()))
            raise ArgumentError(f"{field} must hold only {choices}, got {value}")
        matches.append(names_by_number[value].removeprefix(prefix).lower())
    return sorted(set(matches)) or None


def parse_outcomes(values: Iterable[int]) -> list[str] | None:
    return parse_enum_names("outcomes", common_pb2.Outcome.DESCRIPTOR, "OUTCOME_", values)


def parse_parts(values: Iterable[int]) -> list[str] | None:
    return parse_enum_names("parts", common_pb2.Part.DESCRIPTOR, "PART_", values)


def parse_kinds(values: Iterable[int]) -> list[str] | None:
    return parse_enum_names("kinds", common_pb2.Kind.DESCRIPTOR, "KIND_", values)


def parse_impacts(values: Iterable[int]) -> list[str] | None:
    return parse_enum_names("impacts", common_pb2.Impact.DESCRIPTOR, "IMPACT_", values)


def parse_pair_id(value: str) -> str:
    identifier = value.strip().lower()
    if not PAIR_ID_PATTERN.fullmatch(identifier):
        raise ArgumentError(f"id must be a pair's id as in the answer's header x-abreast-pair, got {value[:80]!r}")
    return identifier


def check_finding_id(field: str, value: int, *, minimum: int = 1) -> int:
    if value < minimum:
        raise ArgumentError(f"{field} must be a finding's id from ListFindings, got {value}")
    return value


def parse_budget(message: Any) -> Budget:
    """Of a request with a field `budget`."""
    field_names = [field.name for field in fields(Budget) if message.budget.HasField(field.name)]
    try:
        return Budget(**{name: getattr(message.budget, name) for name in field_names})
    except ValueError as error:
        raise ArgumentError(f"budget.{error}") from error


def parse_wait(message: Any) -> float:
    """Seconds; of a request with a field `wait`."""
    if not message.HasField("wait"):
        return DEFAULT_WAIT_S
    duration: duration_pb2.Duration = message.wait
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 <= seconds <= MAX_WAIT_S:
        raise ArgumentError(f"wait must be 0 to {MAX_WAIT_S:g} s, got {seconds:g} s")
    return seconds


def parse_note(message: Any, peer: str) -> AuditNote:
    """Of a request with the fields `actor` and `reason`."""
    actor = check_text("actor", message.actor.strip(), MAX_ACTOR_CHARS)
    return AuditNote(actor or f"someone at {peer}", check_text("reason", message.reason.strip(), MAX_REASON_CHARS))


def parse_status_change(message: Any, peer: str) -> StatusChange:
    """Of a SetFindingStatusRequest."""
    audit_note = parse_note(message, peer)
    statuses = parse_enum_names("status", FindingStatus.DESCRIPTOR, "FINDING_STATUS_", [message.status])
    status = statuses[0] if statuses else ""
    if status not in SETTABLE_STATUSES:
        raise ArgumentError(f"status must be one of {', '.join(SETTABLE_STATUSES)}, got {status}")
    if not audit_note.reason:
        raise ArgumentError("reason must say why: it is kept with the finding")
    release = check_text("release", message.release.strip())
    if release and status != "fixed":
        raise ArgumentError(f"release is only said of what is fixed, got status {status}")
    return StatusChange(status, audit_note.actor, audit_note.reason, release)


def parse_traffic_change(message: Any) -> TrafficChange:
    """Of an UpdateTrafficRequest."""
    units = {"new_share": TOTAL_WEIGHT, "sample_safe": MILLION, "sample_unsafe": MILLION, "baseline_share": MILLION}
    values = {
        name: to_fixed_point(name, getattr(message, name), unit)
        for name, unit in units.items()
        if message.HasField(name)
    }
    if not values:
        raise ArgumentError(f"set at least one of {', '.join(units)}")
    return TrafficChange("update", **values)
