"""Mirroring: the sampled requests, the version that receives the copy, and the copy itself."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from support_envoy import Abreast, abreast, burst, exchange, weights
from support_upstream import Received, Upstream

ROLE = ("x-abreast-role", "x-abreast-version")
FIVE_MEGABYTES = 5_000_000


async def get_both(proxy: Abreast, count: int = 1) -> tuple[list[Received], list[Received]]:
    await proxy.wait_for_requests(proxy.old, count)
    await proxy.wait_for_requests(proxy.new, count)
    await proxy.settled()
    return proxy.old.received, proxy.new.received


async def test_client_headers_of_abreast_are_removed() -> None:
    names = ["pair", "arms", "role", "version", "mirror-to", "xff", "anything-else"]
    forged = {f"X-Abreast-{name}": "forged" for name in names}
    async with abreast(sample_unsafe=0.0) as proxy:
        await proxy.client.get("/", headers=forged)
        await proxy.client.post("/", headers=forged)
        await proxy.wait_for_requests(proxy.old, 2)
        await proxy.wait_for_requests(proxy.new, 1)

        assert not [request for request in proxy.old.received + proxy.new.received if b"forged" in request.head]
        assert [request.method for request in proxy.new.received] == ["GET"]


async def test_copy_goes_to_the_other_version() -> None:
    async with abreast() as proxy:
        for share, requests in ((0.0, 5), (0.3, 60), (1.0, 5)):
            await proxy.restart_with(share)
            answered = Counter(
                [(await proxy.client.get(f"/{n}")).headers["x-abreast-version"] for n in range(requests)]
            )
            old, new = await get_both(proxy, requests)

            assert {request.pair for request in old} == {request.pair for request in new}
            assert len(proxy.old.in_role("live")) == len(proxy.new.in_role("shadow")) == answered["old"]
            assert len(proxy.new.in_role("live")) == len(proxy.old.in_role("shadow")) == answered["new"]
            assert answered["new"] == requests * share if share in {0.0, 1.0} else 0 < answered["new"] < requests


async def test_copy_equals_request_except_for_role() -> None:
    contents = [
        b"GET /a//b/../c%2Fd?q=1&q=2&e=%00 HTTP/1.1\r\nhost: shop.example:8443\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: shop\r\nx-forwarded-for: 203.0.113.7, 10.1.1.1\r\nx-request-id: mine\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: shop\r\ncookie: a=1\r\ncookie: b=2\r\nx-many: 1\r\nx-many: 2\r\nx-empty:\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nhost: shop\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{'a': 1}\n",
        b"PUT /o HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n",
        b"DELETE /orders/1 HTTP/1.1\r\nhost: shop\r\n\r\n",
    ]
    async with abreast(sample_unsafe=1.0) as proxy:
        for content in contents:
            assert (await exchange(proxy.port, content, until=b"ok")).startswith(b"HTTP/1.1 200")
            [live], [copy] = await get_both(proxy)
            await proxy.restart_with(new_share=0.0)

            assert live.without(*ROLE, "x-abreast-copies") == copy.without(*ROLE, "x-abreast-copies"), content
            assert copy.captures == live.captures
            assert 0 <= copy.sent_ms - live.sent_ms < 60_000
            assert live.trailers == copy.trailers == b"", "a server may take trailers for headers"
            assert [live.headers[name] for name in ROLE] == ["live", "old"]
            assert [copy.headers[name] for name in ROLE] == ["shadow", "new"]


async def test_request_reaches_service_unchanged() -> None:
    lines = [
        ("host", "shop.example:8443"),
        ("user-agent", "a browser"),
        ("x-request-id", "11111111-1111-4111-8111-111111111111"),
        ("cookie", "a=1; b=2"),
        ("x-forwarded-proto", "gopher"),
    ]
    head = b"GET /a//b/../c%2Fd?q=%7e HTTP/1.1\r\n" + b"".join(f"{k}: {v}\r\n".encode() for k, v in lines) + b"\r\n"
    async with abreast(sample_safe=0.0, trusted_hops=1) as proxy:
        await exchange(proxy.port, head, until=b"ok")
        [request] = proxy.old.received

        assert request.path == "/a//b/../c%2Fd?q=%7e"
        assert [pair for pair in request.header_list if not pair[0].startswith("x-abreast-")] == [
            *lines,
            ("x-forwarded-for", request.headers["x-forwarded-for"]),
        ]


async def test_request_id_of_client_is_kept() -> None:
    mine = "11111111-1111-4111-8111-111111111111"
    async with abreast() as proxy:
        await proxy.client.get("/", headers={"x-request-id": mine})

        assert proxy.old.received[0].headers["x-request-id"] == mine


async def test_body_of_5_megabytes_reaches_both_versions() -> None:
    body = bytes(range(256)) * (FIVE_MEGABYTES // 256)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    async with abreast(sample_unsafe=1.0) as proxy:
        for content in (body, pieces()):
            answer = await proxy.client.post("/upload", content=content)
            [live], [copy] = await get_both(proxy)
            await proxy.restart_with(new_share=0.0)

            assert answer.status_code == 200
            assert live.body == body
            assert copy.body == body


async def test_body_over_the_limit_is_not_mirrored() -> None:
    async with abreast(sample_unsafe=1.0, mirror_body_limit=1000) as proxy:
        await proxy.client.post("/", content=b"x" * 1000)
        await proxy.client.post("/", content=b"x" * 1001)
        await proxy.wait_for_requests(proxy.new, 1)
        await proxy.settled()

        assert [len(request.body) for request in proxy.old.received] == [1000, 1001]
        assert [len(request.body) for request in proxy.new.received] == [1000]


async def test_unread_copy_does_not_delay_upload() -> None:
    size = 24_000_000  # more than the kernel keeps for a socket
    async with abreast(sample_unsafe=1.0, mirror_body_limit=size) as proxy:
        proxy.new.reading.clear()
        answer = await proxy.client.post("/upload", content=b"x" * size, timeout=10)

        assert answer.status_code == 200
        assert len(proxy.old.received[0].body) == size


async def test_chunked_upload_waits_for_frozen_copy_at_most_its_timeout() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b"x" * 100_000

    async with abreast(sample_unsafe=1.0, mirror_body_limit=100_000, shadow_timeout=0.5) as proxy:
        proxy.new.reading.clear()
        answer = await proxy.client.post("/upload", content=pieces(), timeout=10)

        assert answer.status_code == 200
        assert len(proxy.old.received[0].body) == 200 * 100_000


async def test_unsafe_methods_are_not_mirrored_by_default() -> None:
    unsafe = ["POST", "PUT", "PATCH", "DELETE"]
    async with abreast() as proxy:
        for method in [*unsafe, "GET", "HEAD", "OPTIONS"]:
            await proxy.client.request(method, "/")
        await proxy.wait_for_requests(proxy.new, 3)
        await proxy.settled()
        assert Counter(request.method for request in proxy.new.received) == Counter(["GET", "HEAD", "OPTIONS"])

        await proxy.sidecar.set({"abreast.sample.unsafe": {"numerator": 1_000_000, "denominator": "MILLION"}})
        for method in unsafe:
            await proxy.client.request(method, "/")
        await proxy.wait_for_requests(proxy.new, 7)

        assert Counter(request.method for request in proxy.new.received[3:]) == Counter(unsafe)


async def test_sample_contains_both_versions_in_both_roles() -> None:
    async with abreast(weight=0.5, sample_safe=0.1) as proxy:
        await burst(proxy.port, 1500)
        await proxy.settled()
        sampled = await proxy.stat("vhost.service.route.safe_sampled.upstream_rq_total")
        live = {
            version: sum(1 for request in upstream.in_role("live") if request.pair)
            for version, upstream in (("old", proxy.old), ("new", proxy.new))
        }
        copies = {"old": len(proxy.old.in_role("shadow")), "new": len(proxy.new.in_role("shadow"))}

        assert 90 < sampled < 230
        assert sum(live.values()) == sampled
        assert min(live.values()) > sampled / 4
        assert copies == {"old": live["new"], "new": live["old"]}


async def test_sampling_is_independent_of_version() -> None:
    """With one random number for both, everything in a sample below 1% is answered by old."""
    async with abreast(weight=0.5, sample_safe=0.005) as proxy:
        await burst(proxy.port, 4800)
        await proxy.settled()
        live = [[request for request in side.in_role("live") if request.pair] for side in (proxy.old, proxy.new)]

        assert sum(map(len, live)) > 5
        assert min(map(len, live)) > 0


async def test_pair_ids_are_unique_for_equal_request_ids() -> None:
    async with abreast() as proxy:
        for _ in range(20):
            await proxy.client.get("/", headers={"x-request-id": "11111111-1111-4111-8111-111111111111"})
        old, new = await get_both(proxy, 20)

        assert len({UUID(request.pair) for request in old}) == 20
        assert {request.pair for request in old} == {request.pair for request in new}
        assert {request.headers["x-request-id"] for request in old} == {"11111111-1111-4111-8111-111111111111"}


async def test_host_header_is_kept() -> None:
    async with abreast() as proxy:
        await proxy.client.get("/", headers={"host": "shop.example:8443"})
        [live], [copy] = await get_both(proxy)

        assert live.headers["host"] == copy.headers["host"] == "shop.example:8443"


async def test_baseline_request_sends_two_copies() -> None:
    async with abreast(baseline_share=1.0) as proxy:
        for share, roles in ((0.0, {"old": "live", "new": "shadow"}), (1.0, {"old": "shadow", "new": "live"})):
            await proxy.restart_with(share)
            await proxy.client.get("/")
            answering = "new" if share else "old"
            await proxy.wait_for_requests(proxy.old, 1 if share else 2)
            await proxy.wait_for_requests(proxy.new, 2 if share else 1)
            await proxy.settled()
            received = [*proxy.old.received, *proxy.new.received]
            copies = {(request.headers["x-abreast-version"], request.role) for request in received}

            assert copies == {*roles.items(), (answering, "baseline")}
            assert {request.captures for request in received} == {3}
            sent = {request.role: request.sent_ms for request in received}
            assert sent["live"] <= sent["shadow"], "copies have the time at which Envoy sends them"
            assert len({request.pair for request in received}) == 1
            assert len({request.without(*ROLE, "x-abreast-copies") for request in received}) == 1


async def test_baseline_share_is_a_part_of_the_sample() -> None:
    requests = 400
    async with abreast(sample_safe=0.5, baseline_share=0.5) as proxy:
        await burst(proxy.port, requests)
        await proxy.settled()
        arms = Counter(request.captures for request in proxy.old.in_role("live"))
        counts = {
            number: await proxy.stat(f"vhost.service.route.safe_{name}.upstream_rq_total")
            for number, name in ((1, "plain"), (2, "sampled"), (3, "baseline"))
        }

        assert arms == counts
        assert sum(counts.values()) == requests
        assert 140 < counts[1] < 260
        assert 50 < counts[3] < 150


async def test_unsampled_request_has_no_header_of_abreast() -> None:
    async with abreast(sample_safe=0.0) as proxy:
        answer = await proxy.client.get("/")
        [request] = proxy.old.received

        assert not [name for name in request.headers if name.startswith("x-abreast-")]
        assert answer.headers.get_list("x-abreast-version") == ["old"]


async def test_response_has_version_header_once() -> None:
    async def tagged(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 0\r\nx-abreast-version: old\r\n\r\n")

    async with abreast(old=Upstream(answer=tagged)) as proxy:
        answer = await proxy.client.get("/")

        assert answer.headers.get_list("x-abreast-version") == ["old"]


@pytest.mark.parametrize(("sticky", "header"), [("header:X-User", "x-user: {}"), ("cookie:user", "cookie: user={}")])
async def test_sticky_user_moves_only_to_new_as_share_rises(sticky: str, header: str) -> None:
    from abreast_sidecar.envoy.settings import parse_sticky

    users = [f"user-{number}" for number in range(40)]
    requests = [f"GET / HTTP/1.1\r\nhost: shop\r\n{header.format(user)}\r\n" for user in users]
    content = "\r\n".join([*requests[:-1], f"{requests[-1]}connection: close\r\n\r\n"]).encode()
    moved: list[set[str]] = []
    async with abreast(sticky=parse_sticky(sticky), sample_safe=0.0) as proxy:
        for share in (0.2, 0.6, 1.0):
            await proxy.give_new(share)
            answers = [re.findall(rb"x-abreast-version: (\w+)", await exchange(proxy.port, content)) for _ in range(3)]
            assert answers[0] == answers[1] == answers[2]
            moved.append({user for user, version in zip(users, answers[0], strict=True) if version == b"new"})

        assert moved[0] < moved[1] < moved[2] == set(users)
        assert moved[0]


async def test_users_without_sticky_key_are_distributed() -> None:
    from abreast_sidecar.envoy.settings import StickyKey

    async with abreast(weight=0.5, sticky=StickyKey("header", "x-user"), sample_safe=0.0) as proxy:
        answered = Counter([(await proxy.client.get("/")).headers["x-abreast-version"] for _ in range(80)])

        assert min(answered["old"], answered["new"]) > 15


async def test_source_ip_keeps_user_on_one_version() -> None:
    from abreast_sidecar.envoy.settings import StickyKey

    async with abreast(weight=0.5, sticky=StickyKey("source-ip"), sample_safe=0.0) as proxy:
        answered = {(await proxy.client.get("/")).headers["x-abreast-version"] for _ in range(30)}

        assert len(answered) == 1


async def test_excess_copies_are_dropped_and_counted() -> None:
    async with abreast(shadow_concurrency=2) as proxy:
        proxy.new.reading.clear()
        answers = await asyncio.gather(*[proxy.client.get("/") for _ in range(40)])

        assert {answer.status_code for answer in answers} == {200}
        overflow = await proxy.stat("cluster.new_shadow.upstream_rq_pending_overflow")
        full = await proxy.stat("cluster.new_shadow.upstream_cx_overflow")
        assert overflow + full > 0
        assert await proxy.stat("cluster.new_shadow.upstream_rq_active") <= 4


async def test_values_of_sidecar_apply_under_traffic() -> None:
    async with abreast() as proxy:
        assert (await proxy.client.get("/")).headers["x-abreast-version"] == "old"
        await proxy.sidecar.set({**weights(1.0), "abreast.sample.safe": {"numerator": 0, "denominator": "MILLION"}})
        await proxy.settled()
        before = len(proxy.old.received)
        answers = [await proxy.client.get("/") for _ in range(10)]

        assert {answer.headers["x-abreast-version"] for answer in answers} == {"new"}
        assert len(proxy.old.received) == before
