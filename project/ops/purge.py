"""The command that deletes expired rows: purge."""

from collections.abc import Callable

from project.accounts import audit, rate_limits, sessions
from project.extensions import db


def purge() -> None:
    """Delete expired sessions, old events and expired counts of attempts."""
    ended = _delete_all(sessions.delete_expired)
    events = _delete_all(audit.delete_expired)
    counts = _delete_all(rate_limits.delete_expired)
    print(f"Expired sessions deleted: {ended}; events: {events}; counts of attempts: {counts}.")


def _delete_all(delete_some: Callable[[], int]) -> int:
    """Call `delete_some` until it deletes nothing, commit each time, and return the total."""
    total = 0
    while deleted := delete_some():
        db.session.commit()
        total += deleted
    return total
