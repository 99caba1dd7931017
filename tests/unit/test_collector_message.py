"""The messages of Envoy's script, damaged and whole, and what the collector makes of them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast.errors import CaptureError, ErrorReporter
from abreast.export.exporter import ExporterPool
from abreast.export.queue import CAPTURE_OVERHEAD_BYTES, CaptureQueue
from abreast.export.redaction import Redactor
from abreast.export.routes import RouteResolver
from abreast.export.serializer import CaptureSerializer
from abreast.protocol.capture import Capture, decode
from abreast.recorder import BACKGROUND_THREAD
from abreast_sidecar.collector.descriptors import REFLECTION_TIMEOUT_S, Descriptors
from abreast_sidecar.collector.message import read_service, to_recorder
from abreast_sidecar.collector.server import Collector
from abreast_sidecar.settings import CollectorSettings
from abreast_sidecar.traffic.xds import wire_pb2 as wire
from support_grpc import PROTO, PROTO2, SERVICE, Shop, compile_descriptors, frame, make_product

HEAD = b"1 shop pair-1 old live 2 1 complete 4 1000000 1002000 1005000 3 3 - 2 400000 envoy:00ff"
REQUEST = (
    b":method:POST\n:path:/search?q=a\n:authority:shop.internal\ncookie:id=1\nx-abreast-copies:2 0000000000900\n\n"
)
RESPONSE = b":status:200\ncontent-type:text/plain\nx-note:\xe9\nconnection:close\nx-abreast-version:old\n\n"
MESSAGE = HEAD + b"\n" + REQUEST + RESPONSE + b"\n" + b"q=1" + b"ab"
SETTINGS = CollectorSettings(service="shop")
POOL = ExporterPool(SETTINGS, CaptureQueue(SETTINGS), RouteResolver(None), ErrorReporter())


def convert(message: bytes) -> Capture:
    serializer = CaptureSerializer(SETTINGS, Redactor("key"))
    return decode(serializer.serialize(to_recorder(message, POOL))[3])


def test_message_becomes_a_redacted_capture() -> None:
    capture = convert(MESSAGE)

    assert read_service(MESSAGE) == "shop"
    assert (capture.pair, capture.slot, capture.expected_captures) == ("pair-1", "old:live:1", 2)
    assert (capture.request.method, capture.request.path, capture.request.query) == ("POST", "/search", "q=a")
    assert dict(capture.request.headers)["host"] == "shop.internal"
    assert dict(capture.request.headers)["cookie"].startswith("id=hmac:")
    assert (capture.answer.status, dict(capture.answer.headers)) == (200, {"content-type": "text/plain", "x-note": "é"})
    assert capture.request.body.content == b"q=1"
    assert (capture.answer.body.content, capture.answer.body.length, capture.answer.body.has_checksum) == (
        b"ab",
        400000,
        True,
    )
    assert (capture.first_byte_us, capture.total_us, capture.complete) == (2000, 5000, True)
    assert (capture.by_envoy, capture.in_flight) == (True, 4)
    assert capture.wait_us == pytest.approx(100_000, abs=1000)


def test_times_have_a_slot_besides_the_capture_that_they_belong_to() -> None:
    head = b"1 shop pair-1 new shadow 2 1 times 4 1000000 1002000 1005000 0 0 - 0 0 -"
    message = head + b"\n:method:GET\n:path:/\nx-abreast-copies:2 0000000000900\n\n:status:0\n\n\n"
    row = CaptureSerializer(SETTINGS, Redactor("key")).serialize(to_recorder(message, POOL))
    times = decode(row[3])

    assert row[1] == "new:shadow:1="
    assert (times.slot, times.is_times, times.by_envoy, times.in_flight) == ("new:shadow:1", True, True, 4)
    assert (times.first_byte_us, times.total_us) == (2000, 5000)
    assert times.wait_us == pytest.approx(100_000, abs=1000)


@pytest.mark.parametrize(("state", "client_left"), [(b"left", True), (b"aborted", False)])
def test_broken_off_response_is_incomplete(state: bytes, client_left: bool) -> None:
    capture = convert(MESSAGE.replace(b"complete", state))

    assert (capture.client_left, capture.complete) == (client_left, False)


@pytest.mark.parametrize(
    ("part", "replacement"),
    [
        (b"1 shop", b"2 shop"),
        (b"old", b"older"),
        (b"live", b"dead"),
        (b":path:/", b":path:*"),
        (b"q=1", b"q"),
        (b" - ", b" x "),
    ],
)
def test_damaged_message_is_an_error(part: bytes, replacement: bytes) -> None:
    with pytest.raises(CaptureError):
        to_recorder(MESSAGE.replace(part, replacement, 1), POOL)


@given(st.integers(0, len(MESSAGE) - 1), st.binary(max_size=5))
def test_any_bytes_are_a_capture_or_an_error(position: int, noise: bytes) -> None:
    for message in (MESSAGE[:position] + noise + MESSAGE[position + len(noise) :], noise):
        try:
            convert(message)
        except CaptureError:
            continue


@pytest.mark.parametrize(("pair", "mode", "queued"), [("-", "auto", 1), ("pair-1", "auto", 0), ("-", "off", 0)])
def test_logs_are_captures_unless_a_middleware_captured_the_response_or_captures_are_off(
    pair: str, mode: str, queued: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[Capture] = []

    def accept(_collector: Collector, message: bytes, _key: bytes) -> int:
        captures.append(convert(message))
        return 202

    monkeypatch.setattr(Collector, "accept", accept)
    head = "1 shop pair-1 old live 2 1 left 0 1000000 0 1005000 0 0 - 0 0 -\n"
    message = f"{head}:method:GET\n:path:/\n\n:status:0\nx-abreast-pair:{pair}\nx-abreast-capture:{mode}\n\n\n"
    record = wire.LogRecord(body=wire.AnyValue(string_value=message))
    logs = wire.LogsRequest(resource_logs=[wire.ResourceLogs(scope_logs=[wire.ScopeLogs(log_records=[record])])])
    collector = Collector(SETTINGS)

    assert collector.accept_logs(logs.SerializeToString(), b"") == 200
    assert [(capture.slot, capture.client_left) for capture in captures] == [("old:live:1", True)] * queued
    assert collector.accept_logs(b"\xff", b"") == 400


def grpc_message(body: bytes) -> bytes:
    """Return the capture of a call with the same body as request and answer."""
    head = f"1 shop pair-1 old live 2 1 complete - 1000000 1002000 1005000 {len(body)} {len(body)} - {len(body)} {len(body)} -"
    headers = f":method:POST\n:path:/{SERVICE}/GetProduct\ncontent-type:application/grpc\n\n:status:200\ncontent-type:application/grpc\n\n\n"
    return f"{head}\n{headers}".encode() + body + body


async def collect(message: bytes, descriptors: bytes, path: Path, **values: Any) -> CaptureQueue:
    """Return the queue with the capture that comes out of the thread, before the exporter takes it."""
    await asyncio.to_thread(path.write_bytes, descriptors)
    collector = Collector(CollectorSettings(service="shop", descriptors=(str(path),), **values))
    await collector.descriptors.start()
    is_accepted = threading.Event()

    def wait() -> None:
        is_accepted.wait(30)

    BACKGROUND_THREAD.submit(wait)
    assert collector.accept(message, b"") == 202
    queue = collector._pools["shop"].queue
    assert (queue.count, len(queue.recorders)) == (1, 0)  # the loop converts nothing
    is_accepted.set()
    BACKGROUND_THREAD.drain(30)
    return queue


async def test_call_is_converted_in_the_thread_and_its_growth_has_room_in_the_queue(tmp_path: Path) -> None:
    message = grpc_message(frame(make_product().SerializeToString()))

    queue = await collect(
        message, compile_descriptors(PROTO.read_text().replace("ProductRequest)", "Product)")), tmp_path / "a.pb"
    )
    entry = queue.next_recorder()
    assert entry is not None
    recorder, size = entry
    assert recorder.response_body is not None
    assert orjson.loads(recorder.response_body.to_body().content)["name"] == "Tea"
    assert dict(recorder.headers)[b"content-type"] == b"application/grpc+json"
    assert size == queue.bytes == CAPTURE_OVERHEAD_BYTES + recorder.body_bytes
    assert not queue.unconverted_counts


async def test_call_whose_json_has_no_room_in_the_queue_is_counted_as_dropped(tmp_path: Path) -> None:
    message = grpc_message(frame(b""))

    queue = await collect(message, compile_descriptors(), tmp_path / "a.pb", queue_bytes=CAPTURE_OVERHEAD_BYTES + 20)
    assert queue.next_recorder() is None
    assert (dict(queue.drop_counts), queue.count, queue.bytes) == ({"queue_bytes": 1}, 0, 0)


@pytest.mark.parametrize("is_defect", [False, True])
async def test_call_that_can_not_be_converted_is_kept_and_counted(
    is_defect: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_defect:
        monkeypatch.setattr("abreast_sidecar.collector.descriptors.convert_body", lambda *_args, **_options: 1 / 0)
    body = frame(b"\x0a\x02\xff\xfe")

    queue = await collect(grpc_message(body), compile_descriptors(PROTO2), tmp_path / "a.pb")
    entry = queue.next_recorder()
    assert entry is not None
    assert entry[0].response_body is not None
    content = entry[0].response_body.to_body().content
    assert content == body if is_defect else content.startswith(b'"4 bytes, hmac:')
    assert dict(queue.unconverted_counts) == {"grpc_unfit_message": 1}


async def test_start_does_not_wait_for_a_reflection_that_never_answers() -> None:
    server = await asyncio.start_server(lambda _reader, _writer: asyncio.sleep(3600), "127.0.0.1", 0)
    descriptors = Descriptors(
        replace(SETTINGS, descriptors=(f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}",))
    )

    async with asyncio.timeout(REFLECTION_TIMEOUT_S / 2):
        await descriptors.start()
    recorder, counts = to_recorder(grpc_message(b""), POOL), Counter[str]()
    descriptors.prepare(recorder, counts)
    finish = asyncio.create_task(asyncio.to_thread(recorder.finish))
    await descriptors.stop()
    await finish
    server.close()
    assert dict(counts) == {"grpc_unknown_method": 1}  # it is kept by its bytes


async def test_call_that_is_captured_before_the_first_reflection_is_converted() -> None:
    recorder, counts = to_recorder(grpc_message(frame(make_product().SerializeToString())), POOL), Counter[str]()

    async with Shop({}, with_reflection=True).serve() as shop:
        descriptors = Descriptors(replace(SETTINGS, descriptors=(f"grpc://127.0.0.1:{shop.port}",)))
        await descriptors.start()
        descriptors.prepare(recorder, counts)
        await asyncio.to_thread(recorder.finish)
        await descriptors.stop()
    assert dict(recorder.headers)[b"content-type"] == b"application/grpc+json"
    assert dict(counts) == {"grpc_unknown_fields": 1}  # the request is a product
