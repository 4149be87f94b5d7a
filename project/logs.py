"""What the log looks like: JSON for machines in production, one readable line elsewhere.

Nothing secret is ever handed to a log call: no password, no hash, no token.
"""

import logging
from typing import TextIO

import structlog


def configure(*, readable: bool, file: TextIO | None = None) -> None:
    """Set up structlog for this process; lines go to `file`, or to standard output."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if readable else structlog.processors.JSONRenderer(),
        ],
        # One write a line: the server's processes share the output.
        logger_factory=structlog.WriteLoggerFactory(file),
        cache_logger_on_first_use=True,
    )
    # SQLAlchemy's own complaints quote statements and rows; what matters of them is raised too.
    logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)
