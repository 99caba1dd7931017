"""What header values mean, as texts that are equal where two values mean the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

from abreast_sidecar.compare.media import MediaType, parse_media_type

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
