"""What header values mean, as texts that are equal where two values mean the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

from msgspec.structs import replace

from abreast.protocol.capture import Headers, Request
from abreast_sidecar.compare.content import MediaType, parse_media_type
from abreast_sidecar.compare.model import Difference, Impact, Kind, RenderedValues
from abreast_sidecar.compare.values import render_value

# JSON is UTF-8 whatever is said, and so are event streams.
_ALWAYS_UTF8 = frozenset({"json", "ndjson", "events"})
_NONCE_SOURCE = re.compile(r"'nonce-[^']*'")
_LIST_TOKENS = re.compile(r'<[^>]*>?|"(?:[^"\\]|\\.)*"?|[^,;<"]+|.', re.DOTALL)
_NEEDLESS_QUOTES = re.compile(r'="([\w.~-]+)"')


def canonical_directives(value: str, separator: str = ",") -> str:
    """A set of `name` or `name=value`; names in any case."""
    canonical = set()
    for part in _split_list(value, separator):
        name, equals, argument = part.partition("=")
        canonical.add(name.strip().lower() + (equals and "=" + argument.strip().strip('"')))
    return ", ".join(sorted(canonical))


def canonical_names(value: str) -> str:
    """A set of names in any case."""
    return ", ".join(sorted({part.lower() for part in _split_list(value, ",")}))


def canonical_methods(value: str) -> str:
    return ", ".join(sorted(set(_split_list(value, ","))))


def canonical_content_type(value: str) -> str:
    return canonical_media_type(parse_media_type(value))


def canonical_media_type(media_type: MediaType) -> str:
    parameters = {
        name: _canonical_charset(text) if name == "charset" else text
        for name, text in media_type.parameters
        if name != "boundary"
    }
    if media_type.format in _ALWAYS_UTF8 and parameters.get("charset") == "utf-8":
        del parameters["charset"]
    return "; ".join([media_type.essence, *(f"{name}={text}" for name, text in parameters.items())])


def _canonical_charset(name: str) -> str:
    return "utf-8" if name.lower() == "utf8" else name.lower()


def canonical_csp(value: str) -> str:
    """Content-Security-Policy: each directive is a set of sources, and a nonce is fresh in every answer."""
    canonical = []
    for part in _split_list(_NONCE_SOURCE.sub("'nonce-*'", value), ";"):
        name, *sources = part.split()
        canonical.append(" ".join([name.lower(), *sorted(set(sources))]))
    return "; ".join(sorted(canonical))


def canonical_strict_transport(value: str) -> str:
    return canonical_directives(value, ";")


def canonical_links(value: str) -> str:
    """Link: addresses in their order, each with its parameters in any."""
    canonical = []
    for link in _split_unquoted(value, ","):
        parts = _split_unquoted(link, ";")
        canonical.append(
            "; ".join([*parts[:1], *sorted(canonical_directives(parameter, ";") for parameter in parts[1:])])
        )
    return ", ".join(canonical)


def _split_unquoted(value: str, separator: str) -> list[str]:
    """As `_split`, but for what stands in quotes or is an address."""
    pieces = [""]
    for token in _LIST_TOKENS.findall(value):
        if token == separator:
            pieces.append("")
        else:
            pieces[-1] += token
    return [stripped for part in pieces if (stripped := part.strip())]


def canonical_challenge(value: str) -> str:
    """WWW-Authenticate: quotes that a word does not need mean nothing."""
    return _NEEDLESS_QUOTES.sub(r"=\1", value.strip())


def _split_list(value: str, separator: str) -> list[str]:
    return [stripped for part in value.split(separator) if (stripped := part.strip())]


Canonicaliser = Callable[[str], str]
_CANONICALISERS: dict[str, Canonicaliser] = {
    "accept-patch": canonical_names,
    "accept-post": canonical_names,
    "accept-ranges": canonical_names,
    "access-control-allow-headers": canonical_names,
    "access-control-allow-methods": canonical_methods,
    "access-control-expose-headers": canonical_names,
    "allow": canonical_methods,
    "cache-control": canonical_directives,
    "cdn-cache-control": canonical_directives,
    "clear-site-data": canonical_names,
    "content-disposition": canonical_content_type,
    "content-encoding": canonical_names,
    "content-language": canonical_names,
    "content-security-policy": canonical_csp,
    "content-security-policy-report-only": canonical_csp,
    "content-type": canonical_content_type,
    "link": canonical_links,
    "pragma": canonical_directives,
    "proxy-authenticate": canonical_challenge,
    "strict-transport-security": canonical_strict_transport,
    "surrogate-control": canonical_directives,
    "vary": canonical_names,
    "www-authenticate": canonical_challenge,
}
LIST_HEADERS = frozenset(_CANONICALISERS) - {
    "content-disposition",
    "content-type",
    "content-security-policy",
    "content-security-policy-report-only",
    "link",
    "proxy-authenticate",
    "strict-transport-security",
    "www-authenticate",
}  # several lines of these are one list, in any order
PER_LINE_HEADERS = frozenset(
    {"content-security-policy", "content-security-policy-report-only", "content-type"}
)  # each line of these stands for itself; several lines of all others are one list


@lru_cache(maxsize=2048)
def canonical_value(name: str, value: str) -> str:
    canonicalise = _CANONICALISERS.get(name)
    return canonicalise(value) if canonicalise is not None else value.strip()


_PERCENT_ESCAPE = re.compile("%[0-9a-fA-F]{2}")  # their letters have no case

# Attributes of a cookie whose values have no case.
_CASELESS_COOKIE_ATTRIBUTES = frozenset({"samesite", "domain", "priority"})


@lru_cache(maxsize=2048)
def parse_cookie(value: str) -> tuple[str, str]:
    """The cookie's name, and its attributes in any order. Its value is one session's; that it has one, and how, is not.

    When it expires is a moment; that it does is not, nor that it is being deleted.
    """
    pair, _, attribute_text = value.partition(";")
    cookie_name, _, content = pair.partition("=")
    attributes = set() if content.strip().strip('"') else {"(empty)"}
    for part in _split_list(attribute_text, ";"):
        name, _, text = part.partition("=")
        key, text = name.strip().lower(), text.strip().strip('"')
        if key == "expires":
            text = "past" if re.search(r"\b19[67]\d\b", text) else "set"
        elif key == "domain":
            text = text.lower().removeprefix(".")
        elif key in _CASELESS_COOKIE_ATTRIBUTES:
            text = text.lower()
        attributes.add(f"{key}={text}" if text else key)
    return cookie_name.strip(), "; ".join(sorted(attributes))


def resolve_location(value: str, host: str, path: str) -> str:
    """Where it leads, seen from the request: a path if it is the same host, else the whole address."""
    value = _PERCENT_ESCAPE.sub(lambda escape: escape[0].upper(), value.strip())
    try:
        target = urlsplit(urljoin(f"//{host}{path}", value))
    except ValueError:
        return value
    if target.netloc.lower() != host.lower():
        return target._replace(netloc=target.netloc.lower()).geturl() if "@" not in target.netloc else value
    query = f"?{target.query}" if target.query else ""
    fragment = f"#{target.fragment}" if target.fragment else ""
    return f"{target.path or '/'}{query}{fragment}"


def get_scheme(address: str) -> str:
    """In lower case; empty where the address has none."""
    prefix, colon, _ = address.strip().partition("://")
    return prefix.lower() if colon and prefix.isalpha() else ""


_URL_HEADERS = frozenset({"location", "content-location"})
_HTTP_SCHEMES = frozenset({"http", "https"})
# What a client does with an answer differs where one of these is there and was not before.
_BEHAVIOUR_HEADER_PREFIXES = (
    "access-control-allow-",
    "cache-control",
    "clear-site-data",
    "content-disposition",
    "content-security-policy",
    "location",
    "refresh",
    "set-cookie[",
)
_VALIDATOR_HEADERS = frozenset({"etag", "last-modified"})  # their values belong to a build, that there is one does not
_HEADER_IMPACTS: dict[Kind, Impact] = {"added": "additive", "removed": "breaking", "changed": "value"}


def get_header(headers: Headers, name: str) -> str:
    for header, value in headers:
        if header == name:
            return value
    return ""


@lru_cache(maxsize=64)
def _split_volatile(volatile: frozenset[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    prefixes = tuple(name[:-1] for name in volatile if name.endswith("*"))
    return frozenset(name for name in volatile if not name.endswith("*")), prefixes


def diff_headers(
    old: Headers, new: Headers, volatile: frozenset[str], request: Request | None = None
) -> list[Difference]:
    """`request`: what both answered, so that relative and absolute addresses can be told to be the same."""
    if old == new:
        return []
    exact_names, prefixes = _split_volatile(volatile)
    left, right = _group_by_name(old, exact_names, prefixes), _group_by_name(new, exact_names, prefixes)
    if left == right:
        return []
    differences = []
    for name in sorted(left.keys() | right.keys()):
        old_values, new_values = left.get(name), right.get(name)
        if old_values != new_values and not _is_equivalent(name, old_values, new_values, request):
            differences.append(_header_difference(name, old_values, new_values))
    return differences


def diff_validators(old: Headers, new: Headers) -> list[Difference]:
    """Whether clients can ask if what they have is still valid. Any validator will do."""
    before, after = _find_validator(old), _find_validator(new)
    if bool(before) == bool(after):
        return []
    name, value = before or after
    if before:
        return [Difference.from_text("header", name, name, "removed", "value", render_value(value), None)]
    return [Difference.from_text("header", name, name, "added", "additive", None, render_value(value))]


def _find_validator(headers: Headers) -> tuple[str, ...]:
    return next(((name, value) for name, value in headers if name in _VALIDATOR_HEADERS), ())


def diff_trailers(old: Headers, new: Headers, volatile: frozenset[str]) -> list[Difference]:
    differences = diff_headers(old, new, volatile)
    return [
        replace(
            difference,
            path=f"trailer {difference.path}",
            location=RenderedValues(f"trailer {difference.exact_path}", difference.old, difference.new),
        )
        for difference in differences
    ]


def _group_by_name(headers: Headers, volatile: frozenset[str], prefixes: tuple[str, ...]) -> dict[str, list[str]]:
    values_by_name: dict[str, list[str]] = {}
    for name, value in headers:
        if name in volatile or name.startswith(prefixes):
            continue
        if name == "set-cookie":
            cookie_name, attributes = parse_cookie(value)
            values_by_name.setdefault(f"set-cookie[{cookie_name}]", []).append(attributes)
        else:
            values_by_name.setdefault(name, []).append(value.strip())
    return values_by_name


def _is_equivalent(
    name: str, old_values: list[str] | None, new_values: list[str] | None, request: Request | None
) -> bool:
    if (
        name in _URL_HEADERS
        and {*map(get_scheme, old_values or ()), *map(get_scheme, new_values or ())} >= _HTTP_SCHEMES
    ):
        return False
    return _canonical_values(name, old_values, request) == _canonical_values(name, new_values, request)


def _canonical_values(name: str, values: list[str] | None, request: Request | None) -> list[str] | None:
    if values is None:
        return None
    if name in LIST_HEADERS:
        return [canonical_value(name, ",".join(values))]
    if name in _URL_HEADERS and request is not None and (host := get_header(request.headers, "host")):
        return [resolve_location(value, host, request.path) for value in values]
    if name in PER_LINE_HEADERS or name.startswith("set-cookie["):
        return [canonical_value(name, value) for value in values]
    return [canonical_value(name, ", ".join(values))]


def _header_difference(name: str, old_values: list[str] | None, new_values: list[str] | None) -> Difference:
    kind: Kind = "added" if old_values is None else "removed" if new_values is None else "changed"
    impact = _HEADER_IMPACTS[kind]
    if (
        name == "content-type"
        and old_values
        and new_values
        and parse_media_type(old_values[0]).essence != parse_media_type(new_values[0]).essence
    ):
        impact = "breaking"
    if kind == "added" and name.startswith(_BEHAVIOUR_HEADER_PREFIXES):
        impact = "value"
    return Difference.from_text(
        part="header",
        path=name,
        exact_path=name,
        kind=kind,
        impact=impact,
        old=None if old_values is None else render_value(old_values[0] if len(old_values) == 1 else old_values),
        new=None if new_values is None else render_value(new_values[0] if len(new_values) == 1 else new_values),
    )
