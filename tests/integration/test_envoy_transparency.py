"""Sixty raw exchanges through Envoy, each beside the same exchange without it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from support import eventually_async, free_ports
from support_envoy import started
from support_transparency import (
    CASES,
    CORE,
    OUR_REQUEST_HEADERS,
    OUR_RESPONSE_HEADERS,
    compare_copies,
    differences,
    run_cases,
)
from support_transparency_known import KNOWN, KNOWN_COPIES, unknown_causes
from support_wire import Exchange, Recorder

pytestmark = pytest.mark.xdist_group("transparency")  # one Envoy runs all cases


@dataclass(frozen=True)
class Results:
    direct: dict[str, Exchange]
    through: dict[str, Exchange]

    def differences(self, name: str) -> list[str]:
        return differences(
            CASES[name],
            self.direct[name],
            self.through[name],
            added_to_requests=OUR_REQUEST_HEADERS,
            added_to_responses=OUR_RESPONSE_HEADERS,
        )

    def copy_differences(self, name: str) -> list[str]:
        causes = [cause for cause in compare_copies(self.through[name]) if cause]
        return unknown_causes(name, causes, KNOWN_COPIES)


async def run_core() -> Results:
    old, new, listen, admin, sidecar = (SocketAddress("127.0.0.1", port) for port in free_ports(5))
    settings = EnvoySettings(
        listen=listen,
        admin=admin,
        sidecar=sidecar,
        old=(old,),
        new=(new,),
        sample_safe=1.0,
        sample_unsafe=1.0,
        baseline_share=1.0,
    )
    cases = [CASES[name] for name in CORE]
    async with Recorder((old.port, new.port)) as recorder:
        direct = await run_cases(old.port, recorder, cases)
        async with started(settings):
            results = Results(direct, await run_cases(listen.port, recorder, cases))

            async def arrived() -> bool:
                return not any(map(results.copy_differences, CORE))

            await eventually_async(arrived, description="all copies have arrived and equal their live request")
    return results


@pytest.fixture(scope="module")
def results() -> Results:
    return asyncio.run(run_core())


@pytest.mark.parametrize("name", CORE)
def test_exchange_through_envoy_equals_direct_exchange_except_for_known_differences(
    results: Results, name: str
) -> None:
    assert results.direct[name].responses, "the direct exchange has a response"
    assert unknown_causes(name, results.differences(name), KNOWN) == []


def test_most_exchanges_do_not_differ_at_all(results: Results) -> None:
    assert sum(not results.differences(name) for name in CORE) >= 43


def test_live_request_reaches_its_version_once_and_each_copy_once(results: Results) -> None:
    exchange = results.through["method_get"]

    assert [request.first(b"x-abreast-role") for request in exchange.requests] == [b"live"]
    assert sorted(request.first(b"x-abreast-role") for request in exchange.copies) == [b"baseline", b"shadow"]


def test_login_that_belongs_to_a_connection_is_not_copied(results: Results) -> None:
    exchange = results.through["login_ntlm"]

    assert len(exchange.requests) == 1
    assert not exchange.copies
