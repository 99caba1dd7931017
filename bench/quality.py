"""What the verdict is worth, with everything in between: the demo's shop behind Envoy, through Redis, comparison and ledger.

Old against old has to raise no finding and to pass; old against new has to fail with every planted regression, no more.
`python bench/quality.py [--requests 20000] [--rate 250]` takes four minutes, and three times as long at most; precision
and recall of single comparisons are in bench/compare.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys

import grpc
from rows import Row, row

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import comparison_pb2_grpc
from abreast_demo.deploy import DEFAULT_CODE_BY_VERSION, LOOPBACK, StackAddresses, deploy_shop
from abreast_demo.load import LoadGenerator, generate_requests
from abreast_demo.planted_changes import PLANTED_REGRESSIONS
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.stack.process import find_free_port

REQUESTS = 20_000
QUICK = 600  # too few for a verdict
RATE = 250.0  # a second
LONGEST = 3.0  # times as long as the rate asks for; a slow machine sends fewer requests
TURN = 5.0  # seconds between two turns of a chore that decides
SETTLE = 60  # seconds at most until all is in the ledger; what is not shows in the verdict
Found = tuple[api.GetVerdictResponse, list[api.Finding]]  # the verdict, and findings that are told to be real
SAME = {"old": "old", "new": "old"}


def run(*codes: dict[str, str], many: int, rate: float, turns: int = 2) -> list[Found]:
    """Of each, all at the same time."""
    with contextlib.ExitStack() as opening:
        ports = []
        for each in codes:
            ports.append([SocketAddress(LOOPBACK, find_free_port()) for _ in range(3)])
            opening.enter_context(deploy_shop(StackAddresses(*ports[-1]), lambda _: None, code_by_version=each))
        return asyncio.run(_all(ports, many, rate, turns))


async def _all(ports: list[list[SocketAddress]], many: int, rate: float, turns: int) -> list[Found]:
    return await asyncio.gather(*(_measure(each, many, rate, turns) for each in ports))


async def _measure(ports: list[SocketAddress], many: int, rate: float, turns: int) -> Found:
    listen, address, _ = (f"{one.host}:{one.port}" for one in ports)
    safe = (one for one in generate_requests(1) if one.is_safe)
    async with LoadGenerator(f"http://{listen}") as load:
        await load.send(itertools.islice(safe, many), requests_per_s=rate, timeout_s=LONGEST * many / rate)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = comparison_pb2_grpc.ComparisonServiceStub(channel)
        for _ in range(SETTLE):
            if (await stub.GetSummary(api.GetSummaryRequest(service="shop"))).pairs >= load.tally.requests:
                break
            await asyncio.sleep(1)
        await asyncio.sleep(turns * TURN)
        verdict = await stub.GetVerdict(api.GetVerdictRequest(service="shop"))
        listed = await stub.ListFindings(api.ListFindingsRequest(service="shop", page_size=1000))
    return verdict, [
        one for one in listed.findings if one.state == api.FINDING_STATE_REAL and one.impact != common.IMPACT_ADDITIVE
    ]


def rows(many: int = REQUESTS, rate: float = RATE, *, quick: bool = False) -> list[Row]:
    if quick:
        (same, false), (other, real) = run(SAME, DEFAULT_CODE_BY_VERSION, many=QUICK, rate=rate, turns=1)
    else:
        (same, false), (other, real) = (run(each, many=many, rate=rate)[0] for each in (SAME, DEFAULT_CODE_BY_VERSION))
    _tell("same code", same, false)
    _tell("new code", other, real)
    planted = {(one.location.endpoint, one.location.path) for one in PLANTED_REGRESSIONS}
    found = {(f"{one.endpoint.method} {one.endpoint.route}", one.path) for one in real}
    return [
        row("same_code_false_findings", "findings", [len(false)]),
        row("same_code_passes", "share", [same.state == api.VERDICT_STATE_PASS]),
        row("new_code_fails", "share", [other.state == api.VERDICT_STATE_FAIL]),
        row("planted_precision", "share", [len(found & planted) / max(1, len(found))]),
        row("planted_recall", "share", [len(found & planted) / len(planted)]),
    ]


def _tell(what: str, verdict: api.GetVerdictResponse, real: list[api.Finding]) -> None:
    """What is behind the figures, on stderr."""
    print(f"{what}: {api.VerdictState.Name(verdict.state)}", file=sys.stderr)
    for reason in verdict.reasons:
        print(f"  {api.VerdictState.Name(reason.state)} {reason.text}", file=sys.stderr)
    for one in real:
        print(f"  {one.endpoint.method} {one.endpoint.route} {one.path} {one.summary}; {one.reason}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--rate", type=float, default=RATE)
    given = parser.parse_args()
    for one in rows(given.requests, given.rate):
        print(f"{one['name']:28} {one['value']:>8.3f} {one['unit']}")


if __name__ == "__main__":
    main()
