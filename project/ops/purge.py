"""The command that deletes expired rows: purge."""

from collections.abc import Callable

from tqdm import tqdm

from project.accounts import audit, ended_sessions, invitations, rate_limits, sessions
from project.extensions import db
from project.mail import outbox
from project.ops.command_line import OneEvent
from project.tokens import signing_keys

# What to delete, and the function that deletes a batch of it.
EXPIRED: dict[str, Callable[[], int]] = {
    "Expired sessions deleted": sessions.delete_expired,
    "events": audit.delete_expired,
    "counts of attempts": rate_limits.delete_expired,
    "invitations": invitations.delete_expired,
    "emails that were given up": outbox.delete_expired,
    "sessions in the feed": ended_sessions.delete_expired,
    "retired keys": signing_keys.delete_expired,
}


def purge() -> None:
    """Delete expired sessions, events, counts, invitations and mail, and retired keys.

    The number of deleted rows is shown meanwhile if stderr is a terminal.
    """
    purged = OneEvent(audit.Kind.PURGED)
    deleted = dict.fromkeys(EXPIRED, 0)
    with tqdm(unit=" rows", disable=None) as bar:
        for name, delete_some in EXPIRED.items():
            bar.set_description(name)
            while rows := delete_some():
                deleted[name] += rows
                purged.record(rows=sum(deleted.values()))
                db.session.commit()
                bar.update(rows)
    print("; ".join(f"{name}: {rows}" for name, rows in deleted.items()) + ".")
