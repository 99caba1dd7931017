"""Compare each request and response through Abreast with the same exchange without it: python bench/transparency.py.

Each raw case runs directly against a recording service, through Abreast's rendered configuration (every request
mirrored to both versions), through an Envoy with one route, and through nginx if it is installed. Clients of uvicorn,
gunicorn, Node, Go and go-httpbin follow, each if it is installed: requests of all kinds, and then 2,000 each that arrive
when the service closes idle connections. The command prints what differs by cause. It exits with 1 if Abreast changes a
case that nginx passes unchanged and docs/transparency.md does not name it, or answers a request with another status.

    python bench/transparency.py --quick    # 60 raw cases
    python bench/transparency.py idle       # only the requests that arrive when connections close
    python bench/transparency.py latency    # times of a tiny GET through each of them
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from rows import Row, end_in_order, percentile, row

from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.envoy.settings import SERVER_KEEPALIVE_S, EnvoySettings, SocketAddress
from abreast_sidecar.stack.process import ServerProcess, find_free_port, is_answering
from abreast_sidecar.stack.servers import EnvoyServer
from support import eventually_async
from support_transparency import (
    BARE_REQUEST_HEADERS,
    BARE_RESPONSE_HEADERS,
    CASES,
    CORE,
    NGINX_RESPONSE_HEADERS,
    OUR_REQUEST_HEADERS,
    OUR_RESPONSE_HEADERS,
    Case,
    compare_copies,
    differences,
    run_cases,
)
from support_transparency_known import KNOWN, KNOWN_COPIES, KNOWN_NEW, unknown_causes
from support_transparency_services import ECHO_CASES, HTTPBIN_CASES
from support_wire import Exchange, Recorder

HERE = Path(__file__).parent
DIRECT, ABREAST, NEW, BARE, NGINX = "direct", "Abreast", "Abreast, new", "bare Envoy", "nginx"
NO_HEADERS: frozenset[bytes] = frozenset()
ADDED = {  # headers that each proxy adds to requests and to responses
    ABREAST: (OUR_REQUEST_HEADERS, OUR_RESPONSE_HEADERS),
    NEW: (OUR_REQUEST_HEADERS, OUR_RESPONSE_HEADERS),
    BARE: (BARE_REQUEST_HEADERS, BARE_RESPONSE_HEADERS),
    NGINX: (NO_HEADERS, NGINX_RESPONSE_HEADERS),
}
SETTLE_S = 10.0
LOST = "missing"  # Envoy does not repeat a copy whose connection the service closes, as many cases do
IDLE_ROUNDS, IDLE_BURST = 50, 40  # requests to each service, in bursts between pauses
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"
ALL = 1_000_000  # every request, as a runtime value of Envoy

BARE_CONFIG = """
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {listen}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bare
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: service{mirror}}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: service
    connect_timeout: 5s
    load_assignment:
      cluster_name: service
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
"""

# nginx with limits as wide as Abreast's, so that the comparison is with its best.
NGINX_CONFIG = """
daemon off;
{user}
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1000; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  large_client_header_buffers 200 256k;
  client_max_body_size 0;
  keepalive_requests 1000000;
  ignore_invalid_headers off;
  upstream service {{ server 127.0.0.1:{upstream}; keepalive 32; }}
  server {{
    listen 127.0.0.1:{listen} backlog=1000;
    location / {{
      proxy_pass http://service;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header Connection "";
      proxy_pass_header Server;
      proxy_pass_header Date;
      proxy_buffer_size 256k;
      proxy_buffers 8 256k;
      proxy_busy_buffers_size 512k;
    }}
  }}
}}
"""


def format_bare_config(listen: int, upstream: int, mirror: str = "") -> str:
    return BARE_CONFIG.format(admin=find_free_port(), listen=listen, upstream=upstream, mirror=mirror)


@dataclass
class Proxies:
    """Running proxies in front of one service: the port of each, and Abreast's Envoy."""

    ports: dict[str, int]
    envoy: EnvoyServer

    def set_runtime(self, **values: int) -> None:
        query = "&".join(f"abreast.{name.replace('__', '.')}={value}" for name, value in values.items())
        self.envoy.ask_admin("POST", f"/runtime_modify?{query}")

    def give_new(self, share: float) -> None:
        self.set_runtime(weight__old=round(10_000 * (1 - share)), weight__new_or_old=round(10_000 * share))

    def stats(self, pattern: str) -> list[int]:
        stats = json.loads(self.envoy.ask_admin("GET", f"/stats?format=json&filter={pattern}"))["stats"]
        return [stat["value"] for stat in stats if "value" in stat]

    def wait(self, pattern: str, values: set[int]) -> None:
        deadline = time.monotonic() + SETTLE_S
        while not set(self.stats(pattern)) <= values and time.monotonic() < deadline:
            time.sleep(0.05)

    def settle(self) -> None:
        """Wait until no copy is in flight."""
        time.sleep(0.3)
        self.wait("^cluster.(old_shadow|new_shadow|old_baseline|new_baseline).upstream_rq_active$", {0})
        time.sleep(0.2)


@contextlib.contextmanager
def running_proxies(old: int, new: int, **changes: Any) -> Iterator[Proxies]:
    """Start the proxies in front of a service. Both versions may be the same process. `changes` are settings."""
    ports = {DIRECT: old, ABREAST: find_free_port(), BARE: find_free_port(), NGINX: find_free_port()}
    settings = EnvoySettings(
        listen=SocketAddress("127.0.0.1", ports[ABREAST]),
        admin=SocketAddress("127.0.0.1", find_free_port()),
        sidecar=SocketAddress("127.0.0.1", find_free_port()),
        old=(SocketAddress("127.0.0.1", old),),
        new=(SocketAddress("127.0.0.1", new),),
        sample_safe=1.0,
        sample_unsafe=1.0,
        baseline_share=1.0,
        **changes,
    )
    bare = format_bare_config(ports[BARE], old)
    with TemporaryDirectory(prefix="abreast-nginx-") as folder, contextlib.ExitStack() as opening:
        envoy = opening.enter_context(EnvoyServer(render_config(settings)))
        opening.enter_context(EnvoyServer(bare))
        if nginx := shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin"):
            config, user = Path(folder) / "nginx.conf", "user root;" if os.geteuid() == 0 else ""
            config.write_text(NGINX_CONFIG.format(user=user, folder=folder, listen=ports[NGINX], upstream=old))
            command = [nginx, "-c", str(config), "-e", f"{folder}/error.log"]
            _start(opening, "nginx", command, Path(folder), ports[NGINX])
        else:
            del ports[NGINX]
        yield Proxies({DIRECT: old, ABREAST: ports[ABREAST], NEW: ports[ABREAST], **ports}, envoy)


def _start(opening: contextlib.ExitStack, name: str, command: Sequence[str | Path], folder: Path, port: int) -> None:
    server = ServerProcess.start(
        name, command, folder / f"{name}.log", is_ready=lambda _pid: is_answering("127.0.0.1", port, GET, b"HTTP/1.1")
    )
    opening.callback(server.stop)


@dataclass
class Report:
    """Causes of differences per column and case, and the state of the copies."""

    title: str
    cases: int
    causes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    copies: Counter[str] = field(default_factory=Counter)
    copy_causes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def same(self) -> dict[str, int]:
        return {column: self.cases - len(causes) for column, causes in self.causes.items()}

    def print(self) -> None:
        figures = ", ".join(f"{column} {count}" for column, count in self.same.items())
        print(f"\n{self.title}: {self.cases} cases, same as direct: {figures}")
        for column, causes in self.causes.items():
            print(f"  {column}: {len(causes)} differ")
            for cause, names in group(causes):
                shown = ", ".join(names[:6]) + (f", … ({len(names) - 6} more)" if len(names) > 6 else "")
                print(f"    {len(names):4} {cause}: {shown}")
        if self.copies:
            print("  copies: " + ", ".join(f"{count} {state}" for state, count in sorted(self.copies.items())))
            for cause, names in group(self.copy_causes):
                print(f"    {len(names):4} {cause}: {', '.join(names[:8])}")

    def undocumented(self) -> dict[str, list[str]]:
        """Return the causes of Abreast's that docs/transparency.md does not name, where nginx changes nothing."""
        by_nginx = self.causes.get(NGINX, {})
        unknown = {
            f"{name} ({column})": unknown_causes(name, causes, known)
            for column, known in ((ABREAST, KNOWN), (NEW, KNOWN_NEW))
            for name, causes in self.causes[column].items()
            if name not in by_nginx
        }
        copies = {
            f"copy of {name}": unknown_causes(name, [cause for cause in causes if cause != LOST], KNOWN_COPIES)
            for name, causes in self.copy_causes.items()
        }
        return {name: causes for name, causes in (unknown | copies).items() if causes}


def group(causes: Mapping[str, Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Return the names of cases by cause, the most frequent cause first."""
    names = defaultdict(list)
    for name, parts in causes.items():
        names["; ".join(parts)].append(name)
    return sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))


async def _run_raw(cases: Sequence[Case], recorder: Recorder, proxies: Proxies) -> Report:
    report = Report("raw requests", len(cases))
    direct: dict[str, Exchange] = {}
    async with recorder:
        await asyncio.to_thread(proxies.wait, "^cluster.new.membership_healthy$", {1})
        for column, port in proxies.ports.items():
            await asyncio.to_thread(proxies.give_new, 1.0 if column == NEW else 0.0)
            results = await run_cases(port, recorder, cases)
            if column == DIRECT:
                direct = results
                continue
            report.causes[column] = _compare(cases, direct, results, column)
            if column in {ABREAST, NEW}:
                await asyncio.to_thread(proxies.settle)
                await _await_copies(cases, results)
                _count_copies(cases, results, report)
    return report


def _compare(
    cases: Iterable[Case], direct: Mapping[str, Exchange], through: Mapping[str, Exchange], column: str
) -> dict[str, list[str]]:
    added_to_requests, added_to_responses = ADDED[column]
    causes = {
        case.name: differences(
            case,
            direct[case.name],
            through[case.name],
            added_to_requests=added_to_requests,
            added_to_responses=added_to_responses,
        )
        for case in cases
    }
    return {name: parts for name, parts in causes.items() if parts}


async def _await_copies(cases: Iterable[Case], results: Mapping[str, Exchange]) -> None:
    """Wait for copies that are late because the machine is busy."""

    async def arrived() -> bool:
        causes = {case.name: compare_copies(results[case.name]) for case in cases}
        return not any(LOST in unknown_causes(name, parts, KNOWN_COPIES) for name, parts in causes.items())

    with contextlib.suppress(AssertionError):  # the report counts those that never arrive
        await eventually_async(arrived, within=SETTLE_S)


def _count_copies(cases: Iterable[Case], results: Mapping[str, Exchange], report: Report) -> None:
    for case in cases:
        for difference in compare_copies(results[case.name]):
            report.copies[difference or "equal to the live request"] += 1
            if difference:
                report.copy_causes.setdefault(case.name, []).append(difference)


def run_raw(*, quick: bool) -> Report:
    cases = [CASES[name] for name in CORE] if quick else list(CASES.values())
    old, new = find_free_port(), find_free_port()
    with running_proxies(old, new) as proxies:
        return asyncio.run(_run_raw(cases, Recorder((old, new)), proxies))


@contextlib.contextmanager
def running_services() -> Iterator[dict[str, Proxies]]:
    """Start each service whose toolchain is here, with its defaults, and the proxies in front of it."""
    with TemporaryDirectory() as folder, contextlib.ExitStack() as opening:
        services: dict[str, Proxies] = {}
        for name, command in available_services(Path(folder)).items():
            port = find_free_port()
            _start(opening, name, [part.format(port=port) for part in command], Path(folder), port)
            services[name] = opening.enter_context(running_proxies(port, port))
        yield services


def available_services(folder: Path) -> dict[str, list[str]]:
    """Return the command of each service, with {port}. `folder` is for what a compiler makes."""
    python = [sys.executable, "-m"]
    services = {
        "uvicorn": [*python, "uvicorn", "echo:asgi", "--app-dir", f"{HERE}", "--port={port}", "--log-level=warning"],
        # gthread: the default worker of gunicorn closes each connection
        "gunicorn": [
            *python,
            "gunicorn",
            "echo:wsgi",
            "--chdir",
            f"{HERE}",
            "--bind=127.0.0.1:{port}",
            "-kgthread",
            "--threads=8",
        ],
    }
    if node := shutil.which("node"):
        services["Node"] = [node, f"{HERE}/echo.mjs", "{port}"]
    if go := shutil.which("go"):
        subprocess.run([go, "build", "-o", f"{folder}/echo", f"{HERE}/echo.go"], check=True)
        services["Go"] = [f"{folder}/echo", "{port}"]
    if httpbin := shutil.which("go-httpbin") or shutil.which("go-httpbin", path=str(Path.home() / "go" / "bin")):
        services["go-httpbin"] = [httpbin, "-host", "127.0.0.1", "-port", "{port}"]
    return services


async def _run_service(name: str, proxies: Proxies) -> Report:
    cases = list((HTTPBIN_CASES if name == "go-httpbin" else ECHO_CASES).values())
    report = Report(name, len(cases))
    direct: dict[str, Exchange] = {}
    await asyncio.to_thread(proxies.wait, "^cluster.new.membership_healthy$", {1})
    for column, port in proxies.ports.items():
        await asyncio.to_thread(proxies.give_new, 1.0 if column == NEW else 0.0)
        results = await run_cases(port, None, cases)
        if column == DIRECT:
            direct = results
        else:
            report.causes[column] = _compare(cases, direct, results, column)
    return report


async def _run_idle(services: Mapping[str, Proxies]) -> dict[str, dict[str, Counter[str]]]:
    """Return the statuses per service and column. go-httpbin is no service with defaults: it sets several timeouts."""
    names = [name for name in services if name != "go-httpbin"]
    outcomes = await asyncio.gather(*[_run_bursts(name, services[name]) for name in names])
    return dict(zip(names, outcomes, strict=True))


async def _run_bursts(name: str, proxies: Proxies) -> dict[str, Counter[str]]:
    """Return the statuses of requests after pauses as long as the service, or Envoy, keeps idle connections."""
    outcomes: dict[str, Counter[str]] = {column: Counter() for column in proxies.ports if column != NEW}
    generator = random.Random(1)

    async def ask(column: str, method: str, delay: float) -> None:
        await asyncio.sleep(delay)
        raw = f"{method} / HTTP/1.1\r\nhost: shop\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
        outcomes[column][f"{method} {await run_one(proxies.ports[column], raw)}"] += 1

    await asyncio.to_thread(proxies.give_new, 0.0)
    for _ in range(IDLE_ROUNDS):
        idle_s = generator.choice((SERVER_KEEPALIVE_S.get(name, 5.0), EnvoySettings.old_keepalive))
        await asyncio.sleep(0.95 * idle_s)
        async with asyncio.TaskGroup() as requests:
            for column in outcomes:
                for number in range(IDLE_BURST):
                    method = "POST" if number % 2 else "GET"
                    requests.create_task(ask(column, method, 0.1 * idle_s * generator.random()))
    return outcomes


async def run_one(port: int, raw: bytes) -> str:
    result = (await run_cases(port, None, [Case("idle", (raw,))]))["idle"]
    return str(result.responses[-1].status) if result.responses else "no response"


def print_idle(outcomes: Mapping[str, Mapping[str, Counter[str]]]) -> int:
    """Print the statuses, and return how many of Abreast's are no 200."""
    print("\nrequests that arrive when connections close")
    for name, columns in outcomes.items():
        for column, statuses in columns.items():
            shown = ", ".join(f"{count:,} × {status}" for status, count in sorted(statuses.items()))
            print(f"  {name}, {column}: {shown}")
    wrong = [
        columns[ABREAST][status]
        for columns in outcomes.values()
        for status in columns[ABREAST]
        if not status.endswith(" 200")
    ]
    return sum(wrong)


def measure_latency(*, quick: bool) -> dict[str, list[list[float]]]:
    """Return the seconds of each tiny GET over one connection, per column and round. The columns take turns."""
    rounds, count = (2, 300) if quick else (30, 100)  # short turns, so that all columns see the same load
    port, mirror = find_free_port(), find_free_port()
    captures = {"old_capture": "middleware", "new_capture": "middleware"}
    times: dict[str, list[list[float]]] = defaultdict(list)
    with TemporaryDirectory() as folder, contextlib.ExitStack() as opening:
        _start(opening, "tiny", [sys.executable, HERE / "echo.py", str(port)], Path(folder), port)
        bare_with_mirror = format_bare_config(mirror, port, ", request_mirror_policies: [{cluster: service}]")
        opening.enter_context(EnvoyServer(bare_with_mirror))
        proxies = opening.enter_context(running_proxies(port, port, **captures))
        # Envoy captures for this one, and the service takes the place of the collector.
        capturing = opening.enter_context(running_proxies(port, port, collector=SocketAddress("127.0.0.1", port)))
        columns = [
            ("direct", proxies.ports[DIRECT], 0),
            ("bare_envoy", proxies.ports[BARE], 0),
            ("bare_envoy_mirror", mirror, 0),
            ("abreast_unsampled", proxies.ports[ABREAST], 0),
            ("abreast_sampled", proxies.ports[ABREAST], ALL),
            ("abreast_captured", capturing.ports[ABREAST], ALL),
            *([("nginx", proxies.ports[NGINX], 0)] if NGINX in proxies.ports else []),
        ]
        for number in range(rounds + 1):
            for name, column_port, share in columns:
                for each in (proxies, capturing):
                    each.set_runtime(sample__safe=share, sample__baseline=0)
                measured = time_requests(column_port, count)
                if number:  # the first round warms up
                    times[name].append(measured)
    return times


def time_requests(port: int, count: int) -> list[float]:
    seconds: list[float] = []
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began = time.perf_counter()
            connection.sendall(GET)
            response = b""
            while not response.endswith(b"ok"):
                received = connection.recv(65536)
                if not received:
                    raise RuntimeError(f"port {port} closed the connection after {len(seconds)} requests")
                response += received
            seconds.append(time.perf_counter() - began)
    return seconds


def latency_rows(*, quick: bool = False) -> list[Row]:
    return [
        row(f"proxy_{name}_{label}_us", "µs", [percentile(measured, share) * 1e6 for measured in rounds])
        for name, rounds in measure_latency(quick=quick).items()
        for label, share in (("p50", 0.5), ("p99", 0.99))
    ]


def rows(*, quick: bool = False) -> list[Row]:
    report = run_raw(quick=True)
    names = {ABREAST: "abreast", NEW: "abreast_new", BARE: "bare_envoy", NGINX: "nginx"}
    same = [row(f"transparency_same_{names[column]}", "", [count]) for column, count in report.same.items()]
    return [row("transparency_cases", "", [report.cases]), *same, *latency_rows(quick=quick)]


def print_all(*, quick: bool) -> int:
    """Print all parts, and return the exit code."""
    began = time.monotonic()
    reports, wrong = [run_raw(quick=quick)], 0
    reports[0].print()
    if not quick:
        with running_services() as services:
            for name, proxies in services.items():
                reports.append(asyncio.run(_run_service(name, proxies)))
                reports[-1].print()
            wrong = print_idle(asyncio.run(_run_idle(services)))
    undocumented = {
        f"{report.title}: {name}": causes for report in reports for name, causes in report.undocumented().items()
    }
    print(f"\n{time.monotonic() - began:.0f} s; {len(undocumented)} cases that nginx passes unchanged are undocumented")
    for name, causes in undocumented.items():
        print(f"  {name}: {'; '.join(causes)}")
    return 1 if undocumented or wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("cases", "idle", "latency"), default="cases")
    parser.add_argument("--quick", action="store_true", help="60 raw cases, or fewer timed requests")
    arguments = parser.parse_args()
    end_in_order()
    if arguments.part == "cases":
        return print_all(quick=arguments.quick)
    if arguments.part == "idle":
        with running_services() as services:
            return 1 if print_idle(asyncio.run(_run_idle(services))) else 0
    for result in latency_rows(quick=arguments.quick):
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
