"""Queries of a window use hourly counts, and equal a recount of its rows."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from abreast_sidecar.stats.latency import COLD_PAIR_SHARE, MIN_COLD_PAIRS, Timing, count_times
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest
from abreast_sidecar.store.records import Window
from support_pairs import SERVICE, hourly_counts_match_pairs

pytestmark = pytest.mark.postgres

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
SPAN = 40 * 3600  # seconds
PAIRS = 400
WINDOWS = 12
SLOWER = 0.1
PRICE, COLOUR, NAME = 1, 2, 3  # findings: one that counts, one that only adds, one that is not decided
COMPARED = {"match", "mismatch", "partial", "oversize"}


@dataclass(frozen=True)
class Row:
    id: str
    at: datetime
    endpoint: int
    outcome: str
    new_release: str
    old_status: int | None
    new_status: int | None
    old_us: int | None
    new_us: int | None
    findings: tuple[int, ...]

    def within(self, window: Window) -> bool:
        return (window.start is None or self.at >= window.start) and (window.end is None or self.at < window.end)

    @property
    def is_compared(self) -> bool:
        return self.outcome in COMPARED


def make_rows(generator: random.Random) -> list[Row]:
    """Write pairs, some exactly on the hour. The second half of the time has a second release."""
    new_rows = []
    for _ in range(PAIRS):
        second = generator.choice((generator.randrange(SPAN), 3600 * generator.randrange(40)))
        outcome = generator.choice(("match", "mismatch", "mismatch", "only_old"))
        alone = outcome == "only_old"
        findings = generator.sample((PRICE, COLOUR, NAME), generator.randint(1, 3))
        release = "new-2" if second > SPAN / 2 and generator.random() < 0.8 else "new-1"
        new_rows.append(
            Row(
                f"{generator.getrandbits(128):032x}",
                NOON + timedelta(seconds=second),
                generator.choice((1, 2)),
                outcome,
                "" if alone else release,
                generator.choice((200, 200, 500)),
                None if alone else generator.choice((200, 200, 500)),
                generator.randrange(1000, 2000),
                None if alone else generator.randrange(1000, 2000),
                tuple(findings) if outcome == "mismatch" else (),
            )
        )
    return new_rows


@dataclass
class Place:
    url: str
    queries: LedgerReader
    rows: list[Row]
    windows: list[Window]


@pytest.fixture
async def place(postgres_url: str) -> AsyncIterator[Place]:
    generator = random.Random(5)
    pairs = make_rows(generator)
    put(postgres_url, pairs)
    database = Database(postgres_url)
    await database.open()
    edges = [None, *(row.at for row in pairs), *(NOON + timedelta(hours=hour) for hour in range(40))]
    windows = [Window(), *(Window(generator.choice(edges), generator.choice(edges)) for _ in range(WINDOWS))]
    yield Place(postgres_url, LedgerReader(database), pairs, windows)
    await database.close()


def put(url: str, pairs: Iterable[Row]) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "insert into abreast.endpoint (service, method, route) select %s, 'GET', '/' || n from generate_series(1, 2) n",
            (SERVICE,),
        )
        connection.execute(
            "insert into abreast.finding (endpoint_id, part, path, kind, impact, state, count, first_seen, last_seen)"
            " values (1, 'body', '$.price', 'changed', 'value', 'real', 1, %(noon)s, %(noon)s),"
            " (1, 'body', '$.colour', 'added', 'additive', 'real', 1, %(noon)s, %(noon)s),"
            " (2, 'body', '$.name', 'changed', 'value', 'undecided', 1, %(noon)s, %(noon)s)",
            {"noon": NOON},
        )
        for label in ("new-1", "new-2"):
            first = min(row.at for row in pairs if row.new_release == label)
            connection.execute(
                "insert into abreast.release (service, version, label, first_seen) values (%s, 'new', %s, %s)",
                (SERVICE, label, first),
            )
        for day in range(3):
            connection.execute("select abreast.open_day('2026-01-31'::date + %s)", (day,))
        with connection.cursor() as cursor:
            cursor.executemany(
                "insert into abreast.pair (day, id, at, endpoint_id, outcome, new_release, old_status, new_status, old_us,"
                " new_us, findings, waits_match) values ((%(at)s at time zone 'UTC')::date, %(id)s, %(at)s, %(endpoint)s,"
                " %(outcome)s, %(new_release)s, %(old_status)s, %(new_status)s, %(old_us)s, %(new_us)s, %(findings)s, true)",
                [{**vars(row), "findings": list(row.findings)} for row in pairs],
            )


def count_rows(rows: Iterable[Row], predicate: Callable[[Row], bool]) -> int:
    return sum(predicate(row) for row in rows)


async def test_hourly_counts_equal_recount_of_pairs(place: Place) -> None:
    hourly_counts_match_pairs(place.url)
    with psycopg.connect(place.url, autocommit=True) as connection:
        connection.execute("update abreast.pair set outcome = 'match', findings = '{}' where findings @> '{1}'")
        hourly_counts_match_pairs(place.url)
        connection.execute("update abreast.pair set explained = '{2}', explained_by = '{7}' where old_status = 500")
        connection.execute("delete from abreast.pair where outcome = 'only_old'")
        hourly_counts_match_pairs(place.url)


async def test_summary_of_any_window_matches_pairs(place: Place) -> None:
    for window in place.windows:
        inside = [row for row in place.rows if row.within(window)]
        summary = await place.queries.read_summary(SERVICE, window)

        assert summary.outcomes == Counter(row.outcome for row in inside)
        assert summary.explained == count_rows(inside, lambda row: row.findings == (COLOUR,))
        visible = {finding for row in inside for finding in row.findings} & {PRICE, NAME}
        assert summary.findings == (len(visible) if window.is_bounded else 2)
        times: list[datetime | None] = [*sorted(row.at for row in inside)] or [None]
        assert (summary.first, summary.last) == (times[0], times[-1])


async def test_endpoint_list_of_any_window_matches_pairs(place: Place) -> None:
    for window in place.windows:
        inside = [row for row in place.rows if row.within(window)]
        endpoints = (await place.queries.list_endpoints(SERVICE, window, PageRequest(10))).rows

        assert {endpoint.endpoint.route: endpoint.outcomes for endpoint in endpoints} == {
            f"/{number}": Counter(row.outcome for row in inside if row.endpoint == number)
            for number in sorted({row.endpoint for row in inside})
        }
        visible = {finding for row in inside for finding in row.findings}
        assert [endpoint.findings for endpoint in endpoints if endpoint.endpoint.route == "/1"] in (
            [],
            [int(PRICE in visible or not window.is_bounded)],
        )


@pytest.mark.parametrize("release", ["", "new-1", "new-2"])
async def test_finding_list_of_any_window_matches_pairs(place: Place, release: str) -> None:
    for window in place.windows[1:]:
        inside = [row for row in place.rows if row.within(window) and release in ("", row.new_release)]
        finding_filter = FindingFilter(include_noise=True, release=release, window=window)
        findings = (await place.queries.list_findings(finding_filter, PageRequest(10))).rows

        if window.is_bounded or release:
            assert {row.id: row.count for row in findings} == Counter(f for row in inside for f in row.findings)
        for finding in findings:
            endpoint = 2 if finding.id == NAME else 1
            assert finding.compared == count_rows(inside, lambda row: row.is_compared and row.endpoint == endpoint)  # noqa: B023


@pytest.mark.parametrize("release", [None, "new-1", "new-2"])
async def test_evidence_of_any_window_matches_pairs(place: Place, release: str | None) -> None:
    for window in place.windows:
        inside = of_release(place.rows, window, release)
        evidence = await place.queries.read_evidence(
            SERVICE, window, SLOWER, release=release or "", all_releases=release is None
        )

        assert {row.endpoint for row in evidence.endpoints} == {f"GET /{row.endpoint}" for row in inside}
        for endpoint in evidence.endpoints:
            rows = [row for row in inside if f"GET /{row.endpoint}" == endpoint.endpoint]
            assert (endpoint.old_requests, endpoint.new_requests) == (
                len(rows),
                count_rows(rows, lambda row: row.new_status is not None),
            )
            assert endpoint.compared == count_rows(rows, lambda row: row.is_compared)
            assert endpoint.mismatches == count_rows(rows, lambda row: PRICE in row.findings)
            assert endpoint.undecided == count_rows(
                rows, lambda row: NAME in row.findings and PRICE not in row.findings
            )
            assert endpoint.new_errors == count_rows(
                rows, lambda row: row.is_compared and row.new_status == 500 and row.old_status == 200
            )
            assert endpoint.old_errors == count_rows(
                rows, lambda row: row.is_compared and row.old_status == 500 and row.new_status == 200
            )
            assert endpoint.times == count_times(list_warm_timings(rows), SLOWER)


def of_release(rows: Iterable[Row], window: Window, release: str | None) -> list[Row]:
    """Pairs without a response of new belong to the newest release of their time."""
    second = min(row.at for row in rows if row.new_release == "new-2")
    return [
        row
        for row in rows
        if row.within(window) and release in (None, row.new_release or ("new-2" if row.at >= second else "new-1"))
    ]


def list_warm_timings(rows: Iterable[Row]) -> list[Timing]:
    """Leave out the first pairs of each release."""
    warm_rows: list[Row] = []
    for release in {row.new_release for row in rows}:
        release_rows = sorted((row for row in rows if row.new_release == release), key=lambda row: (row.at, row.id))
        warm_rows += release_rows[max(MIN_COLD_PAIRS, math.ceil(len(release_rows) * COLD_PAIR_SHARE)) :]
    return [
        Timing(row.old_us, row.new_us)
        for row in sorted(warm_rows, key=lambda row: (row.at, row.id))
        if row.old_us is not None and row.new_us is not None and row.old_status == row.new_status
    ]
