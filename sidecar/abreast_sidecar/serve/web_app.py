"""Health, metrics and the web page over HTTP. All requests only read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from abreast.v1 import comparison_pb2 as pb
from abreast.v1 import rollout_pb2, traffic_pb2
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError, SidecarError
from abreast_sidecar.serve.health import Readiness
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.render import read_stylesheet, render
from abreast_sidecar.serve.services.comparison import ComparisonServicer
from abreast_sidecar.serve.services.rollout import RolloutServicer
from abreast_sidecar.serve.services.traffic import TrafficServicer
from abreast_sidecar.serve.validate import MAX_ID
from abreast_sidecar.store.reader import LedgerReader

MAX_PAGE_FINDINGS = 200
MAX_PAGE_PAIRS = 50
MAX_PAGE_EVENTS = 8
HTTP_STATUS_BY_ERROR = {ArgumentError: 400, NotFoundError: 404, LedgerError: 503}
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

log = structlog.get_logger(__name__)

PageRenderer = Callable[[Request], Awaitable[str]]


class WebApp:
    """Renders the responses of the gRPC services, which it calls in the same process."""

    def __init__(
        self,
        *,
        reader: LedgerReader,
        comparison: ComparisonServicer,
        traffic: TrafficServicer,
        rollout: RolloutServicer,
        readiness: Readiness,
        metrics: Metrics,
    ) -> None:
        self.reader = reader
        self.comparison = comparison
        self.traffic = traffic
        self.rollout = rollout
        self.readiness = readiness
        self.metrics = metrics
        self.stylesheet = read_stylesheet()

    def create_app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/healthz", self.get_liveness),
                Route("/readyz", self.get_readiness),
                Route("/metrics", self.get_metrics),
                Route("/style.css", self.get_stylesheet),
                Route("/", self._create_page_handler(self.render_overview)),
                Route("/findings/{id:int}", self._create_page_handler(self.render_finding)),
                Route("/pairs/{id}", self._create_page_handler(self.render_pair)),
            ]
        )

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
            await self.metrics.ledger.read(self.reader)
            await self.metrics.rollout.read(self.reader, self.rollout.rollout)
        except LedgerError as error:
            log.warning("can't read the ledger; metrics show its last counts", error=str(error))
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def get_stylesheet(self, _: Request) -> Response:
        return Response(self.stylesheet, media_type="text/css", headers={"cache-control": "max-age=300"})

    def _create_page_handler(self, render_page: PageRenderer) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            status = 200
            try:
                text = await render_page(request)
            except SidecarError as error:
                status = next((code for kind, code in HTTP_STATUS_BY_ERROR.items() if isinstance(error, kind)), 500)
                text = render("error", message=str(error), parts=self.readiness.describe_parts())
            return HTMLResponse(text, status, headers=SECURITY_HEADERS)

        return respond

    async def render_overview(self, request: Request) -> str:
        services = await self.reader.list_services()
        if not services:
            return render("empty", parts=self.readiness.describe_parts())
        name = request.query_params.get("service") or services[0]
        include_noise = request.query_params.get("noise") == "1"
        summary = await self.comparison.GetSummary(pb.GetSummaryRequest(service=name), None)
        service = summary.service
        endpoints_request = pb.ListEndpointsRequest(service=service, page_size=MAX_PAGE_FINDINGS)
        explained_request = pb.ListFindingsRequest(service=service, page_size=MAX_PAGE_FINDINGS, only_explained=True)
        findings_request = pb.ListFindingsRequest(
            service=service, page_size=MAX_PAGE_FINDINGS, include_noise=include_noise
        )
        ramp = await self.rollout.GetRamp(rollout_pb2.GetRampRequest(service=service), None)
        guard = await self.rollout.GetGuard(rollout_pb2.GetGuardRequest(service=service), None)
        events_request = traffic_pb2.ListTrafficEventsRequest(service=service, page_size=MAX_PAGE_EVENTS)
        return render(
            "overview",
            services=services,
            service=service,
            include_noise=include_noise,
            summary=summary,
            verdict=await self.comparison.GetVerdict(pb.GetVerdictRequest(service=service), None),
            findings=await self.comparison.ListFindings(findings_request, None),
            explained=await self.comparison.ListFindings(explained_request, None),
            endpoints=await self.comparison.ListEndpoints(endpoints_request, None),
            traffic=await self.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service=service), None),
            guard=guard.guard,
            ramp=ramp.ramp if ramp.HasField("ramp") else None,
            events=(await self.traffic.ListTrafficEvents(events_request, None)).events,
            parts=self.readiness.describe_parts(),
        )

    async def render_finding(self, request: Request) -> str:
        finding_id = min(request.path_params["id"], MAX_ID)
        detail = await self.comparison.GetFinding(pb.GetFindingRequest(id=finding_id), None)
        pairs_request = pb.ListPairsRequest(finding_id=finding_id, page_size=MAX_PAGE_PAIRS)
        return render(
            "finding",
            service=detail.finding.endpoint.service,
            finding=detail.finding,
            examples=detail.examples,
            pairs=await self.comparison.ListPairs(pairs_request, None),
            feature=detail.feature if detail.HasField("feature") else None,
            events=detail.events,
        )

    async def render_pair(self, request: Request) -> str:
        detail = (await self.comparison.GetPair(pb.GetPairRequest(id=request.path_params["id"]), None)).pair
        return render("pair", service=detail.pair.endpoint.service, detail=detail, pair=detail.pair)
