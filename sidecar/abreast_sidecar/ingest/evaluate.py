"""Evaluates an entry of the stream: decodes its captures, compares them, and makes a record for the ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence

from abreast.errors import CaptureError
from abreast.protocol.capture import Capture, decode
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.ingest.stream import StreamEntry
from abreast_sidecar.store.records import PairRecord

NO_CAPTURE_REASON = "redis has no capture of it any more"
MAX_CLOCK_LEAD_MS = 300_000


def evaluate_entry(entry: StreamEntry, rules: CompareOptions) -> PairRecord:
    """Compare an entry. Never raise: an entry that can't be read or compared becomes an `undecodable` record."""
    captures, reason = _decode_captures(entry)
    try:
        if not captures:
            return undecodable_record(entry, reason or NO_CAPTURE_REASON)
        result = compare_pair(captures, rules, timed_out=entry.ready_reason == "timed_out")
    except Exception as error:  # noqa: BLE001  # one entry must not stop the stream
        return undecodable_record(entry, f"its comparison raised {type(error).__name__}: {error}")
    if reason:
        return undecodable_record(entry, reason, result)
    return PairRecord(
        entry.keys.service, entry.id, _choose_time_ms(entry.time_ms, captures), entry.pair_id, result, entry.blobs
    )


def undecodable_record(entry: StreamEntry, reason: str, partial_result: ComparisonResult | None = None) -> PairRecord:
    """Return a record with the content of the entry, and with what `partial_result` tells about it."""
    result = ComparisonResult(
        outcome="undecodable",
        method=partial_result.method if partial_result else "",
        route=partial_result.route if partial_result else "",
        old=partial_result.old if partial_result else None,
        new=partial_result.new if partial_result else None,
        reason=reason,
    )
    service, content = entry.keys.service, b"\n".join(entry.blobs)
    return PairRecord(service, entry.id, entry.time_ms, entry.pair_id, result, entry.blobs, dead_letter=content)


def _choose_time_ms(entry_ms: int, captures: Sequence[Capture]) -> int:
    """Return the time of a pair: by Redis's clock, unless it is in the future and the services' clocks are not.

    A Redis clock that was set forward keeps numbering entries from there, even after it was corrected. A second delivery
    gets the same time.
    """
    if entry_ms <= time.time() * 1000 + MAX_CLOCK_LEAD_MS:
        return entry_ms
    started_ms = max(capture.started_at for capture in captures) * 1000
    return int(started_ms) if 0 < started_ms < entry_ms - MAX_CLOCK_LEAD_MS else entry_ms


def _decode_captures(entry: StreamEntry) -> tuple[list[Capture], str]:
    captures, reason = [], ""
    for blob in entry.blobs:
        try:
            captures.append(decode(blob))
        except CaptureError as error:
            reason = str(error)
    return captures, reason
