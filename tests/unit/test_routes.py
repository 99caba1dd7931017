from __future__ import annotations

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Host, Mount, Route, Router

from abreast.export.routes import RouteResolver
from abreast.recorder import Receive, Scope, Send
from support_middleware import call, http_scope


async def endpoint(_request: Request) -> Response:
    return PlainTextResponse("ok")


async def bare(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def routes() -> list[BaseRoute]:
    return [
        Route("/products", endpoint),
        Route("/products/top", endpoint),
        Route("/products/{id:int}", endpoint),
        Route("/products/{id:int}", endpoint, methods=["PUT"]),
    ]


def starlette() -> Any:
    return Starlette(
        routes=[
            *routes(),
            Mount("/static", app=bare),
            Mount("/v1", routes=[*routes(), Mount("/deep/{area}", app=Router(routes()))]),
            Mount("/sub", app=Starlette(routes=routes())),
            Mount("/tenants/{tenant}", app=Starlette(routes=routes())),
            Mount("/fast", app=fastapi(inner=True)),
            Host("api.example", app=Router([Route("/hosted/{id}", endpoint)])),
        ]
    )


def fastapi(*, inner: bool = False) -> Any:
    app = FastAPI()
    router, outer = APIRouter(prefix="/items"), APIRouter()

    @router.get("/{item}")
    async def item(item: str) -> str:
        return item

    router.add_route("/plain/{name}", endpoint)
    router.mount("/files", bare)
    outer.include_router(router, prefix="/v2")
    app.include_router(router)
    app.include_router(outer, prefix="/api")
    app.add_api_route("/direct/{id}", endpoint_of_fastapi)
    if not inner:
        app.mount("/sub", fastapi(inner=True))
        app.mount("/starlette", Starlette(routes=routes()))
        app.mount("/static", bare)
    return app


async def endpoint_of_fastapi(id: int) -> int:  # noqa: A002  # as in the paths above
    return id


PATHS = [
    (starlette, "/products", "/products"),
    (starlette, "/products/top", "/products/top"),
    (starlette, "/products/7", "/products/{id}"),
    (starlette, "/static/css/a.css", "/static/{path}"),
    (starlette, "/v1/products/7", "/v1/products/{id}"),
    (starlette, "/v1/deep/north/products/7", "/v1/deep/{area}/products/{id}"),
    (starlette, "/sub/products/7", "/sub/products/{id}"),
    (starlette, "/tenants/acme/products/7", "/tenants/{tenant}/products/{id}"),
    (starlette, "/fast/items/7", "/fast/items/{item}"),
    (starlette, "/fast/api/v2/items/7", "/fast/api/v2/items/{item}"),
    (starlette, "/nowhere", ""),
    (starlette, "/products/7/", ""),
    (fastapi, "/items/7", "/items/{item}"),
    (fastapi, "/plain/x", "/plain/{name}"),
    (fastapi, "/files/x/y", "/files/{path}"),
    (fastapi, "/api/v2/plain/x", "/api/v2/plain/{name}"),
    (fastapi, "/api/v2/files/x/y", "/api/v2/files/{path}"),
    (fastapi, "/sub/api/v2/plain/x", "/sub/api/v2/plain/{name}"),
    (fastapi, "/api/v2/items/7", "/api/v2/items/{item}"),
    (fastapi, "/direct/7", "/direct/{id}"),
    (fastapi, "/direct/x", "/direct/{id}"),
    (fastapi, "/sub/items/7", "/sub/items/{item}"),
    (fastapi, "/sub/api/v2/items/7", "/sub/api/v2/items/{item}"),
    (fastapi, "/starlette/products/7", "/starlette/products/{id}"),
    (fastapi, "/static/a", "/static/{path}"),
    (fastapi, "/nowhere", ""),
]


@pytest.mark.parametrize(("make", "path", "template"), PATHS)
async def test_template_is_the_choice_of_the_router(make: Any, path: str, template: str) -> None:
    app = make()
    scope = http_scope(path)
    await call(app, scope)

    assert RouteResolver(app).resolve(scope) == template


@pytest.mark.parametrize(("make", "path", "template"), PATHS)
async def test_template_is_resolved_if_the_app_got_a_copy_of_the_scope(make: Any, path: str, template: str) -> None:
    """Earlier Starlette and some middleware pass a copy of the scope."""
    app = make()

    async def copying(scope: Scope, receive: Receive, send: Send) -> None:
        await app(dict(scope), receive, send)

    copying.app = app  # type: ignore[attr-defined]
    scope = http_scope(path)
    await call(copying, scope)

    assert "route" not in scope
    assert RouteResolver(copying).resolve(scope) == template


@pytest.mark.parametrize(("method", "status"), [("PUT", 200), ("DELETE", 405)])
async def test_methods_of_one_path_share_a_template(method: str, status: int) -> None:
    app = starlette()
    scope = http_scope("/products/7", method)
    messages, _ = await call(app, scope)

    assert messages[0]["status"] == status
    assert RouteResolver(app).resolve(scope) == "/products/{id}"


async def test_host_route_adds_no_prefix() -> None:
    app = starlette()
    scope = {**http_scope("/hosted/7"), "headers": [(b"host", b"api.example")]}
    await call(app, scope)

    assert RouteResolver(app).resolve(scope) == "/hosted/{id}"


async def test_template_excludes_the_root_path_of_the_server() -> None:
    app = starlette()
    scope = http_scope("/proxy/v1/products/7", root_path="/proxy")
    await call(app, scope)

    assert RouteResolver(app).resolve(scope) == "/v1/products/{id}"


async def test_app_without_routes_has_no_template() -> None:
    scope = http_scope("/products/7")
    await call(bare, scope)

    assert not RouteResolver(bare).resolve(scope)


async def test_template_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abreast.export.routes.MAX_CACHED_TEMPLATES", 10)
    resolver = RouteResolver(starlette())
    for number in range(100):
        resolver.resolve(http_scope(f"/products/{number}"))
        resolver.resolve(
            {**http_scope(f"/tenants/{number}/products/7"), "app_root_path": "", "root_path": f"/tenants/{number}"}
        )

    assert len(resolver._templates) <= 10
    assert len(resolver._prefixes) <= 10
