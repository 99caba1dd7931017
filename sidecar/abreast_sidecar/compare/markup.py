"""HTML and XML as documents: an element is an object with its attributes (`@name`), its text (`#text`) and its children.

Both readers take linear time. The XML reader refuses entity declarations: it expands and fetches nothing. The HTML reader
builds no implied elements, unlike a browser: formatting elements would take a browser's parser quadratic memory.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from abreast_sidecar.compare.values import NotJsonError, parse

MAX_ELEMENT_DEPTH = 150  # less than MAX_JSON_DEPTH
MAX_TAG_CHARS = 8192
MAX_BROKEN_TAGS = 100  # tags without an end in one document

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
    "tr": frozenset({"tr", "tbody", "tfoot"}),
    "td": frozenset({"td", "th", "tr"}),
    "th": frozenset({"td", "th", "tr"}),
    "head": frozenset({"body"}),
}  # fmt: skip
# Each run of characters is possessive (`++`, `*+`): a tag without an end would otherwise take quadratic time.
_TAG = re.compile(r"<(/?)([A-Za-z][^\s/>]*+)((?:[^>\"']++|\"[^\"]*+\"|'[^']*+')*)>")
_ATTRIBUTE = re.compile(r"([^\s=/\"'>]++)(?:\s*+=\s*+(?:\"([^\"]*+)\"|'([^']*+)'|([^\s\"'>]++)))?")


class NotMarkupError(ValueError):
    """A text is not valid HTML or XML, or too deep."""


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
    counts = Counter(child.tag for child in element.children)
    tag_path = (*path[-2:], element.tag)  # three tags identify a place well enough
    repeated.update((*tag_path, tag) for tag, count in counts.items() if count > 1)
    for child in element.children:
        _find_repeated(child, tag_path, repeated)


def _to_document(element: Element, path: tuple[str, ...], repeated: set[tuple[str, ...]]) -> Any:
    document: dict[str, Any] = {f"@{name}": value for name, value in element.attributes.items()}
    tag_path = (*path[-2:], element.tag)
    for child in element.children:
        inner = _to_document(child, tag_path, repeated)
        if (*tag_path, child.tag) in repeated:
            document.setdefault(child.tag, []).append(inner)
        else:
            document[child.tag] = inner
    text = _normalise_space("".join(element.texts), preserves_space=element.preserves_space)
    if element.tag == "script" and "json" in element.attributes.get("type", ""):
        document["#json"] = _parse_script_json(text)
        return document
    if not document:
        return text
    if text:
        document["#text"] = text
    return document


def _parse_script_json(text: str) -> Any:
    try:
        return parse(text.encode("utf-8", "surrogatepass"))
    except NotJsonError:
        return text


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


def read_html(text: str) -> Element:
    """Parse HTML. Raise NotMarkupError for a text without tags, with too many broken tags, or nested too deeply."""
    return _HtmlReader(text).read()


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
            self._add_text(html.unescape(text[position:start]))
            position = self._read_markup(start) if start < len(text) else start
        if not self.root.children:
            raise NotMarkupError("there are no tags")
        root_element = self.root.children[0]
        if self.doctype:
            root_element.attributes["!doctype"] = self.doctype
        is_single_root = (
            len(self.root.children) == 1 and root_element.tag == "html" and not "".join(self.root.texts).strip()
        )
        return root_element if is_single_root else self.root

    def _read_markup(self, start: int) -> int:
        text = self.text
        if text.startswith("<!--", start):
            return self._skip_past("-->", start + 4)
        if text.startswith(("<!", "<?"), start):
            end = self._skip_past(">", start + 2)
            self._read_doctype(text[start + 2 : min(end - 1, start + MAX_TAG_CHARS)])
            return end
        tag_match = _TAG.match(text, start, start + MAX_TAG_CHARS)
        if tag_match is None:
            self._add_text("<")
            self.broken += 1
            if self.broken > MAX_BROKEN_TAGS:
                raise NotMarkupError("too many tags have no end")
            return start + 1
        name = tag_match[2].lower()
        if tag_match[1]:
            self._close_element(name)
            return tag_match.end()
        self._open_element(name, tag_match[3])
        return (
            self._read_raw_text(name, tag_match.end())
            if name in _RAW_TEXT_TAGS and self.stack[-1].tag == name
            else tag_match.end()
        )

    def _read_doctype(self, text: str) -> None:
        """Keep the doctype, which selects the layout mode of browsers."""
        if text[:7].lower() == "doctype" and not self.root.children:
            self.doctype = " ".join(text.lower().split())

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
        if name in _IMPLIED_END_TAGS.get(self.stack[-1].tag, ()):
            self._close_element(self.stack[-1].tag)
            if name == "tr" and self.stack[-1].tag == "tr":
                self._close_element("tr")
        element = Element(
            name,
            _parse_attributes(attribute_text),
            preserves_space=self.stack[-1].preserves_space or name in _PREFORMATTED_TAGS,
        )
        self.stack[-1].children.append(element)
        if name in _VOID_TAGS or attribute_text.endswith("/"):
            return
        if len(self.stack) > MAX_ELEMENT_DEPTH:
            raise NotMarkupError("elements are nested too deeply")
        self.stack.append(element)

    def _close_element(self, name: str) -> None:
        for index in range(len(self.stack) - 1, 0, -1):
            if self.stack[index].tag == name:
                del self.stack[index:]
                return

    def _add_text(self, text: str) -> None:
        if text:
            self.stack[-1].add_text(text)


def _parse_attributes(text: str) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTE.findall(text):
        value = html.unescape(double or single or bare)
        if name.lower() == "class":
            value = " ".join(sorted(set(value.split())))
        attributes.setdefault(name.lower(), value)
    return attributes


def read_xml(body: bytes | str) -> Element:
    """Parse XML. Raise NotMarkupError if it is not well formed, declares entities or is nested too deeply."""
    try:
        return _XmlReader().read(body)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise NotMarkupError(str(error)) from error


class _XmlReader:
    def __init__(self) -> None:
        self.root = Element("")
        self.stack = [self.root]
        self.namespaces = [""]
        parser = self.parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.StartElementHandler = self._open_element
        parser.EndElementHandler = self._close_element
        parser.CharacterDataHandler = self._add_text
        parser.EntityDeclHandler = _refuse_entities
        parser.ProcessingInstructionHandler = None

    def read(self, body: bytes | str) -> Element:
        self.parser.Parse(body, True)
        return self.root.children[0]

    def _open_element(self, name: str, attributes: dict[str, str]) -> None:
        if len(self.stack) > MAX_ELEMENT_DEPTH:
            raise NotMarkupError("elements are nested too deeply")
        namespace, _, local = name.rpartition(" ")
        element = Element(local, {key.rpartition(" ")[2]: value for key, value in attributes.items()})
        if namespace != self.namespaces[-1]:
            element.attributes["xmlns"] = namespace
        self.namespaces.append(namespace)
        self.stack[-1].children.append(element)
        self.stack.append(element)

    def _close_element(self, _name: str) -> None:
        self.namespaces.pop()
        self.stack.pop()

    def _add_text(self, text: str) -> None:
        self.stack[-1].add_text(text)


def _refuse_entities(*_: object) -> None:
    raise NotMarkupError("entity declarations are not allowed")
