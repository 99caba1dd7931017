"""Writes the Python examples of README and docs as modules, so that `make check` checks their types."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"<!-- run: ([\w-]+) -->\n```python\n(.*?)```", re.DOTALL)
PRELUDES = {  # code that an example expects from its reader
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
            prelude = PRELUDES.get(name, "").replace("\n        ", "\n").rstrip(" ")
            (folder / f"{page.stem.lower()}_{name.replace('-', '_')}.py").write_text(prelude + code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
