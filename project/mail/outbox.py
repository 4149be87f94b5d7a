"""The outbox: emails to send, each a row of the table `mails`.

A row is added in the transaction of the act that the email tells of: a rollback sends nothing, and
a commit always sends. Any number of senders may work on the outbox at once: each row is claimed by
one of them. A sender that dies loses its claim after CLAIM_SECONDS, so an email is sent at least
once, and in rare cases twice.
"""

import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from flask import Flask, current_app
from sqlalchemy import Row, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from project import clock
from project.extensions import db
from project.lib import database, metrics
from project.models import MAX_STORED_ERROR, mails_table

MAX_TRIES = 12
FIRST_DELAY, LONGEST_DELAY = 30, 3_600  # seconds until the next try; doubled after each
JITTER = 0.2  # the part by which a delay is shorter or longer at random
CLAIM_SECONDS = 300  # longer than any try takes

_mails = mails_table.c
_WAITING = _mails.failed_at.is_(None)
_FREE = or_(_mails.claimed_until.is_(None), _mails.claimed_until <= bindparam("now"))
_DUE = (
    select(_mails.id)
    .where(_WAITING, _mails.next_try_at <= bindparam("now"), _FREE)
    .order_by(_mails.next_try_at, _mails.id)
    .limit(bindparam("limit"))
)
_COUNTS = select(
    func.count().filter(_WAITING).label("waiting"),
    func.count().filter(~_WAITING).label("dead"),
)
_METRICS = {
    "mails_waiting": "Emails to be sent, now or at their next try.",
    "mails_dead": "Emails that were given up.",
}


class Counts(NamedTuple):
    """The number of emails in the outbox."""

    waiting: int  # to be sent, now or at their next try
    dead: int  # given up


def init_app(app: Flask) -> None:
    """Show the number of emails in the metrics of `app`, if emails can be sent."""

    def read() -> dict[str, float]:
        with app.app_context():
            try:
                return {f"mails_{name}": number for name, number in counts()._asdict().items()}
            except SQLAlchemyError:
                return {}  # not known

    with app.app_context():
        if is_configured():
            metrics.of(app).read_at_scrape(read, _METRICS)


def is_configured() -> bool:
    """Return whether emails can be sent: to a mail server, or in development to a folder."""
    return bool(current_app.config["SMTP_URL"] or current_app.config["MAIL_FOLDER"])


def add(
    kind: str, address: str, language: str, *, user_id: int | None = None, **parameters: str | None
) -> None:
    """Add an email to the transaction of `db.session`.

    `kind` names the template. If `user_id` is given and that user is deleted before the email is
    sent, it is not sent.
    """
    now = clock.utcnow()
    values = {
        "kind": kind,
        "address": address,
        "user_id": user_id,
        "parameters": parameters,
        "language": language,
        "created_at": now,
        "next_try_at": now,
        "tries": 0,
        "error": "",
    }
    db.session.execute(insert(mails_table), values)


def claim(limit: int) -> Sequence[Row[Any]]:
    """Claim at most `limit` emails that are due, count a try of each, commit, and return them."""
    now = clock.utcnow()
    parameters = {"now": now, "limit": limit}
    if database.fetch_one(_DUE, **parameters) is None:
        return []  # without a transaction: mostly, none is due
    ids = db.session.scalars(_DUE.with_for_update(skip_locked=True), parameters).all()
    values = {"claimed_until": now + timedelta(seconds=CLAIM_SECONDS), "tries": _mails.tries + 1}
    claiming = update(mails_table).where(_mails.id.in_(ids)).values(values).returning(*_mails)
    claimed = db.session.execute(claiming).all() if ids else []
    db.session.commit()
    return sorted(claimed, key=lambda mail: (mail.next_try_at, mail.id))


def delete_sent(mail_id: int) -> None:
    """Delete an email that was sent, and commit."""
    database.write(delete(mails_table).where(_mails.id == mail_id))
    db.session.commit()


def postpone(mail: Row[Any], error: str, *, permanent: bool) -> bool:
    """Give a claimed email its next try, or give it up; commit, and return whether it is given up.

    It is given up after a `permanent` error, and after MAX_TRIES.
    """
    now = clock.utcnow()
    dead = permanent or mail.tries >= MAX_TRIES
    values = {
        "claimed_until": None,
        "next_try_at": now + timedelta(seconds=delay(mail.tries)),
        "failed_at": now if dead else None,
        "error": error[:MAX_STORED_ERROR],
    }
    # Not if the claim has expired and another sender has the email now.
    mine = _mails.id == mail.id, _mails.claimed_until == mail.claimed_until
    database.write(update(mails_table).where(*mine).values(values))
    db.session.commit()
    return dead


def delay(tries: int) -> float:
    """Return the seconds between try number `tries` and the next one."""
    seconds: int = min(FIRST_DELAY * 2 ** (tries - 1), LONGEST_DELAY)
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # nosec B311  # no secret


def counts() -> Counts:
    """Return how many emails wait and how many were given up."""
    row = database.fetch_one(_COUNTS)
    return Counts(row.waiting, row.dead) if row else Counts(0, 0)


def newest(limit: int) -> Sequence[Row[Any]]:
    """Return at most `limit` emails, newest first."""
    return database.fetch_all(select(*_mails).order_by(_mails.id.desc()).limit(limit))


def retry_dead() -> int:
    """Let the emails that were given up be tried again from now on, and return how many."""
    values = {"failed_at": None, "tries": 0, "next_try_at": clock.utcnow()}
    return database.write(update(mails_table).where(~_WAITING).values(values))


def forget(address: str) -> None:
    """Delete the emails to an address that were given up; those that wait are still sent."""
    database.write(delete(mails_table).where(~_WAITING, _mails.address == address))


def delete_expired() -> int:
    """Delete a batch of emails given up EVENTS_DAYS ago; return how many, 0 at the end."""
    oldest = clock.utcnow() - timedelta(days=current_app.config["EVENTS_DAYS"])
    return database.delete_batch(mails_table, _mails.failed_at < oldest, _mails.id)
