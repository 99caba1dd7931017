"""Compare both ways of capture, row by row: python bench/captures.py [--requests 20000] [--rate 40].

Envoy and the middleware capture the same responses of the demo's shop, for the ledgers of two stacks. The rows of each
request must be equal: endpoint, outcome, both statuses and all differences. On a busy machine, one way may lose a capture or
deliver it late, which is a gap. The command exits with 1 if rows differ, or if more than 2% are gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import grpc
from rows import Row, end_in_order, row

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import comparison_pb2_grpc
from abreast_demo.deploy import LOOPBACK, StackAddresses, deploy_shop
from abreast_demo.load import LoadGenerator, generate_requests
from abreast_demo.shop import SHOP_SERVICE
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.process import find_free_port
from abreast_sidecar.stack.stack import Stack

REQUESTS, QUICK = 20_000, 300
RATE = 40.0  # requests per second; each one makes six captures
LONGEST = 5.0  # time limit, as a multiple of requests / rate
SETTLE = 60  # seconds without a new row, after which a ledger that lacks some is read
MAX_GAP_SHARE = 0.02
GAPS = {  # a capture is missing or late in one ledger, because the machine was too busy
    common.OUTCOME_ONLY_OLD,
    common.OUTCOME_ONLY_NEW,
    common.OUTCOME_LATE,
    common.OUTCOME_BASELINE_ONLY,
}
PAGE = 1000
TEMPLATES = ",".join(  # the middleware reads them from the framework
    [
        "/catalogue/categories/{slug}",
        *(f"/products/{{product_id}}{part}" for part in ("", "/price", "/reviews", "/related")),
    ]
)


class LedgerRow(NamedTuple):
    request: str
    endpoint: str
    outcome: int
    live: int
    statuses: tuple[int, int]
    differences: tuple[str, ...]

    @property
    def has_gap(self) -> bool:
        return self.outcome in GAPS


async def read_rows(stub: comparison_pb2_grpc.ComparisonServiceStub) -> dict[str, LedgerRow]:
    """Return the rows of a ledger by pair."""
    places: dict[int, tuple[object, ...]] = {}
    request = api.ListFindingsRequest(service=SHOP_SERVICE, include_noise=True, include_settled=True, page_size=PAGE)
    while True:
        findings = await stub.ListFindings(request)
        places |= {
            finding.id: (finding.part, finding.path, finding.kind, finding.impact) for finding in findings.findings
        }
        if not findings.next_page_token:
            break
        request.page_token = findings.next_page_token
    rows: dict[str, LedgerRow] = {}
    pairs_request = api.ListPairsRequest(service=SHOP_SERVICE, page_size=PAGE)
    while True:
        pairs = await stub.ListPairs(pairs_request)
        for pair in pairs.pairs:
            differences = sorted(map(str, (places.get(number, number) for number in pair.finding_ids)))
            endpoint = f"{pair.endpoint.method} {pair.endpoint.route}"
            statuses = pair.old_status, pair.new_status
            rows[pair.id] = LedgerRow(pair.request, endpoint, pair.outcome, pair.live, statuses, tuple(differences))
        if not pairs.next_page_token:
            return rows
        pairs_request.page_token = pairs.next_page_token


async def measure(listen: str, addresses: Sequence[str], many: int, rate: float) -> list[dict[str, LedgerRow]]:
    """Send requests, and return the rows of each ledger."""
    safe = (request for request in generate_requests(1) if request.is_safe)
    async with LoadGenerator(f"http://{listen}") as load:
        await load.send(itertools.islice(safe, many), requests_per_s=rate, timeout_s=LONGEST * many / rate)
    return [await wait_for_rows(address, load.tally.requests) for address in addresses]


async def wait_for_rows(address: str, many: int) -> dict[str, LedgerRow]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = comparison_pb2_grpc.ComparisonServiceStub(channel)
        pairs, seconds = 0, 0
        while pairs < many and seconds < SETTLE:
            await asyncio.sleep(1)
            summary = await stub.GetSummary(api.GetSummaryRequest(service=SHOP_SERVICE))
            pairs, seconds = summary.pairs, seconds + 1 if summary.pairs == pairs else 0
        return await read_rows(stub)


def find_addresses() -> StackAddresses:
    return StackAddresses(*(SocketAddress(LOOPBACK, find_free_port()) for _ in range(3)))


def run(many: int, rate: float) -> tuple[int, int, int]:
    """Return the requests with a row in either ledger, those whose capture is missing in one, and those with other rows."""
    first, second = find_addresses(), find_addresses()
    # The Envoy of the second stack gets no request: the middleware sends its captures to this Redis.
    unused = EnvoySettings(service=SHOP_SERVICE, listen=second.listen, old=(second.http,), new=(second.http,))
    with (
        Stack(unused, grpc=second.grpc, http=second.http) as stack,
        deploy_shop(
            first,
            lambda _: None,
            plain_versions=(),
            shop_environment={"ABREAST_REDIS_URL": stack.service_redis_url},
            sidecar_environment={"ABREAST_ENDPOINTS": TEMPLATES, "ABREAST_ADAPTIVE_SAMPLING": "false"},
            old_capture="envoy",
            new_capture="envoy",
        ),
    ):
        addresses = str(first.grpc), str(second.grpc)
        by_envoy, by_middleware = asyncio.run(measure(str(first.listen), addresses, many, rate))
    pairs = by_envoy.keys() | by_middleware.keys()
    different, gap_count = Counter[tuple[LedgerRow, LedgerRow]](), 0
    for pair in pairs:
        envoy, middleware = by_envoy.get(pair), by_middleware.get(pair)
        if envoy == middleware:
            continue
        if envoy is None or middleware is None or envoy.has_gap or middleware.has_gap:
            gap_count += 1
        else:
            different[envoy, middleware] += 1
    for (envoy_row, middleware_row), count in different.most_common(20):
        print(f"{count} rows differ: by Envoy {envoy_row}, by the middleware {middleware_row}", file=sys.stderr)
    return len(pairs), gap_count, different.total()


def rows(many: int = REQUESTS, rate: float = RATE, *, quick: bool = False) -> list[Row]:
    pairs, gap_count, different = run(QUICK if quick else many, rate)
    return [
        row("capture_rows", "rows", [pairs]),
        row("capture_rows_different", "rows", [different]),
        row("capture_rows_gaps", "rows", [gap_count]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--rate", type=float, default=RATE)
    arguments = parser.parse_args()
    end_in_order()
    results = rows(arguments.requests, arguments.rate)
    for result in results:
        print(f"{result['name']:28} {result['value']:>8.3f} {result['unit']}")
    pairs, different, gap_count = (int(result["value"]) for result in results)
    return int(different > 0 or pairs < arguments.requests or gap_count > arguments.requests * MAX_GAP_SHARE)


if __name__ == "__main__":
    sys.exit(main())
