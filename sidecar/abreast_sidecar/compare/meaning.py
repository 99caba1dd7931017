"""What header values mean, as texts that are equal where two values mean the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

from abreast_sidecar.compare.media import Media, media

# JSON is UTF-8 whatever is said, and so are event streams.
_ALWAYS_UTF8 = frozenset({"json", "ndjson", "events"})
_NONCE = re.compile(r"'nonce-[^']*'")
_TOKENS = re.compile(r'<[^>]*>?|"(?:[^"\\]|\\.)*"?|[^,;<"]+|.', re.DOTALL)
_NEEDLESS_QUOTES = re.compile(r'="([\w.~-]+)"')


def directives(value: str, separator: str = ",") -> str:
    """A set of `name` or `name=value`; names in any case."""
    found = set()
    for part in _split(value, separator):
        name, equals, rest = part.partition("=")
        found.add(name.strip().lower() + (equals and "=" + rest.strip().strip('"')))
    return ", ".join(sorted(found))


def names(value: str) -> str:
    """A set of names in any case."""
    return ", ".join(sorted({part.lower() for part in _split(value, ",")}))


def methods(value: str) -> str:
    return ", ".join(sorted(set(_split(value, ","))))


def content_type(value: str) -> str:
    return said(media(value))


def said(kind: Media) -> str:
    parameters = {
        name: _charset(text) if name == "charset" else text
        for name, text in kind.parameters
        if name != "boundary"
    }
    if kind.format in _ALWAYS_UTF8 and parameters.get("charset") == "utf-8":
        del parameters["charset"]
    return "; ".join([kind.essence, *(f"{name}={text}" for name, text in parameters.items())])


def _charset(name: str) -> str:
    return "utf-8" if name.lower() == "utf8" else name.lower()


def policy(value: str) -> str:
    """Content-Security-Policy: each directive is a set of sources, and a nonce is fresh in every answer."""
    found = []
    for part in _split(_NONCE.sub("'nonce-*'", value), ";"):
        name, *sources = part.split()
        found.append(" ".join([name.lower(), *sorted(set(sources))]))
    return "; ".join(sorted(found))


def strict_transport(value: str) -> str:
    return directives(value, ";")


def links(value: str) -> str:
    """Link: addresses in their order, each with its parameters in any."""
    found = []
    for link in _apart(value, ","):
        parts = _apart(link, ";")
        found.append("; ".join([*parts[:1], *sorted(directives(one, ";") for one in parts[1:])]))
    return ", ".join(found)


def _apart(value: str, separator: str) -> list[str]:
    """As `_split`, but for what stands in quotes or is an address."""
    found = [""]
    for token in _TOKENS.findall(value):
        if token == separator:
            found.append("")
        else:
            found[-1] += token
    return [stripped for part in found if (stripped := part.strip())]


def challenge(value: str) -> str:
    """WWW-Authenticate: quotes that a word does not need mean nothing."""
    return _NEEDLESS_QUOTES.sub(r"=\1", value.strip())


def _split(value: str, separator: str) -> list[str]:
    return [stripped for part in value.split(separator) if (stripped := part.strip())]


Meaning = Callable[[str], str]
_MEANINGS: dict[str, Meaning] = {
    "accept-patch": names,
    "accept-post": names,
    "accept-ranges": names,
    "access-control-allow-headers": names,
    "access-control-allow-methods": methods,
    "access-control-expose-headers": names,
    "allow": methods,
    "cache-control": directives,
    "cdn-cache-control": directives,
    "clear-site-data": names,
    "content-disposition": content_type,
    "content-encoding": names,
    "content-language": names,
    "content-security-policy": policy,
    "content-security-policy-report-only": policy,
    "content-type": content_type,
    "link": links,
    "pragma": directives,
    "proxy-authenticate": challenge,
    "strict-transport-security": strict_transport,
    "surrogate-control": directives,
    "vary": names,
    "www-authenticate": challenge,
}
LISTS = frozenset(_MEANINGS) - {
    "content-disposition",
    "content-type",
    "content-security-policy",
    "content-security-policy-report-only",
    "link",
    "proxy-authenticate",
    "strict-transport-security",
    "www-authenticate",
}  # several lines of these are one list, in any order
APART = frozenset(
    {"content-security-policy", "content-security-policy-report-only", "content-type"}
)  # each line of these stands for itself; several lines of all others are one list


@lru_cache(maxsize=2048)
def meaning(name: str, value: str) -> str:
    known = _MEANINGS.get(name)
    return known(value) if known is not None else value.strip()


_ESCAPE = re.compile("%[0-9a-fA-F]{2}")  # their letters have no case

# Attributes of a cookie whose values have no case.
_NO_CASE = frozenset({"samesite", "domain", "priority"})


@lru_cache(maxsize=2048)
def cookie(value: str) -> tuple[str, str]:
    """The cookie's name, and its attributes in any order. Its value is one session's; that it has one, and how, is not.

    When it expires is a moment; that it does is not, nor that it is being deleted.
    """
    pair, _, rest = value.partition(";")
    named, _, content = pair.partition("=")
    found = set() if content.strip().strip('"') else {"(empty)"}
    for part in _split(rest, ";"):
        name, _, text = part.partition("=")
        key, text = name.strip().lower(), text.strip().strip('"')
        if key == "expires":
            text = "past" if re.search(r"\b19[67]\d\b", text) else "set"
        elif key == "domain":
            text = text.lower().removeprefix(".")
        elif key in _NO_CASE:
            text = text.lower()
        found.add(f"{key}={text}" if text else key)
    return named.strip(), "; ".join(sorted(found))


def location(value: str, host: str, path: str) -> str:
    """Where it leads, seen from the request: a path if it is the same host, else the whole address."""
    value = _ESCAPE.sub(lambda found: found[0].upper(), value.strip())
    try:
        target = urlsplit(urljoin(f"//{host}{path}", value))
    except ValueError:
        return value
    if target.netloc.lower() != host.lower():
        return target._replace(netloc=target.netloc.lower()).geturl() if "@" not in target.netloc else value
    query = f"?{target.query}" if target.query else ""
    fragment = f"#{target.fragment}" if target.fragment else ""
    return f"{target.path or '/'}{query}{fragment}"


def scheme(address: str) -> str:
    """In lower case; empty where the address has none."""
    found, colon, _ = address.strip().partition("://")
    return found.lower() if colon and found.isalpha() else ""
