"""The commands about emails: send_mail and mails."""

import signal
import sys
from typing import Any

from flask import current_app
from sqlalchemy import Row

from project.accounts.mails import compose
from project.extensions import db
from project.mail import outbox, sender, transport
from project.ops.command_line import as_time

MAX_LISTED = 500
TABLE_ROW = "{:>8}  {:18}  {:32}  {:20}  {:>5}  {:20}  {}"
COLUMNS = "id", "kind", "address", "created", "tries", "next try", "error"


def send_mail(once: bool = False) -> None:
    """Send the emails of the outbox, until SIGTERM or SIGINT; those in flight are finished first.

    --once sends those that are due and ends. Any number of senders may run at once.
    """
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # for other threads
    channel = transport.of(app)
    if channel is None:
        sys.exit("No emails can be sent: SMTP_URL is not set.")
    if once:
        sender.Sender(app, channel, compose).run_once()
        return
    signals = {signal.SIGTERM, signal.SIGINT}
    # The sender's threads inherit this: the signals wait for `sigwait`.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    sender.start(app, compose)
    signal.sigwait(signals)


def mails(retry: bool = False) -> None:
    """Print the emails that wait and those that were given up, newest first, as a table.

    --retry lets those that were given up be tried again, from now on, and prints nothing else.
    """
    if retry:
        retried = outbox.retry_dead()
        db.session.commit()
        print(f"Emails to be tried again: {retried}.")
        return
    print(TABLE_ROW.format(*COLUMNS))
    for mail in outbox.newest(MAX_LISTED):
        print(_as_row(mail))
    counts = outbox.counts()
    print(f"\nWaiting: {counts.waiting}; given up: {counts.dead}.")
    if sum(counts) > MAX_LISTED:
        print(f"Only the newest {MAX_LISTED} are listed.")


def _as_row(mail: Row[Any]) -> str:
    created = as_time(mail.created_at)
    following = "given up" if mail.failed_at else as_time(mail.next_try_at)
    columns = mail.id, mail.kind, mail.address, created, mail.tries, following, mail.error
    return TABLE_ROW.format(*columns).rstrip()
