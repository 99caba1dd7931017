"""The conversion of gRPC messages to JSON by descriptors, so that they are redacted and compared by their fields.

A unary message becomes an object, and a stream one line for each message. Fields without presence always have a value, so
an absent field equals one with its default. Unknown fields are left out. Names are those of the `.proto` file.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import orjson
from google.protobuf import descriptor_pb2, json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message

from abreast_sidecar.compare.content import decode_content

FRAME_HEAD_BYTES = 5  # a flag, and the length of the message
COMPRESSED_FLAG = 1
# All messages of a body, decompressed. While the parser runs, up to 0.1 s for 1 MiB, all other threads wait.
MAX_MESSAGE_BYTES = 1024 * 1024
MAX_JSON_BYTES = 4 * 1024 * 1024  # of a converted body; names of fields are longer than their numbers
# All messages of a body and their fields and items; a few bytes can stand for many fields with defaults.
MAX_VALUES = 50_000
MIN_VALUE_BYTES = 2  # a tag, and a length or a small number
FLOAT_DIGITS = range(6, 10)  # of which some number is enough for each 32-bit float
# Types whose JSON is no object of their fields: a short text, or as many values as the message has.
TEXT_TYPES = frozenset({"google.protobuf.Duration", "google.protobuf.Timestamp"})
JSON_TYPES = TEXT_TYPES | {f"google.protobuf.{name}" for name in ("FieldMask", "ListValue", "Struct", "Value")}
ANY_TYPE = "google.protobuf.Any"


class DescriptorError(ValueError):
    """A set of descriptors can't be used."""


class MessageError(ValueError):
    """A body has no messages that can be converted, or is too large."""


class ConvertedBody(NamedTuple):
    json: bytes
    is_fit: bool  # all messages are of the expected type
    has_unknown_fields: bool  # which the JSON lacks


def parse_descriptor_set(content: bytes) -> DescriptorPool:
    """Read what `protoc --include_imports --descriptor_set_out` writes. Raise DescriptorError."""
    try:
        files = descriptor_pb2.FileDescriptorSet.FromString(content).file
    except DecodeError:
        raise DescriptorError("it is no descriptor set, such as protoc --descriptor_set_out writes") from None
    return build_pool(files)


def build_pool(files: Iterable[descriptor_pb2.FileDescriptorProto]) -> DescriptorPool:
    """Return a pool with the files, in any order. Raise DescriptorError."""
    files_by_name = {file.name: file for file in files}
    if not any(file.service for file in files_by_name.values()):
        raise DescriptorError("it has no service")
    pool = DescriptorPool()
    added: set[str] = set()
    waiting = list(files_by_name.values())
    while waiting:
        ready = [file for file in waiting if added.issuperset(file.dependency)]
        if not ready:
            raise DescriptorError(_describe_missing(waiting, files_by_name))
        for file in ready:
            try:
                pool.Add(file)
            except (TypeError, ValueError) as error:
                raise DescriptorError(f"its file {file.name} is not valid: {' '.join(str(error).split())}") from None
            added.add(file.name)
        waiting = [file for file in waiting if file.name not in added]
    return pool


def _describe_missing(
    waiting: Iterable[descriptor_pb2.FileDescriptorProto], files: Mapping[str, descriptor_pb2.FileDescriptorProto]
) -> str:
    for file in waiting:
        for name in file.dependency:
            if name not in files:
                return f"it lacks {name}, which {file.name} imports: write it with --include_imports"
    return "its files import each other"


def find_method(pool: DescriptorPool, path: str) -> MethodDescriptor | None:
    """Return the method of a path such as /shop.v1.Shop/GetProduct."""
    service, _, method = path.removeprefix("/").rpartition("/")
    try:
        return pool.FindServiceByName(service).methods_by_name.get(method)
    except KeyError:
        return None


def convert_body(
    content: bytes,
    coding: str,
    message_type: Descriptor,
    digest: Callable[[bytes], str],
    *,
    is_stream: bool,
    is_truncated: bool,
) -> ConvertedBody:
    """Convert the messages of a body. A message that can't be read becomes a text with its length and digest.

    The same holds for the whole body if its messages can't be split, or exceed a limit. `coding` is that of compressed
    messages. Without `is_truncated`, the last message must be complete.
    """
    try:
        frames = _split_frames(content, coding, is_stream=is_stream, is_truncated=is_truncated)
        texts, is_fit, has_unknown_fields = _convert_frames(frames, message_type, digest)
    except MessageError:
        texts, is_fit, has_unknown_fields = [_describe(content, digest)], False, False
    return ConvertedBody(b"\n".join([*texts, b""] if is_stream else texts), is_fit, has_unknown_fields)


def _convert_frames(
    frames: list[bytes], message_type: Descriptor, digest: Callable[[bytes], str]
) -> tuple[list[bytes], bool, bool]:
    """Return the JSON of each message, and both flags of ConvertedBody. Raise MessageError beyond a limit."""
    cls, converter = message_factory.GetMessageClass(message_type), _Converter()
    texts, is_fit, has_unknown_fields, json_bytes = list[bytes](), True, False, 0
    for frame in frames:
        try:
            message = cls.FromString(frame)
            text = orjson.dumps(converter.convert(message))
            size = message.ByteSize()
            message.DiscardUnknownFields()
            has_unknown_fields |= message.ByteSize() != size
        except MessageError:
            raise
        except Exception:  # noqa: BLE001  # of protobuf and orjson, for example for text that is no UTF-8
            text, is_fit = _describe(frame, digest), False
        texts.append(text)
        json_bytes += len(text)
        if json_bytes > MAX_JSON_BYTES:
            raise MessageError(f"the messages have more than {MAX_JSON_BYTES} bytes of JSON")
    return texts, is_fit, has_unknown_fields


def _describe(content: bytes, digest: Callable[[bytes], str]) -> bytes:
    return orjson.dumps(f"{len(content)} bytes, {digest(content)}")


def _split_frames(content: bytes, coding: str, *, is_stream: bool, is_truncated: bool) -> list[bytes]:
    """Return the decompressed messages of a body."""
    messages, position, size = list[bytes](), 0, 0
    while len(content) - position >= FRAME_HEAD_BYTES:
        flag, start = content[position], position + FRAME_HEAD_BYTES
        end = start + int.from_bytes(content[position + 1 : start])
        if flag > COMPRESSED_FLAG:
            raise MessageError("a message has no valid length")
        if end > len(content):
            break
        message = content[start:end]
        if flag == COMPRESSED_FLAG:
            result = decode_content(message, coding, MAX_MESSAGE_BYTES - size)
            if result.problem or not coding:
                raise MessageError(f"a message can't be decompressed: {result.problem or 'no grpc-encoding'}")
            message = result.data
        size += len(message)
        if size > MAX_MESSAGE_BYTES or len(messages) == MAX_VALUES:
            raise MessageError(f"a body has more than {MAX_MESSAGE_BYTES} bytes or {MAX_VALUES} messages")
        messages.append(message)
        position = end
    if position < len(content) and not is_truncated:
        raise MessageError("the last message is not complete")
    if len(messages) > 1 and not is_stream:
        raise MessageError("a unary call has more than one message")
    return messages


class _Field(NamedTuple):
    attribute: str
    name: str
    has_presence: bool
    shape: Literal["one", "list", "map"]
    render: Callable[[Any], Any] | None  # for one value; None converts a message


@lru_cache(maxsize=4096)
def _list_fields(message_type: Descriptor) -> tuple[_Field, ...]:
    return tuple([_describe_field(descriptor) for descriptor in message_type.fields])


def _describe_field(descriptor: FieldDescriptor) -> _Field:
    message_type = descriptor.message_type
    name = f"[{descriptor.full_name}]" if descriptor.is_extension else descriptor.name
    if message_type is not None and message_type.GetOptions().map_entry:
        render = _choose_renderer(message_type.fields_by_name["value"])
        return _Field(descriptor.name, name, False, "map", render)
    shape: Literal["one", "list"] = "list" if descriptor.is_repeated else "one"
    return _Field(descriptor.name, name, descriptor.has_presence, shape, _choose_renderer(descriptor))


def _choose_renderer(descriptor: FieldDescriptor) -> Callable[[Any], Any] | None:
    if descriptor.message_type is not None:
        return None
    if descriptor.enum_type is not None:
        names = {number: value.name for number, value in descriptor.enum_type.values_by_number.items()}
        return lambda number: names.get(number, number)
    renderer: Callable[[Any], Any] = _SCALAR_RENDERERS.get(descriptor.type, _keep)
    return renderer


class _Converter:
    """Converts the messages of one body."""

    def __init__(self) -> None:
        self._value_count = 0

    def convert(self, message: Message) -> Any:
        message_type = message.DESCRIPTOR
        if message_type.full_name in JSON_TYPES:
            is_text = message_type.full_name in TEXT_TYPES
            self._count(1 if is_text else 1 + message.ByteSize() // MIN_VALUE_BYTES)
            try:
                return json_format.MessageToDict(message)
            except (ValueError, json_format.Error):  # for example a date after the year 9999
                pass
        elif message_type.full_name == ANY_TYPE and (packed := self._unpack(message)) is not None:
            return packed
        fields = _list_fields(message_type)
        self._count(1 + len(fields))
        has_field = message.HasField
        values: dict[str, Any] = {
            field.name: self._convert_field(field, getattr(message, field.attribute))
            for field in fields
            if not field.has_presence or has_field(field.attribute)
        }
        if message_type.is_extendable:
            for descriptor, value in message.ListFields():
                if descriptor.is_extension:
                    field = _describe_field(descriptor)
                    values[field.name] = self._convert_field(field, value)
        return values

    def _unpack(self, message: Any) -> Any:
        """Return the content of an Any, or None if its type is not known."""
        try:
            message_type = message.DESCRIPTOR.file.pool.FindMessageTypeByName(message.TypeName())
            content = self.convert(message_factory.GetMessageClass(message_type).FromString(message.value))
        except (KeyError, DecodeError):
            return None
        return {"@type": message.type_url, **(content if isinstance(content, dict) else {"value": content})}

    def _convert_field(self, field: _Field, value: Any) -> Any:
        render = field.render or self.convert
        if field.shape == "one":
            return render(value)
        self._count(len(value))
        if field.shape == "list":
            return [render(item) for item in value]
        return {_render_key(key): render(value[key]) for key in sorted(value)}

    def _count(self, values: int) -> None:
        self._value_count += values
        if self._value_count > MAX_VALUES:
            raise MessageError(f"the messages have more than {MAX_VALUES} values")


def _keep(value: Any) -> Any:
    return value


def _render_key(key: Any) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


def _render_double(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def _render_float(value: float) -> float | str:
    """Return the shortest number that is the same 32-bit float."""
    if not math.isfinite(value):
        return str(value)
    if value.is_integer():
        return value
    for digits in FLOAT_DIGITS:
        number = float(f"{value:.{digits}g}")
        if abs(number) <= _MAX_FLOAT and _FLOAT.unpack(_FLOAT.pack(number))[0] == value:
            return number
    return value


_FLOAT = struct.Struct("<f")
_MAX_FLOAT = _FLOAT.unpack(b"\xff\xff\x7f\x7f")[0]
_SCALAR_RENDERERS: Mapping[int, Callable[[Any], Any]] = {
    FieldDescriptor.TYPE_BYTES: lambda value: base64.b64encode(value).decode(),
    FieldDescriptor.TYPE_DOUBLE: _render_double,
    FieldDescriptor.TYPE_FLOAT: _render_float,
}
