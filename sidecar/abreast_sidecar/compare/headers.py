"""Differences between headers. Canonical values make two spellings of one meaning equal."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

from msgspec.structs import replace

from abreast.export.redaction import COOKIE_PLACEHOLDERS, SIGNED_COOKIE
from abreast.protocol.capture import Headers, Request
from abreast_sidecar.compare.content import (
    GRPC_LINES_TYPE,
    GRPC_OBJECT_TYPE,
    GRPC_PROTO_TYPE,
    GRPC_TYPE,
    MediaType,
    parse_media_type,
)
from abreast_sidecar.compare.model import Difference, Impact, RenderedValues

# These formats are UTF-8 by definition, whatever charset the header declares.
_ALWAYS_UTF8 = frozenset({"json", "ndjson", "events"})
CONVERTED_TYPES = frozenset({GRPC_OBJECT_TYPE, GRPC_LINES_TYPE})
GRPC_TYPES = CONVERTED_TYPES | {GRPC_PROTO_TYPE}
_NONCE_SOURCE = re.compile(r"'nonce-[^']*'")
_LIST_TOKENS = re.compile(r'<[^>]*>?|"(?:[^"\\]|\\.)*"?|[^,;<"]+|.', re.DOTALL)
_CHALLENGE_START = re.compile(r"([\w!#$%&'*+.^`|~-]+)(?: +(.*))?", re.DOTALL)
_NEEDLESS_QUOTES = re.compile(r'="([\w.~-]+)"')
_URL_HEADERS = frozenset({"location", "content-location"})
_HTTP_SCHEMES = frozenset({"http", "https"})
# Adding one of these headers changes how a client handles the response.
_BEHAVIOUR_HEADER_PREFIXES = (
    "access-control-allow-", "cache-control", "clear-site-data", "content-disposition", "content-security-policy",
    "location", "refresh", "set-cookie[",
)  # fmt: skip
_CORS_PREFIX = "access-control-"
# Without one of these headers, caches store less or by their own rules, and clients read the same response.
_CACHE_LIFETIME_HEADERS = frozenset(
    {"age", "cache-control", "cdn-cache-control", "expires", "pragma", "surrogate-control"}
)
_CACHE_RESTRICTIONS = frozenset({"no-cache", "no-store", "private"})
_VALIDATOR_HEADERS = frozenset({"etag", "last-modified"})  # values depend on the build, their presence does not
_PERCENT_ESCAPE = re.compile("%[0-9a-fA-F]{2}")  # without case
_UNRESERVED = re.compile("[A-Za-z0-9._~-]")  # characters that mean the same with and without an escape
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
MAX_IMMEDIATE_S = 5.0  # from the start of a request to the `expires` of a response that expires at once
MAX_EXPIRY_GAP_S = 2 * 86_400  # between the dates of two cookies for one request
_EXPIRY = re.compile(r"\bexpires=(\d{4}-\d\d-\d\dT[\d:]{8}(?:[+-]\d\d:\d\d)?)")
_CASELESS_COOKIE_ATTRIBUTES = frozenset({"samesite", "domain", "priority"})


def canonical_directives(value: str, separator: str = ",") -> str:
    """Sort a list of `name` or `name=value`, names without case."""
    canonical = set()
    for part in _split_list(value, separator):
        name, equals, argument = part.partition("=")
        canonical.add(name.strip().lower() + (equals and "=" + argument.strip().strip('"')))
    return ", ".join(sorted(canonical))


def canonical_names(value: str) -> str:
    """Sort a list of names without case."""
    return ", ".join(sorted({part.lower() for part in _split_list(value, ",")}))


def canonical_media_type(media_type: MediaType) -> str:
    texts = [GRPC_TYPE if media_type.essence in GRPC_TYPES else media_type.essence]
    for name, value in media_type.parameters:
        text = value
        if name == "charset":
            text = "utf-8" if value.lower() == "utf8" else value.lower()
        is_implied = name == "charset" and text == "utf-8" and media_type.format in _ALWAYS_UTF8
        if name != "boundary" and not is_implied:
            texts.append(f"{name}={text}")
    return "; ".join(texts)


def canonical_csp(value: str) -> str:
    """Sort Content-Security-Policy. Mask nonces, which are new in every response."""
    canonical = []
    for part in _split_list(_NONCE_SOURCE.sub("'nonce-*'", value), ";"):
        name, *sources = part.split()
        canonical.append(" ".join([name.lower(), *sorted(set(sources))]))
    return "; ".join(sorted(canonical))


def canonical_links(value: str) -> str:
    """Sort the parameters of each link, and keep the order of the links."""
    canonical = []
    for link in _split_unquoted(value, ","):
        parts = _split_unquoted(link, ";")
        parameters = sorted(canonical_directives(parameter, ";") for parameter in parts[1:])
        canonical.append("; ".join([*parts[:1], *parameters]))
    return ", ".join(canonical)


def canonical_challenges(value: str) -> str:
    """Sort the parameters of each challenge, and keep the order of the challenges. Schemes and names are without case."""
    challenges: list[tuple[str, list[str]]] = []
    for part in _split_unquoted(_NEEDLESS_QUOTES.sub(r"=\1", value), ","):
        start = _CHALLENGE_START.fullmatch(part)
        if start is not None or not challenges:
            challenges.append((start[1].lower() if start else "", []))
        parameter = (start[2] or "") if start else part
        name, equals, argument = parameter.partition("=")
        is_named = equals and argument.strip("= ")  # `abc==` is a token
        challenges[-1][1].append(f"{name.strip().lower()}={argument.strip()}" if is_named else parameter)
    return ", ".join(" ".join([scheme, ", ".join(sorted(parameters))]).strip() for scheme, parameters in challenges)


def _split_unquoted(value: str, separator: str) -> list[str]:
    """Split at separators outside of quotes and angle brackets."""
    pieces = [""]
    for token in _LIST_TOKENS.findall(value):
        if token == separator:
            pieces.append("")
        else:
            pieces[-1] += token
    return [stripped for part in pieces if (stripped := part.strip())]


def _split_list(value: str, separator: str) -> list[str]:
    return [stripped for part in value.split(separator) if (stripped := part.strip())]


_CANONICALISERS: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(
        (
            "accept-patch", "accept-post", "accept-ranges", "access-control-allow-headers",
            "access-control-expose-headers", "clear-site-data", "content-encoding", "content-language", "vary",
        ),
        canonical_names,
    ),
    **dict.fromkeys(("access-control-allow-methods", "allow"), lambda value: ", ".join(sorted({*_split_list(value, ",")}))),
    **dict.fromkeys(("cache-control", "cdn-cache-control", "pragma", "surrogate-control"), canonical_directives),
    **dict.fromkeys(
        ("content-disposition", "content-type"), lambda value: canonical_media_type(parse_media_type(value))
    ),
    **dict.fromkeys(("content-security-policy", "content-security-policy-report-only"), canonical_csp),
    **dict.fromkeys(("proxy-authenticate", "www-authenticate"), canonical_challenges),
    **dict.fromkeys(
        ("referrer-policy", "x-content-type-options", "x-frame-options"), lambda value: value.strip().lower()
    ),
    "link": canonical_links,
    "strict-transport-security": lambda value: canonical_directives(value, ";"),
}  # fmt: skip
# Several lines of one of these headers make one list, whose order means nothing.
LIST_HEADERS = frozenset(
    name
    for name, canonicalise in _CANONICALISERS.items()
    if canonicalise in {canonical_names, canonical_directives} or name in {"access-control-allow-methods", "allow"}
)
# Each line of one of these headers has its own meaning.
PER_LINE_HEADERS = frozenset({"content-security-policy", "content-security-policy-report-only", "content-type"})


@lru_cache(maxsize=2048)
def canonical_value(name: str, value: str) -> str:
    canonicalise = _CANONICALISERS.get(name)
    return canonicalise(value) if canonicalise is not None else value.strip()


@lru_cache(maxsize=2048)
def parse_cookie(value: str) -> tuple[str, str]:
    """Return the name of a cookie and its sorted attributes.

    The value belongs to a session: what counts is whether it is empty, a placeholder such as `undefined`, or signed. The
    date of `expires` depends on the time: dates far from each other count, and a date in the past, which deletes the cookie.
    """
    pair, _, attribute_text = value.partition(";")
    cookie_name, _, content = pair.partition("=")
    attributes = _describe_cookie_value(content.strip().strip('"'))
    for part in _split_list(attribute_text, ";"):
        name, _, text = part.partition("=")
        key, text = name.strip().lower(), text.strip().strip('"')
        if key == "expires":
            text = "past" if re.search(r"\b19[67]\d\b", text) else _format_expiry(text)
        elif key == "domain":
            text = text.lower().removeprefix(".")
        elif key in _CASELESS_COOKIE_ATTRIBUTES:
            text = text.lower()
        attributes.add(f"{key}={text}" if text else key)
    return cookie_name.strip(), "; ".join(sorted(attributes))


def _describe_cookie_value(content: str) -> set[str]:
    if not content:
        return {"(empty)"}
    if content.lower() in COOKIE_PLACEHOLDERS:
        return {f"({content.lower()})"}
    return {"(signed)"} if SIGNED_COOKIE.fullmatch(content) else set()


def _format_expiry(text: str) -> str:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return "set"
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).isoformat()


def _is_same_expiry(old: list[str] | None, new: list[str] | None) -> bool:
    """Tell whether the attributes of cookies are equal, except that the dates are near each other."""
    if old is None or new is None:
        return False
    before, after = ("\n".join(values) for values in (old, new))
    if _EXPIRY.sub("expires", before) != _EXPIRY.sub("expires", after):
        return False
    try:
        dates = ([datetime.fromisoformat(text) for text in _EXPIRY.findall(values)] for values in (before, after))
        return all(abs((date - other).total_seconds()) <= MAX_EXPIRY_GAP_S for date, other in zip(*dates, strict=True))
    except (TypeError, ValueError):  # another attribute looks like a date
        return False


def resolve_location(value: str, host: str, path: str) -> str:
    """Resolve an address against the request: to a path on the same host, or to a whole address."""
    value = _PERCENT_ESCAPE.sub(_normalise_escape, value.strip())
    try:
        target = urlsplit(urljoin(f"//{host}{path}", value))
    except ValueError:
        return value
    default_port = _DEFAULT_PORTS.get(target.scheme, " ")
    address = target.netloc.lower().removesuffix(default_port)
    if address != host.lower().removesuffix(default_port):
        return target._replace(netloc=address).geturl() if "@" not in target.netloc else value
    query = f"?{target.query}" if target.query else ""
    fragment = f"#{target.fragment}" if target.fragment else ""
    return f"{target.path or '/'}{query}{fragment}"


def _normalise_escape(escape: re.Match[str]) -> str:
    character = chr(int(escape[0][1:], 16))
    return character if _UNRESERVED.match(character) else escape[0].upper()


def get_scheme(address: str) -> str:
    """Return the scheme in lower case, or an empty text."""
    prefix, colon, _ = address.strip().partition("://")
    return prefix.lower() if colon and prefix.isalpha() else ""


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
    """Compare headers except volatile ones. Relative and absolute addresses are equal if `request` is given."""
    if old == new:
        return []
    exact_names, prefixes = _split_volatile(volatile)
    left, right = _group_by_name(old, exact_names, prefixes), _group_by_name(new, exact_names, prefixes)
    if left == right:
        return []
    differences = []
    for name in sorted(left.keys() | right.keys()):
        values = left.get(name), right.get(name)
        if values[0] == values[1]:
            continue
        schemes = {get_scheme(value) for side in values for value in side or ()} if name in _URL_HEADERS else set()
        old_canonical, new_canonical = (_canonical_values(name, side, request) for side in values)
        if name.startswith("set-cookie[") and _is_same_expiry(*values):
            continue
        if schemes >= _HTTP_SCHEMES or old_canonical != new_canonical:
            differences.append(_header_difference(name, *values, request))
    return differences


def diff_validators(old: Headers, new: Headers) -> list[Difference]:
    """Compare whether clients can revalidate a cached response. All validators are equivalent."""
    before, after = (
        next((header for header in headers if header[0] in _VALIDATOR_HEADERS), None) for headers in (old, new)
    )
    if before and not after:
        return [Difference.from_values("header", before[0], before[1], None, "value", before[0])]
    if after and not before:
        return [Difference.from_values("header", after[0], None, after[1], "additive", after[0])]
    return []


def diff_expiry(old: Headers, new: Headers, start_times: tuple[float, float]) -> list[Difference]:
    """Compare whether a response expires at once, later, or at no time that it states. The time itself is volatile.

    `start_times`: Unix times of the requests.
    """
    (before, old_value), (after, new_value) = map(_read_expiry, (old, new), start_times)
    if before == after:
        return []
    impact: Impact = "value" if before else "additive"
    return [Difference.from_values("header", "expires", old_value, new_value, impact, "expires")]


def _read_expiry(headers: Headers, start_time: float) -> tuple[str, str | None]:
    """Return `now`, `later` or empty text, and the header. A date that can't be read is in the past (RFC 9111, 5.3)."""
    values = dict(headers)
    value = values.get("expires")
    if value is None or "max-age" in values.get("cache-control", "").lower():  # which has precedence
        return "", None
    try:
        is_later = parsedate_to_datetime(value).timestamp() > start_time + MAX_IMMEDIATE_S
    except (TypeError, ValueError, OverflowError):
        is_later = False
    return "later" if is_later else "now", value


def diff_trailers(old: Headers, new: Headers, volatile: frozenset[str]) -> list[Difference]:
    differences = []
    for difference in diff_headers(old, new, volatile):
        location = RenderedValues(f"trailer {difference.exact_path}", difference.old, difference.new)
        differences.append(replace(difference, path=f"trailer {difference.path}", location=location))
    return differences


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


def _is_cross_origin(request: Request | None) -> bool:
    """Check whether a browser reads CORS headers in the response. Assume so for a request that is not known."""
    return request is None or bool(get_header(request.headers, "origin"))


def _restricts_caches(values: list[str] | None) -> bool:
    directives = {part.partition("=")[0].strip().lower() for value in values or () for part in _split_list(value, ",")}
    return not directives.isdisjoint(_CACHE_RESTRICTIONS)


def _header_difference(
    name: str, old_values: list[str] | None, new_values: list[str] | None, request: Request | None
) -> Difference:
    impact: Impact = "value"
    if old_values is None:
        impact = "value" if name.startswith(_BEHAVIOUR_HEADER_PREFIXES) else "additive"
    elif name == "cache-control" and _restricts_caches(old_values) and not _restricts_caches(new_values):
        impact = "breaking"  # a cache may give the response of one user to another one
    elif new_values is None:
        is_unread = name in _CACHE_LIFETIME_HEADERS or (name.startswith(_CORS_PREFIX) and not _is_cross_origin(request))
        impact = "value" if is_unread or name == "content-encoding" else "breaking"  # each client reads a plain body
    elif name == "content-type":
        is_same_type = parse_media_type(old_values[0]).essence == parse_media_type(new_values[0]).essence
        impact = "value" if is_same_type else "breaking"
    old, new = (values[0] if values and len(values) == 1 else values for values in (old_values, new_values))
    return Difference.from_values("header", name, old, new, impact, name)
