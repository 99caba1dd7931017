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
from support_serve import Ledger, Refused, Running, refused, running

pytestmark = pytest.mark.postgres

NOW = Duration()


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[Running]:
    async with running(redis_url, postgres_url, sample_safe=0.5, baseline_share=0.2) as found:
        yield found


@pytest.fixture
def ledger(sidecar: Running) -> Ledger:
    found = sidecar.ledger()
    found.endpoint("shop")
    return found


async def refusal(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refused(caught.value)


@pytest.mark.usefixtures("ledger")
async def test_service_named_by_captures_gets_the_default_shares(sidecar: Running) -> None:
    found = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())

    traffic = found.traffic
    assert (traffic.service, traffic.new_share, traffic.sample_safe, traffic.sample_unsafe, traffic.baseline_share) == (
        *("shop", 0.0, 0.5, 0.0, 0.2),
    )
    assert (traffic.version, traffic.rolled_back) == (1, False)
    assert not found.envoys


async def test_unknown_service_is_not_found(sidecar: Running) -> None:
    for service in ("", "shop"):
        for call in (
            sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service=service)),
            sidecar.traffic.Rollback(pb.RollbackRequest(service=service)),
            sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest(service=service)),
            sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(service=service, new_share=1)),
            anext(aiter(sidecar.traffic.WatchTraffic(pb.WatchTrafficRequest(service=service)))),
        ):
            found = await refusal(call)

            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
            assert "no Envoy and no capture has named" in found.message


@pytest.mark.usefixtures("ledger")
async def test_update_changes_only_given_fields(sidecar: Running) -> None:
    first = await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=0.3, wait=NOW))
    second = await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(sample_unsafe=0.000001, wait=NOW))

    assert first.traffic.new_share == 0.3
    assert (second.traffic.new_share, second.traffic.sample_safe, second.traffic.sample_unsafe) == (0.3, 0.5, 1e-6)
    assert second.traffic.version == first.traffic.version + 1


@pytest.mark.usefixtures("ledger")
async def test_events_have_actor_reason_before_and_after(sidecar: Running) -> None:
    await sidecar.traffic.UpdateTraffic(
        pb.UpdateTrafficRequest(new_share=0.25, actor="ada", reason="first step", wait=NOW)
    )
    await sidecar.traffic.Promote(pb.PromoteRequest(actor="ada", reason="all well", wait=NOW))
    await sidecar.traffic.Rollback(pb.RollbackRequest(actor="grace", reason="prices are off", wait=NOW))

    events = (await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events

    told = [(one.action, one.actor, one.reason, one.before.new_share, one.after.new_share) for one in events]
    assert told == [
        ("rollback", "grace", "prices are off", 1.0, 0.0),
        ("promote", "ada", "all well", 0.25, 1.0),
        ("update", "ada", "first step", 0.0, 0.25),
        ("create", "sidecar", "captures named this service", 0.0, 0.0),
    ]
    assert events[0].after.rolled_back
    assert [one.after.version for one in events] == [4, 3, 2, 1]
    assert not events[-1].HasField("before")
    assert all(one.time == one.after.update_time for one in events)


@pytest.mark.usefixtures("ledger")
async def test_events_without_actor_have_the_peer_address(sidecar: Running) -> None:
    await sidecar.traffic.Rollback(pb.RollbackRequest(wait=NOW))

    (event, _) = (await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events

    assert event.actor.startswith("someone at ipv4:127.0.0.1:")


@pytest.mark.usefixtures("ledger")
async def test_update_without_change_writes_no_event(sidecar: Running) -> None:
    first = await sidecar.traffic.Rollback(pb.RollbackRequest(wait=NOW))
    second = await sidecar.traffic.Rollback(pb.RollbackRequest(wait=NOW))

    assert second.traffic == first.traffic
    assert len((await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events) == 2


@pytest.mark.usefixtures("ledger")
async def test_concurrent_updates_are_recorded_in_order(sidecar: Running) -> None:
    shares = [number / 100 for number in range(1, 21)]
    await asyncio.gather(
        *[sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=share, wait=NOW)) for share in shares]
    )

    events = (await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest())).events

    assert sorted(one.after.new_share for one in events[:-1]) == shares
    assert [one.after.version for one in events] == list(range(21, 0, -1))
    for later, earlier in itertools.pairwise(events):
        assert later.before == earlier.after


@pytest.mark.usefixtures("ledger")
async def test_event_pages_are_complete_without_duplicates(sidecar: Running) -> None:
    for number in range(1, 7):
        await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=number / 10, wait=NOW))

    request = pb.ListTrafficEventsRequest(page_size=3)
    versions = []
    while True:
        answer = await sidecar.traffic.ListTrafficEvents(request)
        versions.append([one.after.version for one in answer.events])
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
        await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=0.9 + len(versions) / 100, wait=NOW))

    assert versions == [[7, 6, 5], [4, 3, 2], [1]]


@pytest.mark.usefixtures("ledger")
@pytest.mark.parametrize(
    ("method", "request_", "message"),
    [
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
        ("ListTrafficEvents", pb.ListTrafficEventsRequest(page_size=-1), "page_size must be 1 to 1000"),
        ("ListTrafficEvents", pb.ListTrafficEventsRequest(page_token="x"), "page_token must be"),
    ],
)
async def test_update_rejects_invalid_arguments(sidecar: Running, method: str, request_: Any, message: str) -> None:
    found = await refusal(getattr(sidecar.traffic, method)(request_))

    assert (found.code, found.reason, found.domain) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARGUMENT", "abreast")
    assert message in found.message
    assert (await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).traffic.version == 1


@pytest.mark.usefixtures("ledger")
async def test_watch_can_be_cancelled(sidecar: Running) -> None:
    watch = sidecar.traffic.WatchTraffic(pb.WatchTrafficRequest())
    assert (await anext(aiter(watch))).traffic.service == "shop"
    watch.cancel()

    with pytest.raises(asyncio.CancelledError):
        await anext(aiter(watch))
    assert await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())
