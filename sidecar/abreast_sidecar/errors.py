"""Errors of the sidecar and its command line.

SidecarError
├── SettingError       a setting has a value that can't be used
├── ServerError        an embedded server did not start
├── RedisError         Redis can't be reached or refuses
├── LedgerError        Postgres can't be reached or refuses
│   ├── SchemaError    the database's schema is newer than this code, or broken
│   └── RefusedError   Postgres is well and refuses what it was given
├── RpcError           the sidecar answered a call with any other error
├── StaleRulesError    the rules changed since a batch was judged; judge it again
├── ArgumentError      a request asks for something impossible
├── BroadRuleError     a rule would hide more than it was made for
├── ConflictError      a request does not fit what is under way
└── NotFoundError      an id that the ledger doesn't hold

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
    """The sidecar answered a call with an error that no other class stands for."""
