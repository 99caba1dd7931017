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

from abreast_sidecar.cli.checks import reach
from abreast_sidecar.cli.checks.check import Check, Part, UnreachableError
from abreast_sidecar.cli.humane import count, counted, percent
from abreast_sidecar.housekeeping.envoy import COPIES, counts

ENVOY = Part("Envoy")
TIMEOUT = 3.0  # seconds
MILLION = 1_000_000
STATS = r"^(cluster\.(old|new)(_shadow|_baseline)?\.(membership_|upstream_)|vhost\.service\.route\.|runtime\.(control_plane|admin_overrides_active))"
LOST = {
    "too many at once": "rq_pending_overflow",
    "not connected": "rq_pending_failure_eject",
    "no endpoint": "cx_none_healthy",
}
PLAIN = ("safe_plain", "unsafe_plain")
NUMERATOR = re.compile(r'"numerator"\s+value \{\s+number_value: ([0-9.e+]+)')


@dataclass(frozen=True)
class EnvoyFacts:
    """`old` are its endpoints; `sampling` is the share of safe and unsafe requests that are mirrored."""

    url: str
    version: str
    service: str
    state: str
    stats: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, float] = field(default_factory=dict)
    old: Sequence[reach.Endpoint] = ()

    def routed(self, *routes: str) -> int:
        return sum(self.stats.get(f"vhost.service.route.{route}.upstream_rq_total", 0) for route in routes)

    @property
    def copies(self) -> Mapping[str, int]:
        return counts({"name": name, "value": value} for name, value in self.stats.items())

    @property
    def mirrored(self) -> int:
        """As the ledger counts them: the routes' own counts hold retries too."""
        return self.copies["sampled"]


def look(url: str) -> EnvoyFacts:
    """Takes a second where old is in doubt."""
    info = _get(url, "/server_info")
    stats = _get(url, f"/stats?format=json&filter={urllib.request.quote(STATS)}")  # type: ignore[attr-defined]
    entries = _get(url, "/runtime").get("entries", {})
    version = str(info.get("version", "")).split("/")
    return EnvoyFacts(
        url=url,
        version=version[1] if len(version) > 1 else "?",
        service=str(info.get("node", {}).get("cluster", "")),
        state=str(info.get("state", "")),
        stats={s["name"]: s["value"] for s in stats.get("stats", []) if isinstance(s.get("value"), int)},
        sampling={kind: _share(entries.get(f"abreast.sample.{kind}", {})) for kind in ("safe", "unsafe")},
        old=tuple(reach.look(url, lambda: _get(url, "/clusters?format=json"))),
    )


def _get(url: str, path: str) -> Any:
    base = url if "://" in url else f"http://{url}"
    try:
        with urllib.request.urlopen(base.rstrip("/") + path, timeout=TIMEOUT) as answer:  # noqa: S310  # the user's address
            return json.load(answer)
    except urllib.error.URLError as error:
        raise UnreachableError(str(error.reason).lower()) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnreachableError(f"no answer of an Envoy's admin ({type(error).__name__})") from error


def _share(entry: Mapping[str, Any]) -> float:
    """Of a fraction with the denominator MILLION, as the runtime shows it."""
    value = str(entry.get("final_value", ""))
    found = NUMERATOR.search(value)
    return float(found[1]) / MILLION if found and "MILLION" in value else 0.0


def judge(facts: EnvoyFacts) -> Iterator[Check]:
    where = f"Envoy {facts.version} at {facts.url}, for the service {facts.service}"
    if facts.state == "LIVE":
        yield ENVOY.ok("admin", where)
    else:
        yield ENVOY.warn("admin", f"{where}, is {facts.state}", "wait, or look into Envoy's log")
    yield _control(facts)
    yield from _overridden(facts)
    yield _old(facts.old)
    yield _new(facts)
    yield _sampling(facts)
    yield _requests(facts)
    if facts.mirrored:
        yield _copies(facts)


def _control(facts: EnvoyFacts) -> Check:
    if facts.stats.get("runtime.control_plane.connected_state"):
        return ENVOY.ok("control", "gets weights and sampling from a sidecar")
    return ENVOY.fail(
        "control",
        "is not connected to a sidecar, so weights and sampling stay as they are",
        "start the sidecar, or check its address in envoy.yaml (cluster `sidecar`)",
    )


def _overridden(facts: EnvoyFacts) -> Iterator[Check]:
    if facts.stats.get("runtime.admin_overrides_active"):
        yield ENVOY.warn(
            "override",
            "values set on its admin address stand above the sidecar's weights and sampling",
            "release them with POST /runtime_modify?KEY= for each key that /runtime shows in the layer admin",
        )


def _old(endpoints: Sequence[reach.Endpoint]) -> Check:
    down = [endpoint for endpoint in endpoints if endpoint.trouble]
    if endpoints and not down:
        return ENVOY.ok("old", f"{counted(len(endpoints), 'endpoint')} reached")
    found = f"{len(endpoints) - len(down)} of {counted(len(endpoints), 'endpoint')} reached"
    found = "; ".join([found, *(f"{one.address}: {one.trouble}" for one in down)])
    if down and not any(endpoint.sure for endpoint in down):
        return ENVOY.warn(
            "old", f"{found} (from this machine)", "can Envoy reach it? run doctor where Envoy runs"
        )
    make = ENVOY.fail if len(down) == len(endpoints) else ENVOY.warn
    return make("old", found, "start it: while it is down, nothing answers users when new does not")


def _new(facts: EnvoyFacts) -> Check:
    healthy, total = (facts.stats.get(f"cluster.new.membership_{what}", 0) for what in ("healthy", "total"))
    found = f"{healthy} of {counted(total, 'endpoint')} healthy"
    if healthy and healthy == total:
        return ENVOY.ok("new", found)
    advice = "is it running, and does its health path answer with a status below 500 within a second?"
    return ENVOY.warn("new", found, advice) if healthy else ENVOY.fail("new", found, advice)


def _sampling(facts: EnvoyFacts) -> Check:
    safe, unsafe = facts.sampling.get("safe", 0.0), facts.sampling.get("unsafe", 0.0)
    found = (
        f"{percent(safe)} of safe requests (GET, HEAD, OPTIONS) and {percent(unsafe)} of others are mirrored"
    )
    if safe or unsafe:
        return ENVOY.ok("sampling", found)
    advice = 'abreast traffic set --sample-safe 10% --reason "compare"'
    return ENVOY.fail("sampling", f"{found}: nothing is compared", advice)


def _requests(facts: EnvoyFacts) -> Check:
    total = facts.mirrored + facts.routed(*PLAIN)
    found = f"{counted(total, 'request')}, {count(facts.mirrored)} of them mirrored"
    if not total:
        return ENVOY.warn(
            "requests",
            "no request has come through Envoy since it started",
            "send requests to Envoy's listener, not to the versions themselves",
        )
    if facts.mirrored:
        return ENVOY.ok("requests", found)
    if not facts.routed("safe_plain") and not facts.sampling.get("unsafe"):
        return ENVOY.warn(
            "requests",
            f"{found}: all change something (POST, PUT, …), and such are not mirrored unless asked",
            "send GET requests, or think about: abreast traffic set --sample-unsafe",
        )
    return ENVOY.warn(
        "requests", found, "send more requests, or raise the sampling: abreast traffic set --sample-safe"
    )


def _copies(facts: EnvoyFacts) -> Check:
    sent = sum(facts.copies[cluster] for cluster in COPIES) - facts.copies["not_sent"]
    lost = {
        f"{cluster} {what}": facts.stats.get(f"cluster.{cluster}.upstream_{stat}", 0)
        for cluster in COPIES
        for what, stat in LOST.items()
    }
    found = f"{counted(sent, 'copy', 'copies')} sent"
    if not any(lost.values()):
        return ENVOY.ok("copies", found)
    why = ", ".join(f"{name} {count(number)}" for name, number in lost.items() if number)
    return ENVOY.warn(
        "copies", f"{found}; lost since Envoy started: {why}", "is that version up, and fast enough?"
    )
