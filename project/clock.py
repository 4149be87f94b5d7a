"""The only clock of the service, so that a test can move it."""

from datetime import UTC, datetime


def utcnow() -> datetime:
    """Return the present moment as an aware datetime in UTC.

    Call it through the module (``clock.utcnow()``): a test moves time by replacing this one name.
    """
    return datetime.now(UTC)
