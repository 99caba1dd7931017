"""TrafficService without an Envoy: arguments, events, and services that only captures have named."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from abreast.v1 import traffic_pb2 as pb
from support_serve import Ledger, Refused, RunningSidecar, refused, run_sidecar

pytestmark = pytest.mark.postgres

NOW = Duration()


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url, sample_safe=0.5, baseline_share=0.2) as instance:
        yield instance


@pytest.fixture
def ledger(sidecar: RunningSidecar) -> Ledger:
    ledger = sidecar.ledger()
    ledger.endpoint("shop")
    return ledger


async def refusal(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return refused(error.value)


@pytest.mark.usefixtures("ledger")
async def test_service_named_by_captures_gets_the_default_shares(sidecar: RunningSidecar) -> None:
    response = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())

    traffic = response.traffic
    assert (traffic.service, traffic.new_share, traffic.sample_safe, traffic.sample_unsafe, traffic.baseline_share) == (
        *("shop", 0.0, 0.5, 0.0, 0.2),
    )
    assert (traffic.version, traffic.rolled_back) == (1, False)
    assert not response.envoys


async def test_unknown_service_is_not_found(sidecar: RunningSidecar) -> None:
    for service in ("", "shop"):
        for call in (
            sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service=service)),
            sidecar.traffic.Rollback(pb.RollbackRequest(service=service)),
            sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest(service=service)),
            sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(service=service, new_share=1)),
            anext(aiter(sidecar.traffic.WatchTraffic(pb.WatchTrafficRequest(service=service)))),
        ):
            error = await refusal(call)

            assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
            assert "no Envoy and no capture has named" in error.message


@pytest.mark.usefixtures("ledger")
async def test_update_changes_only_given_fields(sidecar: RunningSidecar) -> None:
    first = await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=0.3, wait=NOW))
    second = await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(sample_unsafe=0.000001, wait=NOW))

    assert first.traffic.new_share == 0.3
    assert (second.traffic.new_share, second.traffic.sample_safe, second.traffic.sample_unsafe) == (0.3, 0.5, 1e-6)
    assert second.traffic.version == first.traffic.version + 1


@pytest.mark.usefixtures("ledger")
async def test_events_have_actor_reason_before_and_after(sidecar: RunningSidecar) -> None:
    await sidecar.traffic.UpdateTraffic(
        pb.UpdateTrafficRequest(new_share=0.25, actor="ada", reason="first step", wait=NOW)
    )
    await sidecar.traffic.Promote(pb.PromoteRequest(actor="ada", reason="all well", wait=NOW))
    await sidecar.traffic.Rollback(pb.RollbackRequest(actor="grace", reason="prices are off", wait=NOW))

    events = (await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events

    changes = [
        (event.action, event.actor, event.reason, event.before.new_share, event.after.new_share) for event in events
    ]
    assert changes == [
        ("rollback", "grace", "prices are off", 1.0, 0.0),
        ("promote", "ada", "all well", 0.25, 1.0),
        ("update", "ada", "first step", 0.0, 0.25),
        ("create", "sidecar", "captures named this service", 0.0, 0.0),
    ]
    assert events[0].after.rolled_back
    assert [event.after.version for event in events] == [4, 3, 2, 1]
    assert not events[-1].HasField("before")
    assert all(event.time == event.after.update_time for event in events)


@pytest.mark.usefixtures("ledger")
async def test_events_without_actor_have_the_peer_address(sidecar: RunningSidecar) -> None:
    await sidecar.traffic.Rollback(pb.RollbackRequest(wait=NOW))

    (event, _) = (await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events

    assert event.actor.startswith("someone at ipv4:127.0.0.1:")


@pytest.mark.usefixtures("ledger")
async def test_update_without_change_writes_no_event(sidecar: RunningSidecar) -> None:
    request = pb.UpdateTrafficRequest(new_share=0.25, wait=NOW)
    first, second = await sidecar.traffic.UpdateTraffic(request), await sidecar.traffic.UpdateTraffic(request)

    assert second.traffic == first.traffic
    assert len((await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events) == 2


@pytest.mark.usefixtures("ledger")
async def test_rollback_is_always_a_new_version(sidecar: RunningSidecar) -> None:
    request = pb.RollbackRequest(wait=NOW)
    versions = [(await sidecar.traffic.Rollback(request)).traffic.version for _ in range(3)]

    assert versions == [2, 3, 4]
    assert len((await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events) == 4


@pytest.mark.usefixtures("ledger")
async def test_concurrent_updates_are_recorded_in_order(sidecar: RunningSidecar) -> None:
    shares = [number / 100 for number in range(1, 21)]
    await asyncio.gather(
        *[sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=share, wait=NOW)) for share in shares]
    )

    events = (await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events

    assert sorted(event.after.new_share for event in events[:-1]) == shares
    assert [event.after.version for event in events] == list(range(21, 0, -1))
    for later, earlier in itertools.pairwise(events):
        assert later.before == earlier.after


@pytest.mark.usefixtures("ledger")
async def test_event_pages_are_complete_without_duplicates(sidecar: RunningSidecar) -> None:
    for number in range(1, 7):
        await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=number / 10, wait=NOW))

    request = pb.ListTrafficEventsRequest(page_size=3)
    versions = []
    while True:
        answer = await sidecar.traffic.ListTrafficEvents(request)
        versions.append([event.after.version for event in answer.events])
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
        await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=0.9 + len(versions) / 100, wait=NOW))

    assert versions == [[7, 6, 5], [4, 3, 2], [1]]


@pytest.mark.usefixtures("ledger")
async def test_update_rejects_invalid_arguments(sidecar: RunningSidecar) -> None:
    for method, request_, message in (
        ("UpdateTraffic", pb.UpdateTrafficRequest(), "set at least one of new_share"),
        (
            "UpdateTraffic",
            pb.UpdateTrafficRequest(new_share=math.nan),
            "new_share must be a share from 0 to 1, got nan",
        ),
        ("UpdateTraffic", pb.UpdateTrafficRequest(new_share=-1), "new_share must be a share from 0 to 1, got -1"),
        ("UpdateTraffic", pb.UpdateTrafficRequest(sample_safe=1.1), "sample_safe must be a share"),
        ("UpdateTraffic", pb.UpdateTrafficRequest(sample_unsafe=math.inf), "sample_unsafe must be a share"),
        ("UpdateTraffic", pb.UpdateTrafficRequest(baseline_share=25), "baseline_share must be a share"),
        ("UpdateTraffic", pb.UpdateTrafficRequest(new_share=0.5, wait=Duration(seconds=11)), "wait must be 0 to 10 s"),
        ("UpdateTraffic", pb.UpdateTrafficRequest(new_share=0.5, wait=Duration(nanos=-1)), "wait must be 0 to 10 s"),
        ("UpdateTraffic", pb.UpdateTrafficRequest(new_share=0.5, actor="x" * 201), "actor must have at most 200"),
        ("Rollback", pb.RollbackRequest(reason="\0"), "reason must not contain a NUL"),
        ("Promote", pb.PromoteRequest(wait=Duration(seconds=-1)), "wait must be 0 to 10 s"),
        ("GetTraffic", pb.GetTrafficRequest(service="\0"), "service must not contain a NUL"),
        ("ListTrafficEvents", pb.ListTrafficEventsRequest(page_size=-1), "page_size must be at least 1"),
        ("ListTrafficEvents", pb.ListTrafficEventsRequest(page_token="x"), "page_token must be"),
    ):
        error = await refusal(getattr(sidecar.traffic, method)(request_))

        assert (error.code, error.reason, error.domain) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "BAD_ARGUMENT",
            "abreast.v1",
        )
        assert message in error.message
        assert (await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).traffic.version == 1


@pytest.mark.usefixtures("ledger")
async def test_watch_can_be_cancelled(sidecar: RunningSidecar) -> None:
    watch = sidecar.traffic.WatchTraffic(pb.WatchTrafficRequest())
    assert (await anext(aiter(watch))).traffic.service == "shop"
    watch.cancel()

    with pytest.raises(asyncio.CancelledError):
        await anext(aiter(watch))
    assert await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())
