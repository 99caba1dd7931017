"""Times and names of the ledger as protobuf has them."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def to_timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message


def to_duration(microseconds: float | None) -> Duration | None:
    if microseconds is None:
        return None
    message = Duration()
    message.FromMicroseconds(round(microseconds))
    return message


def to_enum_number(enum: EnumDescriptor, name: str) -> int:
    """An enum's value by the ledger's name; unspecified for a name that this code does not know."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    value = enum.values_by_name.get(prefix + name.upper())
    return value.number if value else 0
