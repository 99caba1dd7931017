"""The WSGI middleware between a server and an app, without Redis: requests behave as without it."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults

import pytest

from abreast import current, is_shadow
from abreast.context import CURRENT_CONTEXT, NO_REQUEST
from abreast.errors import EffectError
from abreast.wsgi import Environ, ParallelRunMiddleware, StartResponse, _build_scope, _make_template
from support_middleware import marks, pair_id

Started = list[tuple[Any, ...]]


def make_environ(path: str = "/", *, role: str = "live", is_marked: bool = True, **fields: Any) -> Environ:
    environ: Environ = {"PATH_INFO": path, "REQUEST_METHOD": "POST", "wsgi.input": io.BytesIO(b"one\ntwo\n"), **fields}
    setup_testing_defaults(environ)
    if is_marked:
        headers = marks(pair_id(), role=role)
        environ |= {"HTTP_" + name.upper().replace("-", "_"): value for name, value in headers.items()}
    return environ


@pytest.fixture
def wrap() -> Iterator[Callable[..., ParallelRunMiddleware]]:
    """Return a function that puts the middleware around an app. Its Redis can't be reached."""
    created = []

    def wrap(app: Any, **settings: Any) -> ParallelRunMiddleware:
        settings = {"service": "shop", "redis_url": "redis://127.0.0.1:1/0", "flush_timeout": 0.01, **settings}
        created.append(ParallelRunMiddleware(app, **settings))
        return created[-1]

    yield wrap
    for middleware in created:
        middleware.close()


def serve(app: Any, environ: Environ) -> tuple[Started, list[Any], list[bytes]]:
    """Serve a request as a server does. Return the calls of start_response, the chunks, and the written chunks."""
    started: Started = []
    written: list[bytes] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        if exc_info and started:
            raise exc_info[1]
        visible = [row for row in headers if not row[0].startswith("x-abreast-")]
        started.append((status, type(headers), visible))
        return written.append

    response = app(environ, start_response)
    try:
        chunks = list(response)
    finally:
        if hasattr(response, "close"):
            response.close()
    return started, chunks, written


class Closing:
    """An iterable with a length that counts its calls of close."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.close_count = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def close(self) -> None:
        self.close_count += 1


def return_list(_environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("X-Twice", "1"), ("X-Twice", "2")])
    return [b"a", b"", b"b"]


def use_write(_environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    write = start_response("200 OK", [])
    write(b"first")
    write(b"second")
    return (b"third",)


def start_late(_environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", [])
    yield b"a"
    yield b"b"


def read_input(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    stream = environ["wsgi.input"]
    return [stream.read(1), stream.readline(), *stream.readlines(), *stream, stream.read()]


def return_text(_environ: Environ, start_response: StartResponse) -> Any:
    start_response("200 OK", [])
    return ["not bytes"]


def use_headers_of_wrong_type(_environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", iter([("X-Once", "1")]))
    return []


@pytest.mark.parametrize("role", ["live", "shadow"])
@pytest.mark.parametrize(
    "app", [return_list, use_write, start_late, read_input, return_text, use_headers_of_wrong_type]
)
def test_response_is_the_same_with_the_middleware(app: Any, role: str, wrap: Any) -> None:
    expected = serve(app, make_environ(is_marked=False))

    assert serve(wrap(app), make_environ(role=role)) == expected
    assert CURRENT_CONTEXT.get() is NO_REQUEST


def test_server_gets_lists_themselves_and_lengths_of_others(wrap: Any) -> None:
    chunks = [b"a"]
    sized = Closing(b"a", b"b")

    assert wrap(lambda _environ, _start: chunks)(make_environ(), lambda *_: None) is chunks
    response = wrap(lambda _environ, _start: sized)(make_environ(), lambda *_: None)
    assert (len(response), list(response)) == (2, [b"a", b"b"])
    response.close()
    assert sized.close_count == 1


def test_unmarked_request_reaches_the_app_untouched(wrap: Any) -> None:
    calls: list[tuple[object, ...]] = []
    environ, start_response = make_environ(is_marked=False), object()
    expected = dict(environ)
    wrap(lambda *arguments: calls.append(arguments))(environ, start_response)

    assert calls == [(environ, start_response)]
    assert environ == expected


def test_app_does_not_see_the_marks(wrap: Any) -> None:
    names: Any = []
    wrap(lambda environ, _start: names.extend(environ) or [])(make_environ(), lambda *_: None)

    assert names
    assert not [name for name in names if "ABREAST" in name]


def test_file_of_the_server_passes_untouched(tmp_path: Path, wrap: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    files: list[FileWrapper] = []

    def app(environ: Environ, start_response: StartResponse) -> Any:
        start_response("200 OK", [])
        files.append(environ["wsgi.file_wrapper"](path.open("rb")))
        return files[-1]

    fields: dict[str, Any] = {"wsgi.file_wrapper": FileWrapper}
    response = wrap(app)(make_environ(**fields), lambda *_: None)

    assert response is files[0]
    response.close()
    assert files[0].filelike.closed
    assert serve(wrap(app), make_environ(**fields)) == serve(app, make_environ(is_marked=False, **fields))


def test_file_without_descriptor_is_iterated(wrap: Any) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Any:
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"content"))

    fields: dict[str, Any] = {"wsgi.file_wrapper": FileWrapper}

    assert serve(wrap(app), make_environ(**fields)) == serve(app, make_environ(is_marked=False, **fields))


@pytest.mark.parametrize("is_late", [False, True])
def test_errors_of_the_app_reach_the_server(is_late: bool, wrap: Any) -> None:
    def app(_environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if is_late:
            start_response("200 OK", [])
        raise EffectError("a bug")

    def generate(_environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"a"
        raise EffectError("a bug")

    for broken in (app, generate):
        with pytest.raises(EffectError, match="a bug"):
            serve(wrap(broken), make_environ(role="shadow"))
        seen: Any = []
        live = wrap(lambda _environ, _start: seen.append(is_shadow()) or [])  # noqa: B023
        serve(live, make_environ(is_marked=False))
        assert seen == [False]  # the next request of the thread


def test_error_after_the_response_began_is_passed_with_exc_info(wrap: Any) -> None:
    def app(_environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        try:
            raise EffectError("too late")  # noqa: TRY301  # an app does so
        except EffectError as error:
            start_response("500 Error", [], (type(error), error, error.__traceback__))
        return []

    with pytest.raises(EffectError, match="too late"):
        serve(wrap(app), make_environ())


def test_every_part_of_the_app_runs_in_the_context_of_its_request(wrap: Any) -> None:
    roles: list[str] = []

    class Response:
        def __iter__(self) -> Iterator[bytes]:
            roles.append(current().role)
            for number in range(2):
                roles.append(current().role)
                yield b"%d" % number

        def close(self) -> None:
            roles.append(current().role)

    def app(_environ: Environ, start_response: StartResponse) -> Any:
        roles.append(current().role)
        start_response("200 OK", [])
        return Response()

    response: Any = wrap(app)(make_environ(role="shadow"), lambda *_: None)
    assert not is_shadow()  # a server may serve another request before it iterates
    iterator = iter(response)
    assert (next(iterator), is_shadow()) == (b"0", False)
    thread = threading.Thread(target=lambda: (next(iterator), response.close()))
    thread.start()
    thread.join()

    assert roles == ["shadow"] * 5


def test_thread_of_a_request_can_take_its_context(wrap: Any) -> None:
    roles: list[str] = []

    def app(_environ: Environ, _start_response: StartResponse) -> Iterable[bytes]:
        thread = threading.Thread(target=copy_context().run, args=(lambda: roles.append(current().role),))
        thread.start()
        thread.join()
        return []

    wrap(app)(make_environ(role="shadow"), lambda *_: None)

    assert roles == ["shadow"]


@pytest.mark.parametrize("settings", [{"enabled": False}, {"body_limit": object()}], ids=["off", "invalid"])
def test_shadow_is_a_shadow_even_if_capturing_is_off(settings: dict[str, Any], wrap: Any) -> None:
    roles: Any = []
    started, _, _ = serve(
        wrap(lambda _environ, start: (start("200 OK", []) and roles.append(is_shadow())) or [], **settings),
        make_environ(role="shadow"),
    )

    assert roles == [True]
    assert started == [("200 OK", list, [])]


def test_joined_marks_of_a_copy_stay_those_of_a_shadow(wrap: Any) -> None:
    roles: Any = []
    middleware = wrap(lambda _environ, _start: roles.append(is_shadow()) or [])
    environ = make_environ(role="shadow")
    environ["HTTP_X_ABREAST_PAIR"] += ",another"
    middleware(environ, lambda *_: None)

    assert roles == [True]
    assert middleware.queue.drop_counts["invalid_headers"] == 1


def test_copy_without_the_key_is_refused(wrap: Any) -> None:
    calls: Any = []
    middleware = wrap(lambda _environ, start: (start("200 OK", []) and calls.append(1)) or [], edge_key="k" * 16)
    started, chunks, _ = serve(middleware, make_environ(role="shadow"))
    serve(middleware, make_environ(role="live"))
    serve(middleware, make_environ(role="shadow", HTTP_X_ABREAST_KEY="k" * 16))

    assert (started[0][0], b"".join(chunks)) == ("403 Forbidden", b"x-abreast-key is missing or wrong\n")
    assert len(calls) == 2
    assert middleware.queue.drop_counts == {"unproven_copy": 1, "unproven_live": 1}


async def test_asgi_app_is_reported_and_served(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[object, ...]] = []

    async def app(scope: object, receive: object, send: object) -> None:
        calls.append((scope, receive, send))

    middleware: Any = ParallelRunMiddleware(app, service="shop")  # type: ignore[arg-type]  # the mistake
    await middleware(1, 2, 3)

    assert calls == [(1, 2, 3)]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "not a WSGI app" in caplog.text


def test_middleware_is_off_if_threads_are_green(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gevent.monkey", SimpleNamespace(is_module_patched="threading".__eq__))
    middleware = wrap(return_list)
    answer = serve(middleware, make_environ())
    monkeypatch.undo()

    assert "gevent has patched threads" in middleware.problem
    assert answer == serve(return_list, make_environ())
    assert middleware.queue.drop_counts == {}


def test_middleware_starts_no_thread_before_a_sampled_request(wrap: Any) -> None:
    middleware = wrap(return_list)
    serve(middleware, make_environ(is_marked=False))
    assert "abreast export" not in [thread.name for thread in threading.enumerate()]

    serve(middleware, make_environ())
    assert "abreast export" in [thread.name for thread in threading.enumerate()]
    middleware.close()
    assert "abreast export" not in [thread.name for thread in threading.enumerate()]
    assert middleware.queue.drop_counts == {"shutdown": 1}


@pytest.mark.parametrize(("copies", "sent_ms"), [("2 1700000000123", b"1700000000123"), ("2", b""), ("3 ", b"")])
def test_capture_has_the_time_of_envoy_and_the_requests_in_flight(copies: str, sent_ms: bytes, wrap: Any) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/outer":  # neither sampled nor finished
            serve(middleware, make_environ() | {"HTTP_X_ABREAST_COPIES": copies})
        else:
            recorders.append(getattr(start_response, "__self__", None))
        return return_list(environ, start_response)

    recorders: list[Any] = []
    middleware = wrap(app)
    serve(middleware, make_environ("/outer", is_marked=False))
    serve(middleware, make_environ() | {"HTTP_X_ABREAST_COPIES": copies})

    assert [(recorder.route_tags[2], recorder.sent_ms, recorder.in_flight) for recorder in recorders] == [
        (int(copies[0]), sent_ms, 1),
        (int(copies[0]), sent_ms, 0),
    ]


@pytest.mark.parametrize(
    ("rule", "template"),
    [
        ("/products/<int:id>", "/products/{id}"),
        ("/a/<x>/<path:rest>", "/a/{x}/{rest}"),
        ("/l/<string(length=2):code>", "/l/{code}"),
        ("/articles/<int:year>/", "/articles/{year}/"),
        (r"/^articles/(?P<year>[0-9]{4})/$", "/articles/{year}/"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_template_has_the_form_of_asgi_frameworks(rule: str, template: str) -> None:
    assert _make_template(rule) == template


@pytest.mark.parametrize(
    ("fields", "raw_path"),
    [
        ({"RAW_URI": "/a%20b?x=1"}, b"/a%20b?x=1"),
        ({"SCRIPT_NAME": "/v1", "PATH_INFO": "/ä b".encode().decode("latin-1")}, b"/v1/%C3%A4%20b"),
        ({"RAW_URI": "http://shop.example/a", "PATH_INFO": "/a"}, b"/a"),
        ({"PATH_INFO": ""}, b"/"),
    ],
)
def test_path_of_a_capture_is_the_one_that_was_sent(fields: dict[str, str], raw_path: bytes) -> None:
    assert _build_scope({"REQUEST_METHOD": "GET", **fields})["raw_path"] == raw_path
