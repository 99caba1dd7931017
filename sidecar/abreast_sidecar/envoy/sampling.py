"""Rules that choose which requests Envoy samples. The first rule that matches a request decides its share.

A rule is text such as `POST /search read-only 100%`, or a mapping with the same parts. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from abreast.settings import share as parse_share

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
MAX_RULES = 50
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")  # part of a runtime key and of a statistic
METHOD_PATTERN = re.compile(r"[A-Z][A-Z_-]{0,29}")
PATH_PATTERN = re.compile(r"/([A-Za-z0-9._~!$&'()*+,=:@%/-]|\{[A-Za-z_][A-Za-z0-9_]*\}){0,500}")
HOST_PATTERN = re.compile(r"(\*\.)?[0-9a-z_]([0-9a-z_.-]{0,250}[0-9a-z_])?")
HEADER_NAME_PATTERN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,100}")
HEADER_VALUE_PATTERN = re.compile(r"[ -~]{0,200}")
PATH_PARAMETER = re.compile(r"\{[^}]*\}")
SEPARATOR = re.compile(r"\s*;\s+|\s*\n\s*")
ANY_PATH = "*"
QUERIES, READ_ONLY = "queries", "read-only"
WORD_PATTERN = re.compile(
    r"(?P<path>/.*|\*)|(?P<share>[0-9.]+%?)|(?P<method>[A-Z_,-]+)|(?P<graphql>queries)|(?P<read_only>read-only)"
    r"|name:(?P<name>.+)|host:(?P<host>.+)|header:(?P<header>.+)"
)


class RuleDocument(msgspec.Struct, forbid_unknown_fields=True):
    """A rule as a mapping, in a file or in the metadata of an Envoy."""

    share: str | float
    name: str = ""
    method: str | list[str] = ""
    path: str = ""
    host: str = ""
    headers: dict[str, str] = {}
    read_only: bool = False
    graphql: Literal["", "queries"] = ""


@dataclass(frozen=True, slots=True)
class SampleRule:
    """Empty methods, path or host match any. A header without a value matches any value.

    A rule without methods samples only safe methods, and never samples the other ones that it matches.
    """

    name: str
    share: float
    methods: tuple[str, ...] = ()
    path: str = ""  # `*` matches any characters, and {x} one segment
    host: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    read_only: bool = False  # requests of unsafe methods change nothing, so that they also get baseline copies
    queries: bool = False  # only GraphQL queries, by the body

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> SampleRule:
        """Raise ValueError with the requirement."""
        if "share" not in mapping:
            raise ValueError("a share is missing, such as 10%")
        try:
            parts = msgspec.convert(dict(mapping), RuleDocument)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None
        methods = parts.method.split(",") if parts.method and isinstance(parts.method, str) else parts.method
        rule = cls(
            name="",
            share=parse_share(parts.share),
            methods=tuple(dict.fromkeys(method.strip().upper() for method in methods)),
            path="" if parts.path == ANY_PATH else parts.path,
            host=parts.host.lower(),
            headers=tuple(sorted((name.lower(), value) for name, value in parts.headers.items())),
            read_only=parts.read_only or parts.graphql == QUERIES,
            queries=parts.graphql == QUERIES,
        )
        rule._check()
        name = parts.name or rule._derive_name()
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError("a name has at most 40 lower-case letters, digits, - and _, such as name:search")
        return replace(rule, name=name)

    @classmethod
    def parse(cls, text: str) -> SampleRule:
        """Parse words in any order. Raise ValueError with the requirement."""
        parts: dict[str, Any] = {"headers": {}}
        for word in text.split():
            match = WORD_PATTERN.fullmatch(word)
            if match is None or match.lastgroup is None:
                raise ValueError(
                    f"{word!r} is not part of a rule; write METHODS, /PATH, host:HOST, header:NAME=VALUE, {READ_ONLY},"
                    f" {QUERIES}, name:NAME or a share"
                )
            field, value = match.lastgroup, match[match.lastgroup]
            if field == "header":
                name, _, parts["headers"][name] = value.partition("=")
            elif field in parts:
                raise ValueError(f"it has more than one {field}")
            else:
                parts[field] = value == READ_ONLY if field == "read_only" else value
        return cls.from_mapping(parts)

    def _check(self) -> None:
        if not all(METHOD_PATTERN.fullmatch(method) for method in self.methods):
            raise ValueError("methods must be words such as POST or GET,HEAD")
        if self.path and not PATH_PATTERN.fullmatch(self.path):
            raise ValueError("a path must be like /search, /admin/* or /users/{id}")
        if self.host and not HOST_PATTERN.fullmatch(self.host):
            raise ValueError("a host must be like shop.example.com or *.example.com, without a port")
        for name, value in self.headers:
            if not HEADER_NAME_PATTERN.fullmatch(name) or not HEADER_VALUE_PATTERN.fullmatch(value):
                raise ValueError("a header must be like header:x-canary=1, or header:x-canary for any value")
            if name.startswith("x-abreast-") or name in {"host", ":authority", ":method", ":path"}:
                raise ValueError(
                    f"the header {name} can't be matched: use the method, path or host, and Envoy removes x-abreast-*"
                )
        if not (self.methods or self.path or self.host or self.headers):
            raise ValueError(
                "a method, path, host or header is missing; for all safe requests, use --sample-safe SHARE"
            )
        if self.queries and self.methods != ("POST",):
            raise ValueError(f"{QUERIES} needs the method POST, because it reads the body")
        if self.read_only and not self.unsafe_methods:
            raise ValueError(f"{READ_ONLY} needs a method such as POST: GET, HEAD and OPTIONS are read-only")

    def _derive_name(self) -> str:
        words = [*self.methods, self.path, self.host, *(part for header in self.headers for part in header)]
        return re.sub(r"[^a-z0-9_]+", "-", " ".join(words).lower()).strip("-_")[:40].strip("-_")

    @property
    def safe_methods(self) -> tuple[str, ...]:
        return tuple(method for method in self.methods or SAFE_METHODS if method in SAFE_METHODS)

    @property
    def unsafe_methods(self) -> tuple[str, ...]:
        return tuple(method for method in self.methods if method not in SAFE_METHODS)

    @property
    def condition(self) -> str:
        """Return the text of the rule without its name and share."""
        words = [
            ",".join(self.methods),
            self.path,
            f"host:{self.host}" if self.host else "",
            *(f"header:{name}={value}".removesuffix("=") for name, value in self.headers),
            QUERIES if self.queries else READ_ONLY if self.read_only else "",
        ]
        return " ".join(word for word in words if word)

    def __str__(self) -> str:
        return f"name:{self.name} {self.condition} {self.share * 100:g}%"

    def to_mapping(self) -> dict[str, Any]:
        """Return the mapping without the parts that have their default."""
        parts = {
            "name": self.name,
            "method": list(self.methods),
            "path": self.path,
            "host": self.host,
            "headers": dict(self.headers),
            "read_only": self.read_only and not self.queries,
            "graphql": QUERIES if self.queries else "",
        }
        return {**{name: value for name, value in parts.items() if value}, "share": self.share}

    def includes(self, other: SampleRule) -> bool:
        """Return True if this rule matches all requests of the other one. False may mean that it is not certain."""
        headers = dict(self.headers)
        other_headers = dict(other.headers)
        return (
            (not self.methods or (bool(other.methods) and set(self.methods) >= set(other.methods)))
            and _includes_path(self.path, other.path)
            and _includes_host(self.host, other.host)
            and all(name in other_headers and value in {"", other_headers[name]} for name, value in headers.items())
        )


def _includes_path(path: str, other: str) -> bool:
    """Match the pattern `other` as a text, in which the character 1 stands for any characters and 2 for a segment."""
    if not path or not other:
        return not path
    pattern = "".join(
        {"*": r"[^\0]*"}.get(part, r"[^/\1]+" if part.startswith("{") else re.escape(part))
        for part in re.split(r"(\*|\{[^}]*\})", path)
    )
    return re.fullmatch(pattern, PATH_PARAMETER.sub("\2", other).replace("*", "\1")) is not None


def _includes_host(host: str, other: str) -> bool:
    return host in {"", other} or (host.startswith("*.") and other.removeprefix("*").endswith(host[1:]))


def parse_rules(value: str | Sequence[str | Mapping[str, Any]]) -> tuple[SampleRule, ...]:
    """Parse rules in order: mappings or texts, or one text with `; ` or a line break between rules. Raise ValueError."""
    entries = SEPARATOR.split(value.strip().removesuffix(";")) if isinstance(value, str) else value
    rules: list[SampleRule] = []
    for entry in filter(None, entries):
        try:
            rules.append(SampleRule.parse(entry) if isinstance(entry, str) else SampleRule.from_mapping(entry))
            _check_reachable(rules[-1], rules[:-1])
        except ValueError as error:
            raise ValueError(f"rules such as `POST /search read-only 100%` ({entry}: {error})") from None
    if len(rules) > MAX_RULES:
        raise ValueError(f"at most {MAX_RULES} rules")
    return tuple(rules)


def _check_reachable(rule: SampleRule, earlier_rules: Sequence[SampleRule]) -> None:
    for earlier in earlier_rules:
        if rule.includes(earlier) and earlier.includes(rule):
            raise ValueError(f"an earlier rule matches the same requests with the share {earlier.share * 100:g}%")
        if earlier.includes(rule):
            raise ValueError(
                f"it can never match, because the earlier rule {earlier.condition!r} takes all its requests;"
                " put the narrower rule first"
            )
        if rule.name == earlier.name:
            raise ValueError(f"an earlier rule has the name {rule.name} too; give one a name, such as name:search")
