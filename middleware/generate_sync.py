"""Generate the synchronous twins of asynchronous modules.

    python middleware/generate_sync.py [FOLDER]

Writes NAME.py for each NAME_async.py of the psycopg integration, next to it or into FOLDER. The approach is that of
tools/async_to_sync.py in psycopg. The rules also apply to docstrings and comments.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "abreast/integrations/psycopg"
RULES = (
    (r"async for (\w+) in (.+):\n\s+yield \1\n", r"yield from \2\n"),  # asynchronous code has no `yield from`
    (r"\basync (?=def |with |for )", ""),
    (r"\bawait ", ""),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\bAsync(?=[A-Z])", ""),  # AsyncCursor, AsyncIterator
    (r"\bASYNC_(?=[A-Z])", ""),
    (r"(?<=[a-z])_async\b", ""),  # modules and functions
)
HEADER = "# Generated from {source} by `make generate` (middleware/generate_sync.py). Do not edit.\n"


def to_sync(text: str) -> str:
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text


def main(folder: Path) -> None:
    ruff, config = Path(sys.executable).with_name("ruff"), Path(__file__).parents[1] / "pyproject.toml"
    for source in sorted(PACKAGE.glob("*_async.py")):
        twin = folder / source.name.replace("_async", "")
        twin.write_text(HEADER.format(source=source.name) + to_sync(source.read_text()))
        for command in (("check", "--select", "I", "--fix"), ("format",)):
            subprocess.run(
                [ruff, *command, "--silent", "--no-cache", "--config", config, twin], cwd=config.parent, check=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE)
