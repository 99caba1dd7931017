"""The new version of the shop, a FastAPI app. A comment with the name from `planted_changes` marks each mistake."""

from __future__ import annotations

from decimal import Decimal
from http import HTTPStatus
from typing import Annotated, Any, Literal
from uuid import UUID

import psycopg
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field

from abreast_demo.shop import (
    CURRENCIES_WITHOUT_MINOR_UNIT,
    SEARCH_ID_HEADER,
    Product,
    RequestIdMiddleware,
    Shop,
    ShopRow,
    current_timestamp,
    handle_database_error,
    round_to_cents,
    shuffle_members,
    summarise_product,
)

Currency = Literal["EUR", "USD", "GBP", "JPY"]


class ProductSummary(BaseModel):
    id: int
    name: str
    price: Decimal  # planted: price-as-text


class ProductList(BaseModel):
    products: list[ProductSummary]


class ProductPrice(BaseModel):
    product: int
    currency: Currency
    amount: float | int


class PricedProduct(BaseModel):
    id: int
    name: str
    price: float


class ProductDetail(PricedProduct):
    category: str
    stock: int = 0


class SearchResults(BaseModel):
    query: str
    items: list[PricedProduct]
    request_id: UUID


class Stats(BaseModel):
    products: int
    in_stock: int
    average_price: float
    median_price: float
    generated_at: str


class OrderRequest(BaseModel):
    product: int
    quantity: int = Field(ge=1, le=20)


class OrderConfirmation(BaseModel):
    order: UUID
    product: int
    quantity: int


async def get_shop(request: Request) -> Shop:  # async, because FastAPI runs other dependencies in a thread
    shop: Shop = request.app.state.shop
    return shop


ShopDependency = Annotated[Shop, Depends(get_shop)]


async def require_product(product_id: int, shop: ShopDependency) -> Product:
    product = await shop.find_product(product_id)
    if product is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such product")
    return product


catalogue_router = APIRouter(prefix="/catalogue")
router = APIRouter()


@catalogue_router.get("/categories")
async def list_categories(shop: ShopDependency) -> dict[str, list[ShopRow]]:
    return {"categories": await shop.list_categories()}  # planted: cache-control


@catalogue_router.get("/categories/{slug}", response_model=ProductList)
async def list_category_products(slug: str, shop: ShopDependency) -> Any:
    products = await shop.list_category_products(slug)
    if not products:
        raise HTTPException(HTTPStatus.NOT_FOUND, "no such category")
    summaries = [{"id": product.id, "name": product.name, "price": product.price} for product in products]
    return {"products": summaries}


@router.get(
    "/products/{product_id}",
    response_model=ProductDetail,
    response_model_exclude_defaults=True,  # planted: stock-field
)
async def get_product(product: Annotated[Product, Depends(require_product)], response: Response) -> Any:
    response.headers["cache-control"] = "public, max-age=30"
    return {**summarise_product(product), "category": product.category, "stock": product.stock}


@router.get("/products/{product_id}/price", response_model=ProductPrice)
async def get_price(product: Annotated[Product, Depends(require_product)], currency: Currency = "EUR") -> Any:
    amount = product.convert_price(currency)
    value = (
        int(amount) if currency in CURRENCIES_WITHOUT_MINOR_UNIT else float(round_to_cents(amount))
    )  # planted: yen-rounding
    return {"product": product.id, "currency": currency, "amount": value}


@router.get("/products/{product_id}/reviews")
async def list_reviews(product_id: int, shop: ShopDependency) -> ShopRow:
    return {"product": product_id, "reviews": await shop.list_reviews(product_id)}  # planted: empty-reviews


@router.get("/products/{product_id}/related")
async def list_related_products(product: Annotated[Product, Depends(require_product)], shop: ShopDependency) -> ShopRow:
    return {"product": product.id, "related": shuffle_members(await shop.list_related_product_ids(product.id))}


@router.get("/search", response_model=SearchResults)
async def search_products(request: Request, response: Response, shop: ShopDependency, q: str = "") -> Any:
    products = await shop.search_products("search_pattern", q)  # planted: search-error, slow-search
    items = [summarise_product(product) for product in products]
    response.headers[SEARCH_ID_HEADER] = request.state.request_id
    return {"query": q, "items": items, "request_id": request.state.request_id}


@router.get("/stats", response_model=Stats)
async def get_stats(shop: ShopDependency) -> Any:
    shop_stats = await shop.get_stats()
    return {
        "products": shop_stats.products,
        "in_stock": shop_stats.in_stock,
        "average_price": shop_stats.average_cents / 100,
        "median_price": shop_stats.median_cents / 100,
        "generated_at": current_timestamp(),
    }


@router.post("/orders", response_model=OrderConfirmation, status_code=HTTPStatus.CREATED)
async def create_order(order: OrderRequest, shop: ShopDependency) -> Any:
    await require_product(order.product, shop)
    order_id = await shop.create_order(order.product, order.quantity)
    return {"order": order_id, "product": order.product, "quantity": order.quantity}


@router.get("/healthz")
async def get_health() -> dict[str, str]:
    return {"status": "ok"}


def build_fastapi_app(shop: Shop) -> FastAPI:
    app = FastAPI(title="shop", lifespan=shop.lifespan, exception_handlers={psycopg.Error: handle_database_error})
    app.include_router(catalogue_router)
    app.include_router(router)
    app.add_middleware(RequestIdMiddleware)
    return app
