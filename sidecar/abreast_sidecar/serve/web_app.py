"""Health, metrics, the web page, and verdict and traffic for pipelines over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from math import isfinite, nan
from typing import Any

import structlog
from google.protobuf import json_format
from google.protobuf.message import Message
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from abreast.v1 import common_pb2, latency_pb2, rollout_pb2, traffic_pb2
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.errors import (
    ArgumentError,
    ConflictError,
    ForbiddenError,
    LedgerError,
    NotFoundError,
    RedisError,
    SidecarError,
    StaleVersionError,
    StoppingError,
    first_line,
)
from abreast_sidecar.rollout.service import RolloutService
from abreast_sidecar.serve.access import is_json, read_body
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.render import format_word, read_stylesheet, render
from abreast_sidecar.serve.services import Servicers
from abreast_sidecar.serve.validate import MAX_ID
from abreast_sidecar.store.access import current_caller
from abreast_sidecar.store.reader import LedgerReader

MAX_PAGE_FINDINGS = 200
MAX_PAGE_CAUSES = 100
MAX_PAGE_PAIRS = 50
MAX_PAGE_EVENTS = 8
BUDGET_FIELDS = tuple(pb.Budget.DESCRIPTOR.fields_by_name)
GATE_STATUSES = {"PASS": 200, "FAIL": 409, "INCONCLUSIVE": 425}
VERDICT_METRIC_AGE_S = 10.0  # verdicts are expensive: a scrape reuses those of this age
HTTP_STATUS_BY_ERROR = {
    ArgumentError: 400, ForbiddenError: 403, NotFoundError: 404, ConflictError: 409, StaleVersionError: 409,
    LedgerError: 503, RedisError: 503, StoppingError: 503,
}  # fmt: skip
# Calls of /v1/services/{service}/: the servicer, its method and the request.
STEERING_CALLS: Mapping[tuple[str, str], tuple[str, str, type[Message]]] = {
    ("GET", "traffic"): ("traffic", "GetTraffic", traffic_pb2.GetTrafficRequest),
    ("POST", "traffic"): ("traffic", "UpdateTraffic", traffic_pb2.UpdateTrafficRequest),
    ("POST", "rollback"): ("traffic", "Rollback", traffic_pb2.RollbackRequest),
    ("POST", "promote"): ("traffic", "Promote", traffic_pb2.PromoteRequest),
    ("GET", "ramp"): ("rollout", "GetRamp", rollout_pb2.GetRampRequest),
    ("POST", "ramp"): ("rollout", "StartRamp", rollout_pb2.StartRampRequest),
    ("POST", "ramp/abort"): ("rollout", "AbortRamp", rollout_pb2.AbortRampRequest),
}

log = structlog.get_logger(__name__)

JsonReader = Callable[[Request], Awaitable[tuple[dict[str, Any], int]]]
PageRenderer = Callable[[Request], Awaitable[str]]


def _parse_number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = nan
    if not isfinite(number):
        raise ArgumentError(f"{name} must be a number, got {text[:80]!r}")
    return number


def _to_document(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _parse_window(parameters: dict[str, str]) -> common_pb2.TimeWindow | None:
    """Take `since` and `until` out of the parameters: times in RFC 3339."""
    window = common_pb2.TimeWindow()
    for name, field in (("since", window.start), ("until", window.end)):
        if text := parameters.pop(name, ""):
            try:
                field.FromJsonString(text)
            except ValueError as error:
                raise ArgumentError(f"{name} must be a time such as 2026-01-31T09:30:00Z, got {text[:80]!r}") from error
    return window if window.ByteSize() else None


class HttpContext:
    """Stands for the context of gRPC in a call over HTTP."""

    def peer(self) -> str:
        return current_caller.get().peer


async def _parse_call(request: Request, kind: type[Message]) -> Any:
    """Return the message of a JSON body, with the service of the path. Raise ArgumentError."""
    message: Any = kind()
    content, service = b"", request.path_params["service"]
    if request.method == "POST":
        content = await read_body(request)
    if content and not is_json(request):
        raise ArgumentError("the header content-type must be application/json")
    try:
        json_format.Parse(content or b"{}", message)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise ArgumentError(f"the body must be a {kind.DESCRIPTOR.name} in JSON: {first_line(error)}") from error
    if message.service not in {"", service}:
        raise ArgumentError(f"the body names the service {message.service!r}, and the path names {service!r}")
    message.service = service
    return message


class WebApp:
    """Renders the responses of the gRPC services, which it calls in the same process."""

    def __init__(
        self,
        reader: LedgerReader,
        servicers: Servicers,
        rollout: RolloutService,
        readiness: Readiness,
        metrics: Metrics,
    ) -> None:
        self.reader = reader
        self.servicers = servicers
        self.rollout = rollout
        self.readiness = readiness
        self.metrics = metrics
        self.stylesheet = read_stylesheet()
        self._verdicts_at = float("-inf")

    def create_app(self, *routes: Route) -> Starlette:
        """Return the routes of this class, and `routes`."""
        return Starlette(
            routes=[
                *routes,
                Route("/healthz", self.get_liveness),
                Route("/readyz", self.get_readiness),
                Route("/metrics", self.get_metrics),
                Route("/style.css", self.get_stylesheet),
                Route("/v1/services/{service}/verdict", self._create_json_handler(self.read_verdict)),
                Route("/v1/services/{service}/causes", self._create_json_handler(self.read_causes)),
                *(
                    Route(
                        f"/v1/services/{{service}}/{path}",
                        self._create_json_handler(partial(self.steer, call)),
                        methods=[method],
                    )
                    for (method, path), call in STEERING_CALLS.items()
                ),
                Route("/", self._create_page_handler(self.render_overview)),
                Route("/findings/{id:int}", self._create_page_handler(self.render_finding)),
                Route("/pairs/{id}", self._create_page_handler(self.render_pair)),
            ],
            exception_handlers={404: self.handle_unknown_path},
        )

    async def handle_unknown_path(self, request: Request, _: Exception) -> Response:
        message = "no page has this address"
        if request.url.path.startswith("/v1/"):
            return JSONResponse({"error": {"code": 404, "message": message}}, 404)
        return HTMLResponse(render("error", message=message, parts=self.readiness.describe_parts()), 404)

    async def get_liveness(self, _: Request) -> Response:
        return Response("alive\n", media_type="text/plain")

    async def get_readiness(self, _: Request) -> Response:
        is_ready = self.readiness.is_ready
        content = {"ready": is_ready, "draining": self.readiness.is_draining, "parts": self.readiness.describe_parts()}
        return JSONResponse(content, 200 if is_ready else 503)

    async def get_metrics(self, _: Request) -> Response:
        for part in self.readiness.checks:
            self.metrics.ready.labels(part).set(part not in self.readiness.problems)
        try:
            await self.metrics.state.read(self.reader, self.rollout)
            await self._refresh_verdicts()
        except LedgerError as error:
            log.warning("can't read the ledger; metrics show its last counts", error=str(error))
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def _refresh_verdicts(self) -> None:
        if time.monotonic() - self._verdicts_at < VERDICT_METRIC_AGE_S:
            return
        verdicts = {}
        for service in await self.reader.list_services():
            response = await self.servicers.comparison.GetVerdict(pb.GetVerdictRequest(service=service), None)
            verdicts[service] = format_word(response, "state").upper()
        self.metrics.state.verdicts, self._verdicts_at = verdicts, time.monotonic()

    async def get_stylesheet(self, _: Request) -> Response:
        return Response(self.stylesheet, media_type="text/css", headers={"cache-control": "max-age=300"})

    def _create_json_handler(self, read: JsonReader) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            try:
                content, status = await read(request)
            except SidecarError as error:
                status = next((code for kind, code in HTTP_STATUS_BY_ERROR.items() if isinstance(error, kind)), 500)
                content = {"error": {"code": status, "message": str(error)}}
            return JSONResponse(content, status, headers={"cache-control": "no-store"})

        return respond

    async def read_verdict(self, request: Request) -> tuple[dict[str, Any], int]:
        """Return `{"verdict": "PASS", ...}` with 200. With ?gate=1, the status is that of the verdict."""
        parameters = dict(request.query_params)
        gate = parameters.pop("gate", "0")
        budget = {name: _parse_number(name, parameters.pop(name)) for name in BUDGET_FIELDS if name in parameters}
        message = pb.GetVerdictRequest(
            service=request.path_params["service"],
            release=parameters.pop("release", ""),
            window=_parse_window(parameters),
            budget=pb.Budget(**budget),
        )
        if parameters or gate not in {"0", "1"}:
            names = ", ".join(sorted(parameters)) or "gate"
            raise ArgumentError(
                f"unknown parameter or value: {names}; known: gate=1, release, since, until, {', '.join(BUDGET_FIELDS)}"
            )
        response = await self.servicers.comparison.GetVerdict(message, None)
        state = format_word(response, "state").upper()
        return {"verdict": state, **_to_document(response)}, GATE_STATUSES[state] if gate == "1" else 200

    async def read_causes(self, request: Request) -> tuple[dict[str, Any], int]:
        """Return a ListCausesResponse as JSON."""
        parameters = dict(request.query_params)
        message = pb.ListCausesRequest(
            service=request.path_params["service"],
            include_noise=parameters.pop("noise", "") == "1",
            page_size=int(_parse_number("page_size", parameters.pop("page_size", "0"))),
            page_token=parameters.pop("page_token", ""),
            window=_parse_window(parameters),
        )
        if parameters:
            raise ArgumentError(f"unknown parameter: {', '.join(sorted(parameters))}")
        response = await self.servicers.comparison.ListCauses(message, None)
        return _to_document(response), 200

    async def steer(self, call: tuple[str, str, type[Message]], request: Request) -> tuple[dict[str, Any], int]:
        """Make a call of gRPC, and return its response as JSON."""
        servicer, method, kind = call
        message = await _parse_call(request, kind)
        response = await getattr(getattr(self.servicers, servicer), method)(message, HttpContext())
        return _to_document(response), 200

    def _create_page_handler(self, render_page: PageRenderer) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            status = 200
            try:
                text = await render_page(request)
            except SidecarError as error:
                status = next((code for kind, code in HTTP_STATUS_BY_ERROR.items() if isinstance(error, kind)), 500)
                text = render("error", message=str(error), parts=self.readiness.describe_parts())
            return HTMLResponse(text, status)

        return respond

    async def render_overview(self, request: Request) -> str:
        allowed = current_caller.get().services
        services = [name for name in await self.reader.list_services() if not allowed or name in allowed]
        if not services:
            return render("empty", parts=self.readiness.describe_parts())
        service = request.query_params.get("service") or services[0]
        include_noise = request.query_params.get("noise") == "1"
        endpoints_request = pb.ListEndpointsRequest(service=service, page_size=MAX_PAGE_FINDINGS)
        explained_request = pb.ListFindingsRequest(service=service, page_size=MAX_PAGE_FINDINGS, only_explained=True)
        causes_request = pb.ListCausesRequest(service=service, page_size=MAX_PAGE_CAUSES, include_noise=include_noise)
        events_request = traffic_pb2.ListTrafficEventsRequest(service=service, page_size=MAX_PAGE_EVENTS)
        comparison, rollout, traffic = self.servicers.comparison, self.servicers.rollout, self.servicers.traffic
        # Postgres works on the large questions at the same time.
        (summary, verdict, causes, explained, endpoints), ramp, guard, settings, events = await asyncio.gather(
            asyncio.gather(
                comparison.GetSummary(pb.GetSummaryRequest(service=service), None),
                comparison.GetVerdict(pb.GetVerdictRequest(service=service), None),
                comparison.ListCauses(causes_request, None),
                comparison.ListFindings(explained_request, None),
                comparison.ListEndpoints(endpoints_request, None),
            ),
            rollout.GetRamp(rollout_pb2.GetRampRequest(service=service), None),
            rollout.GetGuard(rollout_pb2.GetGuardRequest(service=service), None),
            traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service=service), None),
            traffic.ListTrafficEvents(events_request, None),
        )
        return render(
            "overview",
            services=services,
            service=service,
            include_noise=include_noise,
            summary=summary,
            verdict=verdict,
            causes=causes,
            explained=explained,
            endpoints=endpoints,
            traffic=settings,
            guard=guard.guard,
            ramp=ramp.ramp if ramp.HasField("ramp") else None,
            events=events.events,
            parts=self.readiness.describe_parts(),
        )

    async def render_finding(self, request: Request) -> str:
        finding_id = min(request.path_params["id"], MAX_ID)
        detail = await self.servicers.comparison.GetFinding(pb.GetFindingRequest(id=finding_id), None)
        endpoint = detail.finding.endpoint
        is_latency = detail.finding.part == common_pb2.PART_LATENCY
        is_aggregate = is_latency or detail.finding.part == common_pb2.PART_CACHE  # no single pair shows it
        scope = {"service": endpoint.service, "method": endpoint.method, "route": endpoint.route}
        pairs_request = pb.ListPairsRequest(
            page_size=MAX_PAGE_PAIRS, **(scope if is_aggregate else {"finding_id": finding_id})
        )
        return render(
            "finding",
            service=detail.finding.endpoint.service,
            finding=detail.finding,
            examples=detail.examples,
            pairs=await self.servicers.comparison.ListPairs(pairs_request, None),
            feature=detail.feature if detail.HasField("feature") else None,
            events=detail.events,
            is_aggregate=is_aggregate,
            latency=await self._read_percentiles(endpoint) if is_latency else [],
        )

    async def _read_percentiles(self, endpoint: common_pb2.Endpoint) -> Sequence[latency_pb2.LatencyPercentile]:
        """Return the percentiles of both versions, or nothing if retention has deleted the pairs."""
        try:
            request = latency_pb2.GetLatencyRequest(
                service=endpoint.service, method=endpoint.method, route=endpoint.route
            )
            response = await self.servicers.latency.GetLatency(request, None)
        except NotFoundError:
            return []
        return response.warm.percentiles

    async def render_pair(self, request: Request) -> str:
        detail = (await self.servicers.comparison.GetPair(pb.GetPairRequest(id=request.path_params["id"]), None)).pair
        return render("pair", service=detail.pair.endpoint.service, detail=detail, pair=detail.pair)


CHECK_INTERVAL_S = 1.0


STARTUP_CHECK_INTERVAL_S = 0.1  # until all parts are ready


CHECK_TIMEOUT_S = 3.0


ReadinessCheck = Callable[[], Awaitable[None]]  # raises an error that describes the problem


ReadinessListener = Callable[[bool], Awaitable[None]]


class NotReadyError(Exception):
    """A part is not ready. The message names what it waits for."""


class Readiness:
    """Checks the parts of the sidecar once a second, and reports when all of them become ready or one stops being so."""

    def __init__(self, checks: Mapping[str, ReadinessCheck], listener: ReadinessListener) -> None:
        self.checks = checks
        self.listener = listener
        self.is_draining = False
        self.problems: dict[str, str] = dict.fromkeys(checks, "not checked yet")  # by part
        self._reported_ready: bool | None = None
        self._once_ready_parts: set[str] = set()

    @property
    def is_ready(self) -> bool:
        return not self.problems and not self.is_draining

    def describe_parts(self) -> dict[str, str]:
        """Return `ok` or the problem of each part."""
        return {name: self.problems.get(name, "ok") for name in self.checks}

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await asyncio.gather(*[self._check(name) for name in self.checks])
            await self._report()
            await asyncio.sleep(STARTUP_CHECK_INTERVAL_S if self.problems else CHECK_INTERVAL_S)

    async def drain(self) -> None:
        self.is_draining = True
        await self._report()

    async def _check(self, name: str) -> None:
        problem = ""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self.checks[name]()
        except TimeoutError:
            problem = f"no response within {CHECK_TIMEOUT_S:g} s"
        except Exception as error:  # noqa: BLE001  # any error means that the part is not ready
            problem = str(error) or type(error).__name__
        if problem and self.problems.get(name) != problem:
            is_unexpected = name in self._once_ready_parts and not self.is_draining
            (log.warning if is_unexpected else log.info)("not ready", part=name, error=problem)
        elif not problem and name in self.problems:
            self._once_ready_parts.add(name)
            log.info("part ready", part=name)
        self.problems.pop(name, None)
        if problem:
            self.problems[name] = problem

    async def _report(self) -> None:
        if self.is_ready != self._reported_ready:
            self._reported_ready = self.is_ready
            await self.listener(self.is_ready)
