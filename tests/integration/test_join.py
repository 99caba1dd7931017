"""The join script on a real Redis."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from itertools import permutations
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abreast.protocol.join import CONSUMER_GROUP, JOIN_SCRIPT, Keys, Limits, join_arguments, shard_of
from support import eventually

pytestmark = pytest.mark.redis

KEYS = Keys("shop", 0)
Row = tuple[str, str, int, bytes]
SLOTS = {2: ("old:live:1", "new:shadow:1"), 3: ("old:live:1", "new:shadow:1", "old:baseline:1")}
ON_A_SHARED_SERVER = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:  # by the types of redis-py, replies may be text
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


def join(client: Any, rows: list[Row], bounds: Limits | None = None) -> list[int]:
    names, arguments = join_arguments(KEYS, bounds or Limits(), rows)
    reply: list[int] = client.eval(JOIN_SCRIPT, len(names), *names, *arguments)
    return reply


def ready(client: Any) -> dict[str, dict[bytes, bytes]]:
    """Return the ready pairs. Each must be there once."""
    entries = [entry for _, entry in client.xrange(KEYS.ready)]
    pairs = {entry[b"pair"].decode(): entry for entry in entries}
    assert len(pairs) == len(entries)
    return pairs


def stats(client: Any) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in client.hgetall(KEYS.stats).items()}


def rows(pairs: int, arms: int = 2) -> list[Row]:
    return [(f"p{n}", slot, arms, f"{n}/{slot}".encode()) for n in range(pairs) for slot in SLOTS[arms]]


def test_pair_is_ready_once_all_captures_arrived(client: Any) -> None:
    first, second = rows(1)

    assert join(client, [first]) == [1, 0, 0, 0, 0]
    assert ready(client) == {}
    assert join(client, [second]) == [1, 0, 0, 0, 0]
    assert ready(client)["p0"] == {
        b"pair": b"p0",
        b"why": b"joined",
        b"old:live:1": b"0/old:live:1",
        b"new:shadow:1": b"0/new:shadow:1",
    }


def test_ready_pair_leaves_no_hash(client: Any) -> None:
    join(client, rows(1))

    assert not client.exists(KEYS.pair("p0"))
    assert client.zcard(KEYS.due) == 0
    assert client.zscore(KEYS.joined, "p0") is not None


def test_batches_share_commands(client: Any) -> None:
    captures = rows(100)
    before = client.info("stats")["total_commands_processed"]
    for version in (0, 1):
        join(client, captures[version::2])
    commands = client.info("stats")["total_commands_processed"] - before

    assert len(ready(client)) == 100
    assert commands <= 5 * 100  # per pair: two reads of its hash, one write, one entry; and those of the batch


def test_pair_with_a_baseline_waits_for_three_captures(client: Any) -> None:
    live, shadow, three = rows(1, arms=3)
    join(client, [live, three])
    waiting = ready(client)
    join(client, [shadow])

    assert waiting == {}
    assert len(ready(client)["p0"]) == 2 + 3


def test_deadline_uses_the_clock_of_redis(client: Any) -> None:
    seconds, microseconds = client.time()
    join(client, rows(1)[:1], Limits(wait_ms=5000))
    now = seconds * 1000 + microseconds // 1000

    assert now + 5000 <= client.zscore(KEYS.due, "p0") <= now + 6000


def test_later_capture_does_not_move_the_deadline(client: Any) -> None:
    live, shadow, _ = rows(1, arms=3)
    join(client, [live])
    due = client.zscore(KEYS.due, "p0")
    time.sleep(0.01)  # so that another deadline would differ
    join(client, [shadow])

    assert client.zscore(KEYS.due, "p0") == due


def expire(client: Any) -> int:
    script = resources.files("abreast_sidecar").joinpath("lua/expire_pairs.lua").read_text()
    keys = (KEYS.due, KEYS.ready, KEYS.joined, KEYS.stats)
    return int(client.eval(script, len(keys), *keys, KEYS.pair(""), 100, CONSUMER_GROUP))


def test_late_capture_of_a_timed_out_pair_follows_it(client: Any) -> None:
    """The ledger learns that it is late, not missing. A retry is not the missing capture."""
    live, shadow = rows(1)
    join(client, [live], Limits(wait_ms=1))
    eventually(lambda: expire(client) == 1)

    retry = ("p0", "old:live:2", 2, b"retry")
    assert join(client, [shadow, retry]) == [0, 0, 2, 0, 0]
    entries = [fields for _, fields in client.xrange(KEYS.ready)]
    assert [(entry[b"why"], len(entry)) for entry in entries] == [(b"timed_out", 3), (b"late", 3)]
    assert int(client.hget(KEYS.stats, "bytes")) == len(live[3]) + len(shadow[3])


def test_third_capture_after_a_failover_is_late(client: Any) -> None:
    join(client, [("p", "new:live:1", 2, b"failed"), ("p", "old:shadow:1", 2, b"shadow")])

    assert join(client, [("p", "old:live:2", 2, b"answer")]) == [0, 0, 1, 0, 0]
    assert not client.exists(KEYS.pair("p"))
    assert len(ready(client)) == 1


@pytest.mark.parametrize("order", list(permutations(["new:live:1", "old:shadow:1", "old:live:2"])))
def test_second_attempt_does_not_count_as_a_copy(client: Any, order: tuple[str, ...]) -> None:
    """After a failover, the pair has the answers of both versions to the first attempt, in any order of arrival."""
    for slot in order:
        join(client, [("p", slot, 2, slot.encode())])

    assert {b"new:live:1", b"old:shadow:1"} <= ready(client)["p"].keys()
    assert not client.exists(KEYS.pair("p"))


@pytest.mark.parametrize("order", list(permutations(["old:live:1", "new:shadow:1+", "new:shadow:1="])))
def test_pair_waits_for_times_that_a_capture_announces(client: Any, order: tuple[str, ...]) -> None:
    for slot in order:
        waiting = ready(client)
        join(client, [("p", slot, 2, slot.encode())])

    assert waiting == {}
    assert {slot.encode() for slot in order} <= ready(client)["p"].keys()


def test_foreign_key_does_not_stop_a_batch(client: Any) -> None:
    client.set(KEYS.pair("p0"), "rubbish")

    assert join(client, rows(2)) == [4, 0, 0, 0, 0]
    assert sorted(ready(client)) == ["p0", "p1"]


def test_moved_ids_are_limited_by_age_and_number(client: Any) -> None:
    join(client, rows(20), Limits(max_remembered_ids=5))
    remaining_ids = client.zrange(KEYS.joined, 0, -1)
    eventually(
        lambda: join(client, [], Limits(remember_ms=1)) == [0] * 5 and client.zcard(KEYS.joined) == 0,
        description="moved pairs are forgotten",
    )

    assert len(remaining_ids) == 5


@ON_A_SHARED_SERVER
@given(arms=st.sampled_from([2, 3]), pairs=st.integers(1, 8), seed=st.randoms(use_true_random=False), data=st.data())
def test_join_is_independent_of_order_batches_and_repetition(
    client: Any, arms: int, pairs: int, seed: random.Random, data: st.DataObject
) -> None:
    client.flushall()
    expected = rows(pairs, arms)
    captures = expected + data.draw(st.lists(st.sampled_from(expected), max_size=10))
    seed.shuffle(captures)
    replies: Counter[str] = Counter()
    while captures:
        size = data.draw(st.integers(1, 6))
        batch, captures = captures[:size], captures[size:]
        for _ in range(data.draw(st.integers(1, 2))):  # some batches are sent twice
            reply = join(client, batch)
            assert sum(reply) == len(batch)
            replies.update(dict(zip(("received", "duplicate", "late"), reply, strict=False)))

    entries = ready(client)
    assert {
        (pair, name.decode(), arms, value)
        for pair, entry in entries.items()
        for name, value in entry.items()
        if b":" in name
    } == set(expected)
    assert replies["received"] == len(expected)
    counts = stats(client)
    assert counts["joined"] == pairs
    assert counts["bytes"] == sum(len(row[3]) for row in expected)
    assert (counts["received"], counts.get("duplicate", 0)) == (len(expected), replies["duplicate"])
    assert counts.get("late", 0) == replies["late"]


@ON_A_SHARED_SERVER
@given(order=st.permutations(rows(12)), most=st.integers(1, 6))
def test_max_pairs_rejects_and_counts_captures(client: Any, order: list[Row], most: int) -> None:
    client.flushall()
    refused = 0
    for row in order:
        refused += join(client, [row], Limits(max_pairs=most))[3]

        assert client.zcard(KEYS.due) <= most
        assert client.zcard(KEYS.due) + client.xlen(KEYS.ready) <= most
    counts = stats(client)
    assert refused == counts.get("rejected_pairs", 0)
    assert refused + counts["received"] == len(order)
    stored = client.xlen(KEYS.ready) * 2 + sum(client.hlen(key) for key in client.scan_iter(KEYS.pair("*")))
    assert counts["received"] == stored


@ON_A_SHARED_SERVER
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=20), most=st.integers(1, 1500))
def test_max_bytes_rejects_and_counts_captures(client: Any, sizes: list[int], most: int) -> None:
    client.flushall()
    batch: list[Row] = [(f"p{n // 2}", SLOTS[2][n % 2], 2, bytes(size)) for n, size in enumerate(sizes)]
    reply = join(client, batch, Limits(max_bytes=most))

    counts = stats(client)
    assert counts.get("bytes", 0) <= most
    assert reply[0] + reply[3] + reply[4] == len(batch)
    assert counts.get("rejected_bytes", 0) == reply[4]


@ON_A_SHARED_SERVER
@given(
    order=st.permutations(rows(8)), size=st.integers(1, 6), limit=st.sampled_from([{"max_pairs": 2}, {"max_bytes": 60}])
)
def test_rejections_of_repeated_batches_count_once(
    client: Any, order: list[Row], size: int, limit: dict[str, int]
) -> None:
    """A service sends a batch again if Redis executed the first call, but did not reply in time."""
    client.flushall()
    rejected = Counter[str]()
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        replies = [join(client, batch, Limits(**limit)) for _ in range(2)]
        client.xtrim(KEYS.ready, maxlen=0)  # there is room again, and the third call must not store what was rejected
        replies.append(join(client, batch, Limits(**limit)))

        assert replies[0][3:] == replies[1][3:] == replies[2][3:]
        rejected.update(rejected_pairs=replies[0][3], rejected_bytes=replies[0][4])
    counts = stats(client)
    assert {name: counts.get(name, 0) for name in rejected} == dict(rejected)


def test_released_room_is_reused(client: Any) -> None:
    bounds = Limits(max_pairs=1)
    full = [join(client, rows(1), bounds), join(client, [("p1", "old:live:1", 1, b"")], bounds)]
    client.xtrim(KEYS.ready, maxlen=0)  # as the sidecar does after its commit

    assert full == [[2, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert join(client, rows(3)[4:], bounds) == [2, 0, 0, 0, 0]


def test_rejected_pair_stays_rejected_when_there_is_room(client: Any) -> None:
    bounds = Limits(max_pairs=1)
    join(client, rows(1), bounds)
    replies = [join(client, rows(2)[2:3], bounds)]
    client.xtrim(KEYS.ready, maxlen=0)
    replies.append(join(client, rows(2)[3:], bounds))

    assert replies == [[0, 0, 0, 1, 0]] * 2
    assert client.zcard(KEYS.due) == 0


def test_accepted_pair_has_room_for_its_other_capture(client: Any) -> None:
    first, second = rows(1)
    other = ("other", *first[1:])
    bounds = Limits(max_pairs=2, max_bytes=60)  # for four captures, roughly
    replies = [join(client, [row], bounds) for row in (first, other, second)]

    assert [reply[0] for reply in replies] == [1, 1, 1]
    assert join(client, [("third", *first[1:])], bounds)[3:] == [1, 0]


def test_keys_of_a_shard_share_a_hash_tag() -> None:
    names, _ = join_arguments(KEYS, Limits(), rows(3))

    assert {name[name.index("{") : name.index("}") + 1] for name in names} == {"{shop/0}"}


@given(st.text(), st.integers(1, 64))
def test_pair_has_one_shard(pair: str, shards: int) -> None:
    assert 0 <= shard_of(pair, shards) < shards
    assert shard_of(pair, shards) == shard_of(pair, shards)


@pytest.mark.parametrize("name", ["", "a/b", "{a", "a}"])
def test_service_name_that_breaks_the_hash_tag_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="must not be empty or contain"):
        Keys(name, 0)
