"""Classification of differences by the shapes of their values: volatile, of another format, out of range, or a leak.

Values that both have one shape, with the same format and length, explain a difference if they are:

- A `uuid` of one version, except the nil UUID and two spellings of one UUID. A `ulid` or `trace`.
- A `hash`, `hex`, `token`, `base64` or `jwt`: long and mixed enough to be no word, name or number.
- A `timestamp` of one zone and precision, near the request or near each other.
- A number of type `unix` or `unix text`, near the request.
- A `url` that differs only in parameters that sign it or limit its lifetime, and in values as below.
- A `text`, `path` or `url` of which all tokens that differ explain themselves. The tokens of a URL are its origin, the
  segments of its path and the members of its query. The tokens of a text are words.

Values of two shapes never explain a difference. Neither do numbers, durations, words, names, dates, times of day, email
and IP addresses, ids with a prefix (`cus_...`), booleans, null and empty values. A counter is a number too: only the
baseline shows that it counts.

A text with a fresh id or time is of another format if the rest of it changes too. Otherwise, noise would hide the change.

An addition is a leak if its name is that of a secret, or if it contains a private key, the hash of a password, a stack
trace or a debug block. Redaction has replaced most secrets with digests before.

The explanation is a presumption, since the UUID of a wrong product looks like a new one. `stats.noise` overrules it at
places that never differ between old and baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import orjson
from msgspec.structs import replace

from abreast.export.redaction import Redactor, normalise_name
from abreast_sidecar.compare.documents import parse_csv_fields, parse_embedded, parse_script_data, parse_url
from abreast_sidecar.compare.json_diff import JsonDiff
from abreast_sidecar.compare.model import ELEMENT_SUFFIXES, Difference, Impact, JsonPath, Kind
from abreast_sidecar.compare.values import DIGEST, UNIX_TIME_RANGE_S, LongNumber, Shape, detect_shape, has_digest

MAX_RESPONSE_GAP_S = 10.0  # between two responses to one request
REQUEST_TIME_TOLERANCE_S = 300.0  # for clock skew, cached values, and time that passes during the request
MAX_WRITE_AGE_S = 30 * 86_400.0  # of a record that both versions wrote

DURATION_RATIO = 2.0  # between numbers that depend on the process
TIME_MARGIN_S = 5.0  # requests take time, and some values are rounded or cached
CLOCK_MARGIN_S = 30.0  # between times near their requests: the clocks of two hosts may differ
MAX_AMOUNT_TEXT_CHARS = 200
_AMOUNT = re.compile(r"([^0-9]*?)(-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)([^0-9]*)")
_DURATION_UNIT = re.compile(r"# ?(?:[mµn]?s|secs?|seconds?|milliseconds?|[kmg]i?b)\b", re.IGNORECASE)
_PROCESS_WORDS = frozenset(
    {
        "age", "cpu", "duration", "elapsed", "heap", "latency", "load", "memory", "micros", "millis", "ms", "nanos", "ns",
        "pid", "port", "rss", "runtime", "secs", "seconds", "thread", "threads", "time", "took", "uptime", "us",
    }
)  # fmt: skip
_TYPE_RANKS = {type(None): 0, bool: 1, int: 2, float: 2, str: 3, list: 4, dict: 5}
RANGE_RATIO = 1000.0
LENGTH_RATIO = 10
MIN_TEXT_CHARS = 4  # shorter texts count as this long
# Values without a format: lines of plain text, and the attributes of cookies.
FORMATLESS_PATH_PREFIXES = ("lines[", "set-cookie[")
_FORMATTED_KINDS = frozenset(
    {
        "uuid", "ulid", "trace", "hash", "hex", "token", "base64", "jwt", "timestamp", "unix", "unix text", "date",
        "time", "ip", "email", "url", "prefixed",
    }
)  # fmt: skip
_TIME_KINDS = frozenset({"timestamp", "unix", "unix text"})
_NUMBER_KINDS = frozenset({"integer", "float"})
_TEXT_KINDS = frozenset({"text", "word", "path"})
AnomalyKind = Literal["format", "range"]
StartTimes = tuple[float, float]  # old and new: Unix time in seconds, each by its own clock
OPAQUE_KINDS = frozenset({"uuid", "ulid", "trace", "hash", "hex", "token", "base64", "jwt"})
_FRESH_KINDS = OPAQUE_KINDS | {"timestamp"}
_QUANTITY_SHAPE = Shape("quantity")
SIGNATURE_PARAMETERS = frozenset(
    {
        "awsaccesskeyid", "expires", "expiry", "exp", "hmac", "key-pair-id", "policy", "se", "sig", "sign",
        "signature", "st", "token", "ts", "hdnea", "hdnts", "__token__", "x-amz-credential", "x-amz-date",
        "x-amz-security-token", "x-amz-signature", "x-goog-credential", "x-goog-date", "x-goog-signature",
    }
)  # fmt: skip
_TEXT_SPLITTERS = (  # values that contain separators, words, and parts of words
    re.compile(
        r"([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
        r"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?"
        r"|[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT)",
        re.ASCII,
    ),
    re.compile(r"""([\s"'`()<>\[\]{},;|]+)"""),
    re.compile(r"([:=/@#&?.!]+)"),
)
_URL_ORIGIN = re.compile(r"(?:[^/?#]+://)?[^/?#]*")
_URL_SEPARATORS = re.compile("([/?&=#;])")
_DIGIT = re.compile("[0-9]")
_QUANTITY = re.compile(r"[-+]?[0-9]+(?:[.,][0-9]+)*(?:[a-zµ]{1,3}|%)?")  # a count, duration or size
_TOKENISED_KINDS = frozenset({"text", "word", "path"})
MIN_SERIAL_CHARS = 4  # shorter numbers are sizes and pages
MAX_EMBEDDED_CHARS = 20_000  # of a text with a document in it
MAX_EMBEDDED_DIFFERENCES = 50
MAX_EXPANDED_DIFFERENCES = 400  # of a pair; further texts are compared as a whole
MAX_EMBEDDED_STEPS = 10_000
MAX_LEAK_NODES = 1000  # of an added value
MIN_SECRET_CHARS = 3
MAX_SECRET_CHARS = 4096  # searched for a leak
_REDACTOR = Redactor("leaks")  # finds secrets of bodies that were not redacted
_NAME_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Below these names, a password or token is described and not contained: `max_tokens`, `password_changed_at`.
_DESCRIPTION_LAST_WORDS = frozenset(
    {"at", "count", "date", "expired", "expires", "expiry", "policy", "required", "type"}
)
_COUNT_WORDS = frozenset(
    {"cached", "completion", "input", "limit", "max", "min", "output", "prompt", "reasoning", "total", "used"}
)
_HASHED_NAME_WORDS = frozenset({"card", "jwt", "pan", "pem", "pw"})  # with a digest in the value
_DEBUG_NAMES = frozenset({"backtrace", "debug", "debugbar", "debuginfo", "stacktrace", "traceback"})
_LEAK = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----"
    r"|\$2[abxy]?\$\d\d\$[./A-Za-z0-9]{53}|\$argon2(?:id?|d)\$v=|\$scrypt\$|\$pbkdf2-|\$[156]\$[./A-Za-z0-9]{1,16}\$"
    r"|pbkdf2_sha\d{1,3}\$\d|\{SSHA(?:256|512)?\}|scrypt:\d{1,9}:"
    r"|Traceback \(most recent call last\)|^[^\S\n]*at [\w$.<>/ ]{1,200} ?\([^()\n]{1,300}\.\w{1,5}:\d{1,7}(?::\d{1,7})?\)|goroutine \d{1,9} \[running"
    r"|^#0 .{1,300}\(\d{1,7}\): |^[^\S\n]*from .{1,300}:\d{1,7}:in [`']",
    re.MULTILINE,
)


def explain_change(old: Any, new: Any, request_time: float | None = None) -> str | None:
    """Return the explanation of a difference between two JSON values, such as `uuid`, or None.

    `request_time` is Unix time in seconds. A number counts as a time only if it is near.
    """
    before, after = detect_shape(old), detect_shape(new)
    if before.kind == after.kind == "url":
        return _explain_url(old, new, request_time)
    if before.kind in _TOKENISED_KINDS and after.kind in _TOKENISED_KINDS:
        return _explain_text(old, new, request_time)
    if before != after:
        return None
    if before.kind in OPAQUE_KINDS:
        return before.kind if old.casefold() != new.casefold() else None  # two spellings of one value
    if before.kind in _TIME_KINDS:
        seconds, other_seconds = to_unix_time(old, before), to_unix_time(new, after)
        are_near_request = (
            request_time is not None and _is_near(seconds, request_time) and _is_near(other_seconds, request_time)
        )
        if before.kind != "timestamp":
            return "unix time" if are_near_request else None
        are_near = seconds is not None and _is_near(other_seconds, seconds, MAX_RESPONSE_GAP_S)
        return "timestamp" if are_near or are_near_request else None
    return None


def _is_near(seconds: float | None, request_time: float, tolerance: float = REQUEST_TIME_TOLERANCE_S) -> bool:
    return seconds is not None and abs(seconds - request_time) <= tolerance


def to_unix_time(value: Any, value_shape: Shape) -> float | None:
    """Convert a timestamp or number to Unix time in seconds. A time without a zone is in UTC."""
    if value_shape.kind != "timestamp":
        return int(value) / (1 if value_shape.format == "s" else 1000)
    try:
        if value_shape.format == "http":
            return parsedate_to_datetime(value).timestamp()
        timestamp = datetime.fromisoformat(value.replace(",", "."))
    except ValueError:  # 31 February
        return None
    return (timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)).timestamp()


def _split_url(value: str) -> list[str]:
    """Split an address into its origin, and segments and members without percent escapes, between separators."""
    match = _URL_ORIGIN.match(value)
    origin = match[0] if match else ""
    return [origin, *map(unquote, _URL_SEPARATORS.split(value[len(origin) :]))]


def _explain_url(old: str, new: str, request_time: float | None) -> str | None:
    """Compare addresses part by part. Signatures must exist, have one length and not be empty."""
    old_parts, new_parts = _split_url(old), _split_url(new)
    if len(old_parts) != len(new_parts) or old_parts[0] != new_parts[0]:
        return None
    explanation = None
    for index, (part, other) in enumerate(zip(old_parts, new_parts, strict=True)):
        if part == other:
            continue
        if not part or not other:
            return None
        is_signature = old_parts[index - 1] == "=" and old_parts[index - 2].lower() in SIGNATURE_PARAMETERS
        if is_signature and len(part) == len(other) and _is_same_lifetime(part, other):
            explanation = explanation or "signed url"
        elif part_explanation := explain_change(part, other, request_time):
            explanation = explanation or _embed(part_explanation)
        else:
            return None
    return explanation


def _is_same_lifetime(old: str, new: str) -> bool:
    """Tell whether two members of a signed address are no times, or times near each other."""
    before, after = detect_shape(old), detect_shape(new)
    if before.kind != "unix text" or after != before:
        return True
    return _is_near(to_unix_time(old, before), to_unix_time(new, after) or 0.0)


def _explain_text(
    old: str, new: str, request_time: float | None, splitters: Sequence[re.Pattern[str]] = _TEXT_SPLITTERS
) -> str | None:
    """Compare texts word by word."""
    if not _DIGIT.search(old) or not _DIGIT.search(new):  # ids and times have digits
        return None
    for level, splitter in enumerate(splitters, 1):
        tokens, other_tokens = splitter.split(old), splitter.split(new)
        if len(tokens) != len(other_tokens):
            return None
        if len(tokens) > 1:
            return _explain_tokens(tokens, other_tokens, request_time, splitters[level:])
    return None


def _explain_tokens(
    tokens: list[str], other_tokens: list[str], request_time: float | None, splitters: Sequence[re.Pattern[str]]
) -> str | None:
    explanation = None
    for token, other in zip(tokens, other_tokens, strict=True):
        if token == other:
            continue
        kinds = {detect_shape(token).kind, detect_shape(other).kind}
        if kinds <= _TOKENISED_KINDS:
            token_explanation = _explain_text(token, other, request_time, splitters)
        else:
            token_explanation = explain_change(token, other, request_time)
        if token_explanation is None:
            return None
        explanation = explanation or _embed(token_explanation)
    return explanation


def _embed(explanation: str) -> str:
    return f"{explanation.removesuffix(' inside')} inside"


class _Template(NamedTuple):
    """A text in which values that are often new are replaced by their shapes."""

    tokens: list[str | Shape]
    fresh_values: set[str]  # ids and times


def _make_template(value: str, kind: str) -> _Template:
    template = _Template([], set())
    if kind != "url":
        _add_to_template(template, value, _TEXT_SPLITTERS)
        return template
    origin, *parts = _split_url(value)
    template.tokens.append(origin)
    for index, part in enumerate(parts, 1):
        if parts[index - 2 : index - 1] == ["="] and parts[index - 3].lower() in SIGNATURE_PARAMETERS:
            template.tokens.append(_QUANTITY_SHAPE)
        else:
            _add_to_template(template, part, _TEXT_SPLITTERS)
    return template


def _add_to_template(template: _Template, value: str, splitters: Sequence[re.Pattern[str]]) -> None:
    if not _DIGIT.search(value):
        template.tokens.append(value)
        return
    shape = detect_shape(value)
    if _QUANTITY.fullmatch(value):
        template.tokens.append(_QUANTITY_SHAPE)
    elif shape.kind in _FRESH_KINDS:
        template.tokens.append(shape)
        template.fresh_values.add(value)
    elif splitters:
        for token in splitters[0].split(value):
            _add_to_template(template, token, splitters[1:])
    else:
        template.tokens.append(value)


def _is_other_template(old: str, new: str, kind: str) -> bool:
    """Tell whether two texts have fresh values and differ in something else too."""
    if not _DIGIT.search(old) or not _DIGIT.search(new):
        return False
    before, after = _make_template(old, kind), _make_template(new, kind)
    has_fresh_values = before.fresh_values and after.fresh_values and before.fresh_values != after.fresh_values
    return bool(has_fresh_values) and before.tokens != after.tokens


def is_explained_by_shape(differences: Iterable[Difference], request_time: float) -> bool:
    """Tell whether shapes explain all differences. `request_time` is Unix time in seconds."""
    return all(
        difference.kind == "changed"
        and difference.part != "status"
        and explain_change(*get_values(difference), request_time) is not None
        for difference in differences
    )


def are_write_times(differences: Iterable[Difference], request_time: float) -> bool:
    """Tell whether all differences are between times at which each version may have written the same record.

    A copy of a write arrives after the live request, and each store keeps its own time. `request_time` is Unix time in
    seconds.
    """
    return all(
        difference.kind == "changed"
        and difference.part != "status"
        and _is_write_time(*get_values(difference), request_time)
        for difference in differences
    )


def _is_write_time(old: Any, new: Any, request_time: float) -> bool:
    before, after = detect_shape(old), detect_shape(new)
    if before != after or before.kind not in _TIME_KINDS:
        return False
    seconds, other_seconds = to_unix_time(old, before), to_unix_time(new, after)
    earliest, latest = request_time - MAX_WRITE_AGE_S, request_time + REQUEST_TIME_TOLERANCE_S
    return (
        seconds is not None and _is_near(other_seconds, seconds, MAX_RESPONSE_GAP_S) and earliest <= seconds <= latest
    )


def get_direction(difference: Difference) -> int:
    """Return 1 if new is greater, -1 if old is greater, 0 if they have no order. An absent value is the least."""
    if difference.kind in {"added", "removed"}:
        return 1 if difference.kind == "added" else -1
    if difference.kind == "order":
        return 0
    old, new = get_values(difference)
    before, after = (_TYPE_RANKS.get(type(value), 2) for value in (old, new))
    if before != after:
        return 1 if after > before else -1
    if before not in {2, 3} or old == new:
        return 0
    return 1 if new > old else -1


def compare_values(differences: Sequence[Difference], start_times: StartTimes) -> int | None:
    """Return 1 if new's values at one place are greater, -1 if old's are, 0 for neither, and None for values without order.

    Numbers count without their signs. A time counts by its distance from the start of its request, so that it only is
    greater if it is seconds later.
    """
    if not differences:
        return 0
    orders = [
        order
        for difference in differences
        if difference.kind == "changed"
        and (order := _compare_values(*get_values(difference), difference.path, start_times)) is not None
    ]
    return (sum(orders) > 0) - (sum(orders) < 0) if orders else None


def _compare_values(old: Any, new: Any, path: str, start_times: StartTimes) -> int | None:
    before, after = detect_shape(old), detect_shape(new)
    old_time, new_time = _find_time(old, before), _find_time(new, after)
    if old_time is not None and new_time is not None:
        are_present = _is_near(old_time, start_times[0]) and _is_near(new_time, start_times[1])
        margin = CLOCK_MARGIN_S if are_present else TIME_MARGIN_S
        delay = (new_time - start_times[1]) - (old_time - start_times[0])
        return (delay > margin) - (delay < -margin)
    if type(old) is type(new) is bool:
        return (new > old) - (new < old)
    amount, other_amount = _find_amount(old), _find_amount(new)
    if amount and other_amount:
        (old_number, old_unit), (new_number, new_unit) = amount, other_amount
        if old_unit != new_unit:
            return None
        ratio = DURATION_RATIO if _is_duration(path, old_unit) else 1.0
        return (new_number > ratio * old_number) - (old_number > ratio * new_number)
    if type(old) is type(new) is str and not _DIGIT.search(old) and not _DIGIT.search(new):
        return (new > old) - (new < old)  # a word
    return None


def _find_time(value: Any, value_shape: Shape) -> float | None:
    """Return the Unix time of a value, or of the only timestamp in a text."""
    if value_shape.kind in _TIME_KINDS:
        return to_unix_time(value, value_shape)
    if value_shape.kind == "float" and value_shape.format == "" and int(value) in UNIX_TIME_RANGE_S:
        return float(value)
    if value_shape.kind in _TOKENISED_KINDS and len(value) <= MAX_AMOUNT_TEXT_CHARS and _DIGIT.search(value):
        shapes = [(token, detect_shape(token)) for token in _TEXT_SPLITTERS[0].findall(value)]
        times = [(token, shape) for token, shape in shapes if shape.kind == "timestamp"]
        if len(times) == 1:
            return to_unix_time(*times[0])
    return None


def _find_amount(value: Any) -> tuple[float, str] | None:
    """Return the absolute value of a number, or of the only number in a text, and the rest of that text."""
    kind = type(value)
    if kind is not str:
        text, rest = value, ""
    elif len(value) <= MAX_AMOUNT_TEXT_CHARS and (match := _AMOUNT.fullmatch(value)):
        text, rest = match[2], f"{match[1]}#{match[3]}"
    else:
        return None
    if kind not in {int, float, str}:
        return None
    try:
        return abs(float(text)), rest.strip("#-")
    except (ValueError, OverflowError):
        return None


def _is_duration(path: str, unit: str) -> bool:
    """Tell whether a number depends on the process that answers, such as a duration or its memory."""
    return _DURATION_UNIT.search(unit) is not None or _has_process_name(path)


@lru_cache(maxsize=4096)
def _has_process_name(path: str) -> bool:
    words = _NAME_WORDS.findall(path.rpartition(".")[2])
    return not _PROCESS_WORDS.isdisjoint(word.lower() for word in words)


def get_values(difference: Difference) -> tuple[Any, Any]:
    """Return both values, or None and None if a rendered text was truncated."""
    location = difference.location
    if type(location) is JsonPath:
        old, new = location.old, location.new
        return (
            float(old.digits()) if type(old) is LongNumber else old,
            float(new.digits()) if type(new) is LongNumber else new,
        )
    try:
        return orjson.loads(difference.old or "null"), orjson.loads(difference.new or "null")
    except orjson.JSONDecodeError:
        return None, None


def expand_embedded(differences: Sequence[Difference], start_times: StartTimes) -> list[Difference]:
    """Replace the difference of two texts by the differences of the documents in them, such as JSON, a JWT or a query.

    An address is replaced if several parts differ and their shapes do not explain all.
    """
    expanded: list[Difference] = []
    for difference in differences:
        parts = _expand(difference, start_times) if len(expanded) < MAX_EXPANDED_DIFFERENCES else []
        if parts:
            expanded += parts
        else:
            expanded.append(difference)
    return expanded


def _expand(difference: Difference, start_times: StartTimes) -> list[Difference]:
    location = difference.location
    if difference.kind != "changed" or type(location) is not JsonPath:
        return []
    old, new = location.old, location.new
    if type(old) is not str or type(new) is not str or max(len(old), len(new)) > MAX_EMBEDDED_CHARS:
        return []
    is_url = detect_shape(old).kind == detect_shape(new).kind == "url"
    documents = _split_urls(old, new, start_times) if is_url else _parse_embedded(old, new, difference.path)
    if documents is None:
        return []
    diff = JsonDiff(MAX_EMBEDDED_DIFFERENCES, part=difference.part, max_work=MAX_EMBEDDED_STEPS)
    try:
        parts = diff.compare_at(JsonPath(location.parent, location.step, *documents))
    except RecursionError:  # nested hundreds of levels deep
        return []
    if diff.budget_exceeded or diff.omitted_count or diff.repeat_count:
        return []
    return _select_parts(difference, parts, start_times[0]) if is_url else parts


def _select_parts(difference: Difference, parts: Sequence[Difference], request_time: float) -> list[Difference]:
    """Return the parts of an address that need separate differences, or nothing if one difference is enough.

    Long numbers and ids share the difference of the whole address, so that noise has one place, whatever else differs.
    """
    unexplained = [part for part in parts if not is_explained_by_shape([part], request_time)]
    separate = [
        part for part in unexplained if part.path.endswith(".origin") or not all(map(_is_serial, get_values(part)))
    ]
    if len(parts) < 2 or not separate:
        return []
    if len(separate) == len(unexplained) == 2 and separate[0].path.endswith(".origin"):
        return [separate[0], difference]  # the other part alone would have the place of the address
    return separate if len(separate) == len(unexplained) else [*separate, difference]


def _is_serial(value: Any) -> bool:
    """Tell whether a part of an address looks like a random or consecutive number or id, and like no time."""
    kind = detect_shape(value).kind
    is_number = type(value) is str and len(value) >= MIN_SERIAL_CHARS and value.isdecimal() and kind not in _TIME_KINDS
    return is_number or kind in OPAQUE_KINDS


def _split_urls(old: str, new: str, start_times: StartTimes) -> tuple[Any, Any] | None:
    is_explained = explain_change(old, new, start_times[0]) is not None
    if is_explained or _is_other_template(old.partition("?")[0], new.partition("?")[0], "url"):
        return None
    return parse_url(old), parse_url(new)


def _parse_embedded(old: str, new: str, path: str) -> tuple[Any, Any] | None:
    documents: tuple[Any, Any] = parse_embedded(old), parse_embedded(new)
    if documents[0] is not None and type(documents[0]) is type(documents[1]):
        return documents
    if path.startswith("html") and ".script" in path:
        return parse_script_data(old, new)
    if path.startswith("lines[") and "," in old and "," in new:
        documents = parse_csv_fields(old), parse_csv_fields(new)
        return documents if len(documents[0]) == len(documents[1]) > 2 else None
    return None


def classify_anomalies(differences: Iterable[Difference], start_times: StartTimes) -> list[Difference]:
    """Replace the kind of values of another format or out of range, and the impact of additions that leak secrets."""
    classified = []
    for difference in differences:
        anomaly: tuple[Kind, Impact] | None = None
        if difference.kind == "added":
            anomaly = ("added", "breaking") if _is_leak(difference) else None
        elif (
            difference.kind == "changed"
            and difference.part not in {"status", "error"}
            and not difference.path.startswith(FORMATLESS_PATH_PREFIXES)
        ):
            anomaly = classify_anomaly(*get_values(difference), start_times)
        classified.append(replace(difference, kind=anomaly[0], impact=anomaly[1]) if anomaly else difference)
    return classified


def _is_leak(difference: Difference) -> bool:
    """Tell whether a field that only new has contains a secret. Elements of lists and content of pages have peers in old."""
    location = difference.location
    if difference.part != "body" or type(location) is not JsonPath or difference.path.endswith(ELEMENT_SUFFIXES):
        return False
    if difference.path.startswith("html") or type(location.step) is not str:
        return False
    pending, nodes = [(location.step, location.new)], 0
    while pending and nodes < MAX_LEAK_NODES:
        name, value = pending.pop()
        nodes += 1
        kind = type(value)
        if kind is dict or kind is list:
            if value and normalise_name(name).strip("@#") in _DEBUG_NAMES:
                return True
            pending += value.items() if kind is dict else ((name, inner) for inner in value)
        elif (kind is str or kind is int) and _is_secret(name, str(value)):
            return True
    return False


def _is_secret(name: str, text: str) -> bool:
    text, words = text[:MAX_SECRET_CHARS], [word.lower() for word in _NAME_WORDS.findall(name)]
    if len(text) < MIN_SECRET_CHARS or not words or words[-1] in _DESCRIPTION_LAST_WORDS:
        return False
    if _LEAK.search(text) or normalise_name(name) in _DEBUG_NAMES:
        return True
    # An id may look like a card number or a token by chance, so the name must fit too.
    if not _HASHED_NAME_WORDS.isdisjoint(words) and has_digest(text):
        return True
    return _REDACTOR.is_secret_name(name) and (
        _COUNT_WORDS.isdisjoint(words) or not (text.isdecimal() or DIGEST.fullmatch(text))
    )


def classify_anomaly(old: Any, new: Any, start_times: StartTimes) -> tuple[AnomalyKind, Impact] | None:
    """Return kind and impact of an anomaly between two values of one JSON type, or None.

    The formats can't be compared if only one value contains the digest of a secret. It may look like one by chance: one of
    ten random numbers of 16 digits has the check digit of a card number.
    """
    if has_digest(old) != has_digest(new) and old and new:
        return None
    before, after = detect_shape(old), detect_shape(new)
    kinds = {before.kind, after.kind}
    if before.kind == after.kind and before != after and before.kind in _FORMATTED_KINDS:
        return "format", "value"
    if before.kind != after.kind and ("empty" in kinds or kinds & _FORMATTED_KINDS):
        return "format", "breaking" if after.kind == "empty" or before.kind in _FORMATTED_KINDS else "value"
    if (kinds <= _TOKENISED_KINDS or kinds == {"url"}) and _is_other_template(old, new, before.kind):
        return "format", "value"
    return ("range", "value") if _is_out_of_range(old, new, before, after, start_times) else None


def _is_out_of_range(old: Any, new: Any, before: Shape, after: Shape, start_times: StartTimes) -> bool:
    if before == after and before.kind in _TIME_KINDS:
        old_is_near = _is_near(to_unix_time(old, before), start_times[0])
        return old_is_near != _is_near(to_unix_time(new, after), start_times[1])
    kinds = {before.kind, after.kind}
    if kinds <= _NUMBER_KINDS and old and new:
        has_same_sign = (old < 0) == (new < 0)
        return not (has_same_sign and abs(new) < abs(old) * RANGE_RATIO and abs(old) < abs(new) * RANGE_RATIO)
    if kinds <= _TEXT_KINDS:
        short, long = sorted((len(old), len(new)))
        return long >= LENGTH_RATIO * max(short, MIN_TEXT_CHARS)
    return False
