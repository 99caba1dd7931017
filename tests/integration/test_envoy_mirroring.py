"""Mirroring: the sampled requests, the version that receives the copy, and the copy itself."""

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


async def test_client_headers_of_abreast_are_removed() -> None:
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
async def test_copy_goes_to_the_other_version(share: float) -> None:
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
async def test_copy_equals_request_except_for_role(sent: bytes) -> None:
    async with abreast(sample_unsafe=1.0) as running:
        assert (await exchange(running.port, sent, until=b"ok")).startswith(b"HTTP/1.1 200")
        [live], [copy] = await both(running)

        assert live.without(*ROLE) == copy.without(*ROLE)
        assert live.trailers == copy.trailers == (b"x-sum: 1\r\n" if b"x-sum" in sent else b"")
        assert [live.headers[name] for name in ROLE] == ["live", "old"]
        assert [copy.headers[name] for name in ROLE] == ["shadow", "new"]


async def test_request_reaches_service_unchanged() -> None:
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


async def test_request_id_of_client_is_kept() -> None:
    mine = "11111111-1111-4111-8111-111111111111"
    async with abreast() as running:
        await running.client.get("/", headers={"x-request-id": mine})

        assert running.old.received[0].headers["x-request-id"] == mine


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_of_5_megabytes_reaches_both_versions(chunked: bool) -> None:
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


async def test_body_over_the_limit_is_not_mirrored() -> None:
    async with abreast(sample_unsafe=1.0, mirror_body_limit=1000) as running:
        await running.client.post("/", content=b"x" * 1000)
        await running.client.post("/", content=b"x" * 1001)
        await running.arrived(running.new, 1)
        await running.settled()

        assert [len(request.body) for request in running.old.received] == [1000, 1001]
        assert [len(request.body) for request in running.new.received] == [1000]


async def test_unread_copy_does_not_delay_upload() -> None:
    size = 24_000_000  # more than the kernel keeps for a socket
    async with abreast(sample_unsafe=1.0, mirror_body_limit=size) as running:
        running.new.reading.clear()
        answer = await running.client.post("/upload", content=b"x" * size, timeout=10)

        assert answer.status_code == 200
        assert len(running.old.received[0].body) == size


async def test_chunked_upload_waits_for_frozen_copy_at_most_its_timeout() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b"x" * 100_000

    async with abreast(sample_unsafe=1.0, mirror_body_limit=100_000, shadow_timeout=0.5) as running:
        running.new.reading.clear()
        answer = await running.client.post("/upload", content=pieces(), timeout=10)

        assert answer.status_code == 200
        assert len(running.old.received[0].body) == 200 * 100_000


async def test_unsafe_methods_are_not_mirrored_by_default() -> None:
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


async def test_sample_contains_both_versions_in_both_roles() -> None:
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


async def test_sampling_is_independent_of_version() -> None:
    """With one random number for both, everything in a sample below 1% is answered by old."""
    async with abreast(weight=0.5, sample_safe=0.005) as running:
        await burst(running.port, 4800)
        await running.settled()
        live = [[request for request in side.in_role("live") if request.pair] for side in (running.old, running.new)]

        assert sum(map(len, live)) > 5
        assert min(map(len, live)) > 0


async def test_pair_ids_are_unique_for_equal_request_ids() -> None:
    async with abreast() as running:
        for _ in range(20):
            await running.client.get("/", headers={"x-request-id": "11111111-1111-4111-8111-111111111111"})
        old, new = await both(running, 20)

        assert len({UUID(request.pair) for request in old}) == 20
        assert {request.pair for request in old} == {request.pair for request in new}
        assert {request.headers["x-request-id"] for request in old} == {"11111111-1111-4111-8111-111111111111"}


async def test_host_header_is_kept() -> None:
    async with abreast() as running:
        await running.client.get("/", headers={"host": "shop.example:8443"})
        [live], [copy] = await both(running)

        assert live.headers["host"] == copy.headers["host"] == "shop.example:8443"


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_baseline_request_sends_two_copies(share: float) -> None:
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


async def test_baseline_share_is_a_part_of_the_sample() -> None:
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


async def test_unsampled_request_has_no_pair_id() -> None:
    async with abreast(sample_safe=0.0) as running:
        answer = await running.client.get("/")
        [request] = running.old.received

        assert {name for name in request.headers if name.startswith("x-abreast-")} == {
            "x-abreast-role",
            "x-abreast-version",
        }
        assert (request.role, request.headers["x-abreast-version"]) == ("live", "old")
        assert answer.headers.get_list("x-abreast-version") == ["old"]


async def test_response_has_version_header_once() -> None:
    async def tagged(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 0\r\nx-abreast-version: old\r\n\r\n")

    async with abreast(old=Upstream(answer=tagged)) as running:
        answer = await running.client.get("/")

        assert answer.headers.get_list("x-abreast-version") == ["old"]


@pytest.mark.parametrize("sticky", ["header:X-User", "cookie:user"])
async def test_sticky_user_moves_only_to_new_as_share_rises(sticky: str) -> None:
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


async def test_users_without_sticky_key_are_distributed() -> None:
    from abreast_sidecar.envoy.settings import StickyKey

    async with abreast(weight=0.5, sticky=StickyKey("header", "x-user"), sample_safe=0.0) as running:
        answered = Counter([(await running.client.get("/")).headers["x-abreast-version"] for _ in range(80)])

        assert min(answered["old"], answered["new"]) > 15


async def test_source_ip_keeps_user_on_one_version() -> None:
    from abreast_sidecar.envoy.settings import StickyKey

    async with abreast(weight=0.5, sticky=StickyKey("source-ip"), sample_safe=0.0) as running:
        answered = {(await running.client.get("/")).headers["x-abreast-version"] for _ in range(30)}

        assert len(answered) == 1


async def test_excess_copies_are_dropped_and_counted() -> None:
    async with abreast(shadow_concurrency=2) as running:
        running.new.reading.clear()
        answers = await asyncio.gather(*[running.client.get("/") for _ in range(40)])

        assert {answer.status_code for answer in answers} == {200}
        overflow = await running.stat("cluster.new_shadow.upstream_rq_pending_overflow")
        full = await running.stat("cluster.new_shadow.upstream_cx_overflow")
        assert overflow + full > 0
        assert await running.stat("cluster.new_shadow.upstream_rq_active") <= 4


async def test_values_of_sidecar_apply_under_traffic() -> None:
    async with abreast() as running:
        assert (await running.client.get("/")).headers["x-abreast-version"] == "old"
        await running.sidecar.set({**weights(1.0), "abreast.sample.safe": {"numerator": 0, "denominator": "MILLION"}})
        await running.settled()
        before = len(running.old.received)
        answers = [await running.client.get("/") for _ in range(10)]

        assert {answer.headers["x-abreast-version"] for answer in answers} == {"new"}
        assert len(running.old.received) == before
