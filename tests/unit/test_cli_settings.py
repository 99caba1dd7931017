"""Wrong settings end in one line that shows no password."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from abreast_sidecar import settings
from abreast_sidecar.errors import SettingError
from abreast_sidecar.logs import JsonFormatter
from abreast_sidecar.settings import Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ABREAST_REDIS_URL", "foo"),
        ("ABREAST_REDIS_URL", "http://h:6379"),
        ("ABREAST_REDIS_URL", "redis://h:port/0"),
        ("ABREAST_REDIS_URL", "redis://h:99999"),
        ("ABREAST_POSTGRES_URL", "foo"),
        ("ABREAST_POSTGRES_URL", "postgresql://h:port/x"),
        ("ABREAST_CLAIM_IDLE", "inf"),
        ("ABREAST_CLAIM_IDLE", "nan"),
        ("ABREAST_BATCH_SIZE", "inf"),
    ],
)
def test_what_can_not_work_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"^{name} must be .*, got {value!r}$"):
        Settings.from_environment({name: value})


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        (settings.redis_url, "redis://user:secret@h/1"),
        (settings.redis_url, "rediss://h:6380"),
        (settings.redis_url, "unix:///run/redis.sock?db=1"),
        (settings.database_url, "postgres://a:1,b:2/x"),
        (settings.database_url, "host=/run/postgresql dbname=x"),
    ],
)
def test_every_form_that_the_drivers_take_is_taken(parse: object, value: str) -> None:
    assert callable(parse)
    assert parse(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "redis://user:secret@h:port/0",
        "redis://:sec@ret@h:port/0",
        "redis://h:port/0?password=secret",
        "postgresql://user:secret@h:port/x",
        "host=h port=x password=secret",
        "host=h port=x password='very secret'",
    ],
)
def test_passwords_are_not_shown(value: str) -> None:
    name = "ABREAST_REDIS_URL" if value.startswith("redis") else "ABREAST_POSTGRES_URL"
    with pytest.raises(SettingError) as caught:
        Settings.from_environment({name: value})

    assert "ret" not in str(caught.value)
    assert "port" in str(caught.value)


def test_the_sidecar_refuses_a_wrong_option_in_words() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "abreast_sidecar", "sidecar", "--redis-url", "http://u:secret@h"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2
    assert "must be a URL such as redis://127.0.0.1:6379/0" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_what_libraries_log_is_json_too() -> None:
    record = logging.LogRecord("psycopg.pool", logging.WARNING, "", 0, 'a "%s"\nline', ("b",), None)

    assert json.loads(JsonFormatter().format(record)).items() >= {"event": 'a "b"\nline', "level": "warning"}.items()
