"""Invalid settings of the sidecar end in one line that shows no password."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable

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
        ("ABREAST_ENDPOINTS", "GET /users/{name}, users"),
        ("ABREAST_ENDPOINTS", "/users/{name"),
        ("ABREAST_OPENAPI", "/no/such/openapi.yaml"),
        ("ABREAST_ENDPOINT_VALUES", "-1"),
    ],
)
def test_invalid_variable_is_rejected(name: str, value: str) -> None:
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
def test_every_url_form_of_the_drivers_is_accepted(parse: Callable[[str], str], value: str) -> None:
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
def test_passwords_in_urls_are_not_shown(value: str) -> None:
    name = "ABREAST_REDIS_URL" if value.startswith("redis") else "ABREAST_POSTGRES_URL"
    with pytest.raises(SettingError) as error:
        Settings.from_environment({name: value})

    assert "ret" not in str(error.value)
    assert "port" in str(error.value)


def test_sidecar_command_rejects_an_invalid_option_in_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "abreast_sidecar", "sidecar", "--redis-url", "http://u:secret@h"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 2
    assert "abreast: --redis-url must be a URL such as redis://127.0.0.1:6379/0" in result.stderr
    assert "Traceback" not in result.stderr
    assert "secret" not in result.stderr


def test_log_records_of_libraries_are_json() -> None:
    record = logging.LogRecord("psycopg.pool", logging.WARNING, "", 0, 'a "%s"\nline', ("b",), None)

    assert json.loads(JsonFormatter().format(record)).items() >= {"event": 'a "b"\nline', "level": "warning"}.items()


@pytest.mark.parametrize("logger", ["structlog.get_logger()", "logging.getLogger('a')"])
def test_logged_error_contains_no_local_variable(logger: str) -> None:
    program = f"""
import logging, structlog
from abreast_sidecar.logs import configure
configure("info")
def read(body):
    local = body + "er2"
    raise ValueError("a message")
try:
    read("hunt")
except ValueError:
    {logger}.exception("failed")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert "a message" in result.stderr
    assert "hunter2" not in result.stderr
