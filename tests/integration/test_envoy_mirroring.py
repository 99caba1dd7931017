"""What is mirrored, to whom, and that the copy is the same request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from support_envoy import Abreast, abreast, burst, exchange, weights
from support_upstream import Received, Upstream

ROLE = ("x-abreast-role", "x-abreast-version")
FIVE_MEGABYTES = 5_000_000


async def both(running: Abreast, count: int = 1) -> tuple[list[Received], list[Received]]:
    await running.arrived(running.old, count)
    await running.arrived(running.new, count)
    await running.settled()
    return running.old.received, running.new.received


async def test_what_a_client_says_about_abreast_is_thrown_away() -> None:
    names = ["pair", "arms", "role", "version", "mirror-to", "xff", "anything-else"]
    forged = {f"X-Abreast-{name}": "forged" for name in names}
    async with abreast(sample_unsafe=0.0) as running:
        await running.client.get("/", headers=forged)
        await running.client.post("/", headers=forged)
        await running.arrived(running.old, 2)
        await running.arrived(running.new, 1)

        assert not [request for request in running.old.received + running.new.received if b"forged" in request.head]
        assert [request.method for request in running.new.received] == ["GET"]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
async def test_the_copy_goes_to_the_version_that_did_not_answer(share: float) -> None:
    requests = 60
    async with abreast(weight=share) as running:
        answered = Counter([(await running.client.get(f"/{n}")).headers["x-abreast-version"] for n in range(requests)])
        old, new = await both(running, requests)

        assert {request.pair for request in old} == {request.pair for request in new}
        assert len(running.old.in_role("live")) == len(running.new.in_role("shadow")) == answered["old"]
        assert len(running.new.in_role("live")) == len(running.old.in_role("shadow")) == answered["new"]
        assert answered["new"] == requests * share if share in {0.0, 1.0} else 0 < answered["new"] < requests


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /a//b/../c%2Fd?q=1&q=2&e=%00 HTTP/1.1\r\nhost: shop.example:8443\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: shop\r\nx-forwarded-for: 203.0.113.7, 10.1.1.1\r\nx-request-id: mine\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: shop\r\ncookie: a=1\r\ncookie: b=2\r\nx-many: 1\r\nx-many: 2\r\nx-empty:\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nhost: shop\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{'a': 1}\n",
        b"PUT /o HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n",
        b"DELETE /orders/1 HTTP/1.1\r\nhost: shop\r\n\r\n",
    ],
    ids=["path", "forwarded", "many-headers", "json", "chunked-with-trailers", "no-body"],
)
async def test_the_copy_is_the_same_request_byte_for_byte_but_for_the_role(sent: bytes) -> None:
    async with abreast(sample_unsafe=1.0) as running:
        assert (await exchange(running.port, sent, until=b"ok")).startswith(b"HTTP/1.1 200")
        [live], [copy] = await both(running)

        assert live.without(*ROLE) == copy.without(*ROLE)
        assert live.trailers == copy.trailers == (b"x-sum: 1\r\n" if b"x-sum" in sent else b"")
        assert [live.headers[name] for name in ROLE] == ["live", "old"]
        assert [copy.headers[name] for name in ROLE] == ["shadow", "new"]


async def test_the_service_sees_the_request_as_the_client_sent_it() -> None:
    sent = [
        ("host", "shop.example:8443"),
        ("user-agent", "a browser"),
        ("x-request-id", "11111111-1111-4111-8111-111111111111"),
        ("cookie", "a=1; b=2"),
        ("x-forwarded-proto", "gopher"),
    ]
    head = b"GET /a//b/../c%2Fd?q=%7e HTTP/1.1\r\n" + b"".join(f"{k}: {v}\r\n".encode() for k, v in sent) + b"\r\n"
    async with abreast(sample_safe=0.0, trusted_hops=1) as running:
        await exchange(running.port, head, until=b"ok")
        [request] = running.old.received

        assert request.path == "/a//b/../c%2Fd?q=%7e"
        assert [pair for pair in request.header_list if not pair[0].startswith("x-abreast-")] == [
            *sent,
            ("x-forwarded-for", request.headers["x-forwarded-for"]),
            ("x-envoy-attempt-count", "1"),
        ]


async def test_a_clients_own_request_id_is_kept() -> None:
    mine = "11111111-1111-4111-8111-111111111111"
    async with abreast() as running:
        await running.client.get("/", headers={"x-request-id": mine})

        assert running.old.received[0].headers["x-request-id"] == mine


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_5_megabytes_arrives_whole_on_both_sides(chunked: bool) -> None:
    body = bytes(range(256)) * (FIVE_MEGABYTES // 256)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    async with abreast(sample_unsafe=1.0) as running:
        answer = await running.client.post("/upload", content=pieces() if chunked else body)
        [live], [copy] = await both(running)

        assert answer.status_code == 200
        assert live.body == body
        assert copy.body == body


async def test_a_longer_body_is_not_mirrored_and_arrives_all_the_same() -> None:
    async with abreast(sample_unsafe=1.0, mirror_body_limit=1000) as running:
        await running.client.post("/", content=b"x" * 1000)
        await running.client.post("/", content=b"x" * 1001)
        await running.arrived(running.new, 1)
        await running.settled()

        assert [len(request.body) for request in running.old.received] == [1000, 1001]
        assert [len(request.body) for request in running.new.received] == [1000]


async def test_a_copy_that_nobody_reads_does_not_hold_back_the_upload() -> None:
    size = 24_000_000  # more than the kernel keeps for a socket
    async with abreast(sample_unsafe=1.0, mirror_body_limit=size) as running:
        running.new.reading.clear()
        answer = await running.client.post("/upload", content=b"x" * size, timeout=10)

        assert answer.status_code == 200
        assert len(running.old.received[0].body) == size


async def test_an_upload_of_unknown_length_waits_for_a_frozen_copy_no_longer_than_its_timeout() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b"x" * 100_000

    async with abreast(sample_unsafe=1.0, mirror_body_limit=100_000, shadow_timeout=0.5) as running:
        running.new.reading.clear()
        answer = await running.client.post("/upload", content=pieces(), timeout=10)

        assert answer.status_code == 200
        assert len(running.old.received[0].body) == 200 * 100_000


async def test_unsafe_methods_are_not_mirrored_unless_asked() -> None:
    unsafe = ["POST", "PUT", "PATCH", "DELETE"]
    async with abreast() as running:
        for method in [*unsafe, "GET", "HEAD", "OPTIONS"]:
            await running.client.request(method, "/")
        await running.arrived(running.new, 3)
        await running.settled()
        assert Counter(request.method for request in running.new.received) == Counter(["GET", "HEAD", "OPTIONS"])

        await running.sidecar.set({"abreast.sample.unsafe": {"numerator": 1_000_000, "denominator": "MILLION"}})
        for method in unsafe:
            await running.client.request(method, "/")
        await running.arrived(running.new, 7)

        assert Counter(request.method for request in running.new.received[3:]) == Counter(unsafe)


async def test_a_sample_of_10_percent_at_50_50_holds_both_versions_in_both_roles() -> None:
    async with abreast(weight=0.5, sample_safe=0.1) as running:
        await burst(running.port, 1500)
        await running.settled()
        sampled = await running.stat("vhost.service.route.safe_sampled.upstream_rq_total")
        live = {
            version: sum(1 for request in upstream.in_role("live") if request.pair)
            for version, upstream in (("old", running.old), ("new", running.new))
        }
        copies = {"old": len(running.old.in_role("shadow")), "new": len(running.new.in_role("shadow"))}

        assert 90 < sampled < 230
        assert sum(live.values()) == sampled
        assert min(live.values()) > sampled / 4
        assert copies == {"old": live["new"], "new": live["old"]}


async def test_a_thin_sample_is_not_thrown_with_the_same_dice_as_the_version() -> None:
    """With one random number for both, everything in a sample below 1% is answered by old."""
    async with abreast(weight=0.5, sample_safe=0.005) as running:
        await burst(running.port, 4800)
        await running.settled()
        live = [[request for request in side.in_role("live") if request.pair] for side in (running.old, running.new)]

        assert sum(map(len, live)) > 5
        assert min(map(len, live)) > 0


async def test_pair_ids_are_unique_even_when_one_request_id_is_used_for_everything() -> None:
    async with abreast() as running:
        for _ in range(20):
            await running.client.get("/", headers={"x-request-id": "11111111-1111-4111-8111-111111111111"})
        old, new = await both(running, 20)

        assert len({UUID(request.pair) for request in old}) == 20
        assert {request.pair for request in old} == {request.pair for request in new}
        assert {request.headers["x-request-id"] for request in old} == {"11111111-1111-4111-8111-111111111111"}


async def test_the_host_stays_what_the_client_asked_for() -> None:
    async with abreast() as running:
        await running.client.get("/", headers={"host": "shop.example:8443"})
        [live], [copy] = await both(running)

        assert live.headers["host"] == copy.headers["host"] == "shop.example:8443"


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_a_baseline_request_goes_three_ways(share: float) -> None:
    async with abreast(weight=share, baseline_share=1.0) as running:
        await running.client.get("/")
        await running.arrived(running.old, 1 if share else 2)
        await running.arrived(running.new, 1)
        await running.settled()
        received = [*running.old.received, *running.new.received]
        seen = {(request.headers["x-abreast-version"], request.role) for request in received}
        answers = {"old": "shadow", "new": "live"} if share else {"old": "live", "new": "shadow"}

        assert seen == {*answers.items(), ("old", "baseline")}
        assert {request.headers["x-abreast-copies"] for request in received} == {"3"}
        assert len({request.pair for request in received}) == 1
        assert len({request.without(*ROLE) for request in received}) == 1


async def test_a_part_of_the_sample_is_baseline_and_envoy_counts_each() -> None:
    requests = 400
    async with abreast(sample_safe=0.5, baseline_share=0.5) as running:
        await burst(running.port, requests)
        await running.settled()
        arms = Counter(request.headers.get("x-abreast-copies", "1") for request in running.old.in_role("live"))
        counted = {
            number: await running.stat(f"vhost.service.route.safe_{name}.upstream_rq_total")
            for number, name in (("1", "plain"), ("2", "sampled"), ("3", "baseline"))
        }

        assert arms == counted
        assert sum(counted.values()) == requests
        assert 140 < counted["1"] < 260
        assert 50 < counted["3"] < 150


async def test_a_request_that_is_not_sampled_carries_no_pair() -> None:
    async with abreast(sample_safe=0.0) as running:
        answer = await running.client.get("/")
        [request] = running.old.received

        assert {name for name in request.headers if name.startswith("x-abreast-")} == {
            "x-abreast-role",
            "x-abreast-version",
        }
        assert (request.role, request.headers["x-abreast-version"]) == ("live", "old")
        assert answer.headers.get_list("x-abreast-version") == ["old"]


async def test_the_answer_says_its_version_once_when_the_middleware_says_it_too() -> None:
    async def tagged(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 0\r\nx-abreast-version: old\r\n\r\n")

    async with abreast(old=Upstream(answer=tagged)) as running:
        answer = await running.client.get("/")

        assert answer.headers.get_list("x-abreast-version") == ["old"]


@pytest.mark.parametrize("sticky", ["header:X-User", "cookie:user"])
async def test_a_user_stays_on_one_version_and_a_rising_share_only_moves_users_to_new(sticky: str) -> None:
    from abreast_sidecar.envoy.settings import parse_sticky as parse

    users = [f"user-{number}" for number in range(40)]
    moved: list[set[str]] = []
    async with abreast(sticky=parse(sticky), sample_safe=0.0) as running:
        for share in (0.2, 0.6, 1.0):
            await running.give_new(share)
            seen: dict[str, set[str]] = {user: set() for user in users}
            for user in users * 3:
                headers = {"x-user": user} if sticky.startswith("header") else {"cookie": f"user={user}"}
                seen[user].add((await running.client.get("/", headers=headers)).headers["x-abreast-version"])
            assert all(len(versions) == 1 for versions in seen.values())
            moved.append({user for user, versions in seen.items() if versions == {"new"}})

        assert moved[0] < moved[1] < moved[2] == set(users)
        assert moved[0]


async def test_users_who_show_no_sticky_key_are_still_spread() -> None:
    from abreast_sidecar.envoy.settings import StickyKey

    async with abreast(weight=0.5, sticky=StickyKey("header", "x-user"), sample_safe=0.0) as running:
        answered = Counter([(await running.client.get("/")).headers["x-abreast-version"] for _ in range(80)])

        assert min(answered["old"], answered["new"]) > 15


async def test_one_address_stays_on_one_version_when_that_is_the_key() -> None:
    from abreast_sidecar.envoy.settings import StickyKey

    async with abreast(weight=0.5, sticky=StickyKey("source-ip"), sample_safe=0.0) as running:
        answered = {(await running.client.get("/")).headers["x-abreast-version"] for _ in range(30)}

        assert len(answered) == 1


async def test_a_flood_of_copies_is_dropped_and_counted_and_users_see_nothing_of_it() -> None:
    async with abreast(shadow_concurrency=2) as running:
        running.new.reading.clear()
        answers = await asyncio.gather(*[running.client.get("/") for _ in range(40)])

        assert {answer.status_code for answer in answers} == {200}
        overflow = await running.stat("cluster.new_shadow.upstream_rq_pending_overflow")
        full = await running.stat("cluster.new_shadow.upstream_cx_overflow")
        assert overflow + full > 0
        assert await running.stat("cluster.new_shadow.upstream_rq_active") <= 4


async def test_the_sidecars_values_are_taken_over_while_requests_flow() -> None:
    async with abreast() as running:
        assert (await running.client.get("/")).headers["x-abreast-version"] == "old"
        await running.sidecar.set({**weights(1.0), "abreast.sample.safe": {"numerator": 0, "denominator": "MILLION"}})
        await running.settled()
        before = len(running.old.received)
        answers = [await running.client.get("/") for _ in range(10)]

        assert {answer.headers["x-abreast-version"] for answer in answers} == {"new"}
        assert len(running.old.received) == before
