"""The only clock of the service, which a test can replace."""

from datetime import UTC, datetime


def utcnow() -> datetime:
    """Return the current time as an aware datetime in UTC.

    Call it through the module (``clock.utcnow()``), so that a test can replace it.
    """
    return datetime.now(UTC)
