"""The command that deletes expired rows: purge."""

from collections.abc import Callable

from project.accounts import audit, ended_sessions, invitations, rate_limits, sessions
from project.extensions import db
from project.mail import outbox
from project.tokens import signing_keys


def purge() -> None:
    """Delete expired sessions, events, counts, invitations and mail, and retired keys."""
    ended = _delete_all(sessions.delete_expired)
    events = _delete_all(audit.delete_expired)
    counts = _delete_all(rate_limits.delete_expired)
    invited = _delete_all(invitations.delete_expired)
    mails = _delete_all(outbox.delete_expired)
    feed = _delete_all(ended_sessions.delete_expired)
    keys = _delete_all(signing_keys.delete_expired)
    print(
        f"Expired sessions deleted: {ended}; events: {events}; counts of attempts: {counts};"
        f" invitations: {invited}; emails that were given up: {mails};"
        f" sessions in the feed: {feed}; retired keys: {keys}."
    )


def _delete_all(delete_some: Callable[[], int]) -> int:
    """Call `delete_some` until it deletes nothing, commit each time, and return the total."""
    total = 0
    while deleted := delete_some():
        db.session.commit()
        total += deleted
    return total
