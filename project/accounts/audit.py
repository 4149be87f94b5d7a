"""The audit trail: what happened, to whose account, from where.

An event is a row, written in the transaction of what it tells of, so that neither is there without
the other. A refusal has its own, committed before it is raised.
No password, hash or token is ever in one, nor anything else that a client typed, since people
mistake the field for the password; what a client calls itself is cut and made printable.
When a user is deleted their events stay, and say no more whose they were.
"""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from enum import StrEnum, auto
from typing import Any, NamedTuple, NoReturn, cast

import structlog
from flask import current_app
from sqlalchemy import (
    Column,
    Row,
    Select,
    Table,
    bindparam,
    case,
    delete,
    event,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import Session as DatabaseSession

from project import clock, database, metrics
from project.api.models import Erasure, Event
from project.errors import ServiceError
from project.extensions import db

log = structlog.get_logger()

PAGE = 500  # events that are read at once
DELETED_AT_ONCE = 1_000
ERASED_AT_ONCE = 1_000
ERASURES_AT_ONCE = 10  # so many times that many, while a user is being deleted
# How long after a user is deleted a request that knew them before may still record an event.
ERASURE_OVERLAP = timedelta(hours=1)
FOLLOW_INTERVAL = 0.5  # seconds between two looks for new events
# How long a transaction may take whose events are seen only when it is over.
FOLLOW_OVERLAP = timedelta(seconds=30)
_PENDING = "events"  # what the present transaction has recorded, for the log


class Kind(StrEnum):
    """Everything that the trail tells of, and the details of it.

    `sessions` is how many were ended by it, `pause` how many seconds the account or the address has
    to rest now, `users` how many were shown.
    """

    REGISTERED = auto()
    REGISTRATION_REFUSED = auto()  # why: username_taken, email_taken
    USER_ADDED = auto()
    LOGGED_IN = auto()
    LOGIN_REFUSED = auto()  # why: unknown_email, wrong_password, account_inactive; pause
    REFRESHED = auto()  # repeated: whether by a token that was used a moment ago
    REFRESH_REFUSED = auto()  # why: session_ended, account_inactive
    REFRESH_REUSED = auto()  # a theft; the session is ended
    LOGGED_OUT = auto()  # scope: this, others, all
    SESSION_ENDED = auto()
    SESSIONS_ENDED = auto()
    PASSWORD_CHANGED = auto()
    PASSWORD_CHANGE_REFUSED = auto()  # why: wrong_password; pause
    USERS_IMPORTED = auto()  # users: how many, of one batch
    USERS_EXPORTED = auto()  # their hashes too
    USER_CHANGED = auto()  # fields: username, email or both
    USER_CHANGE_REFUSED = auto()  # why: wrong_password, *_taken, last_admin; pause
    USER_DEACTIVATED = auto()
    USER_ACTIVATED = auto()
    ADMIN_GRANTED = auto()
    ADMIN_REVOKED = auto()
    USER_DELETED = auto()  # by an admin; nothing says whom
    ACCOUNT_DELETED = auto()  # by its user; nothing says whose
    DELETION_REFUSED = auto()  # why: wrong_password, last_admin; pause
    USERS_SEARCHED = auto()  # users


class Origin(NamedTuple):
    """Where a request comes from, as far as anybody can tell."""

    ip: str | None
    user_agent: str
    request_id: str | None = None
    actor_id: int | None = None  # the user who is calling


NOWHERE = Origin(None, "")  # of those who are to be named no more


_events = cast(Table, Event.__table__)
_erasures = cast(Table, Erasure.__table__)
# Where an admin did something to a user, from where they did it is no business of the user's.
_THEIR_OWN = _events.c.actor_id.is_(None)
_PUBLIC = select(
    _events.c.id,
    _events.c.created_at,
    _events.c.kind,
    _events.c.actor_id,
    _events.c.session_id,
    case((_THEIR_OWN, _events.c.ip)).label("ip"),
    case((_THEIR_OWN, _events.c.user_agent), else_="").label("user_agent"),
    case((_THEIR_OWN, _events.c.request_id)).label("request_id"),
    _events.c.details,
)
_NEWEST = (
    _PUBLIC.where(_events.c.user_id == bindparam("user_id"))
    .order_by(_events.c.created_at.desc(), _events.c.id.desc())
    .limit(bindparam("limit"))
)
_NEWEST_BEFORE = _NEWEST.where(
    tuple_(_events.c.created_at, _events.c.id)
    < tuple_(bindparam("created_at", type_=_events.c.created_at.type), bindparam("event_id"))
)


def record(
    kind: Kind,
    origin: Origin,
    *,
    user_id: int | None,
    session_id: str | None = None,
    **details: str | int,
) -> None:
    """Add an event to the transaction of `db.session`, and to the log once that is committed.

    `user_id` is the user whom it is about; who did it to them is the origin's `actor_id`.
    """
    actor_id = origin.actor_id if origin.actor_id != user_id else None
    happened = {
        "kind": kind.value,
        "user_id": user_id,
        "session_id": session_id,
        **origin._asdict() | {"actor_id": actor_id},
        "details": details,
    }
    db.session.execute(insert(_events).values(created_at=clock.utcnow(), **happened))
    db.session.info.setdefault(_PENDING, []).append(happened)


def refuse(error: ServiceError, kind: Kind, origin: Origin, **about: Any) -> NoReturn:
    """Record a refusal as `record` does, commit what is in the transaction, and raise `error`."""
    record(kind, origin, **about)
    db.session.commit()
    raise error


@event.listens_for(db.session, "after_commit")
def _write_log(session: DatabaseSession) -> None:
    """Log what is certain now."""
    for happened in session.info.pop(_PENDING, ()):
        fields = {key: value for key, value in happened.items() if value is not None}
        kind, details = fields.pop("kind"), fields.pop("details")
        write = log.warning if kind == Kind.REFRESH_REUSED else log.info
        write(kind, **fields, **details)
        metrics.of(current_app).event(kind, str(details.get("why", "")))


@event.listens_for(db.session, "after_rollback")
def _forget(session: DatabaseSession) -> None:
    """Log nothing of what has not happened after all."""
    session.info.pop(_PENDING, None)


def of_user(
    user_id: int, limit: int, before: tuple[datetime, int] | None = None
) -> Sequence[Row[Any]]:
    """Return at most `limit` events of a user, the newest first.

    `before` is the created_at and id of an event: the list goes on behind that one.
    """
    if before is None:
        return database.fetch_all(_NEWEST, user_id=user_id, limit=limit)
    created_at, event_id = before
    return database.fetch_all(
        _NEWEST_BEFORE, user_id=user_id, limit=limit, created_at=created_at, event_id=event_id
    )


def since(moment: datetime, user_id: int | None = None) -> Iterator[Row[Any]]:
    """Yield the events from `moment` on, of one user or of all, the oldest first."""
    order = _events.c.created_at, _events.c.id
    wanted: Select[Any] = select(_events).order_by(*order).limit(PAGE)
    if user_id is not None:
        wanted = wanted.where(_events.c.user_id == user_id)
    page = database.fetch_all(wanted.where(_events.c.created_at >= moment))
    while page:
        yield from page
        last = page[-1]
        page = database.fetch_all(wanted.where(tuple_(*order) > (last.created_at, last.id)))


def follow(moment: datetime, user_id: int | None = None) -> Iterator[Row[Any]]:
    """Yield events as `since` does, and go on with those that come, without an end.

    What is committed later than its successors is yielded when it is seen.
    """
    seen: dict[int, datetime] = {}
    while True:
        for happened in since(moment, user_id):
            if happened.id not in seen:
                seen[happened.id] = happened.created_at
                yield happened
        if seen:
            moment = max(moment, max(seen.values()) - FOLLOW_OVERLAP)
            seen = {number: at for number, at in seen.items() if at >= moment}
        time.sleep(FOLLOW_INTERVAL)


def delete_expired() -> int:
    """Delete events older than EVENTS_DAYS, at most DELETED_AT_ONCE, and return how many."""
    oldest = clock.utcnow() - timedelta(days=current_app.config["EVENTS_DAYS"])
    expired = (
        select(_events.c.id)
        .where(_events.c.created_at < oldest)
        .order_by(_events.c.created_at)
        .limit(DELETED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    return database.write(delete(_events).where(_events.c.id.in_(expired)))


def erase(user_id: int) -> None:
    """Take a user, who is being deleted, out of their events, and remember that.

    Out of those about them, and those about others that they did. If they have very many these are
    the newest; `erase_rest` does the others, so that no deletion takes longer than it may.
    """
    db.session.execute(insert(_erasures).values(user_id=user_id, erased_at=clock.utcnow()))
    for _ in range(ERASURES_AT_ONCE):
        if not _erase_some(user_id):
            break


def erase_rest() -> int:
    """Take those who were deleted out of more of their events; return how many, 0 at the end.

    That includes events of requests that were under way when their user was deleted.
    """
    erased = sum(map(_erase_some, db.session.scalars(select(_erasures.c.user_id)).all()))
    if not erased:
        over = _erasures.c.erased_at <= clock.utcnow() - ERASURE_OVERLAP
        # One look into an index for each: a limit keeps PostgreSQL from joining the whole table.
        unnamed = [
            select(_events.c.id)
            .where(column == _erasures.c.user_id)
            .limit(1)
            .scalar_subquery()
            .is_(None)
            for column in (_events.c.user_id, _events.c.actor_id)
        ]
        database.write(delete(_erasures).where(over, *unnamed))
    return erased


def _erase_some(user_id: int) -> int:
    """Take a user out of at most ERASED_AT_ONCE events about them, and as many that they did.

    Nobody waits for events that somebody else is changing; these are left to `erase_rest`.
    """
    columns = _events.c
    by_another = columns.actor_id.is_not(None)  # then that is where it came from
    about_them: dict[Column[Any], Any] = {
        columns.user_id: None,
        columns.session_id: None,
        columns.ip: case((by_another, columns.ip)),
        columns.user_agent: case((by_another, columns.user_agent), else_=""),
        columns.request_id: case((by_another, columns.request_id)),
    }
    done_by_them: dict[Column[Any], Any] = {
        columns.actor_id: None,
        columns.ip: None,
        columns.user_agent: "",
        columns.request_id: None,
    }
    erased = 0
    for column, values in ((columns.user_id, about_them), (columns.actor_id, done_by_them)):
        newest = (
            select(columns.id)
            .where(column == user_id)
            .order_by(columns.created_at.desc(), columns.id.desc())
            .limit(ERASED_AT_ONCE)
            .with_for_update(skip_locked=True)
        )
        erased += database.write(update(_events).where(columns.id.in_(newest)).values(values))
    return erased
