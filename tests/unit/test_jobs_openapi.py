"""Path templates from OpenAPI documents."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from abreast_sidecar.compare.endpoints import MAX_ROUTE_CHARS, Template
from abreast_sidecar.errors import OpenApiError
from abreast_sidecar.jobs.endpoints import MAX_DOCUMENT_PATHS, MAX_DOCUMENT_SERVERS, DeclaredTemplates, parse_openapi


@pytest.mark.parametrize(
    ("document", "templates"),
    [
        ('{"openapi": "3.1.0", "paths": {"/users/{name}": {"get": {}}, "/": {}}}', ["/users/{name}", "/"]),
        ("swagger: '2.0'\nbasePath: /v2/\npaths:\n  /pets/{id}: {get: {}}\n", ["/pets/{id}", "/v2/pets/{id}"]),
        ('{"openapi": "3.0.0", "servers": [{"url": "/"}, {"url": 7}, "x", {"url": "/v1"}], "paths": {"/a": {}}}', ["/a", "/v1/a"]),
        ('{"openapi": "3.0.0", "servers": [{"url": "https://{host}/v1", "variables": {"host": {"default": "h"}}}], "paths": {"/a": {}}}', ["/a", "/v1/a"]),
        ("openapi: 3.1.0\npaths: {}\n", []),
    ],
)  # fmt: skip
def test_templates_come_from_the_paths_of_a_document(document: str, templates: list[str]) -> None:
    assert parse_openapi(document) == (templates, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("openapi: 3.1.0\npaths:\n\t/a: {}\n", "line 3, column 1: "),
        ('{"openapi": "3.1.0", "paths": {', "line 2, column 1: "),
        ("<html></html>", "it has no field openapi or swagger"),
        ("", "it has no field openapi or swagger"),
        ("[1]", "it has no field openapi or swagger"),
        ("openapi: 3.1.0", "paths: must be a mapping, got NoneType"),
        ('{"openapi": "3.1.0", "paths": ["/a"]}', "paths: must be a mapping, got list"),
        ("[" * 100_000, "line 1, column [0-9]+: it has more than 100 levels"),
        ("a: &a {x: 1}\nb: {<<: *a}", "line 2, column 5: replace the merge key"),
        ("- " * 100_000, "line 1, column [0-9]+: it has more than 100 levels"),
        ("\0\x01", "it is neither JSON nor YAML"),
        ("openapi: 2026-99-99", "it is neither JSON nor YAML"),
    ],
)
def test_unusable_document_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(OpenApiError, match=message):
        parse_openapi(text)


def test_paths_with_errors_are_left_out_and_named() -> None:
    document = {"openapi": "3.1.0", "paths": {"/a/{b": {}, "/c?d": {}, "e": {}, "/good/{f}": {}, "x-note": {}}}

    templates, problems = parse_openapi(json.dumps(document))

    assert templates == ["/good/{f}"]
    assert [problem.partition(":")[0] for problem in problems] == ["paths./a/{b", "paths./c?d", "paths.e"]


def test_paths_of_a_document_are_bounded() -> None:
    paths: dict[str, object] = {f"/a{number}": {} for number in range(MAX_DOCUMENT_PATHS + 1)}

    templates, problems = parse_openapi(json.dumps({"openapi": "3.1.0", "paths": paths}))

    assert len(templates) == MAX_DOCUMENT_PATHS
    assert problems == [f"paths: it has more than {MAX_DOCUMENT_PATHS}; the others are left out"]


async def test_error_in_a_document_leaves_the_other_templates(tmp_path: Path) -> None:
    broken, good = tmp_path / "broken.yaml", tmp_path / "good.yaml"
    broken.write_text(f"openapi: 3.1.0\npaths:\n  ? 0x{'f' * 5000}\n")  # an integer that Python does not format
    good.write_text("openapi: 3.1.0\npaths:\n  /users/{name}: {}\n")

    declared = await DeclaredTemplates(("/shops/{shop}",), (str(broken), str(good))).read()

    assert declared.templates == {
        Template("configured", "", "", "/shops/{shop}"),
        Template("openapi", "", "", "/users/{name}"),
    }
    [problem] = declared.problems
    assert problem.startswith(f"{broken}: it can't be used: ValueError in ")
    assert not declared.is_complete


# Servers


def parse_servers(*servers: object) -> tuple[list[str], list[str]]:
    templates, problems = parse_openapi(json.dumps({"openapi": "3.1.0", "servers": servers, "paths": {"/a": {}}}))
    return list(templates), list(problems)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://[your-host]/api", "'your-host' does not appear to be an IPv4 or IPv6 address"),
        ("https://[::1/api", "Invalid IPv6 URL"),
        ("https://h/{api", "a parameter is a name in braces"),
        ("https://h/" + "x" * MAX_ROUTE_CHARS, f"a URL has at most {MAX_ROUTE_CHARS} characters"),
    ],
)
def test_server_with_a_bad_url_is_left_out_and_named(url: str, message: str) -> None:
    templates, [problem] = parse_servers({"url": url}, {"url": "/v1"})

    assert templates == ["/a", "/v1/a"]
    assert problem.startswith(f"servers.0: {message}")
    assert problem.endswith("; paths count without it")


def test_path_that_is_too_long_below_a_server_stays_without_it() -> None:
    long_base = "/" + "x" * (MAX_ROUTE_CHARS - 2)

    templates, [problem] = parse_servers({"url": long_base}, {"url": "/v1"})

    assert templates == ["/a", "/v1/a"]
    assert problem.startswith("paths./xxx")


def test_default_of_a_variable_is_no_template_of_variables() -> None:
    variables: dict[str, Any] = {"a": {"default": "{b}{b}"}, "b": {"default": "x"}, "c": {"default": ["y"]}, "d": "z"}

    templates, problems = parse_servers({"url": "/{a}/{b}/{c}/{d}", "variables": variables})

    assert templates == ["/a", "/{b}{b}/x/{c}/{d}/a"]
    assert problems == []


NESTED_VARIABLES = {f"a{n}": {"default": f"{{a{n + 1}}}" * 2} for n in range(24)}
NESTED_ALIASES = "x0: &x0 [a, a]\n" + "".join(f"x{n}: &x{n} [*x{n - 1}, *x{n - 1}]\n" for n in range(1, 23))
LONG_DEFAULT = {"url": "/{a}" * 60, "variables": {"a": {"default": "x" * 1_000_000}}}


@pytest.mark.parametrize(
    "document",
    [
        json.dumps({"openapi": "3.1.0", "servers": [{"url": "/{a0}", "variables": NESTED_VARIABLES}], "paths": {}}),
        json.dumps({"openapi": "3.1.0", "servers": [LONG_DEFAULT], "paths": {}}),
        f"openapi: 3.1.0\n{NESTED_ALIASES}servers: [{{url: *x22}}]\npaths: {{}}\n",
        f"openapi: 3.1.0\n{NESTED_ALIASES}servers: [{{url: '/{{v}}', variables: {{v: {{default: *x22}}}}}}]\npaths: {{}}\n",
    ],
)
def test_memory_of_a_document_with_nested_texts_is_bounded(document: str) -> None:
    tracemalloc.start()
    try:
        parse_openapi(document)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 20_000_000


def test_servers_of_a_document_are_bounded() -> None:
    templates, problems = parse_servers(*({"url": f"/v{number}"} for number in range(MAX_DOCUMENT_SERVERS + 1)))

    assert len(templates) == 1 + MAX_DOCUMENT_SERVERS
    assert problems == [f"servers: it has more than {MAX_DOCUMENT_SERVERS}; the others are left out"]
