"""Generic conversion between records and protobuf messages.

A record is a dataclass, a msgspec struct, a mapping or a tuple. Fields correspond by name; a converter lists the
exceptions. The type of a message's field determines the value in the record:

- enum: the name without prefix, in lower case; an empty string for the unspecified value.
- Timestamp: an aware datetime.
- Duration: a number of microseconds if the attribute ends with `_us`, else of seconds, or a timedelta.
- Message: a record. A plain tuple has the fields in the order of the message.
- Repeated field: a sequence.
- Unset optional field: None, or the record's default.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, timedelta
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

M = TypeVar("M", bound=Message)
R = TypeVar("R")

Source = str | Callable[[Any], Any]  # a dotted path of attributes, or a function of the record

MISSING = object()
_ATTRIBUTES: dict[Any, dict[str, Any]] = {}  # by type of record; reading type hints is slow
TIMESTAMP, DURATION = Timestamp.DESCRIPTOR.full_name, Duration.DESCRIPTOR.full_name


class MessageConverter:
    """Converts by the names of fields, and by `sources` where the names differ.

    A message field `x` is read from the attribute `x`, `is_x`, `x_us` or `x_s`, unless `sources` names another one.
    """

    def __init__(self, sources: Mapping[type[Message], Mapping[str, Source]]) -> None:
        self._sources = {message_type.DESCRIPTOR.full_name: fields for message_type, fields in sources.items()}

    def to_message(self, message_type: type[M], record: Any = MISSING, /, **values: Any) -> M:
        """Convert a record. `values` replace its attributes and may contain messages.

        Raises AttributeError if the record lacks a field of the message; a key that a mapping lacks stays unset.
        """
        descriptor: Any = message_type.DESCRIPTOR
        sources = self._sources.get(descriptor.full_name, {})
        if isinstance(record, tuple) and not hasattr(record, "_fields"):
            record = dict(zip(descriptor.fields_by_name, record, strict=True))
        fields: dict[str, Any] = {}
        for field in descriptor.fields:
            if field.name in values:
                source, value = field.name, values.pop(field.name)
            elif record is MISSING:
                continue
            else:
                source, value = _read_source(record, field, sources.get(field.name, field.name))
            if value is not None:
                seconds = 1e-6 if source.endswith("_us") else 1.0
                fields[field.name] = (
                    value
                    if isinstance(value, Mapping) and field.is_repeated
                    else [self._encode(field, item, seconds) for item in value]
                    if field.is_repeated
                    else self._encode(field, value, seconds)
                )
        if values:
            raise AttributeError(f"{descriptor.full_name} has no field {', '.join(values)}")
        return message_type(**fields)

    def from_message(self, record_type: type[R], message: Message, /, **values: Any) -> R:
        """Convert a message to a dataclass or struct. `values` replace fields of the message.

        Raises ValueError, which begins with the name of the field, if the record can't have the value.
        """
        unset = {name: None for name, hint in _get_attributes(record_type).items() if type(None) in get_args(hint)}
        return record_type(**unset | self.read_fields(record_type, message, skip=values) | values)

    def read_fields(
        self, record_type: type[Any], message: Message, /, *, skip: Mapping[str, Any] | Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return the record's attributes that the message has, by name. Raises ValueError like `from_message`."""
        descriptor: Any = message.DESCRIPTOR
        sources = self._sources.get(descriptor.full_name, {})
        attributes: dict[str, Any] = {}
        for name, hint in _get_attributes(record_type).items():
            field = None if name in skip else _find_field(descriptor, sources, name)
            if field is None or (field.has_presence and not message.HasField(field.name)):
                continue
            value = getattr(message, field.name)
            if field.enum_type and not field.is_repeated and not value:
                if hint is str:
                    attributes[name] = ""
                continue
            if field.is_repeated:
                container, item_hint = _get_container(hint)
                is_filter = not value and type(None) in get_args(hint)
                attributes[name] = (
                    None if is_filter else container(self._decode(field, v, name, item_hint) for v in value)
                )
            else:
                attributes[name] = self._decode(field, value, name, hint)
        return attributes

    def _encode(self, field: Any, value: Any, seconds: float) -> Any:
        if field.enum_type:
            return find_enum_number(field.enum_type, value)
        if field.message_type is None or isinstance(value, Message):
            return value
        if field.message_type.full_name == TIMESTAMP:
            timestamp = Timestamp()
            timestamp.FromDatetime(value)
            return timestamp
        if field.message_type.full_name == DURATION:
            duration = Duration()
            if isinstance(value, timedelta):
                duration.FromTimedelta(value)
            else:
                duration.FromMicroseconds(round(value * seconds * 1e6))
            return duration
        return self.to_message(GetMessageClass(field.message_type), value)

    def _decode(self, field: Any, value: Any, name: str, hint: Any) -> Any:
        if field.enum_type:
            return _name_enum_value(field, value, hint)
        if field.message_type is None:
            return value
        if field.message_type.full_name == TIMESTAMP:
            try:
                return value.ToDatetime(tzinfo=UTC)
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{field.name} must be a time from year 1 to 9999: {error}") from error
        if field.message_type.full_name == DURATION:
            return value.ToMicroseconds() if name.endswith("_us") else value.ToNanoseconds() / 1e9
        hint = _strip_none(hint)
        if get_origin(hint) is tuple:
            return tuple(getattr(value, part) for part in field.message_type.fields_by_name)
        try:
            return self.from_message(hint, value)
        except ValueError as error:
            raise ValueError(f"{field.name}.{error}") from error


def find_enum_number(enum: Any, name: str | None) -> int:
    """Return the number of an enum's value by its name in records. Return 0, unspecified, for an unknown name."""
    value = enum.values_by_name.get(_get_enum_prefix(enum) + (name or "").upper().replace("-", "_"))
    return value.number if value else 0


def name_enum_number(enum: Any, number: int) -> str:
    """Return the name of an enum's value in records. Return empty text for the unspecified and for an unknown value."""
    value = enum.values_by_number.get(number) if number else None
    return str(value.name).removeprefix(_get_enum_prefix(enum)).lower() if value else ""


def _get_enum_prefix(enum: Any) -> str:
    return str(enum.values_by_number[0].name).removesuffix("UNSPECIFIED")


def _name_enum_value(field: Any, number: int, hint: Any) -> str:
    enum = field.enum_type
    name = name_enum_number(enum, number)
    if not name:
        choices = ", ".join(sorted(value.name for value in enum.values if value.number))
        raise ValueError(f"{field.name} must be one of {choices}, got {number}")
    choices_by_name = {choice.lower(): choice for choice in get_args(hint)} if get_origin(hint) is Literal else {}
    return str(choices_by_name.get(name, name))


def read_attribute(record: Any, name: str) -> Any:
    """Return an attribute, or the value of a key of a mapping."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name)


def _read_source(record: Any, field: Any, source: Source) -> tuple[str, Any]:
    """Return the name of the attribute and its value."""
    if callable(source):
        return field.name, source(record)
    if source != field.name:
        for name in source.split("."):
            record = read_attribute(record, name)
        return source, record
    for name in (source, f"is_{source}", f"{source}_us", f"{source}_s"):
        value = record.get(name, MISSING) if isinstance(record, Mapping) else getattr(record, name, MISSING)
        if value is not MISSING:
            return name, value
    if isinstance(record, Mapping):
        return source, None
    raise AttributeError(
        f"{type(record).__name__} has no attribute for the field {source} of {field.containing_type.full_name}"
    )


def _find_field(descriptor: Any, sources: Mapping[str, Source], attribute: str) -> Any:
    """Return the field that is read from this attribute."""
    for name, source in sources.items():
        if source == attribute:
            return descriptor.fields_by_name[name]
    for name in (attribute, attribute.removeprefix("is_"), attribute.removesuffix("_us"), attribute.removesuffix("_s")):
        if name in descriptor.fields_by_name and name not in sources:
            return descriptor.fields_by_name[name]
    return None


def _get_attributes(record_type: Any) -> dict[str, Any]:
    """Return the types of the attributes that a record is made from."""
    if record_type not in _ATTRIBUTES:
        hints = get_type_hints(record_type)
        if issubclass(record_type, msgspec.Struct):
            names = list(record_type.__struct_fields__)
        else:
            names = [field.name for field in dataclasses.fields(record_type) if field.init]
        _ATTRIBUTES[record_type] = {name: hints[name] for name in names}
    return _ATTRIBUTES[record_type]


def _strip_none(hint: Any) -> Any:
    if get_origin(hint) in {Union, types.UnionType}:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return hint


def _get_container(hint: Any) -> tuple[type[list[Any] | tuple[Any, ...]], Any]:
    """Return the type of a sequence and of its items."""
    hint = _strip_none(hint)
    item_hint = get_args(hint)[0]
    return (tuple if get_origin(hint) is tuple else list), item_hint
