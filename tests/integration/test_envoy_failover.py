"""Users first: what they get when new, the sidecar or a copy is in trouble."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from support import eventually_async, find_free_port, free_ports
from support_envoy import Abreast, abreast, burst, exchange, started
from support_upstream import Received, Upstream, failing, ok, respond, slow


async def hang_up(_request: Received, writer: asyncio.StreamWriter) -> None:
    writer.close()
    raise ConnectionResetError


async def test_safe_requests_succeed_when_new_dies_under_load() -> None:
    async with abreast(weight=1.0) as proxy:
        load = asyncio.create_task(burst(proxy.port, 2000))
        await proxy.wait_for_requests(proxy.new, 100)
        await proxy.new.stop()
        await load

        assert proxy.old.in_role("live")


async def test_new_serves_users_again_after_recovery() -> None:
    async with abreast(weight=1.0) as proxy:
        await proxy.new.stop()
        await proxy.healthy("new", 0)

        async def left_alone() -> bool:
            await proxy.client.get("/")
            return proxy.old.in_role("live")[-1].headers["x-envoy-attempt-count"] == "1"

        await eventually_async(left_alone, description="requests go to old at once")
        await proxy.new.start()

        async def back() -> bool:
            return (await proxy.client.get("/")).headers["x-abreast-version"] == "new"

        await eventually_async(back, description="new answers")


async def test_old_serves_requests_of_failing_new_with_attempt_numbers() -> None:
    async with abreast(weight=1.0, new=Upstream(answer=failing(503))) as proxy:
        answers = [await proxy.client.get("/") for _ in range(3)]
        await proxy.settled()

        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-abreast-version"] for answer in answers} == {"old"}
        failed, answered = proxy.new.in_role("live")[0], proxy.old.in_role("live")[0]
        assert failed.pair == answered.pair
        assert [request.headers["x-envoy-attempt-count"] for request in (failed, answered)] == ["1", "2"]
        assert [request.headers["x-abreast-version"] for request in (failed, answered)] == ["new", "old"]


@pytest.mark.parametrize(("baseline_share", "copies"), [(0.0, 0), (1.0, 1)])
async def test_error_of_old_is_not_retried(baseline_share: float, copies: int) -> None:
    async with abreast(old=Upstream(answer=failing(500)), baseline_share=baseline_share) as proxy:
        answers = [await proxy.client.get("/") for _ in range(5)]
        await proxy.settled()

        assert {(answer.status_code, answer.text) for answer in answers} == {(500, "failed")}
        assert {answer.headers["x-abreast-version"] for answer in answers} == {"old"}
        assert len(proxy.old.in_role("live")) == 5
        assert len(proxy.old.in_role("baseline")) == 5 * copies
        assert len({request.pair for request in proxy.old.in_role("live")}) == 5


async def test_failed_copy_is_not_retried() -> None:
    async with abreast(new=Upstream(answer=failing(503))) as proxy:
        await _assert_copies_of_failed_version_are_not_retried(proxy, proxy.new)
        await proxy.restart_with(new_share=1.0)
        proxy.old.answer, proxy.new.answer = failing(503), ok
        await _assert_copies_of_failed_version_are_not_retried(proxy, proxy.old)


async def _assert_copies_of_failed_version_are_not_retried(proxy: Abreast, failed: Upstream) -> None:
    answers = [await proxy.client.get("/") for _ in range(3)]
    await proxy.wait_for_requests(failed, 3)
    await proxy.settled()

    assert {answer.status_code for answer in answers} == {200}
    assert [request.role for request in failed.received] == ["shadow"] * 3


async def test_error_of_new_sends_one_live_request_to_old() -> None:
    async with abreast(weight=1.0, new=Upstream(answer=failing(500))) as proxy:
        answer = await proxy.client.get("/")
        await proxy.settled()

        assert (answer.status_code, answer.text) == (200, "ok")
        assert len(proxy.new.in_role("live")) == len(proxy.old.in_role("live")) == 1


async def test_error_of_both_versions_uses_one_attempt_each() -> None:
    old, new = Upstream(answer=failing(502)), Upstream(answer=failing(500))
    async with abreast(weight=1.0, sample_safe=0.0, old=old, new=new) as proxy:
        answer = await proxy.client.get("/")

        assert (answer.status_code, answer.headers["x-abreast-version"]) == (502, "old")
        assert len(proxy.new.received) == len(proxy.old.received) == 1


async def test_old_as_fallback_is_not_retried() -> None:
    async with abreast(weight=1.0, sample_safe=0.0, old=Upstream(answer=failing(500))) as proxy:
        await proxy.new.stop()
        await proxy.healthy("new", 0)
        before = len(proxy.old.received)
        answers = [await proxy.client.get("/") for _ in range(5)]

        assert {answer.status_code for answer in answers} == {500}
        assert len(proxy.old.received) - before == 5


@pytest.mark.parametrize(("method", "requests"), [("GET", 2), ("POST", 1)])
async def test_request_is_retried_on_old_after_reset_if_safe(method: str, requests: int) -> None:
    """A service may close an idle connection just when a request arrives on it."""
    async with abreast(sample_safe=0.0, old=Upstream(answer=hang_up)) as proxy:
        response = await proxy.client.request(method, "/")

        assert response.status_code == 503
        assert len(proxy.old.received) == requests


@pytest.mark.parametrize("new_is_healthy", [True, False])
@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_slow_request_runs_once_on_old(share: float, new_is_healthy: bool) -> None:
    async with abreast(
        weight=share,
        sample_safe=0.0,
        per_try_timeout=0.2,
        old=Upstream(answer=slow(1.5)),
        new=Upstream(answer=slow(20.0)),
    ) as proxy:
        if not new_is_healthy:
            await proxy.new.stop()
            await proxy.healthy("new", 0)
        response = await proxy.client.get("/")

        assert (response.status_code, response.headers["x-abreast-version"]) == (200, "old")
        assert len(proxy.old.received) == 1


async def test_retry_header_is_removed_from_response() -> None:
    async with abreast() as proxy:
        for share in (0.0, 1.0):
            await proxy.give_new(share)
            answers = [await proxy.client.request(method, "/") for method in ("GET", "POST")]

            for answer in answers:
                assert {name for name in answer.headers if name.startswith("x-abreast-")} == {"x-abreast-version"}


async def test_concurrent_failures_are_all_retried() -> None:
    """Envoy's own default is three retries at a time."""

    async def fail_later(_request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await respond(writer, b"failed", 503)

    async with abreast(weight=1.0, new=Upstream(answer=fail_later)) as proxy:
        answers = await asyncio.gather(*[proxy.client.get("/") for _ in range(60)])

        assert {answer.status_code for answer in answers} == {200}


async def test_processed_unsafe_request_is_not_retried() -> None:
    async with abreast(weight=1.0, new=Upstream(answer=failing(503))) as proxy:
        answer = await proxy.client.post("/orders", content=b"one")

        assert (answer.status_code, answer.text) == (503, "failed")
        assert len(proxy.new.received) == 1
        assert not proxy.old.received


async def test_client_headers_set_no_retries_or_timeouts() -> None:
    headers = {"x-envoy-retry-on": "5xx", "x-envoy-max-retries": "3", "x-envoy-upstream-rq-timeout-ms": "1"}
    async with abreast(weight=1.0, new=Upstream(answer=failing(503))) as proxy:
        answer = await proxy.client.post("/orders", headers=headers)

        assert answer.status_code == 503
        assert len(proxy.new.received) == 1


async def test_unsafe_request_is_not_retried_after_reset() -> None:
    async with abreast(weight=1.0, new=Upstream(answer=hang_up)) as proxy:
        answer = await proxy.client.post("/orders", content=b"one")

        assert answer.status_code == 503
        assert len(proxy.new.received) == 1
        assert not proxy.old.received


async def test_unprocessed_unsafe_request_is_retried_with_body() -> None:
    body = b"x" * 5_000_000
    async with abreast(weight=1.0) as proxy:
        await proxy.new.stop()
        answer = await proxy.client.post("/orders", content=body)

        assert answer.status_code == 200
        assert [request.body == body for request in proxy.old.in_role("live")] == [True]


async def test_frozen_new_delays_request_by_one_attempt() -> None:
    async with abreast(weight=1.0, per_try_timeout=0.3) as proxy:
        proxy.new.reading.clear()
        start = time.monotonic()
        answer = await proxy.client.get("/")

        assert (answer.status_code, answer.headers["x-abreast-version"]) == (200, "old")
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_second_attempt_does_not_cancel_slow_response(share: float) -> None:
    """Both versions need longer than a try may take: the user must get what he would have got without Envoy."""
    async with abreast(
        weight=share, per_try_timeout=0.2, old=Upstream(answer=slow(1.0)), new=Upstream(answer=slow(1.0))
    ) as proxy:
        answer = await proxy.client.get("/")

        assert (answer.status_code, answer.text) == (200, "ok")


async def test_failing_version_is_ejected_despite_passing_health_check() -> None:
    async with abreast(weight=1.0, sample_safe=0.0, new=Upstream(answer=failing(500))) as proxy:

        async def left_alone() -> bool:
            before = len(proxy.new.received)
            await asyncio.gather(*[proxy.client.get("/") for _ in range(10)])
            return len(proxy.new.received) == before

        await eventually_async(left_alone, description="new gets no requests any more")
        checked = await proxy.stat("cluster.new.health_check.success")

        async def checked_again() -> bool:
            return await proxy.stat("cluster.new.health_check.success") > checked + 1

        await eventually_async(checked_again, description="two more health checks passed")
        assert await left_alone()
        assert await proxy.stat("cluster.new.outlier_detection.ejections_active") == 1


async def test_version_that_starts_late_is_used_within_seconds() -> None:
    late = Upstream(port=find_free_port())
    async with abreast(weight=1.0, new=Upstream(), old=Upstream()) as proxy:
        port = proxy.new.port
        await proxy.new.stop()
        await proxy.healthy("new", 0)
        late.port = port
        start = time.monotonic()
        async with late:
            await proxy.healthy("new", 1)

            assert time.monotonic() - start < 5


async def test_old_is_used_at_once_after_connection_failures() -> None:
    async with abreast(weight=0.5, sample_safe=0.0) as proxy:
        await proxy.new.stop()
        await proxy.healthy("new", 0)
        await proxy.old.stop()
        refused = [(await proxy.client.get("/")).status_code for _ in range(30)]
        await proxy.old.start()
        answers = [(await proxy.client.get("/")).status_code for _ in range(30)]

        assert set(refused) == {503}
        assert set(answers) == {200}


async def test_service_without_health_path_is_healthy() -> None:
    async with abreast() as proxy:
        proxy.new.health_status = 404
        before = await proxy.stat("cluster.new.health_check.success")

        async def checked() -> bool:
            return await proxy.stat("cluster.new.health_check.success") > before + 1

        await eventually_async(checked, description="two more health checks succeeded")
        assert await proxy.stat("cluster.new.membership_healthy") == 1


async def test_envoy_without_sidecar_sends_users_to_old() -> None:
    async with Upstream() as old, Upstream() as new:
        listen, admin_port, nobody = free_ports(3)
        settings = EnvoySettings(
            listen=SocketAddress("127.0.0.1", listen),
            admin=SocketAddress("127.0.0.1", admin_port),
            sidecar=SocketAddress("127.0.0.1", nobody),
            old=(SocketAddress("127.0.0.1", old.port),),
            new=(SocketAddress("127.0.0.1", new.port),),
            sample_safe=1.0,
        )
        start = time.monotonic()
        async with started(settings), httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.listen.port}") as client:
            answers = [await client.get("/") for _ in range(10)]

            assert {answer.headers["x-abreast-version"] for answer in answers} == {"old"}
            assert time.monotonic() - start < 10


async def test_last_values_apply_without_sidecar() -> None:
    async with abreast(weight=1.0) as proxy:
        await proxy.sidecar.__aexit__(None, None, None)

        async def is_gone() -> bool:
            return await proxy.stat("control_plane.connected_state") == 0

        await eventually_async(is_gone, description="Envoy noticed")
        answers = [await proxy.client.get("/") for _ in range(5)]

        assert {answer.headers["x-abreast-version"] for answer in answers} == {"new"}


async def test_admin_layer_overrides_sidecar() -> None:
    async with abreast(weight=1.0) as proxy:
        await proxy.override("abreast.weight.old=10000&abreast.weight.new_or_old=0")

        assert (await proxy.client.get("/")).headers["x-abreast-version"] == "old"
        assert await proxy.stat("runtime.admin_overrides_active") == 1

        await proxy.override("abreast.weight.old=&abreast.weight.new_or_old=")
        assert (await proxy.client.get("/")).headers["x-abreast-version"] == "new"
        assert await proxy.stat("runtime.admin_overrides_active") == 0


@pytest.mark.parametrize("answer", [failing(500), slow(5.0)])
async def test_failing_or_slow_copy_does_not_affect_user(answer: object) -> None:
    async with abreast(new=Upstream(answer=answer)) as proxy:  # type: ignore[arg-type]
        start = time.monotonic()
        answers = [await proxy.client.get("/") for _ in range(5)]

        assert {(answer.status_code, answer.text) for answer in answers} == {(200, "ok")}
        assert time.monotonic() - start < 2


async def test_dead_new_does_not_affect_users_on_old() -> None:
    async with abreast() as proxy:
        await proxy.new.stop()
        answers = [await proxy.client.get("/") for _ in range(5)]

        assert {answer.status_code for answer in answers} == {200}


async def test_copy_ends_after_shadow_timeout() -> None:
    async with abreast(new=Upstream(answer=slow(60.0)), shadow_timeout=0.3) as proxy:
        await proxy.client.get("/")
        await proxy.wait_for_requests(proxy.new, 1)
        await proxy.settled()

        assert await proxy.stat("cluster.new_shadow.upstream_rq_max_duration_reached") == 1


async def test_stream_outlives_all_timeouts() -> None:
    async def events(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(8):
            writer.write(b"8\r\ndata: %d\n\r\n" % number)
            await writer.drain()
            await asyncio.sleep(0.2)
        writer.write(b"0\r\n\r\n")

    async with abreast(old=Upstream(answer=events), per_try_timeout=0.3, idle_timeout=0.8, shadow_timeout=0.3) as proxy:
        answer = await proxy.client.get("/")

        assert answer.text == "".join(f"data: {number}\n" for number in range(8))


async def test_silent_stream_ends_after_idle_timeout() -> None:
    async with abreast(old=Upstream(answer=slow(60.0)), per_try_timeout=0.0, idle_timeout=0.4) as proxy:
        start = time.monotonic()
        answer = await proxy.client.get("/")

        assert answer.status_code == 504
        assert time.monotonic() - start < 5


async def test_request_timeout_limits_whole_request() -> None:
    async with abreast(old=Upstream(answer=slow(60.0)), per_try_timeout=0.0, request_timeout=0.4) as proxy:
        assert (await proxy.client.get("/")).status_code == 504


async def test_retry_uses_another_endpoint_of_old() -> None:
    async with Upstream() as first:
        closed, listen, admin_port = free_ports(3)
        dead = SocketAddress("127.0.0.1", closed)
        async with abreast(old=Upstream(), sample_safe=0.0, health_path="/healthz") as proxy:
            endpoints = (dead, SocketAddress("127.0.0.1", first.port))
            settings = EnvoySettings(
                listen=SocketAddress("127.0.0.1", listen),
                admin=SocketAddress("127.0.0.1", admin_port),
                sidecar=proxy.settings.sidecar,
                old=endpoints,
                new=proxy.settings.new,
            )
            async with started(settings):
                await burst(settings.listen.port, 80)

        assert len(first.in_role("live")) == 80


async def test_aborted_upload_leaves_no_request() -> None:
    head = b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 1000\r\n\r\nabc"
    async with abreast(sample_unsafe=1.0, old=Upstream(answer=ok)) as proxy:
        await exchange(proxy.port, head, until=b"never", within=0.3)
        await proxy.settled()

        assert not proxy.old.received
        assert (await proxy.client.get("/")).status_code == 200
