"""The endpoint of a pair: its method, its route, and the source of the route.

The route is the template of the middleware, else a declared template (configuration before OpenAPI), else the path with
`{id}` at learned places and for ids. gRPC methods keep their path. The operation of a GraphQL request follows its route.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from abreast.protocol.capture import Capture, Request
from abreast_sidecar.compare.content import GRPC_TYPE
from abreast_sidecar.compare.headers import get_header
from abreast_sidecar.compare.model import ID_PATTERN

RouteSource = Literal["", "middleware", "configured", "openapi", "learned", "path", "grpc", "graphql"]
SOURCES_BY_PRECEDENCE: tuple[RouteSource, ...] = ("middleware", "configured", "openapi", "learned", "path")
NO_ROUTE = "(no route)"  # one endpoint for all unknown paths, which scanners try by the thousand
ID_SEGMENT = "{id}"
REST_SEGMENT = "..."  # all segments beyond the limits
MAX_SEGMENTS = 30
MAX_ROUTE_CHARS = 250  # of a route from a path, and of a template
MAX_LITERAL_CHARS = 100  # a longer segment is an id
MAX_OPERATION_CHARS = 100
MAX_PATTERN_SEGMENT_CHARS = 500
# A place keeps values such as `/users/me`: they have at least so many pairs, and the next value far fewer. Popular ids have
# no such gap to the others.
MIN_KEPT_PAIRS = 20
MIN_KEPT_RATIO = 5  # to the next value
NOT_FOUND = 404
GRPC_UNIMPLEMENTED = "12"
GRAPHQL_SEGMENTS = frozenset({"graphql", "gql"})

_ROUTE_CONVERTOR = re.compile(r"\{(\w+):\w+\}")
_COMPOUND_ID = re.compile(
    r"\d{4}-(\d\d|W\d\d|\d\d-\d\d([T_ ].{0,40})?)"  # a month, week, day or time
    r"|(sha\d{1,3}|md5)[:-][0-9A-Fa-f]{16,}"
    r"|[+-]?\d+(\.\d+)?([,;][+-]?\d+(\.\d+)?)+"  # coordinates, or several numbers
)
_EXTENSION = re.compile(r"\.[A-Za-z][0-9A-Za-z]{1,4}")  # of a file, such as `.json`
_TEMPLATE = re.compile(r"/[^\s?#\x00-\x1f]*")
_PARAMETER = re.compile(r"\{[^{}/]+\}")
_GRAPHQL_TOKEN = re.compile(
    r'"""(?:\\"""|[^"]|"(?!""))*"""|"(?:\\.|[^"\\\n\r])*"'  # strings
    r"|#[^\n\r]*"
    r'|[@$&]\w+|[_A-Za-z][_0-9A-Za-z]*|[{}()\[\]"]'
)
_BRACKETS = {"{": "}", "(": ")", "[": "]"}
_OPERATION_TYPES = frozenset({"query", "mutation", "subscription"})


class Route(NamedTuple):
    route: str
    source: RouteSource


class ResolvedEndpoint(NamedTuple):
    method: str
    route: str
    source: RouteSource


class TemplateError(ValueError):
    """A text is no path template."""


@dataclass(slots=True)
class TemplateNode:
    """A node of a tree of templates, one level for each segment. Literals match before parameters."""

    literals: dict[str, TemplateNode] = field(default_factory=dict)
    patterns: dict[tuple[str, ...], TemplateNode] = field(default_factory=dict)  # by the literals around parameters
    parameter: TemplateNode | None = None  # matches a whole segment
    templates: dict[str, str] = field(default_factory=dict)  # by method; empty: any method

    def add(self, method: str, template: str) -> None:
        """Add a template. The first of two templates for the same method and paths counts."""
        node = self
        for segment in template.split("/"):
            node = node._descend(segment)
        node.templates.setdefault(method, template)

    def _descend(self, segment: str) -> TemplateNode:
        if _PARAMETER.fullmatch(segment):
            self.parameter = self.parameter or TemplateNode()
            return self.parameter
        if "{" not in segment:
            return self.literals.setdefault(segment, TemplateNode())
        return self.patterns.setdefault(tuple(_PARAMETER.split(segment)), TemplateNode())

    def find(self, method: str, segments: Sequence[str], index: int = 0) -> str | None:
        """Return the template for a path. The time is bounded by the size of the tree."""
        if index == len(segments):
            templates = self.templates
            head = templates.get("GET") if method == "HEAD" else None
            return templates.get(method) or head or templates.get("")
        segment = segments[index]
        candidates = [self.literals.get(segment)]
        if segment and len(segment) <= MAX_PATTERN_SEGMENT_CHARS:
            candidates += [node for literals, node in self.patterns.items() if _is_match(literals, segment)]
        if segment:
            candidates.append(self.parameter)
        for node in candidates:
            template = node and node.find(method, segments, index + 1)
            if template:
                return template
        return None


def _is_match(literals: tuple[str, ...], segment: str) -> bool:
    """Tell whether a segment is the literals with one character or more between each two.

    The leftmost place of each literal leaves the most room to the others, so no other place is tried.
    """
    first, *inner, last = literals
    if not (segment.startswith(first) and segment.endswith(last)):
        return False
    position, end = len(first), len(segment) - len(last)
    for literal in inner:
        start = segment.find(literal, position + 1, end)
        if start < 0:
            return False
        position = start + len(literal)
    return position < end


class Template(NamedTuple):
    source: RouteSource
    service: str  # empty: all
    method: str  # empty: all
    path: str  # such as `/users/{name}`


def parse_template(text: str) -> tuple[str, str]:
    """Return method and path of a template such as `GET /users/{name}` or `/users/{name}`. Raise TemplateError."""
    method, _, path = text.strip().rpartition(" ")
    method = method.strip()
    if method and not (method.isascii() and method.isalpha()):
        raise TemplateError(f"{method[:MAX_LITERAL_CHARS]!r} is no method")
    if not _TEMPLATE.fullmatch(path):
        raise TemplateError("a path begins with / and has no spaces, ? or #")
    if len(path) > MAX_ROUTE_CHARS or path.count("/") > MAX_SEGMENTS:
        raise TemplateError(f"a path has at most {MAX_ROUTE_CHARS} characters and {MAX_SEGMENTS} segments")
    if re.search("[{}]", _PARAMETER.sub("", path)):
        raise TemplateError("a parameter is a name in braces within a segment, such as {name}")
    return method.upper(), path


@dataclass(frozen=True, slots=True)
class EndpointTemplates:
    """A snapshot of the templates that routes come from. Build it with `from_templates`."""

    configured: Mapping[str, TemplateNode] = field(default_factory=dict)  # by service; empty: all services
    openapi: Mapping[str, TemplateNode] = field(default_factory=dict)
    # By service: places such as `/users/{id}`, whose segment is an id, and kept values such as `/users/me`.
    learned: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def from_templates(cls, templates: Iterable[Template]) -> EndpointTemplates:
        trees: dict[str, dict[str, TemplateNode]] = {"configured": {}, "openapi": {}}
        learned: dict[str, set[str]] = {}
        for source, service, method, path in templates:
            if source == "learned":
                learned.setdefault(service, set()).add(path)
            else:
                trees[source].setdefault(service, TemplateNode()).add(method, path)
        return cls(**trees, learned={service: frozenset(paths) for service, paths in learned.items()})

    def find_declared(self, service: str, method: str, path: str) -> Route | None:
        segments = path.split("/", MAX_SEGMENTS + 1)
        trees: tuple[tuple[RouteSource, Mapping[str, TemplateNode]], ...] = (
            ("configured", self.configured),
            ("openapi", self.openapi),
        )
        for source, tree_by_service in trees:
            for name in (service, ""):
                tree = tree_by_service.get(name)
                template = tree and tree.find(method, segments)
                if template:
                    return Route(template, source)
        return None

    def resolve(self, service: str, method: str, path: str) -> Route:
        """Return the route of a path. A route that another snapshot returned is a path too."""
        return self.find_declared(service, method, path) or generalise(path, self.learned.get(service, frozenset()))


NO_TEMPLATES = EndpointTemplates()


def resolve_endpoint(captures: Sequence[Capture], templates: EndpointTemplates) -> ResolvedEndpoint:
    """Return the endpoint of the captures of old and new, at least one.

    The template of old counts, so that a renamed parameter makes no new endpoint.
    """
    request = captures[0].request
    for capture in captures:
        if capture.request.route:
            request = capture.request
            route = Route(_drop_convertors(request.route), "middleware")
            break
    else:
        route = _resolve_path(captures, templates)
    for capture in captures:
        if operation := read_graphql_operation(capture.request):
            return ResolvedEndpoint(request.method, f"{route.route} {operation}", "graphql")
    return ResolvedEndpoint(request.method, *route)


def _resolve_path(captures: Sequence[Capture], templates: EndpointTemplates) -> Route:
    service, request = captures[0].service, captures[0].request
    is_grpc = get_header(request.headers, "content-type").startswith(GRPC_TYPE)
    if not is_grpc and (declared := templates.find_declared(service, request.method, request.path)):
        return declared
    if all(_is_unknown(capture) for capture in captures):
        return Route(NO_ROUTE, "")
    return Route(request.path, "grpc") if is_grpc else templates.resolve(service, request.method, request.path)


def _is_unknown(capture: Capture) -> bool:
    answer = capture.answer
    status = get_header(answer.trailers, "grpc-status") or get_header(answer.headers, "grpc-status")
    return answer.status == NOT_FOUND or status == GRPC_UNIMPLEMENTED


@lru_cache(maxsize=4096)
def _drop_convertors(template: str) -> str:
    return _ROUTE_CONVERTOR.sub(r"{\1}", template)


def generalise(path: str, learned: frozenset[str]) -> Route:
    """Return the path with `{id}` for ids and at learned places."""
    first, *segments = path.split("/", MAX_SEGMENTS + 1)
    route = first[:MAX_ROUTE_CHARS]
    source: RouteSource = "path"
    for number, segment in enumerate(segments, 1):
        if is_id(segment):
            general_segment = ID_SEGMENT
        elif segment and f"{route}/{ID_SEGMENT}" in learned and f"{route}/{segment}" not in learned:
            general_segment, source = ID_SEGMENT, "learned"
        else:
            general_segment = _generalise_file_name(segment)
        if number > MAX_SEGMENTS or len(route) + len(general_segment) > MAX_ROUTE_CHARS:
            route += f"/{REST_SEGMENT}"
            break
        route += f"/{general_segment}"
    return Route(route or "/", source)


def _generalise_file_name(segment: str) -> str:
    """Return `{id}.json` for `7.json`: Rails and others choose the format by an extension."""
    stem, dot, extension = segment.rpartition(".")
    return f"{ID_SEGMENT}.{extension}" if _EXTENSION.fullmatch(dot + extension) and is_id(stem) else segment


def is_id(segment: str) -> bool:
    """Tell whether a segment is an id by its form: numbers, a UUID, hash, date or a very long text."""
    return (
        len(segment) > MAX_LITERAL_CHARS
        or ID_PATTERN.fullmatch(segment) is not None
        or _COMPOUND_ID.fullmatch(segment) is not None
    )


def learn_places(pairs_by_route: Mapping[str, int], learned: frozenset[str], max_values: int) -> frozenset[str]:
    """Return `learned` with the places that have more than `max_values` values, and the values that they keep.

    `pairs_by_route`: routes from paths, with their pairs. Places near the root come first, because they merge the places
    below.
    """

    def split_routes() -> list[tuple[list[str], int]]:
        return [(generalise(path, learned).route.split("/"), pairs) for path, pairs in pairs_by_route.items()]

    routes = split_routes()
    for depth in range(1, max((len(segments) for segments, _ in routes), default=0)):
        values_by_prefix: dict[str, Counter[str]] = {}
        for segments, pairs in routes:
            if len(segments) > depth and segments[depth] not in {"", ID_SEGMENT, REST_SEGMENT}:
                values_by_prefix.setdefault("/".join(segments[:depth]), Counter())[segments[depth]] += pairs
        former = learned
        for prefix, values in values_by_prefix.items():
            if len(values) > max_values and f"{prefix}/{ID_SEGMENT}" not in learned:
                kept_values = select_kept_values(values, max_values)
                learned |= {f"{prefix}/{segment}" for segment in (ID_SEGMENT, *kept_values)}
        if learned != former:
            learned |= {generalise(place, learned).route for place in learned}  # places below the new ones stay
            routes = split_routes()
    return learned


def select_kept_values(values: Mapping[str, int], max_values: int) -> list[str]:
    """Return the values that are literals by their share of the pairs: those above the lowest gap of the counts."""
    ranked = sorted(values.items(), key=lambda item: -item[1])
    for number in range(min(max_values, len(ranked) - 1), 0, -1):
        pairs, next_pairs = ranked[number - 1][1], ranked[number][1]
        if pairs >= max(MIN_KEPT_PAIRS, MIN_KEPT_RATIO * next_pairs):
            return [segment for segment, _ in ranked[:number]]
    return []


class _GraphQLRequest(msgspec.Struct):
    query: str
    operation_name: str | None = msgspec.field(name="operationName", default=None)


_graphql_decoder = msgspec.json.Decoder(_GraphQLRequest)


def read_graphql_operation(request: Request) -> str:
    """Return type and name of the operation, such as `query Search`. Return empty text for batches and other bodies."""
    if request.method != "POST" or request.path.rstrip("/").rpartition("/")[2] not in GRAPHQL_SEGMENTS:
        return ""
    try:
        document = _graphql_decoder.decode(request.body.content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    operations = list_graphql_operations(document.query)
    if document.operation_name:
        operations = [operation for operation in operations if operation[1] == document.operation_name]
    if len(operations) != 1:
        return ""
    kind, name = operations[0]
    return f"{kind} {name}" if name and len(name) <= MAX_OPERATION_CHARS else kind


def list_graphql_operations(document: str) -> list[tuple[str, str]]:
    """Return the type and the name of each operation of a GraphQL document.

    This is no parser: an operation is its type, a name and a pair of braces, or a pair of braces alone.
    """
    operations: list[tuple[str, str]] = []
    words: list[str] = []  # of the definition
    for token in _list_outer_tokens(document):
        if token == "}":
            words = []
        elif token != "{":
            words.append(token)
        elif not words:
            operations.append(("query", ""))
        elif words[0] in _OPERATION_TYPES:
            name = next(iter(words[1:]), "")
            operations.append((words[0], name if name.isidentifier() else ""))
    return operations


def _list_outer_tokens(document: str) -> list[str]:
    """Return the words and brackets of a GraphQL document outside of brackets. Return none if they don't match."""
    tokens: list[str] = []
    closing: list[str] = []
    for match in _GRAPHQL_TOKEN.finditer(document):
        token = match[0]
        if token == '"':
            return []
        if token[0] in '"#':
            continue
        if token in _BRACKETS.values() and (not closing or closing.pop() != token):
            return []
        if not closing:
            tokens.append(token)
        if token in _BRACKETS:
            closing.append(_BRACKETS[token])
    return [] if closing else tokens
