"""`abreast up` as a separate process with real servers and two small services."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from abreast_sidecar.stack.stack import PORTS_FILE
from support import eventually, find_free_port
from support_middleware import marks
from support_up import START, Up, answers, plain_service, run_up, service

pytestmark = pytest.mark.timeout(240)

INTERRUPTS = int(os.environ.get("ABREAST_TEST_INTERRUPTS", "3"))


@pytest.fixture
def data() -> Iterator[Path]:
    """Yield a folder that the user who runs Postgres for root may enter, unlike the folders of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="abreast-test-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def test_up_compares_responses_and_streams() -> None:
    """One run covers responses first, then streams whose clients leave or stay."""
    with run_up() as up:
        pair = up.ask()["x-abreast-pair"]
        for number in range(12):
            up.ask(f"/products/{number}")
        up.wait_for_pairs(13)
        findings = up.json("findings", "--each")["findings"]
        output = up.command("pair", pair)
        doctor = up.command("doctor")

        assert [(f["endpoint"]["route"], f["path"], f["kind"]) for f in findings] == [
            ("/products/{id}", "$.price", "KIND_TYPE")
        ]
        assert output.returncode == 0, output.stderr
        assert '"price": "7.5"' in output.stdout
        assert doctor.returncode == 0, doctor.stdout
        assert "release old-1" in doctor.stdout
        eventually(
            lambda: "old is captured" in up.text and "new is captured" in up.text, description="both are announced"
        )

        lines = up.watch("/events", lines=12)
        up.watch("/events", lines=300)  # five seconds, and the capture has left
        up.wait_for_pairs(15)
        pairs = [row for row in up.json("pairs")["pairs"] if row["endpoint"]["route"] == "/events"]
        (event,) = [
            finding
            for finding in up.json("findings", "--each")["findings"]
            if finding["endpoint"]["route"] == "/events"
        ]

        assert lines[-2:] == [b'data: {"name": "any"}\n', b"\n"]
        assert [row["outcome"] for row in pairs] == ["OUTCOME_PARTIAL"] * 2
        assert (event["path"], event["kind"], event["count"]) == ("events[*].data.name", "KIND_CHANGED", "2")


def test_up_without_sampling_fails_doctor_and_stops_on_ctrl_c() -> None:
    """Test a start with a shell's `&` too, which ignores the signal."""
    old, new = find_free_port(), find_free_port()
    ignoring = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    with (
        Up(old, new, ("--sample-safe", "0%"), before=ignoring) as up,
        service("old", old, up.redis_url),
        service("new", new, up.redis_url),
    ):
        assert up.process is not None
        up.healthy()
        up.ask()
        failures, doctor = up.failures(), up.command("doctor")
        processes = descendants(up.process.pid)
        niceness = {command_name(pid): os.getpriority(os.PRIO_PROCESS, pid) for pid in processes}
        code = up.stop(signal.SIGINT)

        assert (failures, doctor.returncode) == ({("Envoy", "sampling")}, 1)
        assert (code, len(processes) >= 4) == (0, True)
        # Users' requests come first. The sidecar is a Python process.
        assert (niceness.pop("envoy"), set(niceness.values())) == (0, {5}), niceness
        assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
        assert answers(old)
        assert answers(new)


def command_name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def descendants(pid: int) -> list[int]:
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            pids += [int(child), *descendants(int(child))]
    return pids


def test_up_continues_data_of_killed_run(data: Path) -> None:
    """One data directory covers its lock, a killed run, and shares that options override."""
    # The usual port could be taken by a parallel run between the two runs of this test.
    (data / PORTS_FILE).write_text(json.dumps({"redis": find_free_port()}))
    options = ("--data", str(data))
    with run_up(*options) as first:
        first.ask()
        first.wait_for_pairs(1)
        assert first.json("traffic")["traffic"]["sample_safe"] == 1.0

        intruder = Up(find_free_port(), find_free_port(), options)
        with closing(intruder.log):
            intruder.start()
            code = intruder.stop(signal.SIGCONT)  # it ends after the signal
            assert (code, intruder.text.count("\n")) == (3, 1)
            assert f"{data} is in use by another run" in intruder.text

        first.stop(signal.SIGKILL)
        redis_url, key = first.redis_url, data / "control.key"
        control_key = key.read_text()
        assert (len(control_key.strip()), key.stat().st_mode & 0o777) == (64, 0o600)
        with Up(
            first.old,
            first.new,
            (*options, "--sample-safe", "20%", "--sample", "/admin/* 10%"),
            first.listen,
            first.grpc,
            first.http,
        ) as second:
            assert second.redis_url == redis_url
            assert len(second.json("findings", "--each")["findings"]) == 1
            assert key.read_text() == control_key
            assert second.json("traffic")["traffic"]["sample_safe"] == 0.2
            second.json("traffic", "set", "--sample", "admin=50%", "--reason", "a test")
            assert second.json("traffic")["rules"][0]["share"] == 0.5
        rule = ("--sample", "/admin/* 30%")
        with Up(first.old, first.new, (*options, *rule), first.listen, first.grpc, first.http) as third:
            assert third.json("traffic")["traffic"]["sample_safe"] == 0.2
            assert third.json("traffic")["rules"][0]["share"] == 0.3


def test_up_rejects_address_in_use() -> None:
    port = find_free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)], stderr=subprocess.DEVNULL
    ) as other:
        eventually(lambda: listening(port), description="the other program listens")
        up = Up(find_free_port(), find_free_port(), listen=port)
        with closing(up.log):
            up.start()
            code = up.stop(signal.SIGCONT)
            other.terminate()

            assert (code, up.text.count("\n")) == (3, 1)
            assert f"127.0.0.1:{port}, the address for users' requests (--listen), is used" in up.text


def listening(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_up_proves_its_requests_with_the_printed_key(data: Path) -> None:
    with run_up("--data", str(data), with_key=True) as up:
        pair = up.ask()["x-abreast-pair"]
        up.wait_for_pairs(1)
        forged = marks("forged", version="new", role="shadow")
        refused = httpx.get(f"http://127.0.0.1:{up.new}/products/7", headers=forged, timeout=10)
        eventually(lambda: "unproven_copy" in up.command("status").stdout, description="the refused copy is counted")
        outputs = [up.command(*words).stdout for words in (("pair", pair), ("doctor",), ("status",))]
        redact_key = (data / "redact-key").read_text().strip()
        rotations = [up.command("key", "rotate") for _ in range(2)]
        names = ("edge-key", "redact-key", "envoy/envoy.yaml")
        modes = {name: stat.S_IMODE((data / name).stat().st_mode) for name in names}
        key = up.edge_key

    assert refused.status_code == 403
    assert "unproven_copy 1" in outputs[1]
    assert not [output for output in outputs if key in output]
    assert set(modes.values()) == {0o600}, modes
    assert (data / "edge-key").read_text() == f"{key}\n"
    assert [rotation.returncode for rotation in rotations] == [0, 2], rotations[0].stderr
    assert "already has a key" in rotations[1].stderr
    assert (data / "redact-key").read_text().startswith(f"{redact_key},")


def test_doctor_reports_version_without_middleware() -> None:
    with run_up("--new-capture", "middleware", bare="new") as up:
        for _ in range(3):
            up.ask()
        eventually(lambda: captured(up) == {"old": "ok", "new": "fail"}, description="new alone is named")


def captured(up: Up) -> dict[str, str]:
    checks = up.json("doctor")["checks"]
    return {c["name"]: c["state"] for c in checks if c["part"] == "services" and c["name"] in {"old", "new"}}


def test_up_and_doctor_report_version_that_is_down() -> None:
    old, new = find_free_port(), find_free_port()
    with Up(old, new) as up:
        eventually(lambda: f"old can't be reached: 127.0.0.1:{old}" in up.text, description="up says so")
        assert {("Envoy", "old"), ("Envoy", "new")} <= up.failures()
        with service("old", old, up.redis_url):
            eventually(lambda: "old is healthy" in up.text, description="up says so of old")
            failures = up.failures()

        assert "Envoy finds new unhealthy: GET /healthz" in up.text
        assert (("Envoy", "old") in failures, ("Envoy", "new") in failures) == (False, True)
        assert f"new does not answer at 127.0.0.1:{new} yet" in up.text
        assert f"http://127.0.0.1:{up.http}" in up.text


class ConnectionLogin(BaseHTTPRequestHandler):
    """Asks for a login that belongs to the connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 401)
        self.send_header("content-length", "0")
        if self.path != "/healthz":
            self.send_header("www-authenticate", "NTLM")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


def test_up_separates_clients_of_services_with_connection_logins() -> None:
    """The variables that the command does not use are named too."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), ConnectionLogin) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    old, new = (server.server_address[1] for server in servers)
    with Up(old, new, before=("env", "ABREAST_OLD=127.0.0.1:1", "ABREAST_TRUSTED_HOPS=1", "ABREAST_TYPO=1")) as up:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            up.ask()
        eventually(lambda: "Envoy is restarted with --connection-per-client" in up.text, description="up says so")
        eventually(lambda: listening(up.listen), description="Envoy is back")

        assert not up.failures() & {("Envoy", "logins")}
        assert "this command does not use ABREAST_OLD, ABREAST_TYPO\n" in up.text
    for server in servers:
        server.shutdown()
        server.server_close()


async def test_up_detects_grpc_services() -> None:
    class Say(grpc.GenericRpcHandler):
        def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            async def say(request: bytes, _context: object) -> bytes:
                return request * 2

            return grpc.unary_unary_rpc_method_handler(say)

    servers = [grpc.aio.server(), grpc.aio.server()]
    for server in servers:
        server.add_generic_rpc_handlers([Say()])
    ports = [server.add_insecure_port("127.0.0.1:0") for server in servers]
    for server in servers:
        await server.start()
    up = Up(ports[0], ports[1], ("--sample-unsafe", "100%"))
    await asyncio.to_thread(up.__enter__)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{up.listen}") as channel:
            say: Any = channel.unary_unary("/shop.Shop/Say")
            responses = [await say(b"ab", wait_for_ready=True, timeout=30) for _ in range(11)]

        assert responses == [b"abab"] * 11
        assert "both versions speak HTTP/2 without TLS (h2c)" in up.text
        await asyncio.to_thread(up.wait_for_pairs, 11)
        [row] = (await asyncio.to_thread(up.json, "endpoints"))["endpoints"]
        assert (row["endpoint"]["method"], row["endpoint"]["route"]) == ("POST", "/shop.Shop/Say")
        assert row["source"] == "ENDPOINT_SOURCE_GRPC"
    finally:
        await asyncio.to_thread(up.__exit__)
        await asyncio.gather(*[server.stop(None) for server in servers])


def test_up_interrupted_at_start_leaves_no_process() -> None:
    up = Up(find_free_port(), find_free_port())
    with closing(up.log):
        process = up.start()
        eventually(lambda: "starting postgres" in up.text, within=START, description="it starts")
        mine = descendants(process.pid)
        code = up.stop(signal.SIGINT)

        assert (code, "Traceback" in up.text, bool(mine)) == (0, False, True)
    assert not [pid for pid in mine if runs(pid)]


@pytest.mark.timeout(60 + 60 * INTERRUPTS)
def test_up_starts_after_an_interrupt_at_any_moment_of_its_first_start() -> None:
    """SIGINT, SIGTERM and SIGKILL take turns, at moments from the first one on. The seed makes failures repeatable."""
    moments = random.Random(13)  # no secret
    duration = 0.0
    for number in range(-1, INTERRUPTS):  # the first start is whole, and shows the duration
        folder = Path(tempfile.mkdtemp(prefix="abreast-test-", dir="/tmp"))
        folder.chmod(0o711)
        up = Up(find_free_port(), find_free_port(), options=("--data", str(folder)))
        began = time.monotonic()
        with closing(up.log):
            if number < 0:
                with up:
                    duration = time.monotonic() - began
            else:
                process, delay = up.start(), moments.uniform(0, duration)
                sent = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[number % 3]
                if sent == signal.SIGINT:  # before the interpreter runs the command, it is Python's
                    eventually(lambda: bool(up.text), within=START, description="the command runs")  # noqa: B023
                elif sent == signal.SIGTERM:
                    caught = f"/proc/{process.pid}/status"
                    eventually(lambda: catches(caught, signal.SIGTERM), description="it handles SIGTERM")  # noqa: B023
                time.sleep(max(0.0, began + delay - time.monotonic()))
                code = up.stop(sent)
                assert code == (-signal.SIGKILL if sent == signal.SIGKILL else 0), (
                    f"{sent!r} after {delay:.3f} s: {up.text}"
                )
                with Up(find_free_port(), find_free_port(), options=("--data", str(folder))) as again:
                    assert again.stop(signal.SIGTERM) == 0, f"{sent!r} after {delay:.3f} s: {again.text}"
        shutil.rmtree(folder)


def test_up_ended_while_it_is_loaded_exits_with_0() -> None:
    up = Up(find_free_port(), find_free_port())
    with closing(up.log):
        process = up.start()
        caught = f"/proc/{process.pid}/status"
        eventually(lambda: catches(caught, signal.SIGTERM), description="the process handles SIGTERM")
        code = up.stop(signal.SIGTERM)

        assert (code, up.text) == (0, "")


def catches(status: str, number: signal.Signals) -> bool:
    (mask,) = (line.split()[1] for line in Path(status).read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> number - 1 & 1)


def runs(pid: int) -> bool:
    """Return True once the process has ended; it may stay a zombie for a moment."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_up_survives_suspended_and_ended_redis() -> None:
    """The doctor reports the suspended server. `up` restarts the ended one with its data."""
    with run_up() as up:
        assert up.process is not None
        up.ask()
        up.wait_for_pairs(1)
        redis = next(pid for pid in descendants(up.process.pid) if "valkey" in Path(f"/proc/{pid}/comm").read_text())
        os.kill(redis, signal.SIGSTOP)
        try:
            failures = up.failures()
        finally:
            os.kill(redis, signal.SIGCONT)
        os.kill(redis, signal.SIGKILL)
        eventually(
            lambda: "redis ended (exit code -9) and is being restarted" in up.text, description="up restarts Redis"
        )
        up.ask()
        up.wait_for_pairs(2)

        assert ("Redis", "reachable") in failures
        assert not [name for part, name in failures if part == "Postgres"]


def test_up_serves_the_services_of_a_file(tmp_path: Path) -> None:
    ports = [find_free_port() for _ in range(4)]
    file = tmp_path / "abreast.yaml"
    file.write_text(
        "services:\n"
        f"  shop: {{hosts: [shop.example], old: {{endpoints: 127.0.0.1:{ports[0]}}}, new: {{endpoints: 127.0.0.1:{ports[1]}}},"
        " sample_safe: 1}\n"
        f"  cart: {{prefixes: [/products], old: {{endpoints: 127.0.0.1:{ports[2]}}}, new: {{endpoints: 127.0.0.1:{ports[3]}}},"
        " hosts: ['*.cart.example'], sample_safe: 1}\n"
    )
    with contextlib.ExitStack() as opening:
        for version, port in zip(("old", "new", "old", "old"), ports, strict=True):
            opening.enter_context(plain_service(version, port))
        up = opening.enter_context(Up(0, 0, config=file))
        file.unlink()  # the servers need it no more
        up.healthy()
        with httpx.Client(base_url=f"http://127.0.0.1:{up.listen}") as client:
            hosts = ["shop.example", "Shop.Example:8080", "a.cart.example", "other.example"]
            statuses = [client.get("/products/7", headers={"host": host}).status_code for host in hosts]
        eventually(lambda: count_pairs(up, "shop") == 2 and count_pairs(up, "cart") == 1, description="all pairs")
        findings = [up.json("findings", "--each", "--service", name)["findings"] for name in ("shop", "cart")]
        doctor, text = up.command("doctor"), up.text

    assert statuses == [200, 200, 200, 404]
    assert [[finding["path"] for finding in found] for found in findings] == [["$.price"], []]
    assert doctor.returncode == 0, doctor.stdout
    assert "for the service cart" in doctor.stdout
    assert "cart: new is captured" in text


def count_pairs(up: Up, service_name: str) -> int:
    return int(up.json("status", "--service", service_name)["summary"]["pairs"])
