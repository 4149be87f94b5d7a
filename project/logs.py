"""What the log looks like: JSON for machines in production, one readable line elsewhere.

Nothing secret is ever handed to a log call: no password, no hash, no token.
"""

import structlog


def configure(*, readable: bool) -> None:
    """Set up structlog for this process; lines go to standard output."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if readable else structlog.processors.JSONRenderer(),
        ],
        cache_logger_on_first_use=True,
    )
