"""The descriptors of gRPC services: from files, or by reflection from a running service, which is read every minute."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple

import grpc.aio
import structlog
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection_pb2 as reflection

from abreast.export.serializer import RotatingRedactor
from abreast.recorder import BodyBuffer, RawHeaders
from abreast_sidecar.aio import cancel_and_wait
from abreast_sidecar.collector.message import CapturedBody, EnvoyRecorder
from abreast_sidecar.compare.content import GRPC_LINES_TYPE, GRPC_OBJECT_TYPE, GRPC_PROTO_TYPE, GRPC_TYPE
from abreast_sidecar.compare.messages import DescriptorError, convert_body, find_method, parse_descriptor_set
from abreast_sidecar.errors import locate_error
from abreast_sidecar.settings import CollectorSettings

REFLECTION_SCHEMES = {"grpc://": False, "grpcs://": True}  # True with TLS
# Servers have the first, the second or both. Their messages are equal.
REFLECTION_METHODS = tuple(
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")
)
REFLECTION_TIMEOUT_S = 5.0
REFLECTION_INTERVAL_S = 60.0
RETRY_INTERVAL_S = 2.0  # while the service has not answered yet
MAX_FILES = 5_000  # of one service
MAX_PATHS, MAX_PATH_CHARS = 5_000, 300  # that are remembered; clients choose them
MESSAGE_TYPES = (GRPC_TYPE.encode(), GRPC_PROTO_TYPE.encode())
# Reasons why a call is compared by its bytes, or without some fields.
UNKNOWN_METHOD = "grpc_unknown_method"  # the descriptors lack the method
UNFIT_MESSAGE = "grpc_unfit_message"  # a message is not what the descriptors say
UNKNOWN_FIELDS = "grpc_unknown_fields"  # a message has fields that the descriptors lack

log = structlog.get_logger(__name__)


class Descriptors:
    """The descriptors of the settings. The first source with a method counts. `problems` are warnings for people."""

    def __init__(self, settings: CollectorSettings) -> None:
        sources = settings.descriptors
        self.problems: list[str] = []
        self._pools: dict[str, DescriptorPool | None] = dict.fromkeys(sources)
        self._contents: dict[str, bytes] = {}  # of the pools
        self._problems_by_source: dict[str, str] = {}
        self._methods: dict[str, MethodDescriptor | None] = {}
        self._logged: set[tuple[str, str]] = set()
        self._redactor = RotatingRedactor(settings)
        self._task: asyncio.Task[None] | None = None
        self._is_read = threading.Event()  # each source was read once, or could not be
        self._is_read.set()

    async def start(self) -> None:
        """Read the files before captures arrive, and reflection in the background: a service may not answer."""
        await asyncio.gather(*[self._refresh(source) for source in self._pools if not _is_reflected(source)])
        if any(map(_is_reflected, self._pools)):
            self._is_read.clear()
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task)
            self._is_read.set()

    async def _run(self) -> None:
        while True:
            await asyncio.gather(*map(self._refresh, filter(_is_reflected, self._pools)))
            self._is_read.set()
            await asyncio.sleep(REFLECTION_INTERVAL_S if all(self._pools.values()) else RETRY_INTERVAL_S)

    async def _refresh(self, source: str) -> None:
        """Read a source. While it can't be read, its former descriptors stay."""
        problem = ""
        try:
            content = await _read_source(source)
            if content != self._contents.get(source):
                self._pools[source] = await asyncio.to_thread(parse_descriptor_set, content)
                self._contents[source] = content
                self._methods = {}  # the thread may still add a method of the former descriptors
        except (DescriptorError, OSError) as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001  # one source must not stop the others
            problem = f"it can't be used: {locate_error(error)}"
        if problem != self._problems_by_source.get(source, ""):
            self._problems_by_source[source] = problem
            self.problems[:] = [
                f"descriptors of {name}: {text}" for name, text in self._problems_by_source.items() if text
            ]
            log.warning("the descriptors of gRPC services changed", source=source, problem=problem or "none any more")

    def _find_method(self, path: str) -> MethodDescriptor | None:
        methods = self._methods  # before the pools
        if path not in methods:
            if len(methods) >= MAX_PATHS:
                methods.clear()
            pools = [pool for pool in self._pools.values() if pool is not None]
            candidates = (find_method(pool, path) for pool in pools)
            methods[path] = next((method for method in candidates if method is not None), None)
        return methods[path]

    def prepare(self, recorder: EnvoyRecorder, counts: Counter[str]) -> None:
        """Let the export's thread convert the bodies of a gRPC call, because the loop also controls traffic."""
        if self._pools and not recorder.is_times and _is_grpc(recorder.scope["headers"]):
            recorder.convert = lambda: self._convert(recorder, counts)

    def _convert(self, recorder: EnvoyRecorder, counts: Counter[str]) -> None:
        """Convert both bodies to JSON, and name it in their content types. Otherwise count the reason.

        Wait until the descriptors were read once. Runs in the thread.
        """
        self._is_read.wait()
        scope, problems, is_truncated = recorder.scope, set[str](), not recorder.is_complete
        path = scope["path"][:MAX_PATH_CHARS]
        try:
            with contextlib.suppress(OSError, ValueError):  # the export reports it
                self._redactor.refresh()
            redactor = self._redactor.at(time.time() - (perf_counter_ns() - recorder.context.started_ns) / 1e9)
            digest = lambda content: redactor.hash(content.decode("latin-1"))  # noqa: E731
            method = self._find_method(path)
            if method is None:
                self._count(UNKNOWN_METHOD, path, counts)
                return
            request = _Part(scope["headers"], recorder.request_body, method.input_type, method.client_streaming)
            answer = _Part(recorder.headers, recorder.response_body, method.output_type, method.server_streaming)
            new_request = _convert_part(request, digest, problems, is_truncated=is_truncated)
            new_answer = _convert_part(answer, digest, problems, is_truncated=is_truncated)
        except Exception as error:  # noqa: BLE001  # the capture is compared by its bytes
            problems.add(UNFIT_MESSAGE)
            log.warning("a gRPC call can't be converted", method=path, error=locate_error(error))
        else:
            scope["headers"], recorder.request_body = new_request
            recorder.headers, recorder.response_body = new_answer
        for problem in problems:
            self._count(problem, path, counts)

    def _count(self, reason: str, path: str, counts: Counter[str]) -> None:
        """Count a capture, and log the first one of each method."""
        counts[reason] += 1
        if (reason, path) not in self._logged and len(self._logged) < MAX_PATHS:
            self._logged.add((reason, path))
            log.warning("a gRPC call is not compared by all its fields", method=path, reason=reason)


class _Part(NamedTuple):
    """The request or the answer of a call."""

    headers: RawHeaders
    body: BodyBuffer | None
    message_type: Descriptor
    is_stream: bool


def _convert_part(
    part: _Part, digest: Callable[[bytes], str], problems: set[str], *, is_truncated: bool
) -> tuple[RawHeaders, BodyBuffer | None]:
    """Return the headers and the body, converted if the body is whole. Add what is not converted to `problems`."""
    headers, body = part.headers, part.body
    if body is None or body.buffered_bytes < body.length or not _is_grpc(headers):
        return headers, body
    coding = next((value.decode("latin-1") for name, value in headers if name == b"grpc-encoding"), "")
    converted = convert_body(
        body.to_body().content, coding, part.message_type, digest, is_stream=part.is_stream, is_truncated=is_truncated
    )
    if not converted.is_fit:
        problems.add(UNFIT_MESSAGE)
    if converted.has_unknown_fields:
        problems.add(UNKNOWN_FIELDS)
    content_type = (GRPC_LINES_TYPE if part.is_stream else GRPC_OBJECT_TYPE).encode()
    converted_headers = [
        (name, content_type if name == b"content-type" else value)
        for name, value in headers
        if name != b"content-length"  # of the messages
    ]
    return converted_headers, CapturedBody(converted.json, len(converted.json), "") if converted.json else None


def _is_grpc(headers: RawHeaders) -> bool:
    return any(name == b"content-type" and value.partition(b";")[0].strip() in MESSAGE_TYPES for name, value in headers)


def _is_reflected(source: str) -> bool:
    return source.startswith(tuple(REFLECTION_SCHEMES))


async def _read_source(source: str) -> bytes:
    """Return a descriptor set. Raise DescriptorError or OSError."""
    if not _is_reflected(source):
        return await asyncio.to_thread(Path(source).read_bytes)
    files = await read_reflection(source)
    return FileDescriptorSet(file=sorted(files, key=lambda file: file.name)).SerializeToString()


async def read_reflection(source: str) -> list[FileDescriptorProto]:
    """Return the files of all services at an address such as grpc://127.0.0.1:8002. Raise DescriptorError."""
    scheme = next(scheme for scheme in REFLECTION_SCHEMES if source.startswith(scheme))
    address = source.removeprefix(scheme)
    channel = (
        grpc.aio.secure_channel(address, grpc.ssl_channel_credentials())
        if REFLECTION_SCHEMES[scheme]
        else grpc.aio.insecure_channel(address)
    )
    async with channel:
        for method in REFLECTION_METHODS:
            try:
                async with asyncio.timeout(REFLECTION_TIMEOUT_S):
                    return await _Reflection(channel, method).read_files()
            except TimeoutError:
                raise DescriptorError(f"its reflection does not answer within {REFLECTION_TIMEOUT_S:g} s") from None
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise DescriptorError(f"its reflection fails with {error.code().name}: {error.details()}") from None
            except DecodeError:
                raise DescriptorError("its reflection answers with damaged descriptors") from None
    raise DescriptorError("the service has no reflection: name a file with its descriptors")


class _Reflection:
    """The reflection service. Each request is a separate call, because a stream that the server ends at once may fail with
    INTERNAL in place of the server's status.
    """

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        self._call: Any = channel.unary_unary(
            method,
            request_serializer=reflection.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection.ServerReflectionResponse.FromString,
        )

    async def read_files(self) -> list[FileDescriptorProto]:
        """Return the files of all services with their imports."""
        services = [service.name for service in (await self._ask(list_services="*")).list_services_response.service]
        files: dict[str, FileDescriptorProto] = {}
        for service in services:
            if not any(
                f"{file.package}.{item.name}".lstrip(".") == service for file in files.values() for item in file.service
            ):
                await self._add_files(files, file_containing_symbol=service)
        while missing := {name for file in files.values() for name in file.dependency} - files.keys():
            for name in missing:
                if not await self._add_files(files, file_by_filename=name):
                    raise DescriptorError(f"its reflection lacks {name}, which another of its files imports")
        return list(files.values())

    async def _add_files(self, files: dict[str, FileDescriptorProto], **request: str) -> bool:
        """Add the files of the answer. Return False without a new one: a server may lack the file of a service."""
        answer = await self._ask(**request)
        file_count = len(files)
        for content in answer.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(content)
            files[file.name] = file
        if len(files) > MAX_FILES:
            raise DescriptorError(f"its reflection has more than {MAX_FILES} files")
        return len(files) > file_count

    async def _ask(self, **request: str) -> reflection.ServerReflectionResponse:
        answer: reflection.ServerReflectionResponse = await self._call(reflection.ServerReflectionRequest(**request))
        return answer
