"""The endpoint of a pair: templates, learned places, gRPC and GraphQL."""

from __future__ import annotations

import json
import pickle
import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from abreast.protocol.capture import Answer, Body, Capture, Request, Role
from abreast_sidecar.compare.endpoints import (
    MAX_ROUTE_CHARS,
    NO_ROUTE,
    NO_TEMPLATES,
    EndpointTemplates,
    Template,
    TemplateError,
    generalise,
    learn_places,
    parse_template,
    read_graphql_operation,
    resolve_endpoint,
)

NOTHING: frozenset[str] = frozenset()


def capture(path: str, method: str = "GET", *, version: Any = "old", status: int = 200, **request: Any) -> Capture:
    role: Role = "live" if version == "old" else "shadow"
    return Capture("p", "shop", version, role, Request(method, path, **request), Answer(status))


def templates(*texts: str, source: Any = "configured", service: str = "") -> EndpointTemplates:
    return EndpointTemplates.from_templates(Template(source, service, *parse_template(text)) for text in texts)


def learned(*paths: str) -> EndpointTemplates:
    return EndpointTemplates.from_templates(Template("learned", "shop", "", path) for path in paths)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/products/7", "/products/{id}"),
        ("/u/0d7c1e3a-0000-4000-8000-000000000001/cart", "/u/{id}/cart"),
        ("/days/2026-11-30", "/days/{id}"),
        ("/days/2026-11", "/days/{id}"),
        ("/at/2026-11-30T10:00:00Z", "/at/{id}"),
        ("/weeks/2026-W48", "/weeks/{id}"),
        ("/blobs/sha256:9f86d081884c7d659a2feaa0c55ad015", "/blobs/{id}"),
        ("/blobs/9f86d081884c7d65", "/blobs/{id}"),
        ("/point/9,5", "/point/{id}"),
        ("/bbox/-1.5,40,+2.25,41.0.png", "/bbox/{id}.png"),
        ("/list/,5", "/list/,5"),
        ("/products/7.json", "/products/{id}.json"),
        ("/blobs/9f86d081884c7d65.tar/7.Z", "/blobs/{id}.tar/7.Z"),
        ("/v/1.0/app.js/7.jsonschema/.json", "/v/1.0/app.js/7.jsonschema/.json"),
        ("/v1/users", "/v1/users"),
        ("/users/", "/users/"),
        ("/", "/"),
        ("", "/"),
        ("*", "*"),
        ("/x/" + "a" * 101, "/x/{id}"),
        ("/" + "a/" * 8000, "/a" * 30 + "/..."),
        ("//" + "/" * 16_000, "/" * 30 + "/..."),
        ("/" + "b" * 99 + ("/" + "c" * 99) * 9, "/" + "b" * 99 + "/" + "c" * 99 + "/..."),
    ],
)
def test_paths_are_generalised_by_the_form_of_their_segments(path: str, expected: str) -> None:
    assert generalise(path, NOTHING) == (expected, "path")


def test_learned_place_generalises_all_segments_below_its_prefix() -> None:
    snapshot = learned("/users/{id}", "/users/me")

    routes = [snapshot.resolve("shop", "GET", f"/users/{rest}") for rest in ("alice", "bob/orders", "me", "", "7")]

    assert routes == [
        ("/users/{id}", "learned"),
        ("/users/{id}/orders", "learned"),
        ("/users/me", "path"),
        ("/users/", "path"),
        ("/users/{id}", "path"),
    ]
    assert snapshot.resolve("other", "GET", "/users/alice") == ("/users/alice", "path")


def test_precedence_of_templates() -> None:
    by_all = EndpointTemplates.from_templates(
        [
            Template("learned", "shop", "", "/users/{id}"),
            Template("openapi", "", "", "/users/{user}"),
            Template("configured", "", "GET", "/users/{name}"),
        ]
    )
    old, new = capture("/users/alice"), capture("/users/alice", version="new", route="/users/{slug:str}")

    assert resolve_endpoint([old, new], by_all) == ("GET", "/users/{slug}", "middleware")
    assert resolve_endpoint([new, old], by_all) == ("GET", "/users/{slug}", "middleware")
    assert resolve_endpoint([old], by_all) == ("GET", "/users/{name}", "configured")
    assert resolve_endpoint([capture("/users/alice", "POST")], by_all) == ("POST", "/users/{user}", "openapi")
    assert resolve_endpoint([old], learned("/users/{id}")) == ("GET", "/users/{id}", "learned")
    assert resolve_endpoint([old], NO_TEMPLATES) == ("GET", "/users/alice", "path")


def test_literals_and_parts_of_segments_match_before_parameters() -> None:
    snapshot = templates(
        "/users/{name}", "/users/me", "/users/{name}.json", "/users/{name}/orders", "HEAD /head", "GET /get"
    )

    routes = {
        path: snapshot.resolve("shop", "GET", path).route
        for path in ("/users/me", "/users/al", "/users/al.json", "/users/me/orders", "/users/", "/head")
    }

    assert routes == {
        "/users/me": "/users/me",
        "/users/al": "/users/{name}",
        "/users/al.json": "/users/{name}.json",
        "/users/me/orders": "/users/{name}/orders",
        "/users/": "/users/",
        "/head": "/head",
    }
    assert snapshot.resolve("shop", "HEAD", "/get").source == "configured"
    assert snapshot.resolve("shop", "POST", "/get").source == "path"


@pytest.mark.parametrize(
    ("template", "segment"),
    [
        ("/{year}-{month}-{day}-{slug}.html", "-" * 500),
        ("/{a}{b}{c}{d}{e}{f}x", "y" * 500),
        ("/{a}a{b}a{c}a{d}a{e}b", "a" * 500),
    ],
)
def test_templates_with_several_parameters_in_a_segment_are_fast(template: str, segment: str) -> None:
    snapshot = templates(template)
    started = time.process_time()

    for _ in range(100):
        assert snapshot.find_declared("shop", "GET", f"/{segment}") is None

    assert time.process_time() - started < 5


@given(st.lists(st.sampled_from(["{p}", "a", "b", "."]), min_size=1, max_size=7), st.text("ab.", max_size=9))
def test_parameters_match_one_character_or_more(parts: list[str], segment: str) -> None:
    pattern = "".join("[^/]+" if part == "{p}" else re.escape(part) for part in parts)

    declared = templates("/" + "".join(parts)).find_declared("shop", "GET", f"/{segment}")

    assert (declared is not None) == (re.fullmatch(pattern, segment) is not None)


def test_templates_of_a_service_match_only_its_paths() -> None:
    snapshot = templates("/users/{name}", service="shop")

    assert snapshot.resolve("shop", "GET", "/users/al").source == "configured"
    assert snapshot.resolve("billing", "GET", "/users/al").source == "path"


def test_snapshot_can_be_sent_to_another_process() -> None:
    snapshot = templates("/users/{name}", "/files/{name}.json")

    copy = pickle.loads(pickle.dumps(snapshot))  # noqa: S301  # ours

    assert copy.resolve("shop", "GET", "/files/a.json").route == "/files/{name}.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("users", "a path begins with /"),
        ("GET users/{id}", "a path begins with /"),
        ("/users?x", "has no spaces"),
        ("G3T /users", "'G3T' is no method"),
        ("/users/{id", "a name in braces"),
        ("/users/{}", "a name in braces"),
        ("/users/{a/b}", "a name in braces"),
        ("/" + "x" * 300, f"at most {MAX_ROUTE_CHARS} characters"),
    ],
)
def test_template_errors_name_the_requirement(text: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message.replace("(", r"\(")):
        parse_template(text)


def test_paths_unknown_to_both_versions_share_an_endpoint_unless_a_template_declares_them() -> None:
    both = [capture("/users/nobody", status=404), capture("/users/nobody", version="new", status=404)]

    assert resolve_endpoint(both, learned("/users/{id}")) == ("GET", NO_ROUTE, "")
    assert resolve_endpoint(both, templates("/users/{name}")).route == "/users/{name}"


# Learned places


def learn(paths: dict[str, int] | list[str], known: frozenset[str] = NOTHING, limit: int = 50) -> frozenset[str]:
    pairs = paths if isinstance(paths, dict) else dict.fromkeys(paths, 1)
    return learn_places(pairs, known, limit)


def test_learner_finds_a_place_above_the_limit() -> None:
    assert learn([f"/users/name-{n}" for n in range(50)]) == NOTHING
    assert learn([f"/users/name-{n}" for n in range(51)]) == {"/users/{id}"}


def test_learner_counts_values_with_different_rests_at_one_place() -> None:
    paths = [f"/users/name-{n}{rest}" for n in range(51) for rest in ("", "/orders", "/orders/late")]

    assert learn(paths) == {"/users/{id}"}


def test_learner_finds_places_below_places() -> None:
    paths = [f"/{shop}/c{c}x/item-{item}" for shop in ("a", "b") for c in range(60) for item in range(2)]

    places = learn(paths)

    assert places == {"/a/{id}", "/b/{id}"}  # two items are no reason for a place
    assert learn([f"/a/c{c}x/item-{c}" for c in range(60)]) == {"/a/{id}", "/a/{id}/{id}"}


def test_learner_keeps_values_with_much_more_traffic() -> None:
    paths = {"/users/me": 900, "/users/search": 40, **{f"/users/name-{n}": 2 for n in range(60)}}

    assert learn(paths) == {"/users/{id}", "/users/me", "/users/search"}


def test_learner_keeps_no_popular_ids() -> None:
    popular = {f"/tags/tag-{n}": 1000 // (n + 1) for n in range(500)}

    assert learn(popular) == {"/tags/{id}"}


def test_learner_is_bounded_for_hostile_paths() -> None:
    paths = {f"/{n}x/{n % 97}y/" + "z/" * (n % 40): 1 for n in range(2000)}
    started = time.process_time()

    places = learn(paths)
    routes = {generalise(path, places).route for path in paths}

    assert time.process_time() - started < 5
    assert len(routes) < 200
    assert learn(dict.fromkeys(routes, 1), places) == places


SEGMENT = st.sampled_from(["", "a", "b", "users", "me", "7", "{id}", "...", "x" * 120, "2026-11-30"]) | st.text(
    "abc-é{}.", max_size=6
)
PATHS = st.lists(SEGMENT, max_size=40).map(lambda segments: "/" + "/".join(segments))


@given(st.lists(PATHS, max_size=60), st.integers(1, 5))
def test_learned_routes_are_stable(paths: list[str], limit: int) -> None:
    places = learn(paths, limit=limit)
    routes = {path: generalise(path, places).route for path in paths}

    assert learn(paths, places, limit) == places
    assert {route: generalise(route, places).route for route in routes.values()} == {
        route: route for route in routes.values()
    }
    assert all(len(route) <= MAX_ROUTE_CHARS + 4 for route in routes.values())


@given(st.lists(PATHS, max_size=60), st.integers(1, 5))
@example(["/aa/a", "/aa/b", "/", "/a"], 1)
def test_routes_of_a_former_snapshot_lead_where_their_paths_lead(paths: list[str], limit: int) -> None:
    before = learn(paths[: len(paths) // 2], limit=limit)
    after = learn([generalise(path, before).route for path in paths], before, limit)

    for path in paths:
        route = generalise(path, before).route
        if not route.endswith("/..."):
            assert generalise(route, after).route == generalise(path, after).route


# gRPC and GraphQL


def test_grpc_method_keeps_its_path() -> None:
    headers = (("content-type", "application/grpc+proto"),)
    path = "/shop.v1.ProductService/GetProduct"
    call = capture(path, "POST", headers=headers)
    unimplemented = [
        replace(
            capture("/a.B/C", "POST", version=version, headers=headers), answer=Answer(200, (("grpc-status", "12"),))
        )
        for version in ("old", "new")
    ]

    assert resolve_endpoint([call], learned("/{id}", "/shop.v1.ProductService/{id}")) == ("POST", path, "grpc")
    assert resolve_endpoint(unimplemented, NO_TEMPLATES).route == NO_ROUTE


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("query Search { products { name } }", "query Search"),
        ("{ products { name } }", "query"),
        ("query { a }", "query"),
        ("query($id: ID = 3) @live { a }", "query"),
        ("query @live { a }", "query"),
        ('mutation Buy($id: ID!) { buy(id: $id, note: "} query X {") { id } }', "mutation Buy"),
        ("subscription Prices { price }", "subscription Prices"),
        ("fragment F on Product { name } query Search { products { ...F } }", "query Search"),
        ("# query A {\nquery Search {\n a # }\n}", "query Search"),
        ('query Search { a(text: """ " } mutation X { """) }', "query Search"),
        ("query A { a } query B { b }", ""),
        ("query Search { a", ""),
        ("query Search { a ) }", ""),
        ('query Search { a(b: "x) }', ""),
        ("type Query { a: Int }", ""),
        ("", ""),
        ("query " + "a" * 200 + " { a }", "query"),
    ],
)
def test_graphql_operation_is_read_from_the_document(document: str, expected: str) -> None:
    assert read_graphql_operation(graphql({"query": document})) == expected


def graphql(content: object, path: str = "/graphql", method: str = "POST") -> Request:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Request(method, path, body=Body(body, len(body)))


def test_graphql_operation_name_chooses_the_operation() -> None:
    document = "query A { a } mutation B { b }"

    assert read_graphql_operation(graphql({"query": document, "operationName": "B"})) == "mutation B"
    assert read_graphql_operation(graphql({"query": document, "operationName": "C"})) == ""


@pytest.mark.parametrize(
    "request_",
    [
        graphql([{"query": "{ a }"}]),
        graphql({"query": {"match": "all"}}),
        graphql({"extensions": {"persistedQuery": {}}}),
        graphql(b'{"query": "query Search { a }'),
        graphql(b"\xff\xfe"),
        graphql({"query": "{ a }"}, path="/search"),
        graphql({"query": "{ a }"}, method="PUT"),
    ],
)
def test_graphql_batches_and_unreadable_bodies_have_no_operation(request_: Request) -> None:
    assert read_graphql_operation(request_) == ""


def test_graphql_operation_follows_the_route_of_either_way() -> None:
    body = graphql({"query": "query Search { a }"}, path="/api/graphql/").body
    by_envoy = capture("/api/graphql/", "POST", body=body)
    by_middleware = capture("/api/graphql/", "POST", version="new", route="/api/graphql/")

    assert resolve_endpoint([by_envoy], NO_TEMPLATES) == ("POST", "/api/graphql/ query Search", "graphql")
    assert resolve_endpoint([by_envoy, by_middleware], NO_TEMPLATES).route == "/api/graphql/ query Search"


@given(st.text('{}()[]"#\\query Ab @$\n', max_size=200))
def test_graphql_reader_accepts_any_text(document: str) -> None:
    assert read_graphql_operation(graphql({"query": document})).split(" ")[0] in {
        "",
        "query",
        "mutation",
        "subscription",
    }


def test_graphql_reader_is_fast_on_long_documents() -> None:
    started = time.process_time()
    for document in ("{" * 100_000, '"' * 100_001, '"""' + '\\"' * 50_000, "# " * 50_000, "a " * 50_000):
        read_graphql_operation(graphql({"query": document}))

    assert time.process_time() - started < 5
