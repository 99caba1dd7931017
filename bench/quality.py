"""Measure the quality of verdicts: python bench/quality.py [--requests 20000] [--rate 250].

The demo's shop runs behind Envoy, through Redis, comparison and ledger. Old against old must pass without a finding. Old
against new must fail with exactly the planted regressions. The measurement takes four minutes, or up to three times as
long on a slow machine. For precision and recall of single comparisons, see bench/compare.py.
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
RATE = 250.0  # requests per second
LONGEST = 3.0  # time limit, as a multiple of requests / rate
TURN = 5.0  # seconds between two runs of the job that classifies findings
SETTLE = 60  # seconds until the ledger must hold every request; missing ones show in the verdict
Result = tuple[api.GetVerdictResponse, list[api.Finding]]  # the verdict and the real findings
SAME = {"old": "old", "new": "old"}


def run(*codes: dict[str, str], many: int, rate: float, turns: int = 2) -> list[Result]:
    """Measure several pairs of versions at the same time."""
    with contextlib.ExitStack() as opening:
        ports = []
        for code_by_version in codes:
            ports.append([SocketAddress(LOOPBACK, find_free_port()) for _ in range(3)])
            opening.enter_context(
                deploy_shop(StackAddresses(*ports[-1]), lambda _: None, code_by_version=code_by_version)
            )
        return asyncio.run(_all(ports, many, rate, turns))


async def _all(ports: list[list[SocketAddress]], many: int, rate: float, turns: int) -> list[Result]:
    return await asyncio.gather(*(_measure(addresses, many, rate, turns) for addresses in ports))


async def _measure(ports: list[SocketAddress], many: int, rate: float, turns: int) -> Result:
    listen, address, _ = (f"{address.host}:{address.port}" for address in ports)
    safe = (request for request in generate_requests(1) if request.is_safe)
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
        finding
        for finding in listed.findings
        if finding.state == api.FINDING_STATE_REAL and finding.impact != common.IMPACT_ADDITIVE
    ]


def rows(many: int = REQUESTS, rate: float = RATE, *, quick: bool = False) -> list[Row]:
    if quick:
        (same, false), (other, real) = run(SAME, DEFAULT_CODE_BY_VERSION, many=QUICK, rate=rate, turns=1)
    else:
        (same, false), (other, real) = (
            run(code_by_version, many=many, rate=rate)[0] for code_by_version in (SAME, DEFAULT_CODE_BY_VERSION)
        )
    _print_result("same code", same, false)
    _print_result("new code", other, real)
    planted = {(change.location.endpoint, change.location.path) for change in PLANTED_REGRESSIONS}
    reported = {(f"{finding.endpoint.method} {finding.endpoint.route}", finding.path) for finding in real}
    return [
        row("same_code_false_findings", "findings", [len(false)]),
        row("same_code_passes", "share", [same.state == api.VERDICT_STATE_PASS]),
        row("new_code_fails", "share", [other.state == api.VERDICT_STATE_FAIL]),
        row("planted_precision", "share", [len(reported & planted) / max(1, len(reported))]),
        row("planted_recall", "share", [len(reported & planted) / len(planted)]),
    ]


def _print_result(title: str, verdict: api.GetVerdictResponse, findings: list[api.Finding]) -> None:
    """Print the verdict and its findings to stderr."""
    print(f"{title}: {api.VerdictState.Name(verdict.state)}", file=sys.stderr)
    for reason in verdict.reasons:
        print(f"  {api.VerdictState.Name(reason.state)} {reason.text}", file=sys.stderr)
    for finding in findings:
        endpoint = f"{finding.endpoint.method} {finding.endpoint.route}"
        print(f"  {endpoint} {finding.path} {finding.summary}; {finding.reason}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--rate", type=float, default=RATE)
    arguments = parser.parse_args()
    for result in rows(arguments.requests, arguments.rate):
        print(f"{result['name']:28} {result['value']:>8.3f} {result['unit']}")


if __name__ == "__main__":
    main()
