"""The same shop, ported to FastAPI. Each mistake that the port brought is marked with its name in plants.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from http import HTTPStatus
from typing import Annotated, Any, Literal
from uuid import UUID

import psycopg
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from abreast_demo.shop import WHOLE, Product, Shop, rounded
from abreast_demo.stamp import SEARCH_HEADER, RequestIds, any_order, now

Currency = Literal["EUR", "USD", "GBP", "JPY"]


class Category(BaseModel):
    slug: str
    name: str


class Categories(BaseModel):
    categories: list[Category]


class Listed(BaseModel):
    id: int
    name: str
    price: Decimal  # planted: price-as-text


class Listing(BaseModel):
    products: list[Listed]


class Detail(BaseModel):
    id: int
    name: str
    price: float
    category: str
    stock: int = 0


class Price(BaseModel):
    product: int
    currency: Currency
    amount: float | int


class Review(BaseModel):
    id: int
    stars: int
    words: str


class Reviews(BaseModel):
    product: int
    reviews: list[Review]


class Related(BaseModel):
    product: int
    related: list[int]


class Hit(BaseModel):
    id: int
    name: str
    price: float


class Hits(BaseModel):
    query: str
    items: list[Hit]
    request_id: UUID


class Stats(BaseModel):
    products: int
    in_stock: int
    average_price: float
    median_price: float
    generated_at: str


class Wish(BaseModel):
    product: int
    quantity: int = Field(ge=1, le=20)


class Placed(BaseModel):
    order: UUID
    product: int
    quantity: int


async def the_shop(request: Request) -> Shop:  # async, or FastAPI would ask a thread for it
    found: Shop = request.app.state.shop
    return found


TheShop = Annotated[Shop, Depends(the_shop)]


async def known(product_id: int, shop: TheShop) -> Product:
    product = await shop.product(product_id)
    if product is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such product")
    return product


catalogue = APIRouter(prefix="/catalogue")
router = APIRouter()


@catalogue.get("/categories", response_model=Categories)
async def categories(shop: TheShop) -> Any:
    return {"categories": await shop.categories()}  # planted: cache-control


@catalogue.get("/categories/{slug}", response_model=Listing)
async def category(slug: str, shop: TheShop) -> Any:
    products = await shop.category(slug)
    if not products:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such category")
    listed = [{"id": found.id, "name": found.name, "price": found.price} for found in products]
    return {"products": listed}


@router.get(
    "/products/{product_id}",
    response_model=Detail,
    response_model_exclude_defaults=True,  # planted: stock-field
)
async def product(product: Annotated[Product, Depends(known)], response: Response) -> Any:
    response.headers["cache-control"] = "public, max-age=30"
    return {
        "id": product.id,
        "name": product.name,
        "price": float(product.price),
        "category": product.category,
        "stock": product.stock,
    }


@router.get("/products/{product_id}/price", response_model=Price)
async def price(product: Annotated[Product, Depends(known)], currency: Currency = "EUR") -> Any:
    amount = product.price_in(currency)
    value = int(amount) if currency in WHOLE else float(rounded(amount))  # planted: yen-rounding
    return {"product": product.id, "currency": currency, "amount": value}


@router.get("/products/{product_id}/reviews", response_model=Reviews)
async def reviews(product_id: int, shop: TheShop) -> Any:
    return {
        "product": product_id,
        "reviews": await shop.reviews(product_id),
    }  # planted: empty-reviews


@router.get("/products/{product_id}/related", response_model=Related)
async def related(product: Annotated[Product, Depends(known)], shop: TheShop) -> Any:
    return {"product": product.id, "related": any_order(await shop.related(product.id))}


@router.get("/search", response_model=Hits)
async def search(request: Request, response: Response, shop: TheShop, q: str = "") -> Any:
    found = await shop.search("search_pattern", q)  # planted: search-error, slow-search
    items = [{"id": hit.id, "name": hit.name, "price": float(hit.price)} for hit in found]
    response.headers[SEARCH_HEADER] = request.state.request_id
    return {"query": q, "items": items, "request_id": request.state.request_id}


@router.get("/stats", response_model=Stats)
async def stats(shop: TheShop) -> Any:
    found = await shop.stats()
    return {
        "products": found.products,
        "in_stock": found.in_stock,
        "average_price": found.average_cents / 100,
        "median_price": found.median_cents / 100,
        "generated_at": now(),
    }


@router.post("/orders", response_model=Placed, status_code=HTTPStatus.CREATED)
async def order(wish: Wish, shop: TheShop) -> Any:
    await known(wish.product, shop)
    placed = await shop.order(wish.product, wish.quantity)
    return {"order": placed, "product": wish.product, "quantity": wish.quantity}


@router.get("/healthz")
async def health() -> dict[str, str]:
    return {"status": "ok"}


async def broken(request: Request, error: Exception) -> Response:  # noqa: ARG001  # FastAPI's signature
    return JSONResponse({"detail": "the database refused"}, HTTPStatus.INTERNAL_SERVER_ERROR)


def build(serving: Shop) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await serving.open()
        app.state.shop = serving
        yield
        await serving.close()

    app = FastAPI(title="shop", lifespan=lifespan, exception_handlers={psycopg.Error: broken})
    app.include_router(catalogue)
    app.include_router(router)
    app.add_middleware(RequestIds)
    return app
