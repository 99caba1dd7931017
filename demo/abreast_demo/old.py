"""The old version of the shop, a Starlette app."""

from __future__ import annotations

from http import HTTPStatus

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from abreast_demo.shop import (
    CURRENCIES_WITHOUT_MINOR_UNIT,
    CURRENCY_RATES,
    SEARCH_ID_HEADER,
    Product,
    RequestIdMiddleware,
    Shop,
    current_timestamp,
    handle_database_error,
    round_to_cents,
    shuffle_members,
    summarise_product,
)

LIKE_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "\\%_"})  # the wildcards of LIKE


async def require_product(request: Request) -> Product:
    product = await get_shop(request).find_product(request.path_params["product_id"])
    if product is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such product")
    return product


def get_shop(request: Request) -> Shop:
    shop: Shop = request.app.state.shop
    return shop


async def list_categories(request: Request) -> Response:
    rows = await get_shop(request).list_categories()
    return JSONResponse({"categories": rows}, headers={"cache-control": "public, max-age=300"})


async def list_category_products(request: Request) -> Response:
    products = await get_shop(request).list_category_products(request.path_params["slug"])
    if not products:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such category")
    return JSONResponse({"products": [summarise_product(product) for product in products]})


async def get_product(request: Request) -> Response:
    product = await require_product(request)
    content = {**summarise_product(product), "category": product.category, "stock": product.stock}
    return JSONResponse(content, headers={"cache-control": "public, max-age=30"})


async def get_price(request: Request) -> Response:
    product = await require_product(request)
    currency = request.query_params.get("currency", "EUR")
    if currency not in CURRENCY_RATES:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "unknown currency")
    amount = product.convert_price(currency)
    value = (
        int(amount.quantize(1, "ROUND_HALF_UP"))
        if currency in CURRENCIES_WITHOUT_MINOR_UNIT
        else float(round_to_cents(amount))
    )
    return JSONResponse({"product": product.id, "currency": currency, "amount": value})


async def list_reviews(request: Request) -> Response:
    product = await require_product(request)
    return JSONResponse({"product": product.id, "reviews": await get_shop(request).list_reviews(product.id)})


async def list_related_products(request: Request) -> Response:
    product = await require_product(request)
    return JSONResponse(
        {
            "product": product.id,
            "related": shuffle_members(await get_shop(request).list_related_product_ids(product.id)),
        }
    )


async def search_products(request: Request) -> Response:
    query = request.query_params.get("q", "")
    products = await get_shop(request).search_products("search_text", f"%{query.translate(LIKE_ESCAPES)}%")
    identity = request.state.request_id
    content = {"query": query, "items": [summarise_product(product) for product in products], "request_id": identity}
    return JSONResponse(content, headers={SEARCH_ID_HEADER: identity})


async def get_stats(request: Request) -> Response:
    shop_stats = await get_shop(request).get_stats()
    content = {
        "products": shop_stats.products,
        "in_stock": shop_stats.in_stock,
        "average_price": shop_stats.average_cents / 100,
        "generated_at": current_timestamp(),
    }
    return JSONResponse(content)


async def create_order(request: Request) -> Response:
    order_request = await request.json()
    product_id, quantity = int(order_request["product"]), int(order_request["quantity"])
    if await get_shop(request).find_product(product_id) is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such product")
    order_id = await get_shop(request).create_order(product_id, quantity)
    return JSONResponse({"order": str(order_id), "product": product_id, "quantity": quantity}, HTTPStatus.CREATED)


async def get_health(request: Request) -> Response:  # noqa: ARG001  # Starlette's signature
    return JSONResponse({"status": "ok"})


async def handle_http_exception(request: Request, error: Exception) -> Response:  # noqa: ARG001  # Starlette's signature
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code)


def build_starlette_app(shop: Shop) -> Starlette:
    return Starlette(
        routes=[
            Mount(
                "/catalogue",
                routes=[Route("/categories", list_categories), Route("/categories/{slug}", list_category_products)],
            ),
            Route("/products/{product_id:int}", get_product),
            Route("/products/{product_id:int}/price", get_price),
            Route("/products/{product_id:int}/reviews", list_reviews),
            Route("/products/{product_id:int}/related", list_related_products),
            Route("/search", search_products),
            Route("/stats", get_stats),
            Route("/orders", create_order, methods=["POST"]),
            Route("/healthz", get_health),
        ],
        middleware=[Middleware(RequestIdMiddleware)],
        exception_handlers={HTTPException: handle_http_exception, psycopg.Error: handle_database_error},
        lifespan=shop.lifespan,
    )
