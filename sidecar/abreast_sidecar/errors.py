"""Errors of the sidecar and its command line.

    SidecarError
    ├── SettingError        a setting has an invalid value
    ├── ServerError         a server did not start
    ├── RedisError          Redis can't be reached, or rejects a command
    ├── LedgerError         Postgres can't be reached, or rejects a statement
    │   ├── SchemaError     the schema is newer than this code, or broken
    │   └── RefusedError    Postgres rejects the data of a batch
    ├── RpcError            a call failed with an error that no other class represents
    ├── StaleRulesError     the rules changed since a batch was compared
    ├── ArgumentError       an argument of a request is invalid
    ├── OverbroadRuleError  a rule would hide more than it was made for
    ├── ConflictError       a request conflicts with the present state
    └── NotFoundError       the ledger has no such id

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


class NotFoundError(SidecarError):
    pass


class RpcError(SidecarError):
    """A call failed with an error that no other class represents."""
