"""HTML and XML as documents: an element is an object with its attributes (`@name`), its text (`#text`) and its children.

Both readers take time linear in the text. XML with entity declarations is refused, so nothing is expanded or fetched.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from abreast_sidecar.compare.value import NotJsonError, parse

MAX_DEPTH = 150  # elements in elements; below MAX_DEPTH of documents
MAX_TAG = 8192  # characters from < to >
MAX_BROKEN = 100  # tags without an end, before it is no HTML

_VOID = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"]
)
_RAW = frozenset({"script", "style", "textarea", "title"})
_EXACT = frozenset({"pre", "script", "style", "textarea"})
# An element of the first kind is over when one of the second begins.
_ENDED_BY = {
    "li": frozenset({"li"}),
    "p": frozenset(
        [
            "address",
            "article",
            "aside",
            "blockquote",
            "div",
            "dl",
            "footer",
            "form",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "header",
            "hr",
            "main",
            "nav",
            "ol",
            "p",
            "pre",
            "section",
            "table",
            "ul",
        ]
    ),
    "dt": frozenset({"dt", "dd"}),
    "dd": frozenset({"dt", "dd"}),
    "option": frozenset({"option", "optgroup"}),
    "tr": frozenset({"tr", "tbody", "tfoot"}),
    "td": frozenset({"td", "th", "tr"}),
    "th": frozenset({"td", "th", "tr"}),
    "head": frozenset({"body"}),
}
_TAG = re.compile(r"<(/?)([A-Za-z][^\s/>]*)((?:[^>\"']|\"[^\"]*\"|'[^']*')*)>")
_ATTRIBUTE = re.compile(r"([^\s=/\"'>]+)(?:\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+)))?")


class NotMarkupError(ValueError):
    pass


@dataclass(slots=True)
class Element:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of each text: how many children stand before it
    children: list[Element] = field(default_factory=list)
    exact: bool = True  # whether spaces within the text mean something

    def add(self, text: str) -> None:
        self.text.append(text)
        self.places.append(len(self.children))


def documents(old: Element, new: Element) -> tuple[Any, Any]:
    """Objects of both. A tag that no parent has twice, in either, is no array."""
    repeated: set[tuple[str, ...]] = set()
    for root in (old, new):
        _find_repeated(root, (), repeated)
    return _document(old, (), repeated), _document(new, (), repeated)


def _find_repeated(element: Element, path: tuple[str, ...], repeated: set[tuple[str, ...]]) -> None:
    times = Counter(child.tag for child in element.children)
    here = (*path[-2:], element.tag)  # enough to tell places apart, and bounded
    repeated.update((*here, tag) for tag, count in times.items() if count > 1)
    for child in element.children:
        _find_repeated(child, here, repeated)


def _document(element: Element, path: tuple[str, ...], repeated: set[tuple[str, ...]]) -> Any:
    made: dict[str, Any] = {f"@{name}": value for name, value in element.attributes.items()}
    here = (*path[-2:], element.tag)
    for child in element.children:
        inner = _document(child, here, repeated)
        if (*here, child.tag) in repeated:
            made.setdefault(child.tag, []).append(inner)
        else:
            made[child.tag] = inner
    text = _squeezed("".join(element.text), exact=element.exact)
    if element.tag == "script" and "json" in element.attributes.get("type", ""):
        made["#json"] = _data(text)
        return made
    if not made:
        return text
    if text:
        made["#text"] = text
    return made


def _data(text: str) -> Any:
    """What a page hands to its scripts."""
    try:
        return parse(text.encode("utf-8", "surrogatepass"))
    except NotJsonError:
        return text


def _squeezed(text: str, *, exact: bool) -> str:
    return text.strip() if exact else " ".join(text.split())


def same_order(old: Element, new: Element) -> bool:
    """Whether two elements that have equal documents also have their children, and the text between them, in one order."""
    if [child.tag for child in old.children] != [child.tag for child in new.children]:
        return False
    if old.children and _between(old) != _between(new):
        return False
    return all(same_order(one, other) for one, other in zip(old.children, new.children, strict=True))


def _between(element: Element) -> dict[int, str]:
    """Texts by the number of children before them."""
    found: dict[int, str] = {}
    for place, text in zip(element.places, element.text, strict=True):
        found[place] = found.get(place, "") + text
    return {place: held for place, text in found.items() if (held := _squeezed(text, exact=False))}


def read_html(text: str) -> Element:
    """Raise NotMarkupError for what has no tags, is nested too deeply or is full of broken tags."""
    return _HtmlReader(text).read()


class _HtmlReader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.root = Element("html", exact=False)
        self.stack = [self.root]
        self.broken = 0
        self.doctype = ""
        self.closing: dict[str, bool] = {}  # whether a text that ends something comes again

    def read(self) -> Element:
        position, text = 0, self.text
        while position < len(text):
            start = text.find("<", position)
            if start < 0:
                start = len(text)
            self._characters(html.unescape(text[position:start]))
            position = self._markup(start) if start < len(text) else start
        if not self.root.children:
            raise NotMarkupError("there are no tags")
        whole = self.root.children[0]
        if self.doctype:
            whole.attributes["!doctype"] = self.doctype
        alone = len(self.root.children) == 1 and whole.tag == "html" and not "".join(self.root.text).strip()
        return whole if alone else self.root

    def _markup(self, start: int) -> int:
        text = self.text
        if text.startswith("<!--", start):
            return self._after("-->", start + 4)
        if text.startswith(("<!", "<?"), start):
            end = self._after(">", start + 2)
            self._doctype(text[start + 2 : min(end - 1, start + MAX_TAG)])
            return end
        found = _TAG.match(text, start, start + MAX_TAG)
        if found is None:
            self._characters("<")
            self.broken += 1
            if self.broken > MAX_BROKEN:
                raise NotMarkupError("too many tags have no end")
            return start + 1
        name = found[2].lower()
        if found[1]:
            self._end(name)
            return found.end()
        self._begin(name, found[3])
        return self._raw(name, found.end()) if name in _RAW and self.stack[-1].tag == name else found.end()

    def _doctype(self, text: str) -> None:
        """Without it browsers lay a page out in another way."""
        if text[:7].lower() == "doctype" and not self.root.children:
            self.doctype = " ".join(text.lower().split())

    def _after(self, ending: str, start: int) -> int:
        """Once it was looked for in vain it is not looked for again."""
        if self.closing.get(ending, True):
            found = self.text.find(ending, start)
            if found >= 0:
                return found + len(ending)
            self.closing[ending] = False
        return len(self.text)

    def _raw(self, name: str, start: int) -> int:
        """Text in which nothing is a tag but its own end."""
        found = re.compile(rf"</{name}\s{{0,8}}>", re.IGNORECASE).search(self.text, start)
        end = found.start() if found else len(self.text)
        content = self.text[start:end]
        self._characters(html.unescape(content) if name in {"title", "textarea"} else content)
        return end

    def _begin(self, name: str, rest: str) -> None:
        if name in _ENDED_BY.get(self.stack[-1].tag, ()):
            self._end(self.stack[-1].tag)
            if name == "tr" and self.stack[-1].tag == "tr":
                self._end("tr")
        element = Element(name, _attributes(rest), exact=self.stack[-1].exact or name in _EXACT)
        self.stack[-1].children.append(element)
        if name in _VOID or rest.endswith("/"):
            return
        if len(self.stack) > MAX_DEPTH:
            raise NotMarkupError("elements are nested too deeply")
        self.stack.append(element)

    def _end(self, name: str) -> None:
        for place in range(len(self.stack) - 1, 0, -1):
            if self.stack[place].tag == name:
                del self.stack[place:]
                return

    def _characters(self, text: str) -> None:
        if text:
            self.stack[-1].add(text)


def _attributes(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTE.findall(text):
        value = html.unescape(double or single or bare)
        if name.lower() == "class":
            value = " ".join(sorted(set(value.split())))
        found.setdefault(name.lower(), value)
    return found


def read_xml(body: bytes | str) -> Element:
    """Raise NotMarkupError for what is not well formed, declares entities or is nested too deeply."""
    try:
        return _XmlReader().read(body)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise NotMarkupError(str(error)) from error


class _XmlReader:
    def __init__(self) -> None:
        self.root = Element("")
        self.stack = [self.root]
        self.spaces = [""]
        parser = self.parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.StartElementHandler = self._begin
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        parser.EntityDeclHandler = _refuse
        parser.ProcessingInstructionHandler = None

    def read(self, body: bytes | str) -> Element:
        self.parser.Parse(body, True)
        return self.root.children[0]

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        if len(self.stack) > MAX_DEPTH:
            raise NotMarkupError("elements are nested too deeply")
        space, _, local = name.rpartition(" ")
        made = Element(local, {key.rpartition(" ")[2]: value for key, value in attributes.items()})
        if space != self.spaces[-1]:
            made.attributes["xmlns"] = space
        self.spaces.append(space)
        self.stack[-1].children.append(made)
        self.stack.append(made)

    def _end(self, _name: str) -> None:
        self.spaces.pop()
        self.stack.pop()

    def _characters(self, text: str) -> None:
        self.stack[-1].add(text)


def _refuse(*_: object) -> None:
    raise NotMarkupError("it declares entities")
