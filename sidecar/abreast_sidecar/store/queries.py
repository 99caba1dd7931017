"""Reads of the ledger. All raise LedgerError while Postgres can't be reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, TypeVar

from abreast_sidecar.compare.feature import LEAST, Feature, Features, of_target, separating
from abreast_sidecar.compare.latency import COLD_PAIRS, COLD_SHARE, LEAST_COPIES, MIN_SLOWER_US
from abreast_sidecar.compare.verdict import Counts
from abreast_sidecar.errors import NotFoundError
from abreast_sidecar.store import pages, rows
from abreast_sidecar.store.database import Database, Row
from abreast_sidecar.store.pages import Page
from abreast_sidecar.store.results import (
    Accounts,
    Drop,
    EndpointSummary,
    Evidence,
    Finding,
    FindingEvent,
    Paged,
    Pair,
    PairDetail,
    Poison,
    Summary,
    Window,
    missing,
)
from abreast_sidecar.store.rules import waived

T = TypeVar("T")

MAX_EXAMPLES = 20
MAX_EVENTS = 50
MAX_LISTED = 10  # releases of a finding
NEWEST = 5_000  # pairs of an endpoint whose times a verdict is made of
NEWEST_LISTED = 2_000  # and those that a listing's percentiles are of
MAX_REASONS = 10  # for which entries were put apart
MAX_REQUESTS = 300  # of those that show a finding and of the others, to find what tells them apart
EVIDENCE = (
    "match",
    "mismatch",
    "partial",
    "oversize",
    "aborted",
    "not_compared",
)  # outcomes of requests that were not lost
ALL_TIME = Window()
EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class FindingFilter:
    """Empty text and None mean all."""

    service: str = ""
    method: str = ""
    route: str = ""
    parts: Sequence[str] | None = None
    kinds: Sequence[str] | None = None
    impacts: Sequence[str] | None = None
    include_noise: bool = False
    include_settled: bool = False  # expected and fixed, and what rules or drift explain all of
    only_explained: bool = False  # noise, expected and fixed, and what rules or drift explain some of
    release: str = ""  # of new
    window: Window = ALL_TIME


@dataclass(frozen=True, slots=True)
class PairFilter:
    """Empty text, 0 and None mean all."""

    service: str = ""
    method: str = ""
    route: str = ""
    outcomes: Sequence[str] | None = None
    finding_id: int = 0
    window: Window = ALL_TIME


class Queries:
    def __init__(self, database: Database) -> None:
        self.database = database

    async def services(self) -> list[str]:
        """Those that an Envoy or a capture has named."""
        return [row["service"] for row in await self.database.rows("services")]

    async def tallies(self) -> list[tuple[str, str, int]]:
        """Service, outcome, and rows ever written: it only grows."""
        return [
            (row["service"], row["outcome"], row["pairs"])
            for row in await self.database.rows("outcome_counts")
        ]

    async def webhooks(self) -> dict[str, int]:
        """Messages delivered, failed (attempts), dropped and waiting."""
        (row,) = await self.database.rows("webhook_counts")
        return dict(row)

    async def accounts(self, service: str | None = None) -> list[Accounts]:
        """Of one service, which may be unknown, or of all."""
        return [Accounts(**row) for row in await self.database.rows("accounts", {"service": service})]

    async def drops(self, service: str | None = None) -> list[Drop]:
        return [Drop(**row) for row in await self.database.rows("drops", {"service": service})]

    async def summary(self, service: str, window: Window) -> Summary:
        asked = {"endpoints": await self._endpoints(service), "windowed": window.bounded, **_bounds(window)}
        outcomes = await self.database.rows("summary_outcomes", asked)
        (counts,) = await self.database.rows("summary_counts", asked)
        (accounts,) = await self.accounts(service)
        (held,) = await self.database.rows("envoy_sampled", {"service": service, **_bounds(window)})
        pairs = sum(row["pairs"] for row in outcomes) if window.bounded else accounts.written
        unaccounted = missing(held["sampled"], pairs, accounts.envoy_sampled, accounts.written)
        poison = await self.database.rows("dead_letter_reasons", {"service": service, "limit": MAX_REASONS})
        return Summary(
            service=service,
            outcomes={row["outcome"]: row["pairs"] for row in outcomes},
            explained=sum(row["explained"] for row in outcomes),
            findings=counts["findings"],
            accounts=accounts,
            drops=tuple(await self.drops(service)),
            poison=tuple(Poison(**row) for row in poison),
            first=min((row["first"] for row in outcomes), default=None),
            last=max((row["last"] for row in outcomes), default=None),
            sampled=None if unaccounted is None else pairs + unaccounted,
            unaccounted=unaccounted,
            clock_ahead=await self.clock_ahead(),
        )

    async def clock_ahead(self) -> float:
        """Seconds by which Postgres's clock is ahead of this machine's."""
        return (await self._now() - datetime.now(UTC)).total_seconds()

    async def evidence(
        self,
        service: str,
        window: Window,
        max_slower: float,
        *,
        release: str = "",
        all_releases: bool = False,
    ) -> Evidence:
        """`max_slower`: the part of old's time by which new may be slower. `release`: of new; the newest unless given."""
        label = None if all_releases else release or await self._newest(service, window)
        asked: dict[str, Any] = {"service": service, "endpoints": await self._endpoints(service)}
        asked |= {"windowed": window.bounded, **_bounds(window), "release": label}
        times = {
            "cold_share": COLD_SHARE,
            "cold_pairs": COLD_PAIRS,
            "max_slower": max_slower,
            "newest": NEWEST,
            "least_copies": LEAST_COPIES,
            "min_slower_us": MIN_SLOWER_US,
        }
        span = await self.database.one("release_span", asked)
        counts = await self.database.rows("verdict_counts", {**asked, **times, **_of_release(span, window)})
        (ledger,) = await self.database.rows("verdict_completeness", {**asked, "evidence": list(EVIDENCE)})
        over = window.end is not None and window.end < datetime.now(UTC)
        waivers = await self.database.rows("waivers")
        return Evidence(
            endpoints=tuple(_counts(row, waivers, service, label or "") for row in counts),
            release=label,
            over=over,
            **ledger,
        )

    async def _newest(self, service: str, window: Window) -> str | None:
        found = await self.database.one("release_newest", {"service": service, "end": window.end})
        return found["label"] if found else None

    async def _endpoints(
        self, service: str, findings: Sequence[int] | None = None, *, method: str = "", route: str = ""
    ) -> list[int]:
        """Of one service, all for empty text; of those findings, where they are given."""
        asked = {"service": service, "method": method, "route": route, "findings": _list(findings)}
        return [row["id"] for row in await self.database.rows("endpoint_ids", asked)]

    async def endpoints(self, service: str, window: Window, page: Page) -> Paged[EndpointSummary]:
        filters = {"service": service, "window": asdict(window)}
        place = pages.decode("endpoints", filters, page.token) if page.token else [None, None, None]
        asked: dict[str, Any] = {"endpoints": await self._endpoints(service)}
        asked |= {"windowed": window.bounded, **_bounds(window)}
        asked |= {"limit": page.size + 1, "newest": NEWEST_LISTED}
        asked |= {"after_service": place[0], "after_route": place[1], "after_method": place[2]}
        found = await self.database.rows("endpoints_list", asked)
        return _paged(
            found,
            page,
            rows.endpoint_summary,
            lambda last: pages.encode("endpoints", filters, [last["service"], last["route"], last["method"]]),
        )

    async def findings(self, wanted: FindingFilter, page: Page) -> Paged[Finding]:
        filters = asdict(wanted)
        place = pages.decode("findings", filters, page.token) if page.token else None
        as_of = datetime.fromisoformat(place[0]) if place else await self._now()
        found = await self._findings(wanted, as_of, page.size + 1, place=place)
        return _paged(
            found,
            page,
            rows.finding,
            lambda last: pages.encode(
                "findings", filters, [as_of.isoformat(), last["rank"], last["count"], last["id"]]
            ),
        )

    async def findings_by_id(self, ids: Sequence[int]) -> list[Finding]:
        """Over all time, noise and settled ones too, in the order of a listing."""
        everything = FindingFilter(include_noise=True, include_settled=True)
        found = await self._findings(everything, await self._now(), len(ids), ids=ids)
        return [rows.finding(row) for row in found]

    async def finding(self, finding_id: int) -> tuple[Finding, list[PairDetail]]:
        """The finding over all time, and its examples, the smallest first. Raise NotFoundError."""
        found = await self.findings_by_id([finding_id])
        if not found:
            raise NotFoundError(f"the ledger holds no finding {finding_id}; list them with ListFindings")
        examples = await self.database.rows("finding_examples", {"id": finding_id, "limit": MAX_EXAMPLES})
        return found[0], [rows.pair_detail(row) for row in examples]

    async def finding_events(self, finding_id: int) -> list[FindingEvent]:
        """What people said of it, the latest first."""
        found = await self.database.rows("finding_events", {"id": finding_id, "limit": MAX_EVENTS})
        return [FindingEvent(**row) for row in found]

    async def separating(self, found: Finding) -> Feature | None:
        """What the requests that show the finding have in common, and others of its endpoint don't."""
        if found.of_no_pair:
            return None
        shows = await self._sampled("samples_showing", found.id)
        others = await self._sampled("samples_without", found.id)
        if min(len(shows), len(others)) < LEAST:  # a finding that most requests show has few others at random
            asked = {"id": found.id, "limit": MAX_REQUESTS}
            shows = await self._features("requests_showing", asked, found.endpoint.route)
            others = await self._features("requests_without", asked, found.endpoint.route)
        without = found.compared - found.count
        return separating(shows, others, shows_in_all=found.count, others_in_all=without)

    async def finding_marks(self, service: str) -> dict[int, tuple[Any, ...]]:
        """Per finding id what changes when the finding grows or is told from noise. Those not decided yet are left out."""
        found = await self.database.rows("finding_marks", {"service": service})
        return {row["id"]: tuple(row.values())[1:] for row in found}

    async def pairs(self, wanted: PairFilter, page: Page) -> Paged[Pair]:
        """Newest first."""
        filters = asdict(wanted)
        before, after_id = pages.decode("pairs", filters, page.token) if page.token else [None, None]
        after = datetime.fromisoformat(before) if before else None
        finding = [wanted.finding_id] if wanted.finding_id else None
        asked: dict[str, Any] = {
            "endpoints": await self._endpoints(
                wanted.service, finding, method=wanted.method, route=wanted.route
            ),
            "outcomes": _list(wanted.outcomes),
            "finding_id": wanted.finding_id,
            **_bounds(wanted.window),
            "after_at": after,
            "after_id": after_id,
        }
        found: list[Row] = []
        for day in await self._days(wanted.window, after) if asked["endpoints"] else ():
            more = page.size + 1 - len(found)
            found += await self.database.rows("pairs_list", {**asked, "day": day, "limit": more})
            if len(found) > page.size:
                break
        return _paged(
            found,
            page,
            rows.pair,
            lambda last: pages.encode("pairs", filters, [last["at"].isoformat(), last["id"]]),
        )

    async def _days(self, window: Window, before: datetime | None) -> list[date]:
        """Those that may have pairs of a window, from the one of a moment, the newest first."""
        last = min((moment for moment in (window.end, before) if moment), default=None)
        return [
            day
            for (day,) in (row.values() for row in await self.database.rows("days"))
            if (window.start is None or day >= window.start.astimezone(UTC).date())
            and (last is None or day <= last.astimezone(UTC).date())
        ]

    async def pair(self, pair_id: str) -> PairDetail:
        """Raise NotFoundError for what was not sampled, has not arrived yet, or is no longer kept."""
        row = await self.database.one("pair_get", {"id": pair_id})
        if row is None:
            raise NotFoundError(
                f"the ledger holds no pair {pair_id}: it was not sampled, has not arrived yet, or is no longer kept"
            )
        return rows.pair_detail(row)

    async def _sampled(self, name: str, finding_id: int) -> list[Features]:
        return [row["features"] for row in await self.database.rows(name, {"id": finding_id})]

    async def _features(self, name: str, asked: Mapping[str, Any], route: str) -> list[Features]:
        return [of_target(row["request"], route) for row in await self.database.rows(name, asked)]

    async def _now(self) -> datetime:
        row = await self.database.one("clock")
        return row["now"] if row else datetime.now(UTC)

    async def _findings(
        self,
        wanted: FindingFilter,
        as_of: datetime,
        limit: int,
        *,
        place: Sequence[Any] | None = None,
        ids: Sequence[int] | None = None,
    ) -> list[Row]:
        _, after_rank, after_count, after_id = place or (None, None, None, None)
        windowed = wanted.window.bounded or bool(wanted.release)
        asked = {
            **asdict(wanted),
            **{name: _list(getattr(wanted, name)) for name in ("parts", "kinds", "impacts")},
            **_bounds(wanted.window),
            "since": as_of if wanted.window.start is None else max(as_of, wanted.window.start),
            "endpoints": await self._endpoints(wanted.service, ids),
            "windowed": windowed,
            "most_releases": MAX_LISTED,
            "as_of": as_of,
            "ids": _list(ids),
            "after_rank": after_rank,
            "after_count": after_count,
            "after_id": after_id,
            "limit": limit,
        }
        del asked["window"]
        return await self.database.rows("findings_list", asked)


def _counts(row: Row, waivers: Sequence[Row], service: str, release: str) -> Counts:
    found = rows.counts(row)
    return replace(found, waived=waived(waivers, service, found.endpoint, release)) if waivers else found


def _of_release(span: Row | None, window: Window) -> dict[str, datetime | None]:
    """The part of the window in which pairs without an answer of new belong to the release."""
    if span is None:
        return {"lone_start": EPOCH, "lone_end": EPOCH}
    starts = [one for one in (span["start"], window.start) if one is not None]
    ends = [one for one in (span["stop"], window.end) if one is not None]
    return {
        "lone_start": max(starts, default=None),
        "lone_end": min(ends, default=None),
    }


def _bounds(window: Window) -> dict[str, datetime | None]:
    return {"start": window.start, "end": window.end}


def _list(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _paged(
    found: Sequence[Row], page: Page, make: Callable[[Row], T], token: Callable[[Mapping[str, Any]], str]
) -> Paged[T]:
    """`found` holds one row more than the page where there is another page."""
    shown = found[: page.size]
    return Paged(tuple(make(row) for row in shown), token(shown[-1]) if len(found) > page.size else "")
