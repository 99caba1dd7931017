"""Is Envoy there, does it reach both versions, and does it mirror?"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from abreast_sidecar.cli.doctor import services as reach
from abreast_sidecar.cli.doctor.check import Check, CheckFactory, UnreachableError
from abreast_sidecar.client.output import format_count, format_percent, format_quantity
from abreast_sidecar.jobs.envoy_counts import COPY_CLUSTERS, count_copies

ENVOY_CHECKS = CheckFactory("Envoy")
ENVOY_ADMIN_TIMEOUT_S = 3.0  # seconds
FRACTION_DENOMINATOR = 1_000_000
ENVOY_STATS_FILTER = r"^(cluster\.(old|new)(_shadow|_baseline)?\.(membership_|upstream_)|vhost\.service\.route\.|runtime\.(control_plane|admin_overrides_active))"
COPY_LOSS_STATS = {
    "too many at once": "rq_pending_overflow",
    "not connected": "rq_pending_failure_eject",
    "no endpoint": "cx_none_healthy",
}
UNMIRRORED_ROUTES = ("safe_plain", "unsafe_plain")
NUMERATOR_PATTERN = re.compile(r'"numerator"\s+value \{\s+number_value: ([0-9.e+]+)')


@dataclass(frozen=True)
class EnvoyFacts:
    """`old` are its endpoints; `sampling` is the share of safe and unsafe requests that are mirrored."""

    url: str
    version: str
    service: str
    state: str
    stats: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, float] = field(default_factory=dict)
    old_endpoints: Sequence[reach.EndpointReachability] = ()

    def count_requests(self, *routes: str) -> int:
        return sum(self.stats.get(f"vhost.service.route.{route}.upstream_rq_total", 0) for route in routes)

    @property
    def copy_counts(self) -> Mapping[str, int]:
        return count_copies({"name": name, "value": value} for name, value in self.stats.items())

    @property
    def mirrored_requests(self) -> int:
        """As the ledger counts them: the routes' own counts hold retries too."""
        return self.copy_counts["sampled"]


def read_envoy_facts(url: str) -> EnvoyFacts:
    """Takes a second where old is in doubt."""
    info = _get_admin_json(url, "/server_info")
    stats = _get_admin_json(url, f"/stats?format=json&filter={urllib.request.quote(ENVOY_STATS_FILTER)}")  # type: ignore[attr-defined]
    entries = _get_admin_json(url, "/runtime").get("entries", {})
    version = str(info.get("version", "")).split("/")
    return EnvoyFacts(
        url=url,
        version=version[1] if len(version) > 1 else "?",
        service=str(info.get("node", {}).get("cluster", "")),
        state=str(info.get("state", "")),
        stats={s["name"]: s["value"] for s in stats.get("stats", []) if isinstance(s.get("value"), int)},
        sampling={kind: _parse_runtime_share(entries.get(f"abreast.sample.{kind}", {})) for kind in ("safe", "unsafe")},
        old_endpoints=tuple(reach.probe_old_endpoints(url, lambda: _get_admin_json(url, "/clusters?format=json"))),
    )


def _get_admin_json(url: str, path: str) -> Any:
    base = url if "://" in url else f"http://{url}"
    try:
        with urllib.request.urlopen(base.rstrip("/") + path, timeout=ENVOY_ADMIN_TIMEOUT_S) as answer:  # noqa: S310  # the user's address
            return json.load(answer)
    except urllib.error.URLError as error:
        raise UnreachableError(str(error.reason).lower()) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnreachableError(f"no answer of an Envoy's admin ({type(error).__name__})") from error


def _parse_runtime_share(entry: Mapping[str, Any]) -> float:
    """Of a fraction with the denominator MILLION, as the runtime shows it."""
    value = str(entry.get("final_value", ""))
    match = NUMERATOR_PATTERN.search(value)
    return float(match[1]) / FRACTION_DENOMINATOR if match and "MILLION" in value else 0.0


def check_envoy(facts: EnvoyFacts) -> Iterator[Check]:
    description = f"Envoy {facts.version} at {facts.url}, for the service {facts.service}"
    if facts.state == "LIVE":
        yield ENVOY_CHECKS.ok("admin", description)
    else:
        yield ENVOY_CHECKS.warn("admin", f"{description}, is {facts.state}", "wait, or look into Envoy's log")
    yield _check_control_plane(facts)
    yield from _check_admin_overrides(facts)
    yield _check_old_endpoints(facts.old_endpoints)
    yield _check_new_endpoints(facts)
    yield _check_sampling(facts)
    yield _check_requests(facts)
    if facts.mirrored_requests:
        yield _check_copies(facts)


def _check_control_plane(facts: EnvoyFacts) -> Check:
    if facts.stats.get("runtime.control_plane.connected_state"):
        return ENVOY_CHECKS.ok("control", "gets weights and sampling from a sidecar")
    return ENVOY_CHECKS.fail(
        "control",
        "is not connected to a sidecar, so weights and sampling stay as they are",
        "start the sidecar, or check its address in envoy.yaml (cluster `sidecar`)",
    )


def _check_admin_overrides(facts: EnvoyFacts) -> Iterator[Check]:
    if facts.stats.get("runtime.admin_overrides_active"):
        yield ENVOY_CHECKS.warn(
            "override",
            "values set on its admin address stand above the sidecar's weights and sampling",
            "release them with POST /runtime_modify?KEY= for each key that /runtime shows in the layer admin",
        )


def _check_old_endpoints(endpoints: Sequence[reach.EndpointReachability]) -> Check:
    down = [endpoint for endpoint in endpoints if endpoint.problem]
    if endpoints and not down:
        return ENVOY_CHECKS.ok("old", f"{format_quantity(len(endpoints), 'endpoint')} reached")
    observation = f"{len(endpoints) - len(down)} of {format_quantity(len(endpoints), 'endpoint')} reached"
    observation = "; ".join(
        [observation, *(f"{down_endpoint.address}: {down_endpoint.problem}" for down_endpoint in down)]
    )
    if down and not any(endpoint.is_certain for endpoint in down):
        return ENVOY_CHECKS.warn(
            "old", f"{observation} (from this machine)", "can Envoy reach it? run doctor where Envoy runs"
        )
    make_check = ENVOY_CHECKS.fail if len(down) == len(endpoints) else ENVOY_CHECKS.warn
    return make_check("old", observation, "start it: while it is down, nothing answers users when new does not")


def _check_new_endpoints(facts: EnvoyFacts) -> Check:
    healthy, total = (facts.stats.get(f"cluster.new.membership_{state}", 0) for state in ("healthy", "total"))
    observation = f"{healthy} of {format_quantity(total, 'endpoint')} healthy"
    if healthy and healthy == total:
        return ENVOY_CHECKS.ok("new", observation)
    advice = "is it running, and does its health path answer with a status below 500 within a second?"
    return ENVOY_CHECKS.warn("new", observation, advice) if healthy else ENVOY_CHECKS.fail("new", observation, advice)


def _check_sampling(facts: EnvoyFacts) -> Check:
    safe, unsafe = facts.sampling.get("safe", 0.0), facts.sampling.get("unsafe", 0.0)
    observation = f"{format_percent(safe)} of safe requests (GET, HEAD, OPTIONS) and {format_percent(unsafe)} of others are mirrored"
    if safe or unsafe:
        return ENVOY_CHECKS.ok("sampling", observation)
    advice = 'abreast traffic set --sample-safe 10% --reason "compare"'
    return ENVOY_CHECKS.fail("sampling", f"{observation}: nothing is compared", advice)


def _check_requests(facts: EnvoyFacts) -> Check:
    total = facts.mirrored_requests + facts.count_requests(*UNMIRRORED_ROUTES)
    observation = f"{format_quantity(total, 'request')}, {format_count(facts.mirrored_requests)} of them mirrored"
    if not total:
        return ENVOY_CHECKS.warn(
            "requests",
            "no request has come through Envoy since it started",
            "send requests to Envoy's listener, not to the versions themselves",
        )
    if facts.mirrored_requests:
        return ENVOY_CHECKS.ok("requests", observation)
    if not facts.count_requests("safe_plain") and not facts.sampling.get("unsafe"):
        return ENVOY_CHECKS.warn(
            "requests",
            f"{observation}: all change something (POST, PUT, …), and such are not mirrored unless asked",
            "send GET requests, or think about: abreast traffic set --sample-unsafe",
        )
    return ENVOY_CHECKS.warn(
        "requests", observation, "send more requests, or raise the sampling: abreast traffic set --sample-safe"
    )


def _check_copies(facts: EnvoyFacts) -> Check:
    sent_copies = sum(facts.copy_counts[cluster] for cluster in COPY_CLUSTERS) - facts.copy_counts["not_sent"]
    loss_counts = {
        f"{cluster} {cause}": facts.stats.get(f"cluster.{cluster}.upstream_{stat}", 0)
        for cluster in COPY_CLUSTERS
        for cause, stat in COPY_LOSS_STATS.items()
    }
    observation = f"{format_quantity(sent_copies, 'copy', 'copies')} sent"
    if not any(loss_counts.values()):
        return ENVOY_CHECKS.ok("copies", observation)
    loss_text = ", ".join(f"{name} {format_count(number)}" for name, number in loss_counts.items() if number)
    return ENVOY_CHECKS.warn(
        "copies", f"{observation}; lost since Envoy started: {loss_text}", "is that version up, and fast enough?"
    )
