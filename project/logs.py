"""What the log looks like: JSON for machines in production, one readable line elsewhere.

Nothing secret is ever handed to a log call: no password, no hash, no token. What a client sent may
be in a value, never in a key: both forms escape it, so that no line, key or color is forged.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

import flask
import structlog
from structlog.typing import EventDict


class Output:
    """A file for lines that may be lost: where nobody takes them, requests are answered still."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Write `text`, if that can be done."""
        with contextlib.suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        """Pass on what was written, if that can be done."""
        with contextlib.suppress(OSError):
            self._file.flush()


def configure(*, readable: bool, file: TextIO | None = None, level: int = logging.INFO) -> None:
    """Set up structlog for this process; lines go to `file`, or to standard output."""
    structlog.configure(
        processors=[
            _name_request,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # By itself the readable one lets escape sequences and directions through.
            structlog.dev.ConsoleRenderer(repr_native_str=True)
            if readable
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # One write a line: the server's processes share the output.
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, Output(file or sys.stdout))),
        cache_logger_on_first_use=True,
    )
    # SQLAlchemy's own complaints quote statements and rows; what matters of them is raised too.
    logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)
    logging.getLogger("granian.access").addFilter(_escape)


def _name_request(_logger: object, _method: str, fields: EventDict) -> EventDict:
    """Say in which request it happens, if it is in one."""
    if flask.has_request_context():
        fields.setdefault("request_id", cast(Any, flask.request).id)
    return fields


def _escape(record: logging.LogRecord) -> bool:
    """Escape what the server's access log (which is off unless it is asked for) writes raw."""
    if isinstance(record.args, Mapping):
        record.args = {
            name: json.dumps(value)[1:-1] if isinstance(value, str) else value
            for name, value in record.args.items()
        }
    return True
