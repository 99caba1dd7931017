"""Check the English of the project: sentence starts, sentence length, banned words.

Reads docs, docstrings, comments, command-line help, error and log messages, protos, SQL and templates. Prints each
violation as `path:line: reason: sentence`, and exits with 1 if there is a banned word, a sentence that is too long,
or more than 1% of forbidden sentence starts.

    python tests/prose.py [PATH ...]    # default: the whole project
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MAX_WORDS = 35
MAX_FORBIDDEN_SHARE = 0.01
FORBIDDEN_STARTS = frozenset(
    {"what", "who", "whoever", "of", "where", "that", "which", "whether", "those", "nothing", "such"}
)
BANNED = re.compile(
    r"\b(told|said|held against|put apart|asked again|anew|surely|whoever|what comes|by itself"
    r"|by themselves|of its own|of their own|some hundreds of|(?-i:is none|are none))\b",
    re.IGNORECASE,
)
GENERATED = re.compile(r"_pb2|/xds/|requirements.*\.lock|/corpus/")
COMMENT_MARKS = {".proto": "//", ".sql": "--", ".lua": "--", ".yaml": "#", ".yml": "#", ".sh": "#", ".toml": "#"}
MESSAGE_CALLS = frozenset({"debug", "info", "warning", "error", "exception", "critical", "echo"})
CODE_WORDS = re.compile(r"\b(noqa|type: ignore|pragma|fmt: |ruff: |mypy: )")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_`A-Z])")


class Sentence(NamedTuple):
    path: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return re.findall(r"[\w’'-]+", self.text)


def split_sentences(path: str, line: int, text: str) -> Iterator[Sentence]:
    """Split a paragraph; inline code counts as one word, a link as its text."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"``?[^`]+``?", "CODE", text)
    text = re.sub(r"<?https?://\S+", "URL", text)
    for part in SENTENCE_END.split(" ".join(text.split())):
        stripped = part.strip(" *_\"'(#-–")
        if len(stripped.split()) > 1:
            yield Sentence(path, line, stripped)


def read_markdown(path: str, text: str) -> Iterator[Sentence]:
    """Yield the sentences of paragraphs and list items. Code, tables, comments and headings don't count."""
    text = re.sub(r"<!--.*?-->", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    paragraph: list[str] = []
    start, is_code = 1, False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        is_item = re.match(r"\s*([-*]|\d+\.)\s", line)
        ends = not line.strip() or is_code or line.startswith(("#", "|", "```", "    ", "<")) or is_item
        if ends and paragraph:
            yield from split_sentences(path, start, " ".join(paragraph))
            paragraph = []
        if (
            line.strip()
            and not is_code
            and not line.lstrip().startswith(("#", "|", "```", "<"))
            and not (line.startswith("    ") and not paragraph and not is_item)
        ):
            if not paragraph:
                start = number
            paragraph.append(re.sub(r"^\s*([-*>]|\d+\.)\s+", "", line))


def read_python(path: str, text: str) -> Iterator[Sentence]:
    """Yield docstrings, comments, and the texts of errors, log lines and command-line help."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=True)
            if docstring:
                yield from read_docstring(path, node.body[0].lineno, docstring)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from read_messages(path, node.exc.args)
        elif isinstance(node, ast.Call):
            yield from read_messages(path, [word.value for word in node.keywords if word.arg in {"help", "doc"}])
            if isinstance(node.func, ast.Attribute) and node.func.attr in MESSAGE_CALLS:
                yield from read_messages(path, node.args[:1])
    yield from read_comments(path, python_comments(text))


def read_docstring(path: str, line: int, docstring: str) -> Iterator[Sentence]:
    for paragraph in re.split(r"\n\s*\n", docstring):
        if not paragraph.startswith("    "):
            yield from split_sentences(path, line, re.sub(r"^\s*[-*]\s+", "", paragraph, flags=re.MULTILINE))


def read_messages(path: str, arguments: Iterable[ast.expr]) -> Iterator[Sentence]:
    for argument in arguments:
        text = literal_text(argument)
        if text:
            yield from split_sentences(path, argument.lineno, text)


def literal_text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal_text(value) if isinstance(value, ast.Constant) else "VALUE" for value in node.values)
    return ""


def python_comments(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the line, the text, and whether the comment stands alone on its line."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not CODE_WORDS.search(token.string):
            yield token.start[0], token.string.lstrip("#").strip(), not token.line[: token.start[1]].strip()


def marked_comments(text: str, mark: str) -> Iterator[tuple[int, str, bool]]:
    for number, line in enumerate(text.splitlines(), 1):
        before, mark_found, comment = line.partition(mark)
        if mark_found and before.count("'") % 2 == 0 and before.count('"') % 2 == 0 and not before.endswith(":"):
            yield number, comment.strip(), not before.strip()


def read_comments(path: str, comments: Iterable[tuple[int, str, bool]]) -> Iterator[Sentence]:
    """Join comment lines that follow each other into paragraphs."""
    paragraph: list[str] = []
    start = last = 0
    for line, text, is_alone in comments:
        if paragraph and (line != last + 1 or not is_alone or not text):
            yield from split_sentences(path, start, " ".join(paragraph))
            paragraph = []
        if text:
            start = start if paragraph else line
            paragraph.append(text)
        last = line if is_alone else 0
    if paragraph:
        yield from split_sentences(path, start, " ".join(paragraph))


def read_file(path: Path) -> Iterator[Sentence]:
    text, name = path.read_text(), str(path.relative_to(ROOT))
    if path.suffix == ".md":
        yield from read_markdown(name, text)
    elif path.suffix == ".py":
        yield from read_python(name, text)
    elif path.suffix in COMMENT_MARKS:
        yield from read_comments(name, marked_comments(text, COMMENT_MARKS[path.suffix]))


def project_files(arguments: list[str]) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listing.stdout.splitlines() if not GENERATED.search(name)]
    return [file for file in files if file.is_file() and file.suffix in {".md", ".py", *COMMENT_MARKS}]


def main(arguments: list[str]) -> int:
    sentences = [sentence for file in project_files(arguments) for sentence in read_file(file)]
    is_bad = False
    forbidden = [sentence for sentence in sentences if sentence.words and sentence.words[0].lower() in FORBIDDEN_STARTS]
    for sentence in sentences:
        where = f"{sentence.path}:{sentence.line}"
        if len(sentence.words) > MAX_WORDS:
            is_bad = True
            print(f"{where}: {len(sentence.words)} words: {sentence.text}")
        for match in BANNED.finditer(sentence.text):
            is_bad = True
            print(f"{where}: banned {match[0]!r}: {sentence.text}")
    for sentence in forbidden:
        print(f"{sentence.path}:{sentence.line}: forbidden start: {sentence.text}")
    share = len(forbidden) / max(1, len(sentences))
    print(f"{len(sentences)} sentences, {share:.1%} with a forbidden start (at most {MAX_FORBIDDEN_SHARE:.0%})")
    return 1 if is_bad or share > MAX_FORBIDDEN_SHARE else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
