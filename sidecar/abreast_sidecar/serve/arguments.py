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
from abreast_sidecar.compare.verdict import Budget
from abreast_sidecar.control import MILLION, WEIGHTS, Change, Note, parts
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.store.pages import Page
from abreast_sidecar.store.results import Window
from abreast_sidecar.store.statuses import SETTABLE, Said

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NAME_LIMIT = 300  # characters
ACTOR_LIMIT = 200
REASON_LIMIT = 2000
DEFAULT_WAIT = 1.0  # seconds
MAX_WAIT = 10.0
MAX_ID = 2**63 - 1


def text(name: str, value: str, limit: int = NAME_LIMIT) -> str:
    if len(value) > limit:
        raise ArgumentError(f"{name} must have at most {limit} characters, got {len(value)}")
    if "\x00" in value:
        raise ArgumentError(f"{name} must not hold a NUL character")
    return value


def window(message: Any) -> Window:
    """Of a request with a field `window`."""
    if not message.HasField("window"):
        return Window()
    said = message.window
    start = moment("window.start", said.start) if said.HasField("start") else None
    end = moment("window.end", said.end) if said.HasField("end") else None
    if start is not None and end is not None and end < start:
        raise ArgumentError(
            f"window.end must not lie before window.start, got {end:%FT%TZ} before {start:%FT%TZ}"
        )
    return Window(start, end)


def moment(name: str, value: timestamp_pb2.Timestamp) -> datetime:
    try:
        return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise ArgumentError(f"{name} must be a time from year 1 to 9999: {error}") from error


def page(message: Any) -> Page:
    """Of a request with the fields `page_size` and `page_token`."""
    return Page.wanted(message.page_size, text("page_token", message.page_token, 4000))


def names(field: str, kind: EnumDescriptor, prefix: str, values: Iterable[int]) -> list[str] | None:
    """The ledger's names of an enum's values: OUTCOME_ONLY_OLD is only_old. None for none: no filter."""
    known = {number: value.name for number, value in kind.values_by_number.items() if number}
    found = []
    for value in values:
        if value not in known:
            wanted = ", ".join(sorted(known.values()))
            raise ArgumentError(f"{field} must hold only {wanted}, got {value}")
        found.append(known[value].removeprefix(prefix).lower())
    return sorted(set(found)) or None


def outcomes(values: Iterable[int]) -> list[str] | None:
    return names("outcomes", common_pb2.Outcome.DESCRIPTOR, "OUTCOME_", values)


def part_names(values: Iterable[int]) -> list[str] | None:
    return names("parts", common_pb2.Part.DESCRIPTOR, "PART_", values)


def kinds(values: Iterable[int]) -> list[str] | None:
    return names("kinds", common_pb2.Kind.DESCRIPTOR, "KIND_", values)


def impacts(values: Iterable[int]) -> list[str] | None:
    return names("impacts", common_pb2.Impact.DESCRIPTOR, "IMPACT_", values)


def pair_id(value: str) -> str:
    found = value.strip().lower()
    if not UUID.fullmatch(found):
        raise ArgumentError(
            f"id must be a pair's id as in the answer's header x-abreast-pair, got {value[:80]!r}"
        )
    return found


def finding_id(field: str, value: int, *, least: int = 1) -> int:
    if value < least:
        raise ArgumentError(f"{field} must be a finding's id from ListFindings, got {value}")
    return value


def budget(message: Any) -> Budget:
    """Of a request with a field `budget`."""
    names = [field.name for field in fields(Budget) if message.budget.HasField(field.name)]
    try:
        return Budget(**{name: getattr(message.budget, name) for name in names})
    except ValueError as error:
        raise ArgumentError(f"budget.{error}") from error


def wait(message: Any) -> float:
    """Seconds; of a request with a field `wait`."""
    if not message.HasField("wait"):
        return DEFAULT_WAIT
    said: duration_pb2.Duration = message.wait
    seconds = said.seconds + said.nanos / 1e9
    if not 0 <= seconds <= MAX_WAIT:
        raise ArgumentError(f"wait must be 0 to {MAX_WAIT:g} s, got {seconds:g} s")
    return seconds


def note(message: Any, peer: str) -> Note:
    """Of a request with the fields `actor` and `reason`."""
    actor = text("actor", message.actor.strip(), ACTOR_LIMIT)
    return Note(actor or f"someone at {peer}", text("reason", message.reason.strip(), REASON_LIMIT))


def said(message: Any, peer: str) -> Said:
    """Of a SetFindingStatusRequest."""
    by = note(message, peer)
    found = names("status", FindingStatus.DESCRIPTOR, "FINDING_STATUS_", [message.status])
    status = found[0] if found else ""
    if status not in SETTABLE:
        raise ArgumentError(f"status must be one of {', '.join(SETTABLE)}, got {status}")
    if not by.reason:
        raise ArgumentError("reason must say why: it is kept with the finding")
    release = text("release", message.release.strip())
    if release and status != "fixed":
        raise ArgumentError(f"release is only said of what is fixed, got status {status}")
    return Said(status, by.actor, by.reason, release)


def change(message: Any) -> Change:
    """Of an UpdateTrafficRequest."""
    units = {
        "new_share": WEIGHTS,
        "sample_safe": MILLION,
        "sample_unsafe": MILLION,
        "baseline_share": MILLION,
    }
    said = {
        name: parts(name, getattr(message, name), unit)
        for name, unit in units.items()
        if message.HasField(name)
    }
    if not said:
        raise ArgumentError(f"set at least one of {', '.join(units)}")
    return Change("update", **said)
