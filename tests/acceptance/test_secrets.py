"""The search for secrets of users in all places where a parallel run keeps or shows data."""

from __future__ import annotations

import base64
import json
import os
import random
import secrets
import stat
import string
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
import redis
import zstandard
from click.testing import CliRunner

from abreast.export.redaction import Redactor
from abreast_sidecar.cli import abreast
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack import stack as stack_module
from abreast_sidecar.stack.process import is_answering
from abreast_sidecar.stack.servers import render_redis_acl
from abreast_sidecar.stack.stack import ANY_PORT_ADDRESS, Stack
from support import eventually, free_ports

SERVICE = Path(__file__).parents[1] / "secrets_service.py"
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
MONITOR_PASSWORD = "m" * 32
TEXT_KINDS = ("html", "xml", "plain", "form", "events", "image", "ndjson")
RANDOM = random.Random(1)  # the tokens are no secrets
ANSWER_COUNTS = {"json": 12, "header": 4, "effect": 5, "text": 11}


def make_secret() -> str:
    """Return a random token that its shape reveals. A few in a thousand have no such shape, so these are the same in each run."""
    return "".join(RANDOM.choices(string.ascii_letters + string.digits, k=32))


def make_card() -> str:
    digits = [4, *[secrets.randbelow(10) for _ in range(14)]]
    doubled = [sum(divmod(2 * digit, 10)) if index % 2 == 0 else digit for index, digit in enumerate(digits)]
    return "".join(map(str, digits)) + str(-sum(doubled) % 10)


def make_jwt() -> str:
    parts = (json.dumps({"alg": "HS256"}), json.dumps({"sub": secrets.token_hex(8)}), secrets.token_hex(16))
    return ".".join(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts)


def make_word() -> str:
    """Return a secret that only its name reveals."""
    return f"hunter-{secrets.token_hex(4)}"


def make_answer_secrets() -> dict[str, list[str]]:
    values = {place: [make_word() for _ in range(count)] for place, count in ANSWER_COUNTS.items()}
    values["json"][5], values["json"][6] = make_jwt(), make_secret()
    values["effect"][1], values["effect"][4] = make_secret(), make_card()
    values["header"][2], values["text"][1], values["text"][5] = make_secret(), make_jwt(), make_card()
    return values


@contextmanager
def version(name: str, port: int, stack: Stack, file: Path) -> Iterator[None]:
    environment = {
        "ABREAST_REDIS_URL": stack.service_redis_url,
        "ABREAST_REDACT_KEY_FILE": str(stack.redaction_key_file),
        "PATH": "/usr/bin:/bin",
        "SECRETS": str(file),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with (stack.data_directory.path / f"service-{name}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, SERVICE, name, str(port)], env=environment, stdout=log, stderr=log)
    try:
        eventually(lambda: is_answering("127.0.0.1", port, HEALTH, b" 200 OK"), description=f"{name} answers")
        yield
    finally:
        process.terminate()
        process.wait()


class RedisMonitor:
    """All commands that Redis gets, from a user with only that right."""

    def __init__(self, port: int) -> None:
        self.text = ""
        self._client = redis.Redis.from_url(f"redis://monitor:{MONITOR_PASSWORD}@127.0.0.1:{port}/0")
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(redis.ConnectionError), self._client.monitor() as monitor:  # type: ignore[no-untyped-call]
            for command in monitor.listen():
                self.text += command["command"]


def all_versions_are_healthy(stack: Stack) -> bool:
    stats = httpx.get(f"{stack.admin_url}/stats?filter=membership_healthy", trust_env=False).text
    lines = [line for line in stats.splitlines() if line.startswith(("cluster.old.", "cluster.new."))]
    return len(lines) > 1 and all(line.endswith(": 1") for line in lines)


def dump_database(stack: Stack) -> str:
    """Return a dump, and its compressed values without compression."""
    dump = subprocess.run(
        [stack.postgres.binaries / "pg_dump", "--dbname", stack.postgres_url], capture_output=True, check=True
    ).stdout.decode()
    texts = [dump]
    for word in set(dump.replace("\\\\x", " ").split()):
        if word.startswith("28b52ffd"):  # zstd
            with zstandard.ZstdDecompressor().stream_reader(bytes.fromhex(word)) as reader:
                texts.append(reader.read().decode("latin-1"))
    assert len(texts) > 1, "the dump has no examples"
    return "\n".join(texts)


def send_requests(base_url: str) -> tuple[int, list[str]]:
    """Send secrets in all parts of requests. Return the number of requests and the secrets."""
    words, tokens = [make_word() for _ in range(14)], [make_secret() for _ in range(6)]
    card, jwt = make_card(), make_jwt()
    key = f"-----BEGIN PRIVATE KEY-----\n{tokens[5]}\n-----END PRIVATE KEY-----"
    headers = {
        "authorization": f"Bearer {jwt}",
        "cookie": f"sid={words[0]}; a={words[1]}",
        "user-agent": f"a {tokens[0]}",
    }
    encoded = base64.b64encode(json.dumps({"password": words[2]}).encode()).decode()
    nested = {"a": [{"newPassword": words[3]}], "b": json.dumps({"c": json.dumps({"token": words[4]})}), "d": encoded}
    image = b"\x89PNG\0" + words[12].encode()
    with httpx.Client(base_url=base_url, headers=headers, timeout=60, trust_env=False) as client:
        responses = [
            client.get(f"/reset/{tokens[1]}", params={"access_token": words[5], "q": tokens[2]}),
            client.get("/x", params={"filter": json.dumps({"pin": words[6]}), "next": f"/a?api_key={words[7]}"}),
            client.post("/json", json={**nested, "card": card, "key": key}),
            client.post("/form", data={"user[password]": words[8], "note": tokens[3]}),
            client.post(
                "/files", data={"password": words[9]}, files={"file": (f"{tokens[4]}.png", image, "image/png")}
            ),
            client.post("/plain", content=f"secret: {words[10]}", headers={"content-type": "text/plain"}),
            client.post("/raw", content=b"\0" + words[11].encode(), headers={"content-type": "application/x-own"}),
            client.post("/cut", content=f'{{"token": "{words[13]}', headers={"content-type": "application/json"}),
            *[client.get(f"/text/{kind}") for kind in TEXT_KINDS],
            client.get("/fail"),
        ]
    return len(responses), [*words, *tokens, card, jwt]


@pytest.fixture
def data() -> Iterator[Path]:
    """Return a folder that Postgres's user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


@pytest.mark.parametrize("capture", ["middleware", "envoy"])
def test_no_secret_leaves_the_services(
    capture: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets_by_version = {name: make_answer_secrets() for name in ("old", "new")}
    file = tmp_path / "secrets.json"
    file.write_text(json.dumps(secrets_by_version))
    monkeypatch.chdir(tmp_path)  # the report is written there
    monkeypatch.setattr(
        stack_module,
        "render_redis_acl",
        lambda *arguments: f"{render_redis_acl(*arguments)}user monitor on >{MONITOR_PASSWORD} +monitor\n",
    )
    old, new = (SocketAddress("127.0.0.1", port) for port in free_ports(2))
    settings = EnvoySettings(
        service="shop",
        listen=ANY_PORT_ADDRESS,
        old=(old,),
        new=(new,),
        sample_safe=1.0,
        sample_unsafe=1.0,
        baseline_share=0.0,
        old_capture=capture,
        new_capture=capture,
    )
    with ExitStack() as opening:
        stack = opening.enter_context(Stack(settings, data=data))
        monitor = RedisMonitor(stack.redis.port)
        for name, address in (("old", old), ("new", new)):
            opening.enter_context(version(name, address.port, stack, file))
        eventually(lambda: all_versions_are_healthy(stack), description="Envoy finds both versions healthy")
        request_count, planted = send_requests(stack.envoy_url)
        planted += [value for values in secrets_by_version.values() for items in values.values() for value in items]
        assert len(set(planted)) >= 66

        def count_pairs() -> int:
            with psycopg.connect(stack.postgres_url) as ledger:
                row = ledger.execute("select count(*) from abreast.pair").fetchone()
            return row[0] if row else 0

        eventually(lambda: count_pairs() >= request_count, description="all pairs are in the ledger")
        with psycopg.connect(stack.postgres_url) as ledger:
            pair_ids = [str(row[0]) for row in ledger.execute("select id from abreast.pair").fetchall()]
            finding_ids = [str(row[0]) for row in ledger.execute("select id from abreast.finding").fetchall()]
        environment = {"ABREAST_SIDECAR": stack.grpc_address}

        def run(*words: str) -> str:
            return CliRunner().invoke(abreast, [*words], env=environment).output

        reports = [tmp_path / "abreast-report.html", tmp_path / "abreast-report.json"]
        key = stack.redaction_key_file.read_text().strip()
        key_id = Redactor(key).key_id  # of both versions and the collector
        places = {
            "MONITOR": monitor.text,
            "dump": dump_database(stack),
            "findings": run("findings", "--each", "--json") + run("findings") + run("status") + run("verdict"),
            "finding": "".join(run("finding", finding) + run("finding", finding, "--json") for finding in finding_ids),
            "pairs": run("pairs", "--json") + run("pairs") + "".join(run("pair", pair, "--json") for pair in pair_ids),
            "pair": "".join(run("pair", pair) for pair in pair_ids),
            "report": run("report") + "".join(report.read_text() for report in reports),
            "ps": "\n".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])),
            **{
                path: httpx.get(f"{stack.http_url}{path}", timeout=60, trust_env=False).text
                for path in (
                    *("/", "/metrics", "/v1/services/shop/verdict", "/v1/services/shop/causes"),
                    *(f"/findings/{finding}" for finding in finding_ids),
                    *(f"/pairs/{pair}" for pair in pair_ids),
                )
            },
        }
        for path in data.rglob("*"):
            if path.is_file() and path.suffix in {".log", ".aof", ".rdb", ".yaml", ".json"}:
                places[str(path)] = path.read_bytes().decode("latin-1")
    declared = f"{data}/service-"  # the services' own logs
    leaks = {(place, secret) for place, text in places.items() for secret in planted if secret in text}

    pages = {  # not each finding is about a secret
        start: "".join(text for place, text in places.items() if place.startswith(start))
        for start in ("/findings/", "/pairs/")
    }
    for place in ("MONITOR", "dump", "findings", "finding", "pairs", "pair", "report", *pages):
        assert f"hmac:{key_id}:" in {**places, **pages}[place], place
    assert [place for place, text in places.items() if key in text] == []
    assert {stat.S_IMODE(report.stat().st_mode) for report in reports} == {0o600}
    assert {(place, secret) for place, secret in leaks if not place.startswith(declared)} == set()
