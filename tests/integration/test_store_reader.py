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

from abreast_sidecar.stats.latency import COLD_PAIR_SHARE, MIN_COLD_PAIRS, MIN_SLOWER_US
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
    def compared(self) -> bool:
        return self.outcome in COMPARED


def made(generator: random.Random) -> list[Row]:
    """Write pairs, some exactly on the hour. The second half of the time has a second release."""
    found = []
    for _ in range(PAIRS):
        second = generator.choice((generator.randrange(SPAN), 3600 * generator.randrange(40)))
        outcome = generator.choice(("match", "mismatch", "mismatch", "only_old"))
        alone = outcome == "only_old"
        shown = generator.sample((PRICE, COLOUR, NAME), generator.randint(1, 3))
        release = "new-2" if second > SPAN / 2 and generator.random() < 0.8 else "new-1"
        found.append(
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
                tuple(shown) if outcome == "mismatch" else (),
            )
        )
    return found


@dataclass
class Place:
    url: str
    queries: LedgerReader
    rows: list[Row]
    windows: list[Window]


@pytest.fixture
async def place(postgres_url: str) -> AsyncIterator[Place]:
    generator = random.Random(5)
    pairs = made(generator)
    put(postgres_url, pairs)
    database = Database(postgres_url)
    await database.open()
    edges = [None, *(one.at for one in pairs), *(NOON + timedelta(hours=hour) for hour in range(40))]
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
            first = min(one.at for one in pairs if one.new_release == label)
            connection.execute(
                "insert into abreast.release (service, version, label, first_seen) values (%s, 'new', %s, %s)",
                (SERVICE, label, first),
            )
        for day in range(3):
            connection.execute("select abreast.open_day('2026-01-31'::date + %s)", (day,))
        with connection.cursor() as cursor:
            cursor.executemany(
                "insert into abreast.pair (day, id, at, endpoint_id, outcome, new_release, old_status, new_status, old_us,"
                " new_us, findings) values ((%(at)s at time zone 'UTC')::date, %(id)s, %(at)s, %(endpoint)s,"
                " %(outcome)s, %(new_release)s, %(old_status)s, %(new_status)s, %(old_us)s, %(new_us)s, %(findings)s)",
                [{**vars(one), "findings": list(one.findings)} for one in pairs],
            )


def counted(rows: Iterable[Row], what: Callable[[Row], bool]) -> int:
    return sum(what(one) for one in rows)


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
        inside = [one for one in place.rows if one.within(window)]
        found = await place.queries.read_summary(SERVICE, window)

        assert found.outcomes == Counter(one.outcome for one in inside)
        assert found.explained == counted(inside, lambda one: one.findings == (COLOUR,))
        shown = {finding for one in inside for finding in one.findings} & {PRICE, NAME}
        assert found.findings == (len(shown) if window.is_bounded else 2)
        times: list[datetime | None] = [*sorted(one.at for one in inside)] or [None]
        assert (found.first, found.last) == (times[0], times[-1])


async def test_endpoint_list_of_any_window_matches_pairs(place: Place) -> None:
    for window in place.windows:
        inside = [one for one in place.rows if one.within(window)]
        found = (await place.queries.list_endpoints(SERVICE, window, PageRequest(10))).rows

        assert {one.endpoint.route: one.outcomes for one in found} == {
            f"/{number}": Counter(one.outcome for one in inside if one.endpoint == number)
            for number in sorted({one.endpoint for one in inside})
        }
        shown = {finding for one in inside for finding in one.findings}
        assert [one.findings for one in found if one.endpoint.route == "/1"] in (
            [],
            [int(PRICE in shown or not window.is_bounded)],
        )


@pytest.mark.parametrize("release", ["", "new-1", "new-2"])
async def test_finding_list_of_any_window_matches_pairs(place: Place, release: str) -> None:
    for window in place.windows[1:]:
        inside = [one for one in place.rows if one.within(window) and release in ("", one.new_release)]
        wanted = FindingFilter(include_noise=True, release=release, window=window)
        found = (await place.queries.list_findings(wanted, PageRequest(10))).rows

        if window.is_bounded or release:
            assert {one.id: one.count for one in found} == Counter(f for one in inside for f in one.findings)
        for one in found:
            endpoint = 2 if one.id == NAME else 1
            assert one.compared == counted(inside, lambda row: row.compared and row.endpoint == endpoint)  # noqa: B023


@pytest.mark.parametrize("release", [None, "new-1", "new-2"])
async def test_evidence_of_any_window_matches_pairs(place: Place, release: str | None) -> None:
    for window in place.windows:
        inside = of_release(place.rows, window, release)
        found = await place.queries.read_evidence(
            SERVICE, window, SLOWER, release=release or "", all_releases=release is None
        )

        assert {one.endpoint for one in found.endpoints} == {f"GET /{one.endpoint}" for one in inside}
        for one in found.endpoints:
            rows = [row for row in inside if f"GET /{row.endpoint}" == one.endpoint]
            assert (one.old_requests, one.new_requests) == (
                len(rows),
                counted(rows, lambda row: row.new_status is not None),
            )
            assert one.compared == counted(rows, lambda row: row.compared)
            assert one.mismatches == counted(rows, lambda row: PRICE in row.findings)
            assert one.undecided == counted(rows, lambda row: NAME in row.findings and PRICE not in row.findings)
            assert one.new_errors == counted(
                rows, lambda row: row.compared and row.new_status == 500 and row.old_status == 200
            )
            assert one.old_errors == counted(
                rows, lambda row: row.compared and row.old_status == 500 and row.new_status == 200
            )
            assert (one.timed, one.slower) == timed(rows)


def of_release(rows: Iterable[Row], window: Window, release: str | None) -> list[Row]:
    """Pairs without a response of new belong to the newest release of their time."""
    second = min(one.at for one in rows if one.new_release == "new-2")
    return [
        one
        for one in rows
        if one.within(window) and release in (None, one.new_release or ("new-2" if one.at >= second else "new-1"))
    ]


def timed(rows: Iterable[Row]) -> tuple[int, int]:
    """Leave out the first pairs of each release."""
    every, slower = 0, 0
    for release in {one.new_release for one in rows}:
        of_it = sorted((one for one in rows if one.new_release == release), key=lambda one: (one.at, one.id))
        for one in of_it[max(MIN_COLD_PAIRS, math.ceil(len(of_it) * COLD_PAIR_SHARE)) :]:
            if one.old_us is None or one.new_us is None or one.old_status != one.new_status:
                continue
            every += 1
            slower += one.new_us - one.old_us > max(one.old_us * SLOWER, MIN_SLOWER_US)
    return every, slower
