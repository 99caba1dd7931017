"""From an entry of the stream to what the ledger is given."""

from __future__ import annotations

import time
from collections.abc import Sequence

from abreast.capture import Capture, decode
from abreast.errors import CaptureError
from abreast_sidecar.compare import Judgement, Rules, judge
from abreast_sidecar.read import Entry
from abreast_sidecar.store import Judged

EMPTY = "redis had no capture of it any more"
AHEAD = 300_000  # ms


def judged(entry: Entry, rules: Rules) -> Judged:
    """Never raises: what can't be read or judged is `undecodable`, and kept."""
    captures, reason = _decoded(entry)
    try:
        if not captures:
            return undecodable(entry, reason or EMPTY)
        judgement = judge(captures, rules, swept=entry.why == "swept")
    except Exception as error:  # noqa: BLE001  # one entry must not stop the stream
        return undecodable(entry, f"comparing it raised {type(error).__name__}: {error}")
    if reason:
        return undecodable(entry, reason, judgement)
    return Judged(
        entry.keys.service, entry.id, _moment(entry.at, captures), entry.pair, judgement, entry.blobs
    )


def undecodable(entry: Entry, reason: str, known: Judgement | None = None) -> Judged:
    """`known` is what could be found out about it all the same."""
    judgement = Judgement(
        outcome="undecodable",
        method=known.method if known else "",
        route=known.route if known else "",
        old=known.old if known else None,
        new=known.new if known else None,
        reason=reason,
    )
    service, content = entry.keys.service, b"\n".join(entry.blobs)
    return Judged(service, entry.id, entry.at, entry.pair, judgement, entry.blobs, poison=content)


def _moment(at: int, captures: Sequence[Capture]) -> int:
    """When it was (ms), which is for Redis's clock to say. One that was set forward leaves its stream there, also when it
    is right again; so a time to come is not believed where the services' clocks know better. Whoever is given the entry
    again must find the same.
    """
    if at <= time.time() * 1000 + AHEAD:
        return at
    began = max(one.started for one in captures) * 1000
    return int(began) if 0 < began < at - AHEAD else at


def _decoded(entry: Entry) -> tuple[list[Capture], str]:
    captures, reason = [], ""
    for blob in entry.blobs:
        try:
            captures.append(decode(blob))
        except CaptureError as error:
            reason = str(error)
    return captures, reason
