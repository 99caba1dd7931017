"""Hourly counts equal a count of the rows in any window."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import Window
from abreast_sidecar.store.writer import PairWriter
from support_pairs import SERVICE, difference, make_record, query_value, rows

pytestmark = pytest.mark.postgres

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
SPAN = 40 * 3600  # seconds
OUTCOMES = ("match", "mismatch", "only_old")
WINDOWS = 40


def make_pairs(generator: random.Random) -> list[tuple[datetime, str]]:
    """Write pairs, some exactly on the hour, where windows begin and end."""
    moments = [
        NOON + timedelta(seconds=generator.choice((generator.randrange(SPAN), 3600 * generator.randrange(40))))
        for _ in range(300)
    ]
    return [(moment, generator.choice(OUTCOMES)) for moment in moments]


async def test_hourly_counts_match_pairs_in_any_window(postgres_url: str) -> None:
    generator = random.Random(5)
    pairs = make_pairs(generator)
    ledger = PairWriter(postgres_url, examples_per_finding=1)
    batch = [
        make_record([difference()] if outcome == "mismatch" else [], outcome=outcome, at=round(at.timestamp() * 1000))
        for at, outcome in pairs
    ]
    for _ in range(2):  # a batch that comes twice counts once
        await ledger.write(batch)
    await ledger.close()
    database = Database(postgres_url)
    await database.open()
    edges = [None, *(at for at, _ in pairs), *(NOON + timedelta(hours=hour) for hour in range(40))]
    windows = [Window(), *(Window(generator.choice(edges), generator.choice(edges)) for _ in range(WINDOWS))]
    for window in windows:
        result = await LedgerReader(database).read_summary(SERVICE, window)
        inside = [
            (at, outcome)
            for at, outcome in pairs
            if (window.start is None or at >= window.start) and (window.end is None or at < window.end)
        ]

        assert result.outcomes == Counter(outcome for _, outcome in inside)
        assert (result.first, result.last) == ((min(inside)[0], max(inside)[0]) if inside else (None, None))
    await database.close()


async def test_hourly_counts_are_dropped_with_their_day(postgres_url: str) -> None:
    ledger = PairWriter(postgres_url, examples_per_finding=1)
    for hours in (0, 11, 12, 30):
        await ledger.write([make_record(at=round((NOON + timedelta(hours=hours)).timestamp() * 1000))])
    await ledger.close()
    with psycopg.connect(postgres_url) as connection:
        connection.execute("select abreast.drop_day('2026-01-31')")

    assert query_value(postgres_url, "select sum(pairs) from abreast.hourly_count") == 2
    assert rows(postgres_url, "select count(*) from abreast.pair") == [(2,)]
