"""The nouns of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from msgspec import Struct

from abreast.capture import Capture
from abreast_sidecar.compare.path import Place
from abreast_sidecar.compare.value import shown

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


class Told(NamedTuple):
    place: str
    old: str | None
    new: str | None


class Difference(Struct, frozen=True, eq=False):
    """One place where two answers differ, seen from the old one."""

    part: Part
    path: str  # generalised: `$.items[*].price`, a header's name, `200->500`; empty for the whole part
    kind: Kind
    impact: Impact
    at: (
        Place | Told
    )  # texts of a Place are written when someone reads them: most only count for what is known already
    explained_by: str = ""  # the rule that covers it
    hint: str = ""  # a rule that would: `keyed-by id`, `unordered`

    @staticmethod
    def told(
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
        return Difference(part, path, kind, impact, Told(place, old, new), explained_by, hint)

    @property
    def place(self) -> str:
        """Exact: `$.items[3].price`"""
        return self.at.exact() if isinstance(self.at, Place) else self.at.place

    @property
    def old(self) -> str | None:
        """JSON text of at most VALUE_LIMIT characters; None where there is none."""
        if isinstance(self.at, Place):
            return None if self.kind == "added" else shown(self.at.old)
        return self.at.old

    @property
    def new(self) -> str | None:
        if isinstance(self.at, Place):
            return None if self.kind == "removed" else shown(self.at.new)
        return self.at.new

    def record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _RECORDED}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Difference) and self.record() == other.record()

    def __hash__(self) -> int:
        return hash(tuple(self.record().values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Difference.told, tuple(self.record().values())


_RECORDED = ("part", "path", "place", "kind", "impact", "old", "new", "explained_by", "hint")


@dataclass(frozen=True, slots=True)
class Rules:
    """What the user set about comparing."""

    volatile_headers: frozenset[str] = VOLATILE_HEADERS  # lower case
    max_differences: int = 200  # of one pair; what is beyond says nothing new
    max_decoded: int = 16 * 1024 * 1024  # bytes of a compressed body, decoded
    max_work: int = 600_000  # steps (compare.effort): what is beyond is compared as a whole
    declared: RuleSet | None = None  # those of the user that hold today

    @classmethod
    def ignoring(cls, headers: tuple[str, ...]) -> Rules:
        """The default rules, and these response headers not compared."""
        return cls(volatile_headers=VOLATILE_HEADERS | {name.lower() for name in headers})


class Judgement(Struct, frozen=True):
    """What became of one sampled request."""

    outcome: Outcome
    method: str
    route: str  # template, or the path with its ids generalised
    old: Capture | None = None
    new: Capture | None = None
    baseline: Capture | None = None  # a second answer of old
    differences: tuple[Difference, ...] = ()  # old against new, that no rule explains
    explained: tuple[Difference, ...] = ()  # old against new, each with the rule that explains it
    noise: tuple[Difference, ...] = ()  # old against old, that no rule explains
    noise_explained: tuple[Difference, ...] = ()  # old against old, each with the rule that explains it
    baseline_compared: bool = False
    reason: str = ""

    @property
    def shown(self) -> tuple[Difference, ...]:
        """All that was found, explained or not."""
        return self.differences + self.explained + self.noise + self.noise_explained
