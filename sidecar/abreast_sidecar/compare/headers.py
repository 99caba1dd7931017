"""Differences between headers. Canonical values make two spellings of one meaning equal."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

from msgspec.structs import replace

from abreast.protocol.capture import Headers, Request
from abreast_sidecar.compare.content import MediaType, parse_media_type
from abreast_sidecar.compare.model import Difference, Impact, RenderedValues

# These formats are UTF-8 by definition, whatever charset the header declares.
_ALWAYS_UTF8 = frozenset({"json", "ndjson", "events"})
_NONCE_SOURCE = re.compile(r"'nonce-[^']*'")
_LIST_TOKENS = re.compile(r'<[^>]*>?|"(?:[^"\\]|\\.)*"?|[^,;<"]+|.', re.DOTALL)
_NEEDLESS_QUOTES = re.compile(r'="([\w.~-]+)"')
_URL_HEADERS = frozenset({"location", "content-location"})
_HTTP_SCHEMES = frozenset({"http", "https"})
# Adding one of these headers changes how a client handles the answer.
_BEHAVIOUR_HEADER_PREFIXES = (
    "access-control-allow-", "cache-control", "clear-site-data", "content-disposition", "content-security-policy",
    "location", "refresh", "set-cookie[",
)  # fmt: skip
_VALIDATOR_HEADERS = frozenset({"etag", "last-modified"})  # values depend on the build, their presence does not
_PERCENT_ESCAPE = re.compile("%[0-9a-fA-F]{2}")  # without case
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
    """Sort Content-Security-Policy. Mask nonces, which are new in every answer."""
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
        canonical.append(
            "; ".join([*parts[:1], *sorted(canonical_directives(parameter, ";") for parameter in parts[1:])])
        )
    return ", ".join(canonical)


def _split_unquoted(value: str, separator: str) -> list[str]:
    """Split at separators outside of quotes and angle brackets."""
    pieces = [""]
    for token in _LIST_TOKENS.findall(value):
        if token == separator:
            pieces.append("")
        else:
            pieces[-1] += token
    return [stripped for part in pieces if (stripped := part.strip())]


def canonical_challenge(value: str) -> str:
    """Remove quotes around plain words."""
    return _NEEDLESS_QUOTES.sub(r"=\1", value.strip())


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
    **dict.fromkeys(("proxy-authenticate", "www-authenticate"), canonical_challenge),
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

    The value belongs to a session: only an empty value counts. The date of `expires` depends on the time: only its
    presence counts, and a date in the past, which deletes the cookie.
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
    """Resolve an address against the request: to a path on the same host, or to a whole address."""
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
        old_values, new_values = left.get(name), right.get(name)
        if old_values != new_values and not _is_equivalent(name, old_values, new_values, request):
            differences.append(_header_difference(name, old_values, new_values))
    return differences


def diff_validators(old: Headers, new: Headers) -> list[Difference]:
    """Compare whether clients can revalidate a cached answer. All validators are equivalent."""
    before, after = _find_validator(old), _find_validator(new)
    if bool(before) == bool(after):
        return []
    if before:
        return [Difference.from_values("header", before[0], before[1], None, "value", before[0])]
    return [Difference.from_values("header", after[0], None, after[1], "additive", after[0])]


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
    impact: Impact = "value"
    if old_values is None:
        impact = "value" if name.startswith(_BEHAVIOUR_HEADER_PREFIXES) else "additive"
    elif new_values is None:
        impact = "breaking"
    elif name == "content-type":
        is_same_type = parse_media_type(old_values[0]).essence == parse_media_type(new_values[0]).essence
        impact = "value" if is_same_type else "breaking"
    old, new = (values[0] if values and len(values) == 1 else values for values in (old_values, new_values))
    return Difference.from_values("header", name, old, new, impact, name)
