"""Synchronous twins of asynchronous modules are generated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from generate_sync import PACKAGE, to_sync

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("source", "twin"),
    [
        ("async with connection.transaction():", "with connection.transaction():"),
        ("return await super().execute(query)", "return super().execute(query)"),
        ("def cursor(self) -> psycopg.AsyncCursor[Row]:", "def cursor(self) -> psycopg.Cursor[Row]:"),
        ("@asynccontextmanager", "@contextmanager"),
        ("from package.pool_async import ASYNC_LIMIT, open_async", "from package.pool import LIMIT, open"),
        ("async for row in rows():\n    yield row\n", "yield from rows()\n"),
        ('"""`AsyncConnection` awaits."""', '"""`Connection` awaits."""'),
    ],
)
def test_to_sync_rewrites_code_and_prose(source: str, twin: str) -> None:
    assert to_sync(source) == twin


def test_generated_sync_modules_are_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "middleware/generate_sync.py", tmp_path], check=True)
    twins = {path.name: path.read_text() for path in tmp_path.iterdir()}

    assert twins.keys() == {"connection.py", "pool.py"}
    stale = [name for name, text in twins.items() if (PACKAGE / name).read_text() != text]
    assert not stale, "run make generate"
