"""Tokens, scopes, services and the audit log: every RPC, stream and route, with every kind of token."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2
from starlette.routing import Route

from abreast.v1 import access_pb2 as api
from abreast.v1 import comparison_pb2, traffic_pb2
from abreast_sidecar.envoy.settings import RUNTIME_LAYER
from abreast_sidecar.serve.access import METHODS, ROUTES
from abreast_sidecar.serve.servers import GRPC_SERVICE_NAMES, STREAM_METHODS, register_services
from abreast_sidecar.stack.servers import RedisServer
from abreast_sidecar.store.access import Scope
from abreast_sidecar.traffic.rtds import RTDS_SERVICE
from abreast_sidecar.traffic.xds import wire_pb2 as wire
from support import eventually_async
from support_captures import capture
from support_database import LedgerDatabase
from support_serve import QuerySidecar, RunningSidecar, packed, run_sidecar

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMIN_TOKEN = "admin-token-" + "a" * 32
ENVOY_TOKEN = "envoy-token-" + "e" * 32
RTDS_METHOD = f"/{RTDS_SERVICE}/StreamRuntime"
DENIED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED}
REQUESTS: dict[str, Any] = {  # by method; other methods get an empty message
    RTDS_METHOD: wire.DiscoveryRequest(node=wire.Node(id="edge-1", cluster="shop"), resource_names=[RUNTIME_LAYER])
}


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(redis_server: RedisServer, module_database: LedgerDatabase) -> AsyncIterator[RunningSidecar]:
    settings: dict[str, Any] = {"admin_token": ADMIN_TOKEN, "envoy_token": ENVOY_TOKEN}
    async with run_sidecar(redis_server.url, module_database.url, kind=QuerySidecar, **settings) as sidecar:
        yield sidecar


async def create_token(sidecar: RunningSidecar, name: str, *scopes: str, **fields: Any) -> str:
    request = api.CreateTokenRequest(
        name=name, scopes=[api.Scope.Value(f"SCOPE_{scope.upper()}") for scope in scopes], **fields
    )
    response = await sidecar.access.CreateToken(request, metadata=bearer(ADMIN_TOKEN))
    return response.secret


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def secrets_by_kind(guarded: RunningSidecar) -> dict[str, str]:
    """Return a token of each kind: with one scope, of another service, and tokens that are no longer valid."""
    everything = [scope.value for scope in Scope]
    secrets = {scope.value: await create_token(guarded, f"only-{scope}", scope.value) for scope in Scope}
    secrets["other service"] = await create_token(guarded, "till", *everything, services=["till"])
    secrets["revoked"] = await create_token(guarded, "revoked", *everything)
    secrets["expired"] = await create_token(guarded, "expired", *everything)
    await guarded.access.RevokeToken(api.RevokeTokenRequest(name="revoked"), metadata=bearer(ADMIN_TOKEN))
    guarded.ledger().execute("update abreast.token set expires_at = now() - interval '1 second' where name = 'expired'")
    await eventually_async(lambda: is_expired(guarded), description="the sidecar knows that the token has expired")
    return {**secrets, "none": "", "wrong": "x" * 43}


async def is_expired(sidecar: RunningSidecar) -> bool:
    token = sidecar.sidecar.tokens.get("expired")
    return token is not None and token.expire_time is not None


async def call(sidecar: RunningSidecar, method: str, token: str) -> grpc.StatusCode:
    request = REQUESTS.get(method, empty_pb2.Empty())
    call: Any
    if method in STREAM_METHODS:
        call = sidecar.channel.stream_stream(method, request_serializer=lambda message: message.SerializeToString())(
            iter([request]), metadata=bearer(token), timeout=0.5
        )
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            call.cancel()
        return grpc.StatusCode.OK
    unary: Any = sidecar.channel.unary_unary(method, request_serializer=lambda message: message.SerializeToString())
    try:
        await unary(request, metadata=bearer(token), timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def is_admitted(scope: Scope | None, kind: str) -> bool:
    return scope is None or kind == scope.value


@pytest.mark.parametrize("method", METHODS)
async def test_method_admits_only_tokens_with_its_scope(
    guarded: RunningSidecar, secrets_by_kind: dict[str, str], method: str
) -> None:
    scope = METHODS[method].scope
    for kind, secret in secrets_by_kind.items():
        if kind == "other service":
            continue  # the test of services has a request for each method
        code = await call(guarded, method, secret)
        assert (code not in DENIED) == is_admitted(scope, kind), (method, kind, code)


class MethodRecorder:
    """Takes the place of a server to which the sidecar adds its methods."""

    def __init__(self) -> None:
        self.methods: set[str] = set()

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        for handler in handlers:
            self.methods |= handler._method_handlers.keys()

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        self.methods |= {f"/{service}/{name}" for name in handlers}


async def test_every_method_of_the_server_has_a_scope(guarded: RunningSidecar) -> None:
    recorder, grpc_server = MethodRecorder(), guarded.sidecar.grpc
    register_services(recorder, grpc_server.servicers, grpc_server.discovery, grpc_server.health)

    assert recorder.methods == set(METHODS)
    assert {method.split("/")[1] for method in METHODS if "abreast.v1" in method} == set(GRPC_SERVICE_NAMES)


def routes_of(sidecar: RunningSidecar) -> list[Route]:
    return [route for route in sidecar.sidecar.web_app.routes if isinstance(route, Route)]


async def test_every_route_of_the_page_has_a_scope(guarded: RunningSidecar) -> None:
    names = {
        f"POST {route.path}" if "POST" in (route.methods or ()) and f"POST {route.path}" in ROUTES else route.path
        for route in routes_of(guarded)
    }
    assert names == set(ROUTES)
    assert len(routes_of(guarded)) == len(guarded.sidecar.web_app.routes)


@pytest.mark.parametrize("name", ROUTES)
async def test_route_admits_only_tokens_with_its_scope(
    guarded: RunningSidecar, secrets_by_kind: dict[str, str], name: str
) -> None:
    method, path = name.split() if " " in name else ("GET", name)
    url = path.replace("{id:int}", "1").replace("{id}", "0194b8a2-5f3e-4b7a-9a52-3c1f0d9e7b11")
    for kind, secret in secrets_by_kind.items():
        if kind == "other service":
            continue
        response = await guarded.http.request(method, url, headers=dict(bearer(secret)))
        assert (response.status_code not in {401, 403, 429}) == is_admitted(ROUTES[name], kind), (name, kind, response)


@pytest.mark.parametrize(
    "method", [name for name, access in METHODS.items() if access.target == "service" and access.scope]
)
async def test_token_of_another_service_reaches_no_method(
    guarded: RunningSidecar, secrets_by_kind: dict[str, str], method: str
) -> None:
    service = b"\x0a\x04shop"  # the field `service` has the number 1 in all requests
    code = await call_raw(guarded, method, secrets_by_kind["other service"], service)
    assert code is grpc.StatusCode.PERMISSION_DENIED


async def call_raw(sidecar: RunningSidecar, method: str, token: str, request: bytes) -> grpc.StatusCode:
    method_of_server: Any = sidecar.channel.unary_stream(method)
    stream = method_of_server(request, metadata=bearer(token), timeout=20)
    try:
        await stream.read()
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_token_of_another_service_reaches_no_finding_pair_rule_or_envoy(
    guarded: RunningSidecar, secrets_by_kind: dict[str, str]
) -> None:
    ledger = guarded.ledger()
    finding = ledger.finding(ledger.endpoint(), "$.price", count=1)
    pair = ledger.pair(ledger.endpoint(), finding)
    requests: dict[str, Any] = {
        "ComparisonService/GetFinding": comparison_pb2.GetFindingRequest(id=finding),
        "ComparisonService/SetFindingStatus": comparison_pb2.SetFindingStatusRequest(id=finding),
        "ComparisonService/GetPair": comparison_pb2.GetPairRequest(id=pair),
        **dict.fromkeys(
            (name.removeprefix("/abreast.v1.") for name, access in METHODS.items() if access.target == "all"),
            empty_pb2.Empty(),
        ),
    }
    token = secrets_by_kind["other service"]
    for method, request in requests.items():
        code = await call_raw(guarded, f"/abreast.v1.{method}", token, request.SerializeToString())
        assert code is grpc.StatusCode.PERMISSION_DENIED, method
    assert await call(guarded, RTDS_METHOD, token) is grpc.StatusCode.PERMISSION_DENIED
    assert await call(guarded, RTDS_METHOD, ENVOY_TOKEN) is grpc.StatusCode.OK


async def test_token_of_one_service_needs_no_service_name(guarded: RunningSidecar) -> None:
    guarded.ledger().pair(guarded.ledger().endpoint())
    guarded.ledger().pair(guarded.ledger().endpoint("till"))
    token = await create_token(guarded, "till-reader", "read", services=["till"])

    summary = await guarded.comparison.GetSummary(comparison_pb2.GetSummaryRequest(), metadata=bearer(token))
    pairs = await guarded.comparison.ListPairs(comparison_pb2.ListPairsRequest(), metadata=bearer(token))

    assert summary.service == "till"
    assert {pair.endpoint.service for pair in pairs.pairs} == {"till"}


async def test_envoy_token_is_bound_to_its_node(guarded: RunningSidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    token = await create_token(guarded, "edge-7", "envoy", services=["shop"], node="edge-7")

    assert await call(guarded, RTDS_METHOD, token) is grpc.StatusCode.PERMISSION_DENIED
    monkeypatch.setitem(
        REQUESTS,
        RTDS_METHOD,
        wire.DiscoveryRequest(node=wire.Node(id="edge-7", cluster="shop"), resource_names=[RUNTIME_LAYER]),
    )
    assert await call(guarded, RTDS_METHOD, token) is grpc.StatusCode.OK


async def test_change_has_the_token_as_its_actor_and_is_audited(guarded: RunningSidecar) -> None:
    token = await create_token(guarded, "ann", "operate", "read")
    guarded.ledger().pair(guarded.ledger().endpoint())

    request = traffic_pb2.RollbackRequest(service="shop", actor="ceo", reason="test")
    await guarded.traffic.Rollback(request, metadata=bearer(token))
    events = await guarded.traffic.ListTrafficEvents(
        traffic_pb2.ListTrafficEventsRequest(service="shop"), metadata=bearer(token)
    )
    audit = await guarded.access.ListAuditEvents(
        api.ListAuditEventsRequest(actor_filter="ann"), metadata=bearer(ADMIN_TOKEN)
    )

    assert events.events[0].actor == "ann"
    (entry,) = audit.events
    assert (entry.actor, entry.action, entry.service) == ("ann", "TrafficService/Rollback", "shop")
    assert entry.peer.startswith("127.0.0.1:")


async def test_values_need_the_scope_bodies_and_each_look_is_audited(guarded: RunningSidecar) -> None:
    ledger = guarded.ledger()
    finding = ledger.finding(ledger.endpoint(), "$.password", count=1, detail={"old": '"hunter2"', "new": '"hunter3"'})
    pair = ledger.pair(ledger.endpoint(), finding, request="/products/7?q=hunter2")
    blob = packed(capture("old", {"password": "hunter2"}), capture("new", {"password": "hunter3"}, role="shadow"))
    place = {"part": "body", "path": "$.password", "exact_path": "$.password", "kind": "changed", "impact": "value"}
    difference = {**place, "old": '"hunter2"', "new": '"hunter3"'}
    ledger.example(pair, {finding: 10}, blob, [difference])
    reader = await create_token(guarded, "reader", "read")
    viewer = await create_token(guarded, "viewer", "read", "bodies")

    for token, is_shown in ((reader, False), (viewer, True)):
        metadata = bearer(token)
        shown = str(
            await guarded.comparison.GetFinding(comparison_pb2.GetFindingRequest(id=finding), metadata=metadata)
        )
        listed = str(await guarded.comparison.ListFindings(comparison_pb2.ListFindingsRequest(), metadata=metadata))
        pairs = str(await guarded.comparison.ListPairs(comparison_pb2.ListPairsRequest(), metadata=metadata))
        page = (await guarded.http.get(f"/findings/{finding}", headers=dict(metadata))).text
        overview = (await guarded.http.get("/?service=shop", headers=dict(metadata))).text
        for text in (shown, listed, pairs, page, overview):
            assert ("hunter" in text) == is_shown, text
    audit = await guarded.access.ListAuditEvents(api.ListAuditEventsRequest(), metadata=bearer(ADMIN_TOKEN))
    looks = [(event.actor, event.target) for event in audit.events if event.action == "ComparisonService/GetFinding"]
    assert looks == [("viewer", str(finding))] * 2


async def test_revocation_ends_the_next_call_and_the_session(guarded: RunningSidecar) -> None:
    token = await create_token(guarded, "leaver", "read")
    guarded.ledger().pair(guarded.ledger().endpoint())
    cookie = await log_in(guarded, token)
    before = await guarded.http.get("/?service=shop", headers={"cookie": cookie})

    await guarded.access.RevokeToken(api.RevokeTokenRequest(name="leaver"), metadata=bearer(ADMIN_TOKEN))

    after = await guarded.http.get("/?service=shop", headers={"cookie": cookie})
    assert (before.status_code, after.status_code) == (200, 401)
    assert await call(guarded, "/abreast.v1.ComparisonService/GetSummary", token) is grpc.StatusCode.UNAUTHENTICATED


async def test_revocation_by_another_sidecar_arrives_by_notification(guarded: RunningSidecar) -> None:
    await create_token(guarded, "remote", "read")
    guarded.ledger().execute("update abreast.token set revoked_at = now() where name = 'remote'")

    async def is_revoked() -> bool:
        token = guarded.sidecar.tokens.get("remote")
        return token is not None and token.revoke_time is not None

    await eventually_async(is_revoked, description="the revocation arrived")


async def test_secret_is_only_stored_as_a_hash(guarded: RunningSidecar) -> None:
    secret = await create_token(guarded, "hashed", "read")
    rows = guarded.ledger().execute("select t::text from abreast.token t")

    assert not [row for (row,) in rows if secret in row]


async def test_wrong_tokens_are_limited_and_valid_ones_still_pass(guarded: RunningSidecar) -> None:
    method = "/abreast.v1.ComparisonService/ListPairs"
    codes = [await call(guarded, method, "y" * 40) for _ in range(30)]

    assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await call(guarded, method, await create_token(guarded, "still", "read")) is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("fields", "requirement"),
    [
        ({"name": "admin", "scopes": [1]}, "name must be"),
        ({"name": "a b", "scopes": [1]}, "name must be"),
        ({"name": "x"}, "scopes must be"),
        ({"name": "x", "scopes": [99]}, "scopes must be"),
        ({"name": "x", "scopes": [1], "node": "edge"}, "node must be"),
        ({"name": "x", "scopes": [1], "services": [""]}, "services must be"),
    ],
)
async def test_invalid_token_is_refused(guarded: RunningSidecar, fields: dict[str, Any], requirement: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=requirement) as error:
        await guarded.access.CreateToken(api.CreateTokenRequest(**fields), metadata=bearer(ADMIN_TOKEN))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def log_in(sidecar: RunningSidecar, token: str) -> str:
    page = await sidecar.http.get("/login")
    (csrf,) = re.findall(r'name="csrf" value="(\w+)"', page.text)
    origin = {"origin": str(sidecar.http.base_url)}
    response = await sidecar.http.post("/login", data={"csrf": csrf, "token": token}, headers=origin)
    assert response.status_code == 303, response.text
    cookie = response.headers["set-cookie"]
    assert {"HttpOnly", "Secure", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    return cookie.partition(";")[0]


async def test_login_opens_the_page_and_logout_needs_its_form(guarded: RunningSidecar) -> None:
    guarded.ledger().pair(guarded.ledger().endpoint())
    anonymous = await guarded.http.get("/", headers={"accept": "text/html"})
    cookie = {"cookie": await log_in(guarded, ADMIN_TOKEN)}
    page = await guarded.http.get("/?service=shop", headers=cookie)
    (csrf,) = re.findall(r'name="csrf" value="(\w+)"', page.text)
    own = {**cookie, "origin": str(guarded.http.base_url)}

    foreign = await guarded.http.post("/logout", data={"csrf": csrf}, headers={**cookie, "origin": "http://evil.test"})
    call = "/v1/services/shop/rollback"
    without_token = await guarded.http.post(call, json={}, headers=own)
    with_token = await guarded.http.post(call, json={}, headers={**own, "x-csrf-token": csrf})
    without_form = await guarded.http.post("/logout", headers=own)
    complete = await guarded.http.post("/logout", data={"csrf": csrf}, headers=own)

    assert (anonymous.status_code, anonymous.headers["location"]) == (303, "/login")
    assert (page.status_code, foreign.status_code, without_form.status_code) == (200, 403, 403)
    assert complete.status_code == 303
    assert (without_token.status_code, with_token.status_code) == (403, 200), with_token.text


async def test_forged_session_is_refused(guarded: RunningSidecar) -> None:
    expiry = int(time.time()) + 1000
    for value in (f"{expiry}.{b'admin'.hex()}.{'0' * 64}", "x", "..", f"{expiry}.{b'admin'.hex()}."):
        response = await guarded.http.get("/", headers={"cookie": f"__Host-abreast={value}"})
        assert response.status_code == 401


@pytest.mark.parametrize("host", ["evil.test", "evil.test:80", "127.0.0.1.evil.test", ""])
@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/nothing"])
async def test_unknown_host_is_refused(guarded: RunningSidecar, host: str, path: str) -> None:
    response = await guarded.http.get(path, headers={"host": host})

    assert response.status_code in {400, 403}


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/readyz", "/style.css", "/nothing", "/login"])
async def test_every_response_has_security_headers(guarded: RunningSidecar, path: str) -> None:
    for method in ("GET", "POST", "PUT"):
        response = await guarded.http.request(method, path)
        assert response.headers["referrer-policy"] == "same-origin"  # else browsers send no origin with forms
        for name in ("content-security-policy", "x-content-type-options", "x-frame-options", "cache-control"):
            assert name in response.headers, (method, path)


async def test_health_needs_no_token(guarded: RunningSidecar) -> None:
    check: Any = guarded.channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    assert (await check(b"")).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.asyncio
async def test_proxy_header_counts_only_from_its_address(redis_url: str, postgres_url: str) -> None:
    settings: dict[str, Any] = {"admin_token": ADMIN_TOKEN, "proxy_user_header": "x-user"}
    for address, status in (("127.0.0.1", 200), ("10.0.0.0/8", 401)):
        async with run_sidecar(
            redis_url, postgres_url, kind=QuerySidecar, proxy_addresses=(address,), **settings
        ) as sidecar:
            get = partial(sidecar.http.get, "/metrics")
            assert (await get(headers={"x-user": "ann@example.com"})).status_code == status
            assert (await get()).status_code == 401
            twice = [("x-user", "ann"), ("x-user", "bob")]
            assert (await get(headers=twice)).status_code == 401
