"""The shop as it runs today: Starlette."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from abreast_demo.shop import RATES, WHOLE, Product, Shop, rounded
from abreast_demo.stamp import SEARCH_HEADER, RequestIds, any_order, now

NAMED = str.maketrans({sign: f"\\{sign}" for sign in "\\%_"})  # what LIKE would take for a pattern


def brief(product: Product) -> dict[str, Any]:
    return {"id": product.id, "name": product.name, "price": float(product.price)}


async def known(request: Request) -> Product:
    product = await shop(request).product(request.path_params["product_id"])
    if product is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such product")
    return product


def shop(request: Request) -> Shop:
    found: Shop = request.app.state.shop
    return found


async def categories(request: Request) -> Response:
    rows = await shop(request).categories()
    return JSONResponse({"categories": rows}, headers={"cache-control": "public, max-age=300"})


async def category(request: Request) -> Response:
    products = await shop(request).category(request.path_params["slug"])
    if not products:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such category")
    return JSONResponse({"products": [brief(product) for product in products]})


async def product(request: Request) -> Response:
    found = await known(request)
    content = {**brief(found), "category": found.category, "stock": found.stock}
    return JSONResponse(content, headers={"cache-control": "public, max-age=30"})


async def price(request: Request) -> Response:
    found = await known(request)
    currency = request.query_params.get("currency", "EUR")
    if currency not in RATES:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "unknown currency")
    amount = found.price_in(currency)
    value = int(amount.quantize(1, "ROUND_HALF_UP")) if currency in WHOLE else float(rounded(amount))
    return JSONResponse({"product": found.id, "currency": currency, "amount": value})


async def reviews(request: Request) -> Response:
    found = await known(request)
    return JSONResponse({"product": found.id, "reviews": await shop(request).reviews(found.id)})


async def related(request: Request) -> Response:
    found = await known(request)
    return JSONResponse({"product": found.id, "related": any_order(await shop(request).related(found.id))})


async def search(request: Request) -> Response:
    words = request.query_params.get("q", "")
    found = await shop(request).search("search_text", f"%{words.translate(NAMED)}%")
    identity = request.state.request_id
    content = {"query": words, "items": [brief(product) for product in found], "request_id": identity}
    return JSONResponse(content, headers={SEARCH_HEADER: identity})


async def stats(request: Request) -> Response:
    found = await shop(request).stats()
    content = {
        "products": found.products,
        "in_stock": found.in_stock,
        "average_price": found.average_cents / 100,
        "generated_at": now(),
    }
    return JSONResponse(content)


async def order(request: Request) -> Response:
    wanted = await request.json()
    product, quantity = int(wanted["product"]), int(wanted["quantity"])
    if await shop(request).product(product) is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such product")
    placed = await shop(request).order(product, quantity)
    return JSONResponse({"order": str(placed), "product": product, "quantity": quantity}, HTTPStatus.CREATED)


async def health(request: Request) -> Response:  # noqa: ARG001  # Starlette's signature
    return JSONResponse({"status": "ok"})


async def refused(request: Request, error: Exception) -> Response:  # noqa: ARG001  # Starlette's signature
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code)


async def broken(request: Request, error: Exception) -> Response:  # noqa: ARG001  # Starlette's signature
    return JSONResponse({"detail": "the database refused"}, HTTPStatus.INTERNAL_SERVER_ERROR)


def build(serving: Shop) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await serving.open()
        app.state.shop = serving
        yield
        await serving.close()

    return Starlette(
        routes=[
            Mount(
                "/catalogue", routes=[Route("/categories", categories), Route("/categories/{slug}", category)]
            ),
            Route("/products/{product_id:int}", product),
            Route("/products/{product_id:int}/price", price),
            Route("/products/{product_id:int}/reviews", reviews),
            Route("/products/{product_id:int}/related", related),
            Route("/search", search),
            Route("/stats", stats),
            Route("/orders", order, methods=["POST"]),
            Route("/healthz", health),
        ],
        middleware=[Middleware(RequestIds)],
        exception_handlers={HTTPException: refused, psycopg.Error: broken},
        lifespan=lifespan,
    )
