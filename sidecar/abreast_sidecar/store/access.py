"""Callers, their tokens and the audit log, as the ledger stores them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from abreast_sidecar.errors import ConflictError, ForbiddenError, NotFoundError, UnauthenticatedError
from abreast_sidecar.store.database import Database, sanitise_text
from abreast_sidecar.store.records import Window, from_row

TOKENS_CHANNEL = "abreast_tokens"  # NOTIFY
SECRET_BYTES = 32
MAX_TOKENS = 10_000  # every sidecar keeps all valid ones in memory
MAX_AUDIT_TEXT_CHARS = 300
ADMIN_NAME, ENVOY_NAME = "admin", "envoy"  # names of the tokens in the settings
RESERVED_NAMES = frozenset({ADMIN_NAME, ENVOY_NAME})


class Scope(StrEnum):
    """A right. No scope includes another one."""

    READ = "read"  # everything but captured values
    BODIES = "bodies"  # captured values
    OPERATE = "operate"  # changes
    ADMIN = "admin"  # tokens, audit log
    ENVOY = "envoy"  # traffic settings for an Envoy


USER_SCOPES = frozenset(Scope) - {Scope.ENVOY}


@dataclass(frozen=True, slots=True)
class Caller:
    """The origin of a call. Its `name` is empty if callers need no token; then the request may name an actor."""

    name: str = ""
    scopes: frozenset[str] = frozenset(Scope)
    services: frozenset[str] = frozenset()  # empty: all
    node: str = ""  # the only Envoy; empty: any
    peer: str = ""  # address

    @property
    def is_named(self) -> bool:
        return bool(self.name)

    def check_scope(self, scope: Scope) -> None:
        """Raise ForbiddenError."""
        if scope not in self.scopes:
            raise ForbiddenError(
                f"this call needs a token with the scope {scope}, and {self.name} has {', '.join(sorted(self.scopes))}; "
                f"create one: abreast token create NAME --scope {scope}"
            )

    def check_service(self, service: str) -> None:
        """Raise ForbiddenError."""
        if self.services and service not in self.services:
            raise ForbiddenError(f"the token {self.name} is valid for {', '.join(sorted(self.services))} only")

    def check_envoy(self, service: str, node: str) -> None:
        """Raise ForbiddenError unless the caller is an Envoy of the service."""
        self.check_scope(Scope.ENVOY)
        self.check_service(service)
        if self.node and node != self.node:
            raise ForbiddenError(f"the token {self.name} is valid for the Envoy {self.node} only")


current_caller: ContextVar[Caller] = ContextVar("current_caller")


@dataclass(frozen=True, slots=True)
class TokenDraft:
    name: str
    scopes: list[str]
    services: list[str]
    node: str
    expire_time: datetime | None
    creator: str


@dataclass(frozen=True, slots=True)
class Token:
    name: str
    scopes: tuple[str, ...]
    services: tuple[str, ...]
    node: str
    creator: str
    create_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None
    digest: bytes = field(repr=False)

    def check_valid(self) -> None:
        """Raise UnauthenticatedError if the token is revoked or expired."""
        if self.revoke_time is not None:
            raise UnauthenticatedError(f"the token {self.name} is revoked; ask an administrator for another one")
        if self.expire_time is not None and self.expire_time <= datetime.now(UTC):
            raise UnauthenticatedError(
                f"the token {self.name} expired at {self.expire_time:%FT%TZ}; create another one"
            )


@dataclass(frozen=True, slots=True)
class AuditEvent:
    id: int
    time: datetime
    actor: str
    peer: str
    action: str
    service: str
    target: str


def hash_secret(secret: str) -> bytes:
    """Return the hash of a token. Tokens are random, so that a plain hash resists guessing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


class TokenStore:
    """All tokens, in memory: a call does not wait for Postgres, and tokens stay valid while it is away."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tokens: Mapping[bytes, Token] | None = None  # by digest; None before the first read

    async def refresh(self) -> None:
        rows = await self._database.fetch_all("tokens_read", {"limit": MAX_TOKENS})
        self._tokens = {token.digest: token for token in (from_row(Token, row) for row in rows)}

    @property
    def is_loaded(self) -> bool:
        return self._tokens is not None

    def find(self, secret: str) -> Token | None:
        """Return the token, which may be revoked or expired."""
        return (self._tokens or {}).get(hash_secret(secret))

    def get(self, name: str) -> Token | None:
        return next((token for token in (self._tokens or {}).values() if token.name == name), None)

    async def read_service(self, kind: str, identifier: object) -> str:
        """Return the service of a `finding` or `pair`, or empty text without one."""
        query = {"finding": "finding_service", "pair": "pair_service"}[kind]
        row = await self._database.fetch_one(query, {"id": identifier})
        return "" if row is None else str(row["service"])

    async def create(self, draft: TokenDraft) -> tuple[Token, str]:
        """Return the token and its secret, which is not stored. Raise ConflictError if the name is taken."""
        secret = secrets.token_urlsafe(SECRET_BYTES)
        values = {**asdict(draft), "digest": hash_secret(secret), "limit": MAX_TOKENS}
        row = await self._database.fetch_one("token_create", values)
        if row is None:
            raise ConflictError(
                f"the name {draft.name!r} is taken, or the ledger has {MAX_TOKENS:,} tokens: use another name"
            )
        await self.refresh()
        return from_row(Token, row), secret

    async def revoke(self, name: str) -> Token:
        """Raise NotFoundError for an unknown name."""
        row = await self._database.fetch_one("token_revoke", {"name": name})
        if row is None:
            raise NotFoundError(f"there is no token {name!r}; list them with ListTokens")
        await self.refresh()
        return from_row(Token, row)

    async def list_tokens(self, *, before_id: int | None, limit: int) -> list[tuple[int, Token]]:
        """Return ids and tokens, the newest first."""
        rows = await self._database.fetch_all("tokens_list", {"before_id": before_id, "limit": limit})
        return [(row["id"], from_row(Token, row)) for row in rows]


class AuditLog:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, *, actor: str, peer: str, action: str, service: str, target: str) -> None:
        values = {"actor": actor, "peer": peer, "action": action, "service": service, "target": target}
        texts = {name: sanitise_text(text, MAX_AUDIT_TEXT_CHARS) for name, text in values.items()}
        await self._database.execute("audit_add", texts)

    async def list_events(self, window: Window, *, actor: str, before_id: int | None, limit: int) -> list[AuditEvent]:
        """Return events, the newest first."""
        values = {**asdict(window), "actor": actor, "before_id": before_id, "limit": limit}
        return [from_row(AuditEvent, row) for row in await self._database.fetch_all("audit_list", values)]
