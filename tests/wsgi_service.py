"""The apps that the tests of WSGI serve with gunicorn: the same pages by Flask and by Django, and plain WSGI.

gunicorn imports `flask`, `django`, `plain` or the same with `_recorded`, which have the middleware around them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import django.core.wsgi
import django.http
import django.urls
from django.conf import settings
from flask import Flask, Response, request, send_file

from abreast import effect, record
from abreast.wsgi import Environ, ParallelRunMiddleware, StartResponse

FILE = str(Path(__file__).parents[1] / "LICENSE")
SENT: list[str] = []
send_mail = effect("mail.send")(SENT.append)


def stream(count: int, pause_s: float) -> Iterator[bytes]:
    for number in range(count):
        yield b"%d\n" % number
        time.sleep(pause_s)


flask = Flask(__name__)


@flask.get("/products/<int:number>")
def flask_product(number: int) -> dict[str, Any]:
    record("product.viewed", {"number": number})
    return {"number": number, "name": "ä product"}


@flask.post("/echo")
def flask_echo() -> bytes:
    return request.get_data()


@flask.get("/stream")
def flask_stream() -> Response:
    return Response(stream(3, 0.01), mimetype="text/plain")


@flask.get("/file")
def flask_file() -> Response:
    return send_file(FILE, mimetype="text/plain")


@flask.get("/empty")
def flask_empty() -> tuple[str, int]:
    return "", 204


@flask.get("/fail")
def flask_fail() -> str:
    raise ZeroDivisionError


@flask.post("/mail")
def flask_mail() -> dict[str, list[str]]:
    thread = threading.Thread(target=copy_context().run, args=(send_mail, "hello"))
    thread.start()
    thread.join()
    return {"sent": SENT}


def django_product(_request: object, number: int) -> django.http.HttpResponse:
    return django.http.JsonResponse({"number": number})


def django_echo(incoming: django.http.HttpRequest) -> django.http.HttpResponse:
    return django.http.HttpResponse(incoming.body)


def django_stream(_request: object) -> django.http.StreamingHttpResponse:
    return django.http.StreamingHttpResponse(stream(3, 0.01))


def django_file(_request: object) -> django.http.FileResponse:
    return django.http.FileResponse(open(FILE, "rb"))  # noqa: PTH123  # Django closes it


def django_empty(_request: object) -> django.http.HttpResponse:
    return django.http.HttpResponse(status=204)


def django_fail(_request: object) -> django.http.HttpResponse:
    raise ZeroDivisionError


urlpatterns = [
    django.urls.path("products/<int:number>", django_product),
    django.urls.path("echo", django_echo),
    django.urls.path("stream", django_stream),
    django.urls.path("file", django_file),
    django.urls.path("empty", django_empty),
    django.urls.re_path("^fail$", django_fail),
]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="for tests", LOGGING_CONFIG=None)
django_app = django.core.wsgi.get_wsgi_application()


def plain(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    headers = [("Content-Type", "text/plain")]
    match environ["PATH_INFO"]:
        case "/write":
            write = start_response("200 OK", headers)
            write(b"one")
            return [b"two"]
        case "/length":
            start_response("200 OK", [*headers, ("Content-Length", "3")])
            return (b"abc",)
        case "/endless":
            start_response("200 OK", headers)
            return stream(1_000_000, 0.01)
        case "/raise":
            raise ZeroDivisionError
        case "/raise-late":
            return raise_late(start_response)
        case _:
            start_response("404 Not Found", headers)
            return []


def raise_late(start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"begun"
    raise ZeroDivisionError


flask_recorded = ParallelRunMiddleware(flask.wsgi_app)
django_recorded = ParallelRunMiddleware(django_app)
plain_recorded = ParallelRunMiddleware(plain)
