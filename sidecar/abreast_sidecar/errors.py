"""Errors of the sidecar and its command line.

    SidecarError
    ├── SettingError        a setting has an invalid value
    ├── ServerError         a server did not start
    ├── RedisError          Redis can't be reached, or rejects a command
    ├── LedgerError         Postgres can't be reached, or rejects a statement
    │   ├── SchemaError     the schema is newer than this code, or broken
    │   └── RefusedError    Postgres rejects the data of a batch
    ├── OpenApiError        an OpenAPI document can't be read or used
    ├── RpcError            a call failed with an error that no other class represents
    ├── StaleRulesError     the rules changed since a batch was compared
    ├── ArgumentError       an argument of a request is invalid
    ├── OverbroadRuleError  a rule would hide more than it was made for
    ├── ConflictError       a request conflicts with the present state
    │   └── VerdictError    the verdict is FAIL, and the request would send more users to new
    ├── StaleVersionError   the settings changed since the caller read them
    ├── NotFoundError       the ledger has no such id
    ├── AccessError         a caller may not make a call
    │   ├── UnauthenticatedError  it has no valid token
    │   ├── ForbiddenError        its token lacks the scope or the service
    │   └── TooManyCallsError     it exceeds a limit
    └── StoppingError       the sidecar drains and ends streams

Messages are lower case and say what, where and what to do.
"""


class SidecarError(Exception):
    pass


class SettingError(SidecarError):
    pass


class ServerError(SidecarError):
    pass


class RedisError(SidecarError):
    pass


class LedgerError(SidecarError):
    pass


class SchemaError(LedgerError):
    pass


class RefusedError(LedgerError):
    pass


class StaleRulesError(SidecarError):
    pass


class ArgumentError(SidecarError):
    pass


class OverbroadRuleError(SidecarError):
    pass


class ConflictError(SidecarError):
    pass


class VerdictError(ConflictError):
    pass


class StaleVersionError(SidecarError):
    pass


class NotFoundError(SidecarError):
    pass


class AccessError(SidecarError):
    pass


class UnauthenticatedError(AccessError):
    pass


class ForbiddenError(AccessError):
    pass


class TooManyCallsError(AccessError):
    pass


class StoppingError(SidecarError):
    def __init__(self) -> None:
        super().__init__("the sidecar is stopping; call again")


class OpenApiError(SidecarError):
    pass


class RpcError(SidecarError):
    pass


def first_line(error: Exception) -> str:
    """Return the first line of a driver's message, or the name of the error's class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def locate_error(error: Exception) -> str:
    """Return the class of an error and the line that raised it. The message may contain captured values."""
    place = error.__traceback__
    if place is None:
        return type(error).__name__
    while place.tb_next is not None:
        place = place.tb_next
    return f"{type(error).__name__} in {place.tb_frame.f_globals.get('__name__')}, line {place.tb_lineno}"
