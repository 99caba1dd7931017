"""The gRPC status of each error of the sidecar."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2

from abreast_sidecar.errors import (
    ArgumentError,
    ConflictError,
    LedgerError,
    NotFoundError,
    OverbroadRuleError,
    RedisError,
    SchemaError,
    SidecarError,
)
from abreast_sidecar.traffic.xds import wire_pb2 as wire

ERROR_DOMAIN = "abreast"
ERROR_INFO_TYPE_URL = "type.googleapis.com/google.rpc.ErrorInfo"
STATUS_DETAILS_KEY = "grpc-status-details-bin"  # trailing metadata with a google.rpc.Status


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    code: grpc.StatusCode
    message: str
    reason: str  # reason of the google.rpc.ErrorInfo, in UPPER_SNAKE_CASE

    @property
    def metadata(self) -> Iterable[tuple[str, bytes]]:
        info = wire.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN)
        detail = any_pb2.Any(type_url=ERROR_INFO_TYPE_URL, value=info.SerializeToString())
        status = wire.Status(code=self.code.value[0], message=self.message, details=[detail])
        return ((STATUS_DETAILS_KEY, status.SerializeToString()),)


class StoppingError(SidecarError):
    """Ends streams while the sidecar drains."""

    def __init__(self) -> None:
        super().__init__("the sidecar is stopping; call again")


STATUS_BY_ERROR: tuple[tuple[type[SidecarError], grpc.StatusCode, str], ...] = (
    (StoppingError, grpc.StatusCode.UNAVAILABLE, "STOPPING"),
    (ArgumentError, grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARGUMENT"),
    (OverbroadRuleError, grpc.StatusCode.FAILED_PRECONDITION, "RULE_TOO_BROAD"),
    (NotFoundError, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (ConflictError, grpc.StatusCode.FAILED_PRECONDITION, "CONFLICT"),
    (SchemaError, grpc.StatusCode.FAILED_PRECONDITION, "LEDGER_SCHEMA"),
    (LedgerError, grpc.StatusCode.UNAVAILABLE, "LEDGER_UNAVAILABLE"),
    (RedisError, grpc.StatusCode.UNAVAILABLE, "REDIS_UNAVAILABLE"),
)
INTERNAL_ERROR_STATUS = ErrorStatus(grpc.StatusCode.INTERNAL, "internal error; see the sidecar's log", "INTERNAL")


def to_error_status(error: Exception) -> ErrorStatus:
    for kind, code, reason in STATUS_BY_ERROR:
        if isinstance(error, kind):
            return ErrorStatus(code, str(error), reason)
    return INTERNAL_ERROR_STATUS
