"""Reads the ledger. All functions raise LedgerError while Postgres is away."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from operator import itemgetter
from typing import Any, TypeVar

import orjson

from abreast_sidecar.errors import ArgumentError, NotFoundError
from abreast_sidecar.stats.causes import Cause, CauseMember, group_causes
from abreast_sidecar.stats.features import MIN_REQUESTS, Feature, collect_target_features, find_common_feature
from abreast_sidecar.stats.latency import (
    COLD_PAIR_SHARE,
    MIN_COLD_PAIRS,
    TimeCounts,
    Timing,
    count_times,
    select_like_for_like,
)
from abreast_sidecar.stats.noise import NoisyPlace
from abreast_sidecar.stats.verdict import Budget, EndpointCounts, ServiceCounts, Verdict, decide_verdict
from abreast_sidecar.store.catalogue import MAX_PATH_CHARS
from abreast_sidecar.store.database import Database, Row, sanitise_text
from abreast_sidecar.store.records import (
    CaptureAccounting,
    DeadLetterCount,
    Drop,
    EffectiveSample,
    Endpoint,
    EndpointSummary,
    Explanation,
    Finding,
    FindingEvent,
    LedgerSummary,
    LoadSummary,
    PageResult,
    StoredDifference,
    StoredPair,
    StoredPairDetail,
    VerdictEvidence,
    Window,
    count_missing,
    from_row,
    read_captures,
    read_timing_arrays,
)
from abreast_sidecar.store.rules import describe_waiver
from abreast_sidecar.store.samples import FEW_PAIRS

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
CURSOR_CHECKSUM_BYTES = 8
MAX_TIMINGS = 20_000  # pairs of an endpoint, the newest
MAX_VERDICT_TIMINGS = 5_000  # newest pairs of an endpoint for a verdict
MAX_DEPARTURE_PERIODS = 1_000  # newest periods of ten seconds with users who left
MAX_CONTROLLED_SHARE = 0.95  # of new; above it, too few users of old are left to compare with
MAX_LISTING_TIMINGS = 2_000  # newest pairs of an endpoint for the percentiles in a listing
MAX_EXAMPLES = 20
FINDING_ORDERS = ("", "count desc", "first_seen desc", "last_seen desc")
MAX_EVENTS = 50
MAX_EXPLANATIONS = 10
MAX_RELEASES_LISTED = 10  # per finding
MAX_DEAD_LETTER_REASONS = 10
EFFECTIVE_SAMPLE_S = 600.0  # age of the counts that the effective sample is from
MAX_FEATURE_REQUESTS = 300  # with a finding, and as many without
ACCOUNTED_OUTCOMES = ("match", "mismatch", "partial", "oversize", "aborted", "not_compared")  # the request was not lost
ALL_TIME = Window()
EPOCH = datetime.fromtimestamp(0, UTC)

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PageRequest:
    size: int
    token: str = ""

    @classmethod
    def from_request(cls, size: int, token: str) -> PageRequest:
        """Check the size of a request; 0 means the default. A page has at most MAX_PAGE_SIZE entries."""
        if size < 0:
            raise ArgumentError(f"page_size must be at least 1, or 0 for {DEFAULT_PAGE_SIZE}, got {size}")
        return cls(min(size, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE, token)


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


@dataclass(frozen=True, slots=True)
class Listing:
    """One page of a listing. A page token is valid only for the listing and filters that it comes from."""

    name: str
    filters: Mapping[str, Any]
    page: PageRequest

    @property
    def limit(self) -> int:
        """Return the number of rows to read: one more than the page has, which shows that there is another page."""
        return self.page.size + 1

    def decode_position(self, columns: int) -> list[Any]:
        """Return the position after which the page begins, or that many None for the first page. Raise ArgumentError."""
        return decode_cursor(self.name, self.filters, self.page.token) if self.page.token else [None] * columns

    def make_page(
        self, rows: Sequence[S], convert: Callable[[S], T], get_position: Callable[[S], list[Any]]
    ) -> PageResult[T]:
        """Convert the rows of the page, and make the token of the next page."""
        shown = rows[: self.page.size]
        token = "" if len(rows) <= len(shown) else encode_cursor(self.name, self.filters, get_position(shown[-1]))
        return PageResult(tuple(map(convert, shown)), token)


async def read_timings(database: Database, endpoint: Endpoint, window: Window) -> tuple[list[Timing], bool]:
    """Return timings in order of arrival, and whether older pairs exist. Raise NotFoundError without any."""
    parameters = {**asdict(endpoint), **_make_window_parameters(window), "limit": MAX_TIMINGS}
    rows = await database.fetch_all("pair_times", parameters)
    if not rows:
        raise NotFoundError(
            f"the ledger has no pair with both times of {endpoint.method} {endpoint.route} of {endpoint.service}"
        )
    return [Timing(*(row[name] for name in Timing._fields)) for row in rows], rows[0]["more"]


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
    cause_id: int = 0  # only findings with the same cause as this one
    order_by: str = ""  # one of FINDING_ORDERS; empty: by impact, then by count

    def __post_init__(self) -> None:
        if self.order_by not in FINDING_ORDERS:
            raise ValueError(
                f"order_by must be one of {', '.join(filter(None, FINDING_ORDERS))}, or empty, got {self.order_by!r}"
            )


@dataclass(frozen=True, slots=True)
class CountedPage(PageResult[T]):
    total_size: int  # of all pages


@dataclass(frozen=True, slots=True)
class CausePage:
    """A page of causes, and the counts of the whole list."""

    rows: tuple[Cause, ...]
    next_token: str
    total_size: int
    finding_count: int


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

    async def is_known_service(self, service: str) -> bool:
        """Check that an Envoy or a capture has named the service."""
        return bool((await self.database.fetch_row("service_exists", {"service": service}))["named"])

    async def read_tallies(self) -> list[tuple[str, str, int]]:
        """Return service, outcome, and the number of rows ever written."""
        rows = await self.database.fetch_all("outcome_counts")
        return [(row["service"], row["outcome"], row["pairs"]) for row in rows]

    async def count_webhooks(self) -> dict[str, int]:
        """Count messages that were delivered, dropped or wait, and failed attempts."""
        return await self.database.fetch_row("webhook_counts")

    async def read_accounts(self, service: str | None = None) -> list[CaptureAccounting]:
        """Return the accounts of one service, which may be unknown, or of all."""
        return await self._fetch(CaptureAccounting, "accounts", {"service": service})

    async def list_drops(self, service: str | None = None) -> list[Drop]:
        return await self._fetch(Drop, "drops", {"service": service})

    async def _fetch(self, record_type: type[T], name: str, parameters: Mapping[str, Any]) -> list[T]:
        return [from_row(record_type, row) for row in await self.database.fetch_all(name, parameters)]

    async def read_summary(self, service: str, window: Window) -> LedgerSummary:
        parameters = {
            "service": service,
            "endpoints": await self._find_endpoint_ids(service),
            **_make_window_parameters(window),
            "limit": MAX_DEAD_LETTER_REASONS,
        }
        outcomes = await self.database.fetch_all("summary_outcomes", parameters)
        findings = (await self.database.fetch_row("summary_counts", parameters))["findings"]
        (accounts,) = await self.read_accounts(service)
        sampled = (await self.database.fetch_row("envoy_sampled", parameters))["sampled"]
        pairs = sum(row["pairs"] for row in outcomes) if window.is_bounded else accounts.written
        unaccounted = count_missing(sampled, pairs, accounts.envoy_sampled, accounts.written)
        return LedgerSummary(
            service=service,
            outcomes={row["outcome"]: row["pairs"] for row in outcomes},
            explained=sum(row["explained"] for row in outcomes),
            findings=findings,
            accounts=accounts,
            dead_letters=tuple(await self._fetch(DeadLetterCount, "dead_letter_reasons", parameters)),
            drops=tuple(await self.list_drops(service)),
            sheds=tuple(await self._fetch(Drop, "sheds", parameters)),
            unconverted=tuple(await self._fetch(Drop, "unconverted", parameters)),
            load=next(iter(await self._fetch(LoadSummary, "load_summary", parameters)), None),
            first=min((row["first"] for row in outcomes), default=None),
            last=max((row["last"] for row in outcomes), default=None),
            sampled=None if unaccounted is None else pairs + unaccounted,
            unaccounted=unaccounted,
            clock_ahead_s=await self.measure_clock_ahead(),
        )

    async def read_effective_sample(self, service: str) -> EffectiveSample | None:
        """Return None without a selected request in the last EFFECTIVE_SAMPLE_S."""
        parameters = {"service": service, "seconds": EFFECTIVE_SAMPLE_S}
        (sample,) = await self._fetch(EffectiveSample, "effective_sample", parameters)
        return sample if sample.selected else None

    async def read_rule_counts(self, service: str) -> dict[str, int]:
        """Return Envoys' counts of sampling rules, by the name of the counter."""
        return {row["name"]: row["count"] for row in await self.database.fetch_all("rule_counts", {"service": service})}

    async def measure_clock_ahead(self) -> float:
        """Return the seconds by which Postgres's clock is ahead of this machine's."""
        return (await self._read_database_time() - datetime.now(UTC)).total_seconds()

    async def read_evidence(
        self, service: str, window: Window, max_slower: float, *, release: str = "", all_releases: bool = False
    ) -> VerdictEvidence:
        """Read the evidence on one release of new; the newest by default.

        `max_slower`: the share of old's time by which new may be slower.
        """
        label = None if all_releases else release
        if label == "":
            newest = await self.database.fetch_one("release_newest", {"service": service, "end": window.end})
            label = newest["label"] if newest else None
        elif label is not None:
            await self._check_release(service, label)
        parameters = {
            "service": service,
            "release": label,
            "endpoints": await self._find_endpoint_ids(service),
            **_make_window_parameters(window),
            "cold_share": COLD_PAIR_SHARE,
            "cold_pairs": MIN_COLD_PAIRS,
            "newest": MAX_VERDICT_TIMINGS,
            "evidence": list(ACCOUNTED_OUTCOMES),
        }
        span = await self.database.fetch_one("release_span", parameters)
        parameters |= _limit_to_release(span, window)
        counts = await self.database.fetch_all("verdict_counts", parameters)
        limits = {"periods": MAX_DEPARTURE_PERIODS, "max_share": MAX_CONTROLLED_SHARE}
        noisy_places = await self._fetch(NoisyPlace, "verdict_noise", {**parameters, "few": FEW_PAIRS})
        service_row = await self.database.fetch_row("verdict_service_counts", {**parameters, **limits})
        completeness = await self.database.fetch_row("verdict_completeness", parameters)
        has_ended = window.end is not None and window.end < datetime.now(UTC)
        waivers = await self.database.fetch_all("waivers")
        endpoint_times, times = await asyncio.to_thread(_count_all_times, counts, max_slower)
        return VerdictEvidence(
            endpoints=tuple(
                _make_endpoint_counts(row, waivers, service, label or "", row_times)
                for row, row_times in zip(counts, endpoint_times, strict=True)
            ),
            service=from_row(ServiceCounts, service_row, times=times, noisy_places=tuple(noisy_places)),
            release=label,
            has_ended=has_ended,
            **completeness,
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
        return await asyncio.to_thread(
            decide_verdict,
            evidence.endpoints,
            evidence.completeness(pending),
            budget,
            release=evidence.release,
            service=evidence.service,
        )

    async def _check_release(self, service: str, label: str) -> None:
        """Raise NotFoundError for a release of new that no pair of the service names. Empty service: of any service."""
        if not await self.database.fetch_one("release_known", {"service": service, "label": label}):
            of_service = f" of {service}" if service else ""
            raise NotFoundError(f"the ledger has no pair of release {label!r} of new{of_service}")

    async def _find_endpoint_ids(
        self, service: str, findings: Sequence[int] | None = None, *, method: str = "", route: str = ""
    ) -> list[int]:
        """Return endpoint ids. Empty text and None mean all."""
        parameters = {"service": service, "method": method, "route": route, "findings": _to_list(findings)}
        return [row["id"] for row in await self.database.fetch_all("endpoint_ids", parameters)]

    async def list_endpoints(self, service: str, window: Window, page: PageRequest) -> CountedPage[EndpointSummary]:
        listing = Listing("endpoints", {"service": service, "window": asdict(window)}, page)
        after_service, after_route, after_method = listing.decode_position(3)
        parameters = {
            "endpoints": await self._find_endpoint_ids(service),
            **_make_window_parameters(window),
            "limit": listing.limit,
            "newest": MAX_LISTING_TIMINGS,
            "after_service": after_service,
            "after_route": after_route,
            "after_method": after_method,
        }
        rows = await self.database.fetch_all("endpoints_list", parameters)
        result = listing.make_page(
            rows,
            lambda row: from_row(EndpointSummary, row, outcomes=row["outcomes"] or {}),
            lambda row: [row["service"], row["route"], row["method"]],
        )
        return CountedPage(result.rows, result.next_token, rows[0]["total"] if rows else 0)

    async def list_findings(self, criteria: FindingFilter, page: PageRequest) -> CountedPage[Finding]:
        listing = Listing("findings", asdict(criteria), page)
        position = listing.decode_position(4)
        if criteria.release:
            await self._check_release(criteria.service, criteria.release)
        as_of = datetime.fromisoformat(position[0]) if position[0] else await self._read_database_time()
        rows = await self._find_findings(
            criteria,
            as_of,
            listing.limit,
            position=position,
            cause_ids=await self._find_cause_ids(criteria.cause_id) if criteria.cause_id else None,
        )
        result = listing.make_page(
            rows, _to_finding, lambda row: [as_of.isoformat(), row["rank"], row["weight"], row["id"]]
        )
        return CountedPage(result.rows, result.next_token, rows[0]["total"] if rows else 0)

    async def list_causes(self, criteria: FindingFilter, page: PageRequest) -> CausePage:
        """Group all findings of the filter into causes, and return a page of them, the most harmful first."""
        listing = Listing("causes", asdict(criteria), page)
        (position,) = listing.decode_position(1)
        if criteria.release:
            await self._check_release(criteria.service, criteria.release)
        causes = await self.read_causes(criteria)
        after = [cause for cause in causes if position is None or list(cause.sort_key) > position]
        result = listing.make_page(after[: listing.limit], lambda cause: cause, lambda cause: [list(cause.sort_key)])
        finding_count = sum(len(cause.members) + len(cause.consequences) for cause in causes)
        return CausePage(result.rows, result.next_token, len(causes), finding_count)

    async def read_causes(self, criteria: FindingFilter) -> list[Cause]:
        """Return all causes, the most harmful first."""
        parameters = {
            **asdict(criteria),
            **{name: _to_list(getattr(criteria, name)) for name in ("parts", "kinds", "impacts")},
            **_make_window_parameters(criteria.window),
            "endpoints": await self._find_endpoint_ids(criteria.service, method=criteria.method, route=criteria.route),
            "windowed": criteria.window.is_bounded or bool(criteria.release),
        }
        del parameters["window"]
        rows = await self.database.fetch_all("cause_members", parameters)
        return await asyncio.to_thread(lambda: group_causes(CauseMember(**row) for row in rows))

    async def _find_cause_ids(self, finding_id: int) -> list[int]:
        """Return the findings with the same cause, over all time. Raise NotFoundError."""
        finding, _examples = await self.get_finding(finding_id)
        criteria = FindingFilter(service=finding.endpoint.service, include_noise=True, include_settled=True)
        causes = await self.read_causes(criteria)
        cause = next((cause for cause in causes if cause.includes(finding_id)), None)
        return [finding_id] if cause is None else [member.id for member in (*cause.members, *cause.consequences)]

    async def get_findings(self, ids: Sequence[int]) -> list[Finding]:
        """Return findings over all time, in the order of a listing."""
        criteria = FindingFilter(include_noise=True, include_settled=True)
        matches = await self._find_findings(criteria, await self._read_database_time(), len(ids), ids=ids)
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
        return await self._fetch(FindingEvent, "finding_events", {"id": finding_id, "limit": MAX_EVENTS})

    async def find_common_feature(self, finding: Finding) -> Feature | None:
        """Find a feature that requests with the finding share, and other requests of the endpoint lack."""
        if finding.is_aggregate:
            return None
        parameters = {"id": finding.id, "limit": MAX_FEATURE_REQUESTS}
        samples = [await self.database.fetch_all(name, parameters) for name in ("samples_showing", "samples_without")]
        if min(map(len, samples)) >= MIN_REQUESTS:
            with_finding, without_finding = map(_list_features, samples)
        else:  # most requests show the finding, or few do
            with_finding, without_finding = [
                [
                    collect_target_features(row["request"], finding.endpoint.route)
                    for row in await self.database.fetch_all(name, parameters)
                ]
                for name in ("requests_showing", "requests_without")
            ]
        return find_common_feature(
            with_finding,
            without_finding,
            total_with_finding=finding.count,
            total_without_finding=finding.compared - finding.count,
        )

    async def read_finding_marks(self, service: str) -> dict[int, tuple[Any, ...]]:
        """Return the columns that change with a finding, by its id. Undecided findings are left out."""
        marks = await self.database.fetch_all("finding_marks", {"service": service})
        return {row["id"]: tuple(row.values())[1:] for row in marks}

    async def list_pairs(self, criteria: PairFilter, page: PageRequest) -> PageResult[StoredPair]:
        """List pairs, the newest first."""
        listing = Listing("pairs", asdict(criteria), page)
        after_text, after_id = listing.decode_position(2)
        after_time = datetime.fromisoformat(after_text) if after_text else None
        endpoints = await self._find_endpoint_ids(
            criteria.service,
            [criteria.finding_id] if criteria.finding_id else None,
            method=criteria.method,
            route=criteria.route,
        )
        parameters = {
            "endpoints": endpoints,
            "outcomes": _to_list(criteria.outcomes),
            "finding_id": criteria.finding_id,
            **_make_window_parameters(criteria.window),
            "after_at": after_time,
            "after_id": after_id,
        }
        matches: list[Row] = []
        for day in await self._list_days(criteria.window, after_time) if endpoints else ():
            limit = listing.limit - len(matches)
            matches += await self.database.fetch_all("pairs_list", {**parameters, "day": day, "limit": limit})
            if len(matches) == listing.limit:
                break
        return listing.make_page(matches, _to_pair, lambda row: [row["at"].isoformat(), row["id"]])

    async def _list_days(self, window: Window, end: datetime | None) -> list[date]:
        """List days with pairs of a window, up to `end`, the newest first."""
        first_day = date.min if window.start is None else window.start.astimezone(UTC).date()
        last_day = min((moment.astimezone(UTC).date() for moment in (window.end, end) if moment), default=date.max)
        return [row["day"] for row in await self.database.fetch_all("days") if first_day <= row["day"] <= last_day]

    async def get_pair(self, pair_id: str) -> StoredPairDetail:
        """Raise NotFoundError for a pair that was not sampled, has not arrived yet, or was dropped."""
        row = await self.database.fetch_one("pair_get", {"id": pair_id})
        if row is None:
            raise NotFoundError(
                f"the ledger has no pair {pair_id}: it was not sampled, has not arrived yet, or was dropped"
            )
        return _to_pair_detail(row)

    async def _read_database_time(self) -> datetime:
        now: datetime = (await self.database.fetch_row("clock"))["now"]
        return now

    async def _find_findings(
        self,
        criteria: FindingFilter,
        as_of: datetime,
        limit: int,
        *,
        position: Sequence[Any] = (None, None, None, None),
        ids: Sequence[int] | None = None,
        cause_ids: Sequence[int] | None = None,
    ) -> list[Row]:
        _, after_rank, after_weight, after_id = position
        parameters = {
            **asdict(criteria),
            **{name: _to_list(getattr(criteria, name)) for name in ("parts", "kinds", "impacts")},
            **_make_window_parameters(criteria.window),
            "since": as_of if criteria.window.start is None else max(as_of, criteria.window.start),
            "endpoints": await self._find_endpoint_ids(criteria.service, ids),
            "windowed": criteria.window.is_bounded or bool(criteria.release),
            "most_releases": MAX_RELEASES_LISTED,
            "as_of": as_of,
            "ids": _to_list(ids),
            "cause_ids": _to_list(cause_ids),
            "after_rank": after_rank,
            "after_weight": after_weight,
            "after_id": after_id,
            "limit": limit,
        }
        del parameters["window"]
        return await self.database.fetch_all("findings_list", parameters)


def _count_all_times(rows: Sequence[Row], max_slower: float) -> tuple[list[TimeCounts], TimeCounts]:
    """Return the counts of each endpoint, and of all together in order of arrival."""
    samples: list[Sequence[Timing]] = []
    arrivals: list[tuple[float, Timing]] = []
    for row in rows:
        timings = read_timing_arrays(row)
        sample = select_like_for_like(timings)
        if sample is timings:
            sample, times = ([], []) if row["expects_baseline"] else (timings, row["at"])
        else:
            times = [at for at, timing in zip(row["at"], timings, strict=True) if timing.baseline_us is not None]
        samples.append(sample)
        arrivals += zip(times, sample, strict=True)
    arrivals.sort(key=itemgetter(0))
    return (
        [count_times(sample, max_slower) for sample in samples],
        count_times([timing for _, timing in arrivals], max_slower),
    )


def _make_endpoint_counts(
    row: Row, waivers: Sequence[Row], service: str, release: str, times: TimeCounts
) -> EndpointCounts:
    endpoint = f"{row['method']} {row['route']}"
    waived = describe_waiver(waivers, service, endpoint, release)
    return from_row(EndpointCounts, row, endpoint=endpoint, waived=waived, times=times)


def _limit_to_release(span: Row | None, window: Window) -> dict[str, datetime | None]:
    """Return the part of the window in which pairs without a response of new belong to the release."""
    if span is None:
        return {"lone_start": EPOCH, "lone_end": EPOCH}
    starts = [moment for moment in (span["start"], window.start) if moment is not None]
    ends = [moment for moment in (span["stop"], window.end) if moment is not None]
    return {"lone_start": max(starts, default=None), "lone_end": min(ends, default=None)}


def _make_window_parameters(window: Window) -> dict[str, Any]:
    return {"start": window.start, "end": window.end, "windowed": window.is_bounded}


def _to_list(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _to_finding(row: Row) -> Finding:
    return from_row(Finding, row, explanations=tuple(_iter_explanations(row))[:MAX_EXPLANATIONS])


def _list_features(samples: Sequence[Row]) -> list[dict[str, list[str]]]:
    """Return the features of each request. Equal requests of one client count once, because they are not independent."""
    by_request = {
        (sample["client"], str(sample["features"]) if sample["client"] is not None else number): sample["features"]
        for number, sample in enumerate(samples)
    }
    return list(by_request.values())


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
        path = sanitise_text(stored["path"], MAX_PATH_CHARS)  # as the finding has it
        finding = f"{stored['part']} {stored['kind']} {path}"
        flags = {"is_noise": finding in noise_keys, "is_drift": finding in drift_keys}
        rule_id = int(stored.get("explained_by") or 0)
        values = {"old": None, "new": None, **stored, "path": path}
        differences.append(from_row(StoredDifference, values, **flags, rule_id=rule_id))
    captures = () if row["captures"] is None else read_captures(row["captures"])
    return StoredPairDetail(_to_pair(row), captures, tuple(differences))
