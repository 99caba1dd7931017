"""Reads the ledger. All functions raise LedgerError while Postgres is away."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any, TypeVar

import orjson

from abreast_sidecar.errors import ArgumentError, NotFoundError
from abreast_sidecar.stats.features import (
    MIN_REQUESTS,
    Feature,
    RequestFeatures,
    collect_target_features,
    find_common_feature,
)
from abreast_sidecar.stats.latency import COLD_PAIR_SHARE, MIN_BASELINE_PAIRS, MIN_COLD_PAIRS, MIN_SLOWER_US, Timing
from abreast_sidecar.stats.verdict import Budget, EndpointCounts, Verdict, decide_verdict
from abreast_sidecar.store.database import Database, Row
from abreast_sidecar.store.records import (
    CaptureAccounting,
    DeadLetterCount,
    Drop,
    Endpoint,
    EndpointSummary,
    Explanation,
    Finding,
    FindingEvent,
    LedgerSummary,
    PageResult,
    StoredDifference,
    StoredPair,
    StoredPairDetail,
    VerdictEvidence,
    Window,
    count_missing,
    from_row,
    read_captures,
)
from abreast_sidecar.store.rules import describe_waiver

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
CURSOR_CHECKSUM_BYTES = 8
MAX_TIMINGS = 20_000  # pairs of an endpoint, the newest
MAX_VERDICT_TIMINGS = 5_000  # newest pairs of an endpoint for a verdict
MAX_LISTING_TIMINGS = 2_000  # newest pairs of an endpoint for the percentiles in a listing
MAX_EXAMPLES = 20
MAX_EVENTS = 50
MAX_EXPLANATIONS = 10
MAX_RELEASES_LISTED = 10  # per finding
MAX_DEAD_LETTER_REASONS = 10
MAX_FEATURE_REQUESTS = 300  # with a finding, and as many without
ACCOUNTED_OUTCOMES = ("match", "mismatch", "partial", "oversize", "aborted", "not_compared")  # the request was not lost
ALL_TIME = Window()
EPOCH = datetime.fromtimestamp(0, UTC)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PageRequest:
    size: int
    token: str = ""

    @classmethod
    def from_request(cls, size: int, token: str) -> PageRequest:
        """Check the size of a request; 0 means the default."""
        if not 0 <= size <= MAX_PAGE_SIZE:
            raise ArgumentError(f"page_size must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}, got {size}")
        return cls(size or DEFAULT_PAGE_SIZE, token)


def encode_cursor(listing: str, filters: Mapping[str, Any], position: list[Any]) -> str:
    content = orjson.dumps(position)
    return base64.urlsafe_b64encode(_compute_cursor_checksum(listing, filters, content) + content).decode().rstrip("=")


def decode_cursor(listing: str, filters: Mapping[str, Any], token: str) -> list[Any]:
    """Return the position in a token. Raise ArgumentError if it is not of the same listing and filters."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    checksum, content = raw[:CURSOR_CHECKSUM_BYTES], raw[CURSOR_CHECKSUM_BYTES:]
    if not content or checksum != _compute_cursor_checksum(listing, filters, content):
        raise ArgumentError(
            "page_token must be the next_page_token of the last answer, with the filters unchanged; "
            "leave it empty to start again"
        )
    position: list[Any] = orjson.loads(content)
    return position


def _compute_cursor_checksum(listing: str, filters: Mapping[str, Any], content: bytes) -> bytes:
    scope = orjson.dumps([listing, filters], option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(scope + content, digest_size=CURSOR_CHECKSUM_BYTES).digest()


async def read_timings(database: Database, endpoint: Endpoint, window: Window) -> tuple[list[Timing], bool]:
    """Return timings in order of arrival, and whether older pairs exist. Raise NotFoundError without any."""
    parameters = {
        "service": endpoint.service,
        "method": endpoint.method,
        "route": endpoint.route,
        "start": window.start,
        "end": window.end,
        "limit": MAX_TIMINGS,
    }
    rows = await database.fetch_all("pair_times", parameters)
    if not rows:
        raise NotFoundError(
            f"the ledger has no pair with both times of {endpoint.method} {endpoint.route} of {endpoint.service}"
        )
    return [from_row(Timing, row) for row in rows], rows[0]["more"]


@dataclass(frozen=True, slots=True)
class FindingFilter:
    """Filters of a listing of findings. Empty text and None mean all."""

    service: str = ""
    method: str = ""
    route: str = ""
    parts: Sequence[str] | None = None
    kinds: Sequence[str] | None = None
    impacts: Sequence[str] | None = None
    include_noise: bool = False
    include_settled: bool = False  # expected and fixed, and findings that rules or drift explain completely
    only_explained: bool = False  # noise, expected and fixed, and findings that rules or drift explain in part
    release: str = ""  # a release of new
    window: Window = ALL_TIME


@dataclass(frozen=True, slots=True)
class PairFilter:
    """Filters of a listing of pairs. Empty text, 0 and None mean all."""

    service: str = ""
    method: str = ""
    route: str = ""
    outcomes: Sequence[str] | None = None
    finding_id: int = 0
    window: Window = ALL_TIME


class LedgerReader:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def list_services(self) -> list[str]:
        """List the services that an Envoy or a capture has named."""
        return [row["service"] for row in await self.database.fetch_all("services")]

    async def read_tallies(self) -> list[tuple[str, str, int]]:
        """Return service, outcome, and the number of rows ever written."""
        return [
            (row["service"], row["outcome"], row["pairs"]) for row in await self.database.fetch_all("outcome_counts")
        ]

    async def count_webhooks(self) -> dict[str, int]:
        """Count messages that were delivered, dropped or wait, and failed attempts."""
        (row,) = await self.database.fetch_all("webhook_counts")
        return dict(row)

    async def read_accounts(self, service: str | None = None) -> list[CaptureAccounting]:
        """Return the accounts of one service, which may be unknown, or of all."""
        return [
            from_row(CaptureAccounting, row) for row in await self.database.fetch_all("accounts", {"service": service})
        ]

    async def list_drops(self, service: str | None = None) -> list[Drop]:
        return [from_row(Drop, row) for row in await self.database.fetch_all("drops", {"service": service})]

    async def read_summary(self, service: str, window: Window) -> LedgerSummary:
        parameters = {
            "endpoints": await self._find_endpoint_ids(service),
            "windowed": window.is_bounded,
            **_make_window_parameters(window),
        }
        outcomes = await self.database.fetch_all("summary_outcomes", parameters)
        (counts,) = await self.database.fetch_all("summary_counts", parameters)
        (accounts,) = await self.read_accounts(service)
        (sampled_row,) = await self.database.fetch_all(
            "envoy_sampled", {"service": service, **_make_window_parameters(window)}
        )
        pairs = sum(row["pairs"] for row in outcomes) if window.is_bounded else accounts.written
        unaccounted = count_missing(sampled_row["sampled"], pairs, accounts.envoy_sampled, accounts.written)
        dead_letters = await self.database.fetch_all(
            "dead_letter_reasons", {"service": service, "limit": MAX_DEAD_LETTER_REASONS}
        )
        return LedgerSummary(
            service=service,
            outcomes={row["outcome"]: row["pairs"] for row in outcomes},
            explained=sum(row["explained"] for row in outcomes),
            findings=counts["findings"],
            accounts=accounts,
            drops=tuple(await self.list_drops(service)),
            dead_letters=tuple(from_row(DeadLetterCount, row) for row in dead_letters),
            first=min((row["first"] for row in outcomes), default=None),
            last=max((row["last"] for row in outcomes), default=None),
            sampled=None if unaccounted is None else pairs + unaccounted,
            unaccounted=unaccounted,
            clock_ahead_s=await self.measure_clock_ahead(),
        )

    async def measure_clock_ahead(self) -> float:
        """Return the seconds by which Postgres's clock is ahead of this machine's."""
        return (await self._read_database_time() - datetime.now(UTC)).total_seconds()

    async def read_evidence(
        self, service: str, window: Window, max_slower: float, *, release: str = "", all_releases: bool = False
    ) -> VerdictEvidence:
        """Read the evidence on one release of new; the newest by default.

        `max_slower`: the share of old's time by which new may be slower.
        """
        label = None if all_releases else release or await self._find_newest_release(service, window)
        parameters: dict[str, Any] = {"service": service, "endpoints": await self._find_endpoint_ids(service)}
        parameters |= {"windowed": window.is_bounded, **_make_window_parameters(window), "release": label}
        thresholds = {
            "cold_share": COLD_PAIR_SHARE,
            "cold_pairs": MIN_COLD_PAIRS,
            "max_slower": max_slower,
            "newest": MAX_VERDICT_TIMINGS,
            "least_copies": MIN_BASELINE_PAIRS,
            "min_slower_us": MIN_SLOWER_US,
        }
        span = await self.database.fetch_one("release_span", parameters)
        counts = await self.database.fetch_all(
            "verdict_counts", {**parameters, **thresholds, **_limit_to_release(span, window)}
        )
        (ledger,) = await self.database.fetch_all(
            "verdict_completeness", {**parameters, "evidence": list(ACCOUNTED_OUTCOMES)}
        )
        has_ended = window.end is not None and window.end < datetime.now(UTC)
        waivers = await self.database.fetch_all("waivers")
        return VerdictEvidence(
            endpoints=tuple(_make_endpoint_counts(row, waivers, service, label or "") for row in counts),
            release=label,
            has_ended=has_ended,
            **ledger,
        )

    async def read_verdict(
        self,
        service: str,
        window: Window,
        budget: Budget,
        pending: int,
        *,
        release: str = "",
        all_releases: bool = False,
    ) -> Verdict:
        """Decide the verdict of a window. Count `pending` before the call: later captures are not missing."""
        evidence = await self.read_evidence(
            service, window, budget.max_slower, release=release, all_releases=all_releases
        )
        return decide_verdict(evidence.endpoints, evidence.completeness(pending), budget, release=evidence.release)

    async def _find_newest_release(self, service: str, window: Window) -> str | None:
        row = await self.database.fetch_one("release_newest", {"service": service, "end": window.end})
        return row["label"] if row else None

    async def _find_endpoint_ids(
        self, service: str, findings: Sequence[int] | None = None, *, method: str = "", route: str = ""
    ) -> list[int]:
        """Return endpoint ids. Empty text and None mean all."""
        parameters = {"service": service, "method": method, "route": route, "findings": _to_list(findings)}
        return [row["id"] for row in await self.database.fetch_all("endpoint_ids", parameters)]

    async def list_endpoints(self, service: str, window: Window, page: PageRequest) -> PageResult[EndpointSummary]:
        filters = {"service": service, "window": asdict(window)}
        position = decode_cursor("endpoints", filters, page.token) if page.token else [None, None, None]
        parameters: dict[str, Any] = {"endpoints": await self._find_endpoint_ids(service)}
        parameters |= {"windowed": window.is_bounded, **_make_window_parameters(window)}
        parameters |= {"limit": page.size + 1, "newest": MAX_LISTING_TIMINGS}
        parameters |= {"after_service": position[0], "after_route": position[1], "after_method": position[2]}
        matches = await self.database.fetch_all("endpoints_list", parameters)
        return _make_page(
            matches,
            page,
            lambda row: from_row(EndpointSummary, row, outcomes=row["outcomes"] or {}),
            lambda row: encode_cursor("endpoints", filters, [row["service"], row["route"], row["method"]]),
        )

    async def list_findings(self, criteria: FindingFilter, page: PageRequest) -> PageResult[Finding]:
        filters = asdict(criteria)
        position = decode_cursor("findings", filters, page.token) if page.token else None
        as_of = datetime.fromisoformat(position[0]) if position else await self._read_database_time()
        matches = await self._find_findings(criteria, as_of, page.size + 1, position=position)
        return _make_page(
            matches,
            page,
            _to_finding,
            lambda row: encode_cursor("findings", filters, [as_of.isoformat(), row["rank"], row["count"], row["id"]]),
        )

    async def get_findings(self, ids: Sequence[int]) -> list[Finding]:
        """Return findings over all time, in the order of a listing."""
        everything = FindingFilter(include_noise=True, include_settled=True)
        matches = await self._find_findings(everything, await self._read_database_time(), len(ids), ids=ids)
        return [_to_finding(row) for row in matches]

    async def get_finding(self, finding_id: int) -> tuple[Finding, list[StoredPairDetail]]:
        """Return the finding over all time, and its examples, the smallest first. Raise NotFoundError."""
        findings = await self.get_findings([finding_id])
        if not findings:
            raise NotFoundError(f"the ledger has no finding {finding_id}; list them with ListFindings")
        examples = await self.database.fetch_all("finding_examples", {"id": finding_id, "limit": MAX_EXAMPLES})
        return findings[0], [_to_pair_detail(row) for row in examples]

    async def list_finding_events(self, finding_id: int) -> list[FindingEvent]:
        """List changes of its status, the latest first."""
        events = await self.database.fetch_all("finding_events", {"id": finding_id, "limit": MAX_EVENTS})
        return [from_row(FindingEvent, row) for row in events]

    async def find_common_feature(self, finding: Finding) -> Feature | None:
        """Find a feature that requests with the finding share, and other requests of the endpoint lack."""
        if finding.is_aggregate:
            return None
        showing = await self._read_sample_features("samples_showing", finding.id)
        others = await self._read_sample_features("samples_without", finding.id)
        if min(len(showing), len(others)) < MIN_REQUESTS:  # most requests show the finding, or few do
            parameters = {"id": finding.id, "limit": MAX_FEATURE_REQUESTS}
            showing = await self._read_request_features("requests_showing", parameters, finding.endpoint.route)
            others = await self._read_request_features("requests_without", parameters, finding.endpoint.route)
        others_total = finding.compared - finding.count
        return find_common_feature(
            showing, others, total_with_finding=finding.count, total_without_finding=others_total
        )

    async def read_finding_marks(self, service: str) -> dict[int, tuple[Any, ...]]:
        """Return the columns that change with a finding, by its id. Undecided findings are left out."""
        marks = await self.database.fetch_all("finding_marks", {"service": service})
        return {row["id"]: tuple(row.values())[1:] for row in marks}

    async def list_pairs(self, criteria: PairFilter, page: PageRequest) -> PageResult[StoredPair]:
        """List pairs, the newest first."""
        filters = asdict(criteria)
        after_text, after_id = decode_cursor("pairs", filters, page.token) if page.token else [None, None]
        after_time = datetime.fromisoformat(after_text) if after_text else None
        finding = [criteria.finding_id] if criteria.finding_id else None
        parameters: dict[str, Any] = {
            "endpoints": await self._find_endpoint_ids(
                criteria.service, finding, method=criteria.method, route=criteria.route
            ),
            "outcomes": _to_list(criteria.outcomes),
            "finding_id": criteria.finding_id,
            **_make_window_parameters(criteria.window),
            "after_at": after_time,
            "after_id": after_id,
        }
        matches: list[Row] = []
        for day in await self._list_days(criteria.window, after_time) if parameters["endpoints"] else ():
            remaining = page.size + 1 - len(matches)
            matches += await self.database.fetch_all("pairs_list", {**parameters, "day": day, "limit": remaining})
            if len(matches) > page.size:
                break
        return _make_page(
            matches, page, _to_pair, lambda row: encode_cursor("pairs", filters, [row["at"].isoformat(), row["id"]])
        )

    async def _list_days(self, window: Window, end: datetime | None) -> list[date]:
        """List days with pairs of a window, up to `end`, the newest first."""
        last = min((moment for moment in (window.end, end) if moment), default=None)
        return [
            day
            for (day,) in (row.values() for row in await self.database.fetch_all("days"))
            if (window.start is None or day >= window.start.astimezone(UTC).date())
            and (last is None or day <= last.astimezone(UTC).date())
        ]

    async def get_pair(self, pair_id: str) -> StoredPairDetail:
        """Raise NotFoundError for a pair that was not sampled, has not arrived yet, or was dropped."""
        row = await self.database.fetch_one("pair_get", {"id": pair_id})
        if row is None:
            raise NotFoundError(
                f"the ledger has no pair {pair_id}: it was not sampled, has not arrived yet, or was dropped"
            )
        return _to_pair_detail(row)

    async def _read_sample_features(self, name: str, finding_id: int) -> list[RequestFeatures]:
        return [row["features"] for row in await self.database.fetch_all(name, {"id": finding_id})]

    async def _read_request_features(
        self, name: str, parameters: Mapping[str, Any], route: str
    ) -> list[RequestFeatures]:
        return [
            collect_target_features(row["request"], route) for row in await self.database.fetch_all(name, parameters)
        ]

    async def _read_database_time(self) -> datetime:
        row = await self.database.fetch_one("clock")
        return row["now"] if row else datetime.now(UTC)

    async def _find_findings(
        self,
        criteria: FindingFilter,
        as_of: datetime,
        limit: int,
        *,
        position: Sequence[Any] | None = None,
        ids: Sequence[int] | None = None,
    ) -> list[Row]:
        _, after_rank, after_count, after_id = position or (None, None, None, None)
        windowed = criteria.window.is_bounded or bool(criteria.release)
        parameters = {
            **asdict(criteria),
            **{name: _to_list(getattr(criteria, name)) for name in ("parts", "kinds", "impacts")},
            **_make_window_parameters(criteria.window),
            "since": as_of if criteria.window.start is None else max(as_of, criteria.window.start),
            "endpoints": await self._find_endpoint_ids(criteria.service, ids),
            "windowed": windowed,
            "most_releases": MAX_RELEASES_LISTED,
            "as_of": as_of,
            "ids": _to_list(ids),
            "after_rank": after_rank,
            "after_count": after_count,
            "after_id": after_id,
            "limit": limit,
        }
        del parameters["window"]
        return await self.database.fetch_all("findings_list", parameters)


def _make_endpoint_counts(row: Row, waivers: Sequence[Row], service: str, release: str) -> EndpointCounts:
    endpoint = f"{row['method']} {row['route']}"
    return from_row(EndpointCounts, row, endpoint=endpoint, waived=describe_waiver(waivers, service, endpoint, release))


def _limit_to_release(span: Row | None, window: Window) -> dict[str, datetime | None]:
    """Return the part of the window in which pairs without a response of new belong to the release."""
    if span is None:
        return {"lone_start": EPOCH, "lone_end": EPOCH}
    starts = [moment for moment in (span["start"], window.start) if moment is not None]
    ends = [moment for moment in (span["stop"], window.end) if moment is not None]
    return {"lone_start": max(starts, default=None), "lone_end": min(ends, default=None)}


def _make_window_parameters(window: Window) -> dict[str, datetime | None]:
    return {"start": window.start, "end": window.end}


def _to_list(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _make_page(
    matches: Sequence[Row],
    page: PageRequest,
    convert: Callable[[Row], T],
    make_token: Callable[[Mapping[str, Any]], str],
) -> PageResult[T]:
    """Convert the rows of a page. `matches` has one row more if there is another page."""
    page_rows = matches[: page.size]
    return PageResult(
        tuple(convert(row) for row in page_rows), make_token(page_rows[-1]) if len(matches) > page.size else ""
    )


def _to_finding(row: Row) -> Finding:
    return from_row(Finding, row, explanations=tuple(_iter_explanations(row))[:MAX_EXPLANATIONS])


def _iter_explanations(row: Row) -> Iterator[Explanation]:
    if row["status"] in {"expected", "fixed"}:
        yield Explanation(row["status"], row["count"], row["status_reason"])
    elif row["state"] == "noise" and row["status"] != "confirmed" and row["count"] + row["baseline_count"]:
        cause = "shape" if row["shape_explained"] and not row["baseline_count"] else "noise"
        yield Explanation(cause, row["count"], row["reason"])
    for rule in row["rules"] or ():
        yield Explanation("rule", **rule)
    if row["drift_pairs"]:
        yield Explanation("drift", row["drift_pairs"], "in a recheck both versions agreed")


def _to_pair(row: Row) -> StoredPair:
    explained = zip(row["explained"] or (), row["explained_by"] or (), strict=True)
    return from_row(StoredPair, row, explained=tuple(explained))


def _to_pair_detail(row: Row) -> StoredPairDetail:
    noise_keys, drift_keys = set(row["noisy"]), set(row["drifted"])
    differences = []
    for stored in row["differences"] or ():
        finding = f"{stored['part']} {stored['kind']} {stored['path']}"
        flags = {"is_noise": finding in noise_keys, "is_drift": finding in drift_keys}
        rule_id = int(stored.get("explained_by") or 0)
        values = {"old": None, "new": None, **stored}
        differences.append(from_row(StoredDifference, values, **flags, rule_id=rule_id))
    captures = () if row["captures"] is None else read_captures(row["captures"])
    return StoredPairDetail(_to_pair(row), captures, tuple(differences))
