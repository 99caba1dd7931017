"""JSON logs on stderr. Only commands that run as a separate process configure logging."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import orjson
import structlog

from abreast_sidecar.errors import SettingError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str) -> None:
    """Configure structlog and the standard logging. Raise SettingError for an unknown level."""
    threshold = LEVELS.get(level.lower())
    if threshold is None:
        raise SettingError(f"ABREAST_LOG_LEVEL must be one of {', '.join(LEVELS)}, got {level!r}")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(serializer=orjson.dumps, default=_serialize_unknown),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    # Libraries use the standard module. Their warnings and errors are logged as JSON too.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("psycopg.pool").setLevel(
        logging.ERROR
    )  # it warns of each attempt; the sidecar logs an outage once


class JsonFormatter(logging.Formatter):
    """Formats the records of libraries with the fields of the sidecar's log."""

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
