"""Writes the Python examples of README and docs that a test runs, each as a module, so that `make check` checks their types."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"<!-- run: ([\w-]+) -->\n```python\n(.*?)```", re.DOTALL)
GIVEN = {  # what a page leaves to its reader
    "forms": """
        import abreast
        class Receipt:
            def __init__(self, text: str) -> None:
                self.text = text
        class Card: ...
        async def charge(card: Card, amount: int) -> Receipt:
            return charge_now(card, amount)
        def charge_now(card: Card, amount: int) -> Receipt:
            return Receipt(str(amount))
    """,
    "taskiq": """
        async def send_mail(to: str) -> None: ...
    """,
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name, code in EXAMPLE.findall(page.read_text()):
            given = GIVEN.get(name, "").replace("\n        ", "\n").rstrip(" ")
            (folder / f"{page.stem.lower()}_{name.replace('-', '_')}.py").write_text(given + code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
