"""JSON logs on stderr. Only commands that are a process of their own configure logging."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import orjson
import structlog

from abreast_sidecar.errors import SettingError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str) -> None:
    """Raise SettingError for a level that is none."""
    threshold = LEVELS.get(level.lower())
    if threshold is None:
        raise SettingError(f"ABREAST_LOG_LEVEL must be one of {', '.join(LEVELS)}, got {level!r}")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(serializer=orjson.dumps, default=_serialize_unknown),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard module: only what is wrong.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # warns of each try; the sidecar says it once


class JsonFormatter(logging.Formatter):
    """The same fields as ours, whatever a library writes."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "event": record.getMessage(),
            "logger": record.name,
            "level": record.levelname.lower(),
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=_serialize_unknown).decode()


def _serialize_unknown(value: object) -> str:
    return repr(value)
