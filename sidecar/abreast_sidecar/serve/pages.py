"""Health, metrics and the page over HTTP. Only reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

import orjson
import structlog
from jinja2 import Environment, PackageLoader, StrictUndefined
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from abreast.protocol.capture import Body, Capture
from abreast_sidecar.compare.effects import describe_effect
from abreast_sidecar.compare.values import render_value
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError, SidecarError
from abreast_sidecar.rollout.service import RolloutService
from abreast_sidecar.serve import validate as arguments
from abreast_sidecar.serve.http import PairBacklog, Readiness
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.phrase import describe_location, summarise_finding
from abreast_sidecar.stats.verdict import Budget
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest, PairFilter
from abreast_sidecar.store.records import Finding, Window
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT

MAX_BODY_CHARS = 20_000  # characters shown
MAX_UNREADABLE_SHARE = 0.1  # the share of unreadable characters above which a body is not shown as text


def render(name: str, **values: Any) -> str:
    return _build_environment().get_template(f"{name}.html.j2").render(now=datetime.now(UTC), **values)


@cache
def _build_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("abreast_sidecar.serve", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_count,
        share=format_share,
        time=format_duration,
        moment=format_time,
        body=format_body,
        phrase=summarise_finding,
        place=describe_location,
        words=format_words,
        rate=format_rate,
        in_order=sort_captures,
        said=lambda effect: render_value(describe_effect(effect)),
    )
    environment.globals.update(WEIGHTS=TOTAL_WEIGHT, MILLION=MILLION)
    return environment


def format_count(value: int) -> str:
    return f"{value:,}"


def format_share(part: float, total: float) -> str:
    """A percentage that says 0% only for none and 100% only for all."""
    if not total or not part:
        return "0%"
    percent = 100 * part / total
    if percent < 0.01:
        return "<0.01%"
    text = f"{percent:.2f}" if percent < 1 else f"{percent:.1f}"
    if part < total and float(text) >= 100:
        return ">99.9%"
    return text.rstrip("0").rstrip(".") + "%"


def format_rate(finding: Finding) -> str:
    """`6.9% (5.1% to 9.2%)`: the interval holds with 95% however often one looks. A dash where it is of no single pairs."""
    interval = finding.rate
    if interval is None:
        return "–"
    value = format_share(min(finding.count, finding.compared), finding.compared)
    return f"{value} ({format_share(interval.low, 1)} to {format_share(interval.high, 1)})"


def format_duration(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.1f} ms"
    return f"{microseconds / 1_000_000:.2f} s"


def format_time(value: datetime | None) -> str:
    return "-" if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def format_words(name: str) -> str:
    """The ledger's names as words: only_old is `only old`."""
    return name.replace("_", " ")


def sort_captures(captures: Iterable[Capture]) -> list[Capture]:
    """Old, new, then baseline copies."""
    return sorted(captures, key=lambda capture: (capture.role == "baseline", capture.version != "old", capture.attempt))


def format_body(body: Body) -> str:
    """As text, JSON indented; what is no text is only described."""
    if not body.length:
        return "(empty)"
    truncation_note = (
        "" if body.is_complete else f"\n… {body.length - len(body.content):,} bytes more were not captured"
    )
    text = body.content.decode(errors="replace")
    if text.count("\ufffd") > MAX_UNREADABLE_SHARE * len(text) or not text:
        return f"({body.length:,} bytes that are no text)"
    if body.is_complete:
        text = _indent_json(body.content) or text
    if len(text) > MAX_BODY_CHARS:
        text = text[:MAX_BODY_CHARS] + f"\n… {len(text) - MAX_BODY_CHARS:,} characters more are not shown"
    return text + truncation_note


def _indent_json(content: bytes) -> str:
    try:
        return orjson.dumps(orjson.loads(content), option=orjson.OPT_INDENT_2).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return ""


MAX_PAGE_FINDINGS = 200  # shown on the page
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

PageRenderer = Callable[["WebApp", Request], Awaitable[str]]


class WebApp:
    def __init__(
        self,
        *,
        reader: LedgerReader,
        control: TrafficController,
        rollout: RolloutService,
        backlog: PairBacklog,
        readiness: Readiness,
        metrics: Metrics,
    ) -> None:
        self.reader = reader
        self.control = control
        self.rollout = rollout
        self.backlog = backlog
        self.readiness = readiness
        self.metrics = metrics
        self.style = (resources.files("abreast_sidecar.serve") / "templates" / "style.css").read_bytes()

    def create_app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/healthz", self.get_liveness),
                Route("/readyz", self.get_readiness),
                Route("/metrics", self.get_metrics),
                Route("/style.css", self.get_stylesheet),
                Route("/", self._create_page_handler(WebApp.render_overview)),
                Route("/findings/{id:int}", self._create_page_handler(WebApp.render_finding)),
                Route("/pairs/{id}", self._create_page_handler(WebApp.render_pair)),
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
            self.metrics.rollout.guards = await self.rollout.list_guards()
            self.metrics.rollout.ramps = await self.rollout.list_active_ramps()
            self.metrics.rollout.webhooks = await self.reader.count_webhooks()
        except LedgerError as error:
            log.warning("metrics show the last counts of the ledger", error=str(error))
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def get_stylesheet(self, _: Request) -> Response:
        return Response(self.style, media_type="text/css", headers={"cache-control": "max-age=300"})

    def _create_page_handler(self, render_content: PageRenderer) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            status = 200
            try:
                text = await render_content(self, request)
            except SidecarError as error:
                status = next((code for kind, code in HTTP_STATUS_BY_ERROR.items() if isinstance(error, kind)), 500)
                text = render("error", message=str(error), parts=self.readiness.describe_parts())
            return HTMLResponse(text, status, headers=SECURITY_HEADERS)

        return respond

    async def render_overview(self, request: Request) -> str:
        services = await self.reader.list_services()
        if not services:
            return render("empty", parts=self.readiness.describe_parts())
        service_name = arguments.check_text("service", request.query_params.get("service", ""))
        service = await self.control.resolve_service(service_name or services[0])
        traffic = await self.control.read(service)
        pending = await self.backlog.count(service)
        include_noise = request.query_params.get("noise") == "1"
        findings = await self.reader.list_findings(
            FindingFilter(service=service, include_noise=include_noise), PageRequest(MAX_PAGE_FINDINGS)
        )
        explained = await self.reader.list_findings(
            FindingFilter(service=service, only_explained=True), PageRequest(MAX_PAGE_FINDINGS)
        )
        return render(
            "overview",
            explained=explained,
            services=services,
            service=service,
            noise=include_noise,
            summary=await self.reader.read_summary(service, Window()),
            pending=pending,
            verdict=await self.reader.read_verdict(service, Window(), Budget(), pending or 0),
            findings=findings,
            endpoints=await self.reader.list_endpoints(service, Window(), PageRequest(MAX_PAGE_FINDINGS)),
            traffic=traffic,
            roll=await self.control.registry.list_all(service),
            guard=await self.rollout.get_guard(service),
            ramp=await self.rollout.get_ramp(service),
            events=await self.control.repository.list_events(service, before_id=None, limit=MAX_PAGE_EVENTS),
            parts=self.readiness.describe_parts(),
        )

    async def render_finding(self, request: Request) -> str:
        finding_id = min(request.path_params["id"], arguments.MAX_ID)
        finding, examples = await self.reader.get_finding(finding_id)
        pairs = await self.reader.list_pairs(PairFilter(finding_id=finding_id), PageRequest(MAX_PAGE_PAIRS))
        return render(
            "finding",
            service=finding.endpoint.service,
            finding=finding,
            examples=examples,
            pairs=pairs,
            feature=await self.reader.find_common_feature(finding),
            events=await self.reader.list_finding_events(finding.id),
        )

    async def render_pair(self, request: Request) -> str:
        detail = await self.reader.get_pair(arguments.parse_pair_id(request.path_params["id"]))
        return render("pair", service=detail.pair.endpoint.service, detail=detail, pair=detail.pair)
