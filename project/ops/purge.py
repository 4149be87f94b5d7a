"""The command that deletes expired rows: purge."""

from collections.abc import Callable

from project.accounts import audit, invitations, rate_limits, sessions
from project.extensions import db
from project.mail import outbox


def purge() -> None:
    """Delete expired sessions, events, counts of attempts, invitations, and undeliverable mail."""
    ended = _delete_all(sessions.delete_expired)
    events = _delete_all(audit.delete_expired)
    counts = _delete_all(rate_limits.delete_expired)
    invited = _delete_all(invitations.delete_expired)
    mails = _delete_all(outbox.delete_expired)
    print(
        f"Expired sessions deleted: {ended}; events: {events}; counts of attempts: {counts};"
        f" invitations: {invited}; emails that were given up: {mails}."
    )


def _delete_all(delete_some: Callable[[], int]) -> int:
    """Call `delete_some` until it deletes nothing, commit each time, and return the total."""
    total = 0
    while deleted := delete_some():
        db.session.commit()
        total += deleted
    return total
