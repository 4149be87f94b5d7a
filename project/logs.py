"""What the log looks like: JSON for machines in production, one readable line elsewhere.

Nothing secret is ever handed to a log call: no password, no hash, no token. What a client sent may
be in a value, never in a key: both forms escape it, so that no line, key or color is forged.
"""

import json
import logging
from collections.abc import Mapping
from typing import TextIO

import structlog


def configure(*, readable: bool, file: TextIO | None = None, level: int = logging.INFO) -> None:
    """Set up structlog for this process; lines go to `file`, or to standard output."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # By itself the readable one lets escape sequences and directions through.
            structlog.dev.ConsoleRenderer(repr_native_str=True)
            if readable
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # One write a line: the server's processes share the output.
        logger_factory=structlog.WriteLoggerFactory(file),
        cache_logger_on_first_use=True,
    )
    # SQLAlchemy's own complaints quote statements and rows; what matters of them is raised too.
    logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)
    logging.getLogger("granian.access").addFilter(_escape)


def _escape(record: logging.LogRecord) -> bool:
    """Escape what the server's access log (which is off unless it is asked for) writes raw."""
    if isinstance(record.args, Mapping):
        record.args = {
            name: json.dumps(value)[1:-1] if isinstance(value, str) else value
            for name, value in record.args.items()
        }
    return True
