"""The nouns of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from msgspec import Struct

from abreast.capture import Capture
from abreast_sidecar.compare.path import JsonPath
from abreast_sidecar.compare.value import render_value

if TYPE_CHECKING:
    from abreast_sidecar.compare.rules import RuleSet

Part = Literal["status", "header", "body", "error", "latency", "effect", "cache"]
Kind = Literal["added", "removed", "changed", "type", "format", "range", "order", "slower"]
Impact = Literal["breaking", "value", "additive"]
Outcome = Literal[
    "match",
    "mismatch",
    "partial",
    "only_old",
    "only_new",
    "baseline_only",
    "undecodable",
    "oversize",
    "shed",
    "aborted",
    "not_compared",
]

# Headers that say nothing about a version: they name a machine, a moment, a connection or one request, or belong to
# one build (validators). Names that end in * stand for all that begin so.
VOLATILE_HEADERS = frozenset(
    {
        "age",
        "alt-svc",
        "cf-*",
        "connection",
        "content-digest",
        "content-length",  # said again, and better, by the body; so do the digests
        "content-md5",
        "date",
        "digest",
        "etag",
        "expires",  # a moment; cache-control is compared
        "keep-alive",
        "last-modified",
        "nel",
        "report-to",
        "repr-digest",
        "server",
        "server-timing",
        "traceparent",
        "tracestate",
        "transfer-encoding",
        "via",
        "x-amz-*",
        "x-amzn-*",
        "x-b3-*",
        "x-cloud-trace-context",
        "x-correlation-id",
        "x-datadog-*",
        "x-envoy-*",
        "x-powered-by",
        "x-process-time",
        "x-ratelimit-*",
        "x-request-id",
        "x-response-time",
        "x-runtime",
        "x-served-by",
        "x-trace-id",
    }
)


class RenderedValues(NamedTuple):
    place: str
    old: str | None
    new: str | None


class Difference(Struct, frozen=True, eq=False):
    """One place where two answers differ, seen from the old one."""

    part: Part
    path: str  # generalised: `$.items[*].price`, a header's name, `200->500`; empty for the whole part
    kind: Kind
    impact: Impact
    location: (
        JsonPath | RenderedValues
    )  # texts of a Place are written when someone reads them: most only count for what is known already
    explained_by: str = ""  # the rule that covers it
    hint: str = ""  # a rule that would: `keyed-by id`, `unordered`

    @staticmethod
    def from_text(
        part: Part,
        path: str,
        place: str,
        kind: Kind,
        impact: Impact,
        old: str | None,
        new: str | None,
        explained_by: str = "",
        hint: str = "",
    ) -> Difference:
        """One whose texts are known."""
        return Difference(part, path, kind, impact, RenderedValues(place, old, new), explained_by, hint)

    @property
    def place(self) -> str:
        """Exact: `$.items[3].price`"""
        return self.location.exact() if isinstance(self.location, JsonPath) else self.location.place

    @property
    def old(self) -> str | None:
        """JSON text of at most VALUE_LIMIT characters; None where there is none."""
        if isinstance(self.location, JsonPath):
            return None if self.kind == "added" else render_value(self.location.old)
        return self.location.old

    @property
    def new(self) -> str | None:
        if isinstance(self.location, JsonPath):
            return None if self.kind == "removed" else render_value(self.location.new)
        return self.location.new

    def to_record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _RECORD_FIELDS}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Difference) and self.to_record() == other.to_record()

    def __hash__(self) -> int:
        return hash(tuple(self.to_record().values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Difference.from_text, tuple(self.to_record().values())


_RECORD_FIELDS = ("part", "path", "place", "kind", "impact", "old", "new", "explained_by", "hint")


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What the user set about comparing."""

    volatile_headers: frozenset[str] = VOLATILE_HEADERS  # lower case
    max_differences: int = 200  # of one pair; what is beyond says nothing new
    max_decoded_bytes: int = 16 * 1024 * 1024  # bytes of a compressed body, decoded
    max_work: int = 600_000  # steps (compare.effort): what is beyond is compared as a whole
    rule_set: RuleSet | None = None  # those of the user that hold today

    @classmethod
    def with_ignored_headers(cls, headers: tuple[str, ...]) -> CompareOptions:
        """The default rules, and these response headers not compared."""
        return cls(volatile_headers=VOLATILE_HEADERS | {name.lower() for name in headers})


class ComparisonResult(Struct, frozen=True):
    """What became of one sampled request."""

    outcome: Outcome
    method: str
    route: str  # template, or the path with its ids generalised
    old: Capture | None = None
    new: Capture | None = None
    baseline: Capture | None = None  # a second answer of old
    differences: tuple[Difference, ...] = ()  # old against new, that no rule explains
    explained_differences: tuple[Difference, ...] = ()  # old against new, each with the rule that explains it
    noise: tuple[Difference, ...] = ()  # old against old, that no rule explains
    explained_noise: tuple[Difference, ...] = ()  # old against old, each with the rule that explains it
    baseline_compared: bool = False
    reason: str = ""

    @property
    def all_differences(self) -> tuple[Difference, ...]:
        """All that was found, explained or not."""
        return self.differences + self.explained_differences + self.noise + self.explained_noise
