"""Health, metrics and the page over HTTP. Only reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

import structlog
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from abreast_sidecar.compare.verdict import Budget, Verdict, decide
from abreast_sidecar.control import Control
from abreast_sidecar.control.steerers import Steerers
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError, SidecarError
from abreast_sidecar.serve import arguments, page
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.pending import Pending
from abreast_sidecar.serve.readiness import Readiness
from abreast_sidecar.serve.verdicts import ledger
from abreast_sidecar.store.pages import Page
from abreast_sidecar.store.queries import FindingFilter, PairFilter, Queries
from abreast_sidecar.store.results import Window

FINDINGS = 200  # shown on the page
PAIRS = 50
EVENTS = 8
STATUS = {ArgumentError: 400, NotFoundError: 404, LedgerError: 503}
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

log = structlog.get_logger(__name__)

Show = Callable[["Web", Request], Awaitable[str]]


class Web:
    def __init__(
        self,
        *,
        queries: Queries,
        control: Control,
        steerers: Steerers,
        pending: Pending,
        readiness: Readiness,
        metrics: Metrics,
    ) -> None:
        self.queries = queries
        self.control = control
        self.steerers = steerers
        self.pending = pending
        self.readiness = readiness
        self.metrics = metrics
        self.style = (resources.files("abreast_sidecar.serve") / "templates" / "style.css").read_bytes()

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/healthz", self.alive),
                Route("/readyz", self.ready),
                Route("/metrics", self.prometheus),
                Route("/style.css", self.stylesheet),
                Route("/", self._page(Web.overview)),
                Route("/findings/{id:int}", self._page(Web.finding)),
                Route("/pairs/{id}", self._page(Web.pair)),
            ]
        )

    async def alive(self, _: Request) -> Response:
        return Response("alive\n", media_type="text/plain")

    async def ready(self, _: Request) -> Response:
        ready = self.readiness.ready
        content = {"ready": ready, "draining": self.readiness.draining, "parts": self.readiness.states()}
        return JSONResponse(content, 200 if ready else 503)

    async def prometheus(self, _: Request) -> Response:
        for part in self.readiness.checks:
            self.metrics.ready.labels(part).set(part not in self.readiness.wrong)
        try:
            await self.metrics.ledger.read(self.queries)
            self.metrics.steering.guards = await self.steerers.guards()
            self.metrics.steering.ramps = await self.steerers.ramps()
            self.metrics.steering.webhooks = await self.queries.webhooks()
        except LedgerError as error:
            log.warning("metrics show the last counts of the ledger", error=str(error))
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def stylesheet(self, _: Request) -> Response:
        return Response(self.style, media_type="text/css", headers={"cache-control": "max-age=300"})

    def _page(self, show: Show) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            status = 200
            try:
                text = await show(self, request)
            except SidecarError as error:
                status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
                text = page.render("error", message=str(error), parts=self.readiness.states())
            return HTMLResponse(text, status, headers=HEADERS)

        return respond

    async def overview(self, request: Request) -> str:
        services = await self.queries.services()
        if not services:
            return page.render("empty", parts=self.readiness.states())
        asked = arguments.text("service", request.query_params.get("service", ""))
        service = await self.control.resolve(asked or services[0])
        traffic = await self.control.read(service)
        pending = await self.pending.count(service)
        noise = request.query_params.get("noise") == "1"
        findings = await self.queries.findings(
            FindingFilter(service=service, include_noise=noise), Page(FINDINGS)
        )
        explained = await self.queries.findings(
            FindingFilter(service=service, only_explained=True), Page(FINDINGS)
        )
        return page.render(
            "overview",
            explained=explained,
            services=services,
            service=service,
            noise=noise,
            summary=await self.queries.summary(service, Window()),
            pending=pending,
            verdict=await self._verdict(service, pending or 0),
            findings=findings,
            endpoints=await self.queries.endpoints(service, Window(), Page(FINDINGS)),
            traffic=traffic,
            roll=await self.control.roster.all(service),
            guard=await self.steerers.guard(service),
            ramp=await self.steerers.ramp(service),
            events=await self.control.journal.events(service, before_id=None, limit=EVENTS),
            parts=self.readiness.states(),
        )

    async def _verdict(self, service: str, pending: int) -> Verdict:
        """By the budget that `abreast verdict` has unless told otherwise."""
        budget = Budget()
        found = await self.queries.evidence(service, Window(), budget.max_slower)
        return decide(found.endpoints, ledger(found, pending), budget)

    async def finding(self, request: Request) -> str:
        number = min(request.path_params["id"], arguments.MAX_ID)
        found, examples = await self.queries.finding(number)
        pairs = await self.queries.pairs(PairFilter(finding_id=number), Page(PAIRS))
        return page.render(
            "finding",
            service=found.endpoint.service,
            finding=found,
            examples=examples,
            pairs=pairs,
            feature=await self.queries.separating(found),
            events=await self.queries.finding_events(found.id),
        )

    async def pair(self, request: Request) -> str:
        found = await self.queries.pair(arguments.pair_id(request.path_params["id"]))
        return page.render("pair", service=found.pair.endpoint.service, detail=found, pair=found.pair)
