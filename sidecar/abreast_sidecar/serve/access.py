"""Access to the API and the page: tokens, scopes, services, sessions, the audit log, and what a caller may see.

Each RPC, stream and route has an entry in METHODS or ROUTES. One without an entry is refused.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import structlog
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Match, Route
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from abreast.v1 import common_pb2, comparison_pb2
from abreast_sidecar.aio import error_within
from abreast_sidecar.errors import (
    AccessError,
    ArgumentError,
    ForbiddenError,
    LedgerError,
    TooManyCallsError,
    UnauthenticatedError,
)
from abreast_sidecar.serve.render import current_csrf_token
from abreast_sidecar.serve.validate import check_pair_id
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.access import (
    ADMIN_NAME,
    ENVOY_NAME,
    USER_SCOPES,
    AuditLog,
    Caller,
    Scope,
    TokenStore,
    current_caller,
)

MAX_FAILURES, FAILURE_WINDOW_S = 10, 60.0  # wrong tokens per address
MAX_FAILURE_ADDRESSES = 10_000
SESSION_COOKIE = "__Host-abreast"
SESSION_S = 12 * 3600
MAX_FORM_BYTES = 16 * 1024
FORM_TIMEOUT_S = 10.0
WITHHELD_TEXT = "values need the scope bodies"
SAFE_METHODS = frozenset({"GET", "HEAD"})
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer, browsers send the origin `null` with forms
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
BEARER_PREFIX = "bearer "

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class MethodAccess:
    """The right that a method needs. `scope` is None if everybody may call it.

    `target` is the source of the service: the field `service`, the object with the field `id`, or none. A token for
    single services can't call a method that concerns all of them.
    """

    scope: Scope | None
    target: Literal["service", "finding", "pair", "all", "stream"] = "service"

    @property
    def is_change(self) -> bool:
        return self.scope in {Scope.OPERATE, Scope.ADMIN}


def _declare(service: str, scope: Scope, *names: str, target: Any = "service") -> dict[str, MethodAccess]:
    return {f"/abreast.v1.{service}/{name}": MethodAccess(scope, target) for name in names}


METHODS: Mapping[str, MethodAccess] = {
    **_declare(
        "ComparisonService",
        Scope.READ,
        *("GetSummary", "GetVerdict", "ListEndpoints", "ListCauses", "ListFindings", "ListPairs", "WatchFindings"),
    ),
    **_declare("ComparisonService", Scope.READ, "GetFinding", target="finding"),
    **_declare("ComparisonService", Scope.OPERATE, "SetFindingStatus", target="finding"),
    **_declare("ComparisonService", Scope.BODIES, "GetPair", target="pair"),
    **_declare("LatencyService", Scope.READ, "GetLatency"),
    **_declare("RuleService", Scope.READ, "ListRules", "PreviewRule", target="all"),
    **_declare("RuleService", Scope.OPERATE, "CreateRule", "DeleteRule", "ApplyRules", target="all"),
    **_declare("TrafficService", Scope.READ, "GetTraffic", "WatchTraffic", "ListTrafficEvents"),
    **_declare("TrafficService", Scope.OPERATE, "UpdateTraffic", "Rollback", "Promote"),
    **_declare("RolloutService", Scope.READ, "GetGuard", "GetRamp", "GetDrill"),
    **_declare("RolloutService", Scope.OPERATE, "SetGuard", "StartRamp", "PauseRamp", "ResumeRamp", "AbortRamp"),
    **_declare("RolloutService", Scope.OPERATE, "StartDrill", "EndDrill"),
    **_declare(
        "AccessService", Scope.ADMIN, "CreateToken", "ListTokens", "RevokeToken", "ListAuditEvents", target="all"
    ),
    # The RTDS server checks the service and the node, which stand in the first message.
    "/envoy.service.runtime.v3.RuntimeDiscoveryService/StreamRuntime": MethodAccess(Scope.ENVOY, "stream"),
    "/grpc.health.v1.Health/Check": MethodAccess(None),
    "/grpc.health.v1.Health/Watch": MethodAccess(None),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": MethodAccess(Scope.READ, "stream"),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": MethodAccess(Scope.READ, "stream"),
}
UNAUDITED_METHODS = frozenset({"AccessService/ListTokens", "AccessService/ListAuditEvents"})
# By path, or by method and path where methods need different scopes.
ROUTES: Mapping[str, Scope | None] = {
    "/healthz": None,
    "/readyz": None,
    "/style.css": None,
    "/login": None,
    "/logout": None,
    "/metrics": Scope.READ,
    "/": Scope.READ,
    "/findings/{id:int}": Scope.READ,
    "/pairs/{id}": Scope.BODIES,
    "/v1/services/{service}/verdict": Scope.READ,
    "/v1/services/{service}/causes": Scope.READ,
    "/v1/services/{service}/traffic": Scope.READ,
    "/v1/services/{service}/ramp": Scope.READ,
    "POST /v1/services/{service}/traffic": Scope.OPERATE,
    "POST /v1/services/{service}/rollback": Scope.OPERATE,
    "POST /v1/services/{service}/promote": Scope.OPERATE,
    "POST /v1/services/{service}/ramp": Scope.OPERATE,
    "POST /v1/services/{service}/ramp/abort": Scope.OPERATE,
}


class FailureLimiter:
    """Counts wrong tokens per address."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address → count, start of the window

    def add(self, address: str) -> bool:
        """Count a failure. Return True if the address has exceeded the limit."""
        now = time.monotonic()
        count, started = self._failures.pop(address, (0, now))
        if now - started > FAILURE_WINDOW_S:
            count, started = 0, now
        self._failures[address] = (count + 1, started)
        if len(self._failures) > MAX_FAILURE_ADDRESSES:
            self._failures.popitem(last=False)
        return count >= MAX_FAILURES


class Authenticator:
    """Finds the caller of a token, a session cookie or a header of the trusted proxy."""

    def __init__(self, settings: Settings, tokens: TokenStore) -> None:
        self.tokens = tokens
        self.needs_token = bool(settings.admin_token)
        self._settings = settings
        self._failures = FailureLimiter()
        self._key = settings.admin_token.encode() or secrets.token_bytes(32)
        self._proxies = tuple(ipaddress.ip_network(network, strict=False) for network in settings.proxy_addresses)

    def identify(self, secret: str, address: str, *, is_envoy: bool = False) -> Caller:
        """Return the caller with this token. Raise AccessError, or LedgerError while the tokens are unknown.

        A valid token always passes, so that wrong tokens from the same address can't prevent a rollback.
        """
        if not (self.needs_token or (is_envoy and self._settings.envoy_token)):
            return Caller(peer=address)
        try:
            return replace(self._find(secret), peer=address)
        except UnauthenticatedError as error:
            if secret and self.tokens.find(secret) is None and self._failures.add(_get_host(address)):
                raise TooManyCallsError(
                    f"more than {MAX_FAILURES} wrong tokens in {FAILURE_WINDOW_S:g} s; wait, and use a valid token"
                ) from error
            log.warning("call without a valid token", peer=address, error=str(error))
            raise

    def _find(self, secret: str) -> Caller:
        if not secret:
            raise UnauthenticatedError("the sidecar needs a token: set ABREAST_TOKEN or ABREAST_TOKEN_FILE")
        for expected, caller in (
            (self._settings.admin_token, Caller(ADMIN_NAME, USER_SCOPES)),
            (self._settings.envoy_token, Caller(ENVOY_NAME, frozenset({Scope.ENVOY}))),
        ):
            if expected and hmac.compare_digest(expected.encode(), secret.encode("utf-8", "surrogatepass")):
                return caller
        return self._check_token(self.tokens.find(secret))

    def _check_token(self, token: Any) -> Caller:
        if token is None:
            if not self.tokens.is_loaded:
                raise LedgerError("the tokens can't be read from the ledger yet; call again")
            raise UnauthenticatedError("the token is not valid; set ABREAST_TOKEN to a token of this sidecar")
        token.check_valid()
        return Caller(token.name, frozenset(token.scopes), frozenset(token.services), token.node)

    def create_session(self, caller: Caller) -> str:
        """Return the value of a cookie. It holds no secret, and ends with its token or with the admin token."""
        content = f"{int(time.time()) + SESSION_S}.{caller.name.encode().hex()}"
        return f"{content}.{self._sign('session', content)}"

    def read_session(self, cookie: str, address: str) -> Caller | None:
        """Return the caller of a session, or None. Raise UnauthenticatedError if its token is no longer valid."""
        content, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(self._sign("session", content).encode(), signature.encode()):
            return None
        expiry, _, name_hex = content.partition(".")
        if int(expiry) < time.time():
            return None
        name = bytes.fromhex(name_hex).decode()
        caller = Caller(ADMIN_NAME, USER_SCOPES) if name == ADMIN_NAME else self._check_token(self.tokens.get(name))
        return replace(caller, peer=address)

    def read_proxy_user(self, headers: Headers, address: str) -> Caller | None:
        """Return the user that the trusted proxy names, or None."""
        if not self._settings.proxy_user_header or not self._is_proxy(address):
            return None
        names = headers.getlist(self._settings.proxy_user_header)
        if len(names) != 1 or not names[0].strip():
            return None
        return Caller(f"user {names[0].strip()}", frozenset(self._settings.proxy_scopes), peer=address)

    def _is_proxy(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(_get_host(address).strip("[]"))
        except ValueError:
            return False
        return any(ip in network for network in self._proxies)

    def create_csrf_token(self, session: str) -> str:
        return self._sign("csrf", session)

    def _sign(self, purpose: str, content: str) -> str:
        return hmac.digest(self._key, f"{purpose} {content}".encode(), "sha256").hex()


class CallGuard:
    """Checks each call of a service, records it in the audit log, and withholds values that the caller may not see."""

    def __init__(self, authenticator: Authenticator, audit: AuditLog) -> None:
        self.authenticator = authenticator
        self.audit = audit

    def authenticate(self, method: str, context: Any) -> None:
        """Set the caller of a gRPC call. Raise AccessError."""
        access = METHODS.get(method)
        peer = _get_peer(context.peer())
        if access is not None and access.scope is None:
            current_caller.set(Caller(peer=peer))
            return
        values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        secret = _parse_bearer(values)
        is_envoy = access is not None and access.scope is Scope.ENVOY
        current_caller.set(self.authenticator.identify(secret, peer, is_envoy=is_envoy))

    async def invoke(self, method: str, inner: Callable[..., Awaitable[Any]], request: Any, context: Any) -> Any:
        """Run a method for the current caller."""
        access, caller = await self._admit(method, request)
        response = await inner(request, context)
        is_look = isinstance(response, LOOKS) and has_bodies(response) and Scope.BODIES in caller.scopes
        if is_look:
            await self._record(caller, method, request)
        elif access.is_change and _get_action(method) not in UNAUDITED_METHODS:
            await self._record_change(caller, method, request, response)
        return response if Scope.BODIES in caller.scopes else withhold_values(response)

    async def stream(
        self, method: str, inner: Callable[..., AsyncIterator[Any]], request: Any, context: Any
    ) -> AsyncIterator[Any]:
        """Run a streaming method for the current caller."""
        access, caller = await self._admit(method, request)
        async for response in inner(request, context):
            if access.target == "service":
                self.check_still_valid(caller, method, context)
            yield response if Scope.BODIES in caller.scopes else withhold_values(response)

    def check_still_valid(self, caller: Caller, method: str, context: Any) -> None:
        """Raise AccessError if the token of a stream was revoked or has expired."""
        if caller.is_named:
            self.authenticate(method, context)

    async def _admit(self, method: str, request: Any) -> tuple[MethodAccess, Caller]:
        access, caller = METHODS.get(method), current_caller.get()
        if access is None:
            raise ForbiddenError(f"{method} has no declared scope")
        if access.scope is None:
            return access, caller
        caller.check_scope(access.scope)
        if caller.services:
            await self._check_service(caller, access, request)
        if caller.is_named and access.is_change and hasattr(request, "actor"):
            request.actor = caller.name
        return access, caller

    async def _check_service(self, caller: Caller, access: MethodAccess, request: Any) -> None:
        """Limit the request to the services of the token. Raise AccessError or ArgumentError."""
        if access.target == "stream":
            return
        if access.target == "all":
            raise ForbiddenError(f"this call concerns all services, and the token {caller.name} is for single ones")
        if access.target != "service":
            identifier = request.id
            if access.target == "pair":
                identifier = check_pair_id(identifier)
            service = await self.authenticator.tokens.read_service(access.target, identifier)
            if service:  # else the method says that the object does not exist
                caller.check_service(service)
            return
        if not request.service:
            if len(caller.services) > 1:
                raise ArgumentError(
                    f"service must be one of {', '.join(sorted(caller.services))} (command line: --service)"
                )
            (request.service,) = caller.services
        caller.check_service(request.service)

    async def _record(self, caller: Caller, method: str, request: Any, response: Any = None) -> None:
        await self.audit.add(
            actor=caller.name or getattr(request, "actor", "") or f"someone at {caller.peer}",
            peer=caller.peer,
            action=_get_action(method),
            service=_get_service(response) or getattr(request, "service", ""),
            target=str(getattr(request, "id", "") or getattr(request, "name", "")),
        )

    async def _record_change(self, caller: Caller, method: str, request: Any, response: Any) -> None:
        """Record a change that has happened."""
        if getattr(response, "recording_error", ""):  # the ledger gets the event of the rollback later
            log.warning("a rollback is not in the audit log", actor=request.actor, peer=caller.peer)
            return
        record = asyncio.create_task(self._record(caller, method, request, response))
        if error := await error_within(record):
            log.warning("a change is not in the audit log", action=method, actor=caller.name, error=error)

    def wrap(self, servicers: Any) -> Any:
        """Return the servicers for calls in this process, with the same checks."""
        return _GuardedServicers(self, servicers)


class _GuardedServicers:
    def __init__(self, guard: CallGuard, servicers: Any) -> None:
        for field in fields(servicers):
            setattr(self, field.name, _GuardedServicer(guard, getattr(servicers, field.name)))


class _GuardedServicer:
    def __init__(self, guard: CallGuard, servicer: Any) -> None:
        self._guard = guard
        self._servicer = servicer
        base = next(kind for kind in type(servicer).__mro__ if kind.__module__.startswith("abreast.v1."))
        self._prefix = f"/abreast.v1.{base.__name__.removesuffix('Servicer')}"

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        inner = getattr(self._servicer, name)
        return lambda request, context: self._guard.invoke(f"{self._prefix}/{name}", inner, request, context)


LOOKS = (comparison_pb2.GetFindingResponse, comparison_pb2.GetPairResponse)


def has_bodies(response: Any) -> bool:
    if isinstance(response, comparison_pb2.GetPairResponse):
        return bool(response.pair.captures)
    return bool(response.examples)


def withhold_values(message: Any) -> Any:
    """Remove captured values from a response."""
    if isinstance(message, Message):
        if withhold := WITHHOLDERS.get(message.DESCRIPTOR.full_name):
            withhold(message)
        for field, value in message.ListFields():
            if field.message_type is not None:
                for part in value if field.is_repeated else (value,):
                    withhold_values(part)
    return message


def _withhold_finding(finding: comparison_pb2.Finding) -> None:
    if finding.part not in {common_pb2.PART_STATUS, common_pb2.PART_LATENCY, common_pb2.PART_CACHE}:
        finding.summary = WITHHELD_TEXT


def _clear(*names: str) -> Callable[[Message], None]:
    def clear(message: Message) -> None:
        for name in names:
            message.ClearField(name)

    return clear


def _withhold_request(pair: comparison_pb2.Pair) -> None:
    pair.request = pair.endpoint.route


WITHHOLDERS: Mapping[str, Callable[[Any], None]] = {
    "abreast.v1.Finding": _withhold_finding,
    "abreast.v1.GetFindingResponse": _clear("feature", "examples"),
    "abreast.v1.Pair": _withhold_request,
    "abreast.v1.Difference": _clear("old", "new", "exact_path"),
}


class PageAccess:
    """ASGI middleware: checks host, origin, caller, scope and forms, and sets security headers on each response."""

    def __init__(self, app: Starlette, authenticator: Authenticator, settings: Settings) -> None:
        self.app = app
        self.authenticator = authenticator
        self._hosts = frozenset(name.lower() for name in (*settings.page_hosts, "localhost"))

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_secured(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            receive = await self._admit(Request(scope, receive))
        except AccessError as error:
            await self._refuse(scope, error)(scope, receive, send_secured)
        except (ArgumentError, LedgerError) as error:
            status = 400 if isinstance(error, ArgumentError) else 503
            await PlainTextResponse(f"{error}\n", status)(scope, receive, send_secured)
        else:
            await self.app(scope, receive, send_secured)

    async def _admit(self, request: Request) -> Receive:
        """Set the caller. Return the channel of the request's body, which may have been read."""
        self._check_host(request.headers.getlist("host"))
        cookie = cookie_parser(request.headers.get("cookie", "")).get(SESSION_COOKIE, "")
        path, needed = self._find_route(request.scope)
        caller, by_token = self._identify(request, cookie, is_public=needed is None)
        current_caller.set(caller)
        csrf_token = self.authenticator.create_csrf_token(cookie or caller.name)
        current_csrf_token.set(csrf_token)
        receive = request.receive
        if request.method not in SAFE_METHODS and not by_token:
            self._check_origin(request)
            if self.authenticator.needs_token or not is_json(request):
                receive = await self._check_form(request, csrf_token)
        if needed is not None:
            caller.check_scope(needed)
            if path == "/metrics" and caller.services:
                raise ForbiddenError("metrics concern all services, and the token is for single ones")
        return receive

    def _check_host(self, values: list[str]) -> None:
        """Refuse unknown names: a web page could point its own name here (DNS rebinding). Raise ForbiddenError."""
        host = values[0].lower() if len(values) == 1 else ""
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            if name not in self._hosts:
                raise ForbiddenError(
                    f"the host {name[:100]!r} is unknown; use an IP address, or add the name to ABREAST_PAGE_HOSTS"
                ) from None

    def _find_route(self, scope: AsgiScope) -> tuple[str, Scope | None]:
        """Return the path of the route and the scope that it needs. A path or method without a route needs none."""
        for route in self.app.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                path = str(getattr(route, "path", ""))
                name = f"{scope['method']} {path}" if f"{scope['method']} {path}" in ROUTES else path
                if name not in ROUTES:
                    raise ForbiddenError(f"{name} has no declared scope")
                return path, ROUTES[name]
        return "", None

    def _identify(self, request: Request, cookie: str, *, is_public: bool) -> tuple[Caller, bool]:
        """Return the caller, and whether the request has a token, which a browser does not send on its own."""
        address = _format_client(request.scope)
        if not self.authenticator.needs_token:
            return Caller(peer=address), False
        if is_public:
            return Caller(scopes=frozenset(), peer=address), False
        if secret := _parse_bearer(request.headers.getlist("authorization")):
            return self.authenticator.identify(secret, address), True
        session = self.authenticator.read_session(cookie, address) if cookie else None
        if caller := session or self.authenticator.read_proxy_user(request.headers, address):
            return caller, False
        raise UnauthenticatedError("this page needs a login, or a token in the header authorization")

    def _check_origin(self, request: Request) -> None:
        """Refuse a request of another site. Only a program sends JSON without an origin. Raise ForbiddenError."""
        origin = request.headers.get("origin")
        if origin is None and is_json(request):
            return
        if urlsplit(origin or "").netloc.lower() != request.headers.get("host", "").lower():
            raise ForbiddenError(
                f"the origin {(origin or '')[:100]!r} is another site; send the form from this page, or application/json"
            )

    async def _check_form(self, request: Request, csrf_token: str) -> Receive:
        """Refuse a form without the token of its page. Raise AccessError or ArgumentError."""
        body = await read_body(request)
        token = request.headers.get("x-csrf-token") or (parse_qs(body.decode("latin-1")).get("csrf") or [""])[0]
        if not hmac.compare_digest(token.encode(), csrf_token.encode()):
            raise ForbiddenError("the form has expired; load the page again")

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        return receive

    def _refuse(self, scope: AsgiScope, error: AccessError) -> Response:
        is_page = scope["method"] == "GET" and "text/html" in Headers(scope=scope).get("accept", "")
        if isinstance(error, UnauthenticatedError) and is_page:
            return RedirectResponse("/login", 303)
        kinds: Iterable[tuple[type[AccessError], int]] = ((UnauthenticatedError, 401), (TooManyCallsError, 429))
        status = next((code for kind, code in kinds if isinstance(error, kind)), 403)
        headers = {"www-authenticate": "Bearer"} if status == 401 else None
        return PlainTextResponse(f"{error}\n", status, headers=headers)


class LoginPages:
    """The routes that begin and end a session. `render` renders a template."""

    def __init__(self, authenticator: Authenticator, render: Callable[..., str]) -> None:
        self.authenticator = authenticator
        self._render = render

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/login", self.show_login, methods=["GET"]),
            Route("/login", self.log_in, methods=["POST"]),
            Route("/logout", self.log_out, methods=["POST"]),
        ]

    async def show_login(self, _request: Request) -> Response:
        return HTMLResponse(self._render("login", message=""))

    async def log_in(self, request: Request) -> Response:
        form = parse_qs((await request.body()).decode("latin-1"))
        secret = (form.get("token") or [""])[0].strip()
        if not self.authenticator.needs_token:
            return RedirectResponse("/", 303)
        try:
            caller = self.authenticator.identify(secret, _format_client(request.scope))
        except AccessError as error:
            status = 429 if isinstance(error, TooManyCallsError) else 401
            return HTMLResponse(self._render("login", message=str(error)), status)
        response = RedirectResponse("/", 303)
        response.set_cookie(
            SESSION_COOKIE,
            self.authenticator.create_session(caller),
            max_age=SESSION_S,
            secure=True,
            httponly=True,
            samesite="strict",
        )
        return response

    async def log_out(self, _request: Request) -> Response:
        response = RedirectResponse("/login", 303)
        response.delete_cookie(SESSION_COOKIE, secure=True, httponly=True, samesite="strict")
        return response


def is_json(request: Request) -> bool:
    """Check the content type. A web page can't send JSON to another site without asking it first."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def read_body(request: Request) -> bytes:
    """Return the body of a form or of a call. Raise ArgumentError if it is too long or too slow."""
    body = b""
    try:
        async with asyncio.timeout(FORM_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_FORM_BYTES:
                    raise ArgumentError(f"the body must have at most {MAX_FORM_BYTES} bytes")
    except TimeoutError:
        raise ArgumentError(f"the body did not arrive within {FORM_TIMEOUT_S:g} s") from None
    return body


def _parse_bearer(values: list[Any]) -> str:
    """Return the token of the only header, or empty text."""
    value = str(values[0]) if len(values) == 1 else ""
    return value[len(BEARER_PREFIX) :].strip() if value.lower().startswith(BEARER_PREFIX) else ""


def _get_peer(peer: str) -> str:
    """Return host:port of a peer such as ipv4:127.0.0.1:5000."""
    return (
        peer.partition(":")[2].replace("%5B", "[").replace("%5D", "]") if peer.startswith(("ipv4:", "ipv6:")) else peer
    )


def _format_client(scope: AsgiScope) -> str:
    host, port = scope.get("client") or ("unknown", 0)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _get_host(address: str) -> str:
    return address.rpartition(":")[0] or address


def _get_action(method: str) -> str:
    return method.removeprefix("/abreast.v1.")


def _get_service(response: Any) -> str:
    """Return the service that a response names, or empty text."""
    for name in ("traffic", "guard", "ramp"):
        if hasattr(response, name):
            return str(getattr(response, name).service)
    return str(response.finding.endpoint.service) if hasattr(response, "finding") else ""
