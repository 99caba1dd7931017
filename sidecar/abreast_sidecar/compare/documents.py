"""Parsers of bodies that are not JSON, into values that compare as JSON does: lines, items, forms, parts and markup.

An element of HTML or XML is an object with its attributes (`@name`), its text (`#text`) and its children. Both readers
take linear time. The XML reader refuses entity declarations: it expands and fetches nothing. Of the elements that a browser
implies, the HTML reader builds `head` and `body`: formatting elements would take quadratic memory.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl
from xml.parsers import expat

from abreast.protocol.capture import digest
from abreast_sidecar.compare.content import MediaType, decode_text, parse_media_type, sniff_format
from abreast_sidecar.compare.headers import canonical_media_type
from abreast_sidecar.compare.values import UNIX_TIME_RANGE_S, ExactDecoder, NotJsonError, parse

MAX_FORM_FIELDS = 10_000
MAX_PARTS = 1000
RECORD_SEPARATOR = b"\x1e"
MAX_ELEMENT_DEPTH = 150  # less than MAX_JSON_DEPTH
MAX_TAG_CHARS = 8192
MAX_BROKEN_TAGS = 100  # tags without an end in one document
MAX_SCRIPT_VALUES = 10  # places of a script that may begin a JSON value
_FORM = re.compile(r"[\w.%~+\[\]-]{1,64}+=[^&=\s]*+(?:&[\w.%~+\[\]-]{1,64}+=[^&=\s]*+)+", re.ASCII)
_SCRIPT_DATA = re.compile(r"[=(:]\s*+([{\[])")
_SCRIPT_DECODER = ExactDecoder()
_JWT_TIMES = frozenset({"auth_time", "exp", "iat", "nbf", "updated_at"})
_TO_STANDARD_BASE64 = str.maketrans("-_", "+/", "=")

_VOID_TAGS = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"]
)
_RAW_TEXT_TAGS = frozenset({"script", "style", "textarea", "title"})
_PREFORMATTED_TAGS = frozenset({"pre", "script", "style", "textarea"})
# By the tag of an open element: the tags that end it when they begin, as in HTML's optional end tags.
_IMPLIED_END_TAGS = {
    "li": frozenset({"li"}),
    "p": frozenset(
        {
            "address", "article", "aside", "blockquote", "div", "dl", "footer", "form", "h1", "h2", "h3", "h4", "h5",
            "h6", "header", "hr", "main", "nav", "ol", "p", "pre", "section", "table", "ul",
        }
    ),
    "dt": frozenset({"dt", "dd"}),
    "dd": frozenset({"dt", "dd"}),
    "option": frozenset({"option", "optgroup"}),
    "thead": frozenset({"tbody", "tfoot"}),
    "tbody": frozenset({"tbody", "tfoot"}),
    "tr": frozenset({"tr", "tbody", "tfoot"}),
    "td": frozenset({"td", "th", "tr", "tbody", "tfoot"}),
    "th": frozenset({"td", "th", "tr", "tbody", "tfoot"}),
    "head": frozenset({"body"}),
}  # fmt: skip
_PAGE_TAGS = frozenset({"html", "head", "body"})  # with one of these or a doctype, a text is a page and no fragment
_PAGE_PARTS = frozenset({"head", "body", "frameset"})
_HEAD_TAGS = frozenset({"base", "link", "meta", "script", "style", "title"})
_BOOLEAN_ATTRIBUTES = frozenset(
    {
        "allowfullscreen", "async", "autofocus", "autoplay", "checked", "controls", "default", "defer", "disabled",
        "formnovalidate", "inert", "ismap", "itemscope", "loop", "multiple", "muted", "nomodule", "novalidate", "open",
        "playsinline", "readonly", "required", "reversed", "selected",
    }
)  # fmt: skip
_XSI_TYPE = "http://www.w3.org/2001/XMLSchema-instance type"
# Each run of characters is possessive (`++`, `*+`): a tag without an end would otherwise take quadratic time.
_TAG = re.compile(r"<(/?)([A-Za-z][^\s/>]*+)((?:[^>\"']++|\"[^\"]*+\"|'[^']*+')*)>")
_ATTRIBUTE = re.compile(r"([^\s=/\"'>]++)(?:\s*+=\s*+(?:\"([^\"]*+)\"|'([^']*+)'|([^\s\"'>]++)))?")


class DocumentError(ValueError):
    """A body is not in its format, or too large or too deep."""


def split_lines(text: str) -> list[str]:
    """Split at line ends of Unix or Windows. A text that ends with a line end has an empty last line."""
    return text.replace("\r\n", "\n").split("\n")


def split_csv_lines(text: str) -> list[str]:
    """Split at line ends, and quote only the fields that need it. Lines with another separator stay as they are."""
    if any(separator in text for separator in ";\t|"):
        return split_lines(text)
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error:  # such as a very long field
        return split_lines(text)
    lines = []
    for row in rows:
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(row)
        lines.append(line.getvalue())
    return [*lines, ""] if text.endswith("\n") else lines


def parse_embedded(text: str) -> Any:
    """Return the JSON value, the claims of a JWT, or the form in a text, or None. Times of a JWT become timestamps."""
    start = text[:1]
    if start in {"{", "["}:
        value = _parse_json_or_text(text)
        return value if isinstance(value, (dict, list)) else None
    if start == "e" and text.startswith("eyJ"):
        first, separator, rest = text.partition(".")
        header = _parse_base64_json(first)
        payload, _, signature = rest.partition(".")
        claims = _parse_base64_json(payload) if separator else None
        if header is None or claims is None:
            return None if separator else header
        times = {name: format_timestamp(claims[name]) for name in _JWT_TIMES & claims.keys()}
        return {"header": header, "claims": claims | times, "is_signed": bool(signature)}
    if _FORM.fullmatch(text):
        return parse_form(text)
    return None


def _parse_base64_json(text: str) -> dict[str, Any] | None:
    try:
        standard = text.translate(_TO_STANDARD_BASE64)
        value = parse(base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True))
    except (ValueError, NotJsonError):
        return None
    return value if isinstance(value, dict) else None


def format_timestamp(value: Any) -> Any:
    """Return Unix time as ISO 8601, or the value if it is no time of this century."""
    is_time = type(value) is int and value in UNIX_TIME_RANGE_S
    return datetime.fromtimestamp(value, UTC).isoformat() if is_time else value


def parse_script_data(old: str, new: str) -> tuple[Any, Any] | None:
    """Return the first JSON values of two scripts that are equal otherwise."""
    for match in islice(_SCRIPT_DATA.finditer(old), MAX_SCRIPT_VALUES):
        start = match.start(1)
        if old[:start] != new[:start]:
            return None
        try:
            (value, end), (other, other_end) = (_SCRIPT_DECODER.raw_decode(text, start) for text in (old, new))
        except (ValueError, RecursionError):
            continue
        if value != other:
            return (value, other) if old[end:] == new[other_end:] else None
    return None


def parse_url(text: str) -> dict[str, Any]:
    """Split an address into its origin, the segments of its path, the members of its query, and its fragment."""
    path, _, fragment = text.partition("#")
    path, _, query = path.partition("?")
    scheme, separator, rest = path.rpartition("://")
    host, *segments = rest.split("/")
    members = _group_by_name(parse_qsl(query, keep_blank_values=True))
    parts = {"origin": f"{scheme}{separator}{host}", "query": members, "fragment": fragment}
    return parts | {f"segment{index}": segment for index, segment in enumerate(segments, 1)}


def parse_csv_fields(line: str) -> dict[str, str]:
    """Return the fields of one line by their number, or nothing for a line of prose, or of another format."""
    try:
        (fields,) = csv.reader([line])
    except (csv.Error, ValueError):
        return {}
    if any(text[:1] == " " for text in fields):
        return {}
    return {f"column{index}": text for index, text in enumerate(fields, 1)}


def parse_ndjson(body: bytes) -> list[Any]:
    """Parse each line that is not empty. Raise NotJsonError."""
    return [parse(line) for raw in body.split(b"\n") if (line := raw.strip(RECORD_SEPARATOR + b" \t\r"))]


def parse_sse(text: str) -> list[dict[str, Any]]:
    """Parse server-sent events as the HTML standard does, and data that is JSON."""
    events: list[dict[str, Any]] = []
    event: dict[str, Any] = {}
    data: list[str] = []
    for line in [*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""]:
        if not line:
            if data:
                content = "\n".join(data)
                event["data"] = _parse_json_or_text(content) if content[:1] in {"{", "["} else content
            if event:
                events.append(event)
            event, data = {}, []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name:  # lines that start with a colon are comments
            event[name] = value
    return events


def _parse_json_or_text(text: str) -> Any:
    try:
        return parse(text.encode("utf-8", "surrogatepass"))
    except NotJsonError:
        return text


def parse_form(text: str, max_fields: int = MAX_FORM_FIELDS) -> dict[str, Any]:
    """Parse fields by name; a repeated field is an array. Raise ValueError for too many fields."""
    return _group_by_name(parse_qsl(text, keep_blank_values=True, max_num_fields=max_fields))


def parse_multipart(body: bytes, media_type: MediaType) -> dict[str, Any] | list[Any]:
    """Parse parts by name, or as a list if a part has no name. Ignore preamble and epilogue.

    Raise DocumentError for a body that is truncated or has no boundary.
    """
    boundary = media_type.get_parameter("boundary").encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2) if boundary else []
    if len(pieces) < 2 or len(pieces) > MAX_PARTS + 1 or not pieces[-1].startswith(b"--"):
        raise DocumentError("the parts have no boundary or no end")
    parts = [_parse_part(piece) for piece in pieces[1:-1]]
    if all(name for name, _ in parts):
        return _group_by_name(parts)
    return [value for _, value in parts]


def _parse_part(piece: bytes) -> tuple[str, Any]:
    padding, line_end, remainder = piece.partition(b"\r\n")
    if padding.strip(b" \t") or not line_end:
        raise DocumentError("unexpected text on a boundary line")
    head, _, content = (line_end + remainder).partition(b"\r\n\r\n")
    headers: dict[str, str] = {}
    for line in filter(None, head.decode("latin-1").split("\r\n")):
        name, _, value = line.partition(":")
        key, value = name.strip().lower(), value.strip()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    disposition, media_type = (
        parse_media_type(headers.pop(name, "")) for name in ("content-disposition", "content-type")
    )
    headers.pop("content-length", None)  # the content is compared
    part: dict[str, Any] = {}
    if media_type.essence:
        part["type"] = canonical_media_type(media_type)
    if disposition.essence not in {"", "form-data"}:
        part["disposition"] = disposition.essence
    part |= {name: value for name, value in disposition.parameters if name != "name"}
    part |= headers
    part["content"] = _parse_content(content, media_type)
    return disposition.get_parameter("name"), part if len(part) > 1 else part["content"]


def _parse_content(content: bytes, media_type: MediaType) -> Any:
    if media_type.format == "json" or (not media_type.essence and sniff_format(content) == "json"):
        try:
            return parse(content)
        except NotJsonError:
            pass
    is_binary = media_type.format == "bytes" or (media_type.format == "unknown" and media_type.essence)
    text = None if is_binary else decode_text(content, media_type.get_parameter("charset"))
    return {"length": len(content), "digest": digest(content)} if text is None else text


def _group_by_name(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values_by_name: dict[str, list[Any]] = {}
    for name, value in pairs:
        values_by_name.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in values_by_name.items()}


@dataclass(slots=True)
class Element:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    text_positions: list[int] = field(default_factory=list)  # for each text, the number of children before it
    children: list[Element] = field(default_factory=list)
    preserves_space: bool = True  # False if runs of spaces are equal to one space

    def add_text(self, text: str) -> None:
        self.texts.append(text)
        self.text_positions.append(len(self.children))


def to_documents(old: Element, new: Element) -> tuple[Any, Any]:
    """Convert both. Children are arrays if any parent at the same place, on either side, repeats their tag."""
    repeated: set[tuple[str, ...]] = set()
    for root in (old, new):
        _find_repeated(root, (), repeated)
    return _to_document(old, (), repeated), _to_document(new, (), repeated)


def _find_repeated(element: Element, path: tuple[str, ...], repeated: set[tuple[str, ...]]) -> None:
    tag_path = (*path[-2:], element.tag)  # three tags identify a place well enough
    tags: set[str] = set()
    for child in element.children:
        if child.tag in tags:
            repeated.add((*tag_path, child.tag))
        tags.add(child.tag)
        if child.children:
            _find_repeated(child, tag_path, repeated)


def _to_document(element: Element, path: tuple[str, ...], repeated: set[tuple[str, ...]]) -> Any:
    document: dict[str, Any] = (
        {f"@{name}": value for name, value in element.attributes.items()} if element.attributes else {}
    )
    tag_path = (*path[-2:], element.tag)
    for child in element.children:
        inner = _to_document(child, tag_path, repeated)
        if (*tag_path, child.tag) in repeated:
            document.setdefault(child.tag, []).append(inner)
        else:
            document[child.tag] = inner
    text = _normalise_space("".join(element.texts), preserves_space=element.preserves_space) if element.texts else ""
    if element.tag == "script" and "json" in element.attributes.get("type", ""):
        document["#json"] = _parse_json_or_text(text)
        return document
    if not document:
        return text
    if text:
        document["#text"] = text
    return document


def _normalise_space(text: str, *, preserves_space: bool) -> str:
    return text.strip() if preserves_space else " ".join(text.split())


def has_same_order(old: Element, new: Element) -> bool:
    """Compare the order of children and texts, which equal documents don't contain."""
    if [child.tag for child in old.children] != [child.tag for child in new.children]:
        return False
    if old.children and _group_texts(old) != _group_texts(new):
        return False
    return all(
        has_same_order(old_child, new_child) for old_child, new_child in zip(old.children, new.children, strict=True)
    )


def _group_texts(element: Element) -> dict[int, str]:
    """Return the texts by the number of children before them."""
    texts: dict[int, str] = {}
    for position, text in zip(element.text_positions, element.texts, strict=True):
        texts[position] = texts.get(position, "") + text
    return {
        position: normalised
        for position, text in texts.items()
        if (normalised := _normalise_space(text, preserves_space=False))
    }


class _HtmlReader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.root = Element("html", preserves_space=False)
        self.stack = [self.root]
        self.broken = 0
        self.doctype = ""
        self.missing_endings: set[str] = set()  # no such ending follows

    def read(self) -> Element:
        position, text = 0, self.text
        while position < len(text):
            start = text.find("<", position)
            if start < 0:
                start = len(text)
            if start > position:
                self.stack[-1].add_text(html.unescape(text[position:start]))
            position = self._read_markup(start) if start < len(text) else start
        if not self.root.children:
            raise DocumentError("there are no tags")
        if self.doctype or any(child.tag in _PAGE_TAGS for child in self.root.children):
            _complete_page(self.root)
        root_element = self.root.children[0]
        if self.doctype:
            root_element.attributes["!doctype"] = self.doctype
        has_siblings = len(self.root.children) > 1 or "".join(self.root.texts).strip()
        return self.root if has_siblings or root_element.tag != "html" else root_element

    def _read_markup(self, start: int) -> int:
        text = self.text
        if text.startswith("<!--", start):
            return self._skip_past("-->", start + 4)
        if text.startswith(("<!", "<?"), start):
            end = self._skip_past(">", start + 2)
            declaration = text[start + 2 : min(end - 1, start + MAX_TAG_CHARS)].lower()
            if declaration.startswith("doctype") and not self.root.children:
                self.doctype = " ".join(declaration.split())  # selects the layout mode of browsers
            return end
        tag_match = _TAG.match(text, start, start + MAX_TAG_CHARS)
        if tag_match is None:
            self._add_text("<")
            self.broken += 1
            if self.broken > MAX_BROKEN_TAGS:
                raise DocumentError("too many tags have no end")
            return start + 1
        name = tag_match[2].lower()
        if tag_match[1]:
            self._close_element(name)
            return tag_match.end()
        self._open_element(name, tag_match[3])
        is_raw_text = name in _RAW_TEXT_TAGS and self.stack[-1].tag == name
        return self._read_raw_text(name, tag_match.end()) if is_raw_text else tag_match.end()

    def _skip_past(self, ending: str, start: int) -> int:
        """Return the position after the next ending. Missing endings are searched for once, to stay linear."""
        index = -1 if ending in self.missing_endings else self.text.find(ending, start)
        if index >= 0:
            return index + len(ending)
        self.missing_endings.add(ending)
        return len(self.text)

    def _read_raw_text(self, name: str, start: int) -> int:
        """Add the text up to the end tag of an element that has no children, such as `script`."""
        end_tag = re.compile(rf"</{name}\s{{0,8}}>", re.IGNORECASE).search(self.text, start)
        end = end_tag.start() if end_tag else len(self.text)
        content = self.text[start:end]
        self._add_text(html.unescape(content) if name in {"title", "textarea"} else content)
        return end

    def _open_element(self, name: str, attribute_text: str) -> None:
        while name in _IMPLIED_END_TAGS.get(self.stack[-1].tag, ()):
            self._close_element(self.stack[-1].tag)
        parent = self.stack[-1]
        is_first_row_group = parent.tag == "table" and not any(
            child.tag in {"tr", "tbody"} for child in parent.children
        )
        if name == "tbody" and is_first_row_group and not attribute_text.strip():
            return  # the tag may be omitted
        element = Element(
            name,
            _parse_attributes(attribute_text),
            preserves_space=parent.preserves_space or name in _PREFORMATTED_TAGS,
        )
        parent.children.append(element)
        if name in _VOID_TAGS or attribute_text.endswith("/"):
            return
        if len(self.stack) > MAX_ELEMENT_DEPTH:
            raise DocumentError("elements are nested too deeply")
        self.stack.append(element)

    def _close_element(self, name: str) -> None:
        for index in range(len(self.stack) - 1, 0, -1):
            if self.stack[index].tag == name:
                del self.stack[index:]
                return
            if self.stack[index].tag == "table" and name == "tbody":
                return  # its start tag had no element

    def _add_text(self, text: str) -> None:
        if text:
            self.stack[-1].add_text(text)


def _list_content(element: Element) -> list[Element | str]:
    """Return the texts and children of an element in their order."""
    content: list[tuple[int, int, Element | str]] = [
        *((position, 0, text) for position, text in zip(element.text_positions, element.texts, strict=True)),
        *((index, 1, child) for index, child in enumerate(element.children)),
    ]
    return [item for _, _, item in sorted(content, key=lambda entry: entry[:2])]


def _complete_page(root: Element) -> None:
    """Build the elements html, head and body whose tags a page may omit."""
    page = next((child for child in root.children if child.tag == "html"), None)
    if page is None:
        page = Element("html", preserves_space=False)
    items = [*_list_content(page), *(item for item in _list_content(root) if item is not page)]
    parts: dict[str, Element] = {}
    for item in items:
        if isinstance(item, str):
            if item.strip():
                parts.setdefault("body", Element("body", preserves_space=False)).add_text(item)
        elif item.tag in _PAGE_PARTS and item.tag not in parts:
            parts[item.tag] = item
        else:
            name = "head" if item.tag in _HEAD_TAGS and "body" not in parts else "body"
            parts.setdefault(name, Element(name, preserves_space=False)).children.append(item)
    head = parts.get("head")
    if head is not None and not (head.attributes or head.children):
        del parts["head"]
    page.children, page.texts, page.text_positions = list(parts.values()), [], []
    root.children, root.texts, root.text_positions = [page], [], []


def read_html(text: str) -> Element:
    """Parse HTML. Raise DocumentError for a text without tags, with too many broken tags, or nested too deeply."""
    return _HtmlReader(text).read()


def _parse_attributes(text: str) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTE.findall(text):
        value = html.unescape(double or single or bare)
        if name.lower() in _BOOLEAN_ATTRIBUTES:
            value = ""  # any value sets it
        elif name.lower() == "class":
            value = " ".join(sorted(set(value.split())))
        attributes.setdefault(name.lower(), value)
    return attributes


class _XmlReader:
    def __init__(self) -> None:
        self.root = Element("")
        self.stack = [self.root]
        self.namespaces = [""]
        self.prefixes: dict[str | None, list[str]] = {}
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._open_element
        self.parser.EndElementHandler = self._close_element
        self.parser.CharacterDataHandler = self._add_text
        self.parser.StartNamespaceDeclHandler = self._open_namespace
        self.parser.EndNamespaceDeclHandler = lambda prefix: self.prefixes[prefix].pop()
        self.parser.EntityDeclHandler = self._refuse_entities

    def _open_element(self, name: str, attributes: dict[str, str]) -> None:
        if len(self.stack) > MAX_ELEMENT_DEPTH:
            raise DocumentError("elements are nested too deeply")
        if _XSI_TYPE in attributes:
            attributes[_XSI_TYPE] = self._resolve_name(attributes[_XSI_TYPE])
        namespace, _, local = name.rpartition(" ")
        element = Element(local, {key.rpartition(" ")[2]: value for key, value in attributes.items()})
        if namespace != self.namespaces[-1]:
            element.attributes["xmlns"] = namespace
        self.namespaces.append(namespace)
        self.stack[-1].children.append(element)
        self.stack.append(element)

    def _open_namespace(self, prefix: str | None, uri: str | None) -> None:
        self.prefixes.setdefault(prefix, []).append(uri or "")

    def _resolve_name(self, text: str) -> str:
        """Replace the prefix of a name by its namespace."""
        prefix, colon, local = text.strip().rpartition(":")
        namespaces = self.prefixes.get(prefix if colon else None)
        return f"{{{namespaces[-1]}}}{local}" if namespaces else text

    def _close_element(self, _name: str) -> None:
        self.namespaces.pop()
        self.stack.pop()

    def _add_text(self, text: str) -> None:
        self.stack[-1].add_text(text)

    def _refuse_entities(self, *_: object) -> None:
        raise DocumentError("entity declarations are not allowed")


def read_xml(body: bytes | str) -> Element:
    """Parse XML. Raise DocumentError if it is not well formed, declares entities or is nested too deeply."""
    reader = _XmlReader()
    try:
        reader.parser.Parse(body, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise DocumentError(str(error)) from error
    return reader.root.children[0]
