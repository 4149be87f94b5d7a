"""The audit log: what happened to which account, who did it, and where the request came from.

An event is a row of the table `events`, written in the transaction of the act that it records: no
act is stored without its event, and no event without its act. A refusal has a transaction of its
own, committed before the error is raised.
No event holds a password, a hash or a token, nor any other text that a client sent, because users
mistake other fields for the password. Only roles are such a text: admins send them, and they are
short words. The user agent is truncated and made printable.
When a user is deleted their events stay, without anything that identifies the user.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum, auto
from typing import Any, NamedTuple, NoReturn

import structlog
from flask import current_app
from sqlalchemy import (
    Row,
    ScalarSelect,
    and_,
    bindparam,
    case,
    event,
    func,
    insert,
    select,
    tuple_,
    union,
    update,
)
from sqlalchemy.orm import Session as DatabaseSession

from project import clock
from project.errors import ServiceError
from project.extensions import db
from project.lib import database, metrics
from project.mail import rendering
from project.models import events_table, users_table

log = structlog.get_logger()

ANONYMIZED_AT_ONCE = 1_000  # events
_UNCOMMITTED = "events"  # key in the session's `info`: events to log after the commit


class Kind(StrEnum):
    """The kinds of events, each with its details.

    `sessions` is the number of sessions that the act ended, `pause` the seconds for which the
    account or the address is blocked now, `users` the number of users in a result.
    """

    REGISTERED = auto()
    REGISTRATION_REFUSED = auto()  # why: username_taken, email_taken
    USER_ADDED = auto()
    LOGGED_IN = auto()  # amr: as in the token, if a code was needed too
    # why: unknown_email, wrong_password, account_inactive, email_unverified, mfa_required (the
    # password was right, and there was no code), wrong_code; pause
    LOGIN_REFUSED = auto()
    # repeated: whether the token had been used in the last REFRESH_REUSE_SECONDS
    REFRESHED = auto()
    REFRESH_REFUSED = auto()  # why: session_ended, account_inactive
    REFRESH_REUSED = auto()  # a theft; the session is ended
    LOGGED_OUT = auto()  # scope: this, others, all
    SESSION_ENDED = auto()
    SESSIONS_ENDED = auto()
    PASSWORD_CHANGED = auto()
    PASSWORD_CHANGE_REFUSED = auto()  # why: wrong_password, wrong_code; pause
    USERS_IMPORTED = auto()  # users
    USERS_EXPORTED = auto()  # with their hashes; second_factors: whether with them too
    USER_CHANGED = auto()  # fields: username, email or both
    # why: wrong_password, wrong_code, *_taken, last_admin, ...; pause
    USER_CHANGE_REFUSED = auto()
    USER_DEACTIVATED = auto()
    USER_ACTIVATED = auto()
    ADMIN_GRANTED = auto()
    ADMIN_REVOKED = auto()
    ROLES_CHANGED = auto()  # roles: all that the user has now, without admin
    USER_DELETED = auto()  # by an admin; the event does not name the user
    ACCOUNT_DELETED = auto()  # by the user; the event does not name them
    DELETION_REFUSED = auto()  # why: wrong_password, wrong_code, last_admin; pause
    USERS_SEARCHED = auto()  # users
    PASSWORD_RESET = auto()  # with a link from an email; sessions
    EMAIL_VERIFIED = auto()
    EMAIL_CHANGE_REQUESTED = auto()  # USER_CHANGED follows when the user confirms it
    USER_INVITED = auto()  # the event does not name the email
    TOTP_STARTED = auto()  # the user has got a secret for an authenticator
    TOTP_ENABLED = auto()  # sessions
    TOTP_DISABLED = auto()  # by the user
    TOTP_RESET = auto()  # why: admin, operator, password_reset; sessions
    # a change of the second factor; why: wrong_password, wrong_code, totp_not_found; pause
    TOTP_REFUSED = auto()
    CODE_GIVEN = auto()  # in a session, for a change; method: otp, rc
    RECOVERY_CODE_USED = auto()
    RECOVERY_CODES_REPLACED = auto()
    SESSION_REVOKED = auto()  # client: the service that ended it
    CLIENT_ADDED = auto()  # client
    CLIENT_SECRET_ROTATED = auto()  # client
    CLIENT_DISABLED = auto()  # client
    # why: unknown_client, wrong_secret, client_disabled; pause; client, if there is one
    CLIENT_REFUSED = auto()
    KEYS_ROTATED = auto()  # key: its kid
    PURGED = auto()  # rows


class Origin(NamedTuple):
    """Where a request comes from, as far as the server can tell."""

    ip: str | None
    user_agent: str
    request_id: str | None = None
    actor_id: int | None = None  # the user who sends the request
    language: str = rendering.DEFAULT_LANGUAGE  # of the emails that the request causes
    trace_id: str | None = None  # of the trace that the request is a part of


ANONYMOUS = Origin(None, "")  # of a user who is deleted

_columns = events_table.c
# A user is not shown from where an admin acted on their account.
_BY_THE_USER = _columns.actor_id.is_(None)
_PUBLIC = select(
    _columns.id,
    _columns.created_at,
    _columns.kind,
    _columns.actor_id,
    _columns.session_id,
    case((_BY_THE_USER, _columns.ip)).label("ip"),
    case((_BY_THE_USER, _columns.user_agent), else_="").label("user_agent"),
    case((_BY_THE_USER, _columns.request_id)).label("request_id"),
    _columns.details,
)
_NEWEST = (
    _PUBLIC.where(_columns.user_id == bindparam("user_id"))
    .order_by(_columns.created_at.desc(), _columns.id.desc())
    .limit(bindparam("limit"))
)
_NEWEST_BEFORE = _NEWEST.where(
    tuple_(_columns.created_at, _columns.id)
    < tuple_(bindparam("created_at", type_=_columns.created_at.type), bindparam("event_id"))
)


def _existing_user(parameter: str) -> ScalarSelect[int]:
    """Return a query for the id in `parameter` if there is such a user; otherwise it is NULL.

    It waits for a transaction that is deleting the user, and lets none delete them until this
    transaction is over, as the check of the foreign key would, which fails instead of waiting.
    """
    user = users_table.c.id == bindparam(parameter, type_=users_table.c.id.type)
    query = select(users_table.c.id).where(user)
    return query.with_for_update(read=True, key_share=True).scalar_subquery()


_INSERT = (
    insert(events_table)
    .values(user_id=_existing_user("user"), actor_id=_existing_user("actor"))
    .returning(_columns.id, _columns.user_id, _columns.actor_id)
    .execution_options(prepare=True)
)


def record(
    kind: Kind,
    origin: Origin,
    *,
    user_id: int | None,
    session_id: str | None = None,
    **details: str | int,
) -> int:
    """Add an event to the transaction of `db.session`, and return its id; the commit logs it.

    `user_id` is the user whom the event is about. If another user acted, `origin.actor_id` says
    who. If either has been deleted in the meantime, the event is stored without session and origin.
    """
    actor_id = origin.actor_id if origin.actor_id != user_id else None
    happened = {
        "kind": kind.value,
        "session_id": session_id,
        "ip": origin.ip,
        "user_agent": origin.user_agent,
        "request_id": origin.request_id,
        "trace_id": origin.trace_id,
        "details": details,
    }
    about = {"created_at": clock.utcnow(), "user": user_id, "actor": actor_id}
    stored = db.session.execute(_INSERT, happened | about).one()
    if (stored.user_id, stored.actor_id) != (user_id, actor_id):
        nothing = dict.fromkeys(("session_id", "ip", "request_id", "trace_id")) | {"user_agent": ""}
        db.session.execute(update(events_table).where(_columns.id == stored.id).values(nothing))
    logged = {"user_id": user_id} | happened | {"actor_id": actor_id}
    db.session.info.setdefault(_UNCOMMITTED, []).append(logged)
    return int(stored.id)


def amend(event_id: int, **details: str | int) -> None:
    """Replace the details of an event that an earlier transaction has stored."""
    db.session.execute(update(events_table).where(_columns.id == event_id).values(details=details))


def lock_actor(origin: Origin) -> None:
    """Keep the acting user, if any, from being changed or deleted until the transaction ends.

    For an act that locks anything else before it records its event, which locks the actor too.
    """
    if origin.actor_id is not None:
        db.session.execute(select(_existing_user("actor")), {"actor": origin.actor_id})


def refuse(error: ServiceError, kind: Kind, origin: Origin, **about: Any) -> NoReturn:
    """Record a refusal as `record` does, commit the transaction, and raise `error`."""
    record(kind, origin, **about)
    db.session.commit()
    raise error


@event.listens_for(db.session, "after_commit")
def _log_committed(session: DatabaseSession) -> None:
    for happened in session.info.pop(_UNCOMMITTED, ()):
        fields = {key: value for key, value in happened.items() if value is not None}
        kind, details = fields.pop("kind"), fields.pop("details")
        write = log.warning if kind == Kind.REFRESH_REUSED else log.info
        write(kind, **fields, **details)
        metrics.of(current_app).event(kind, str(details.get("why", "")))


@event.listens_for(db.session, "after_rollback")
def _discard_rolled_back(session: DatabaseSession) -> None:
    session.info.pop(_UNCOMMITTED, None)


def of_user(
    user_id: int, limit: int, before: tuple[datetime, int] | None = None
) -> Sequence[Row[Any]]:
    """Return at most `limit` events of a user, newest first.

    `before` is the created_at and id of an event: only older events are returned.
    """
    if before is None:
        return database.fetch_all(_NEWEST, user_id=user_id, limit=limit)
    created_at, event_id = before
    return database.fetch_all(
        _NEWEST_BEFORE, user_id=user_id, limit=limit, created_at=created_at, event_id=event_id
    )


def delete_expired() -> int:
    """Delete a batch of events older than EVENTS_DAYS; return how many, 0 at the end."""
    oldest = clock.utcnow() - timedelta(days=current_app.config["EVENTS_DAYS"])
    return database.delete_batch(events_table, _columns.created_at < oldest, _columns.created_at)


def anonymize(user_id: int) -> None:
    """Remove what identifies a user from their events; this transaction deletes the user.

    The user's id is removed, and with it the session, address, client and request that were
    theirs. Where another user acted on them, the origin of that user stays.

    The row lock waits for transactions that have recorded an event for this user. A transaction
    that records one later waits for this one and then finds no user (`record`).
    """
    row = select(users_table.c.id).where(users_table.c.id == user_id)
    db.session.execute(row.with_for_update())
    by_another = and_(_columns.actor_id.is_not(None), _columns.actor_id != user_id)
    values = {
        "user_id": func.nullif(_columns.user_id, user_id),
        "actor_id": func.nullif(_columns.actor_id, user_id),
        "session_id": case((_columns.user_id != user_id, _columns.session_id)),
        "ip": case((by_another, _columns.ip)),
        "user_agent": case((by_another, _columns.user_agent), else_=""),
        "request_id": case((by_another, _columns.request_id)),
        "trace_id": case((by_another, _columns.trace_id)),
    }
    order = _columns.created_at, _columns.id
    named = [
        select(_columns.id).where(column == user_id).order_by(*order).limit(ANONYMIZED_AT_ONCE)
        for column in (_columns.user_id, _columns.actor_id)
    ]
    ids = union(*(select(query.subquery().c.id) for query in named))
    # In the same order in every transaction: two deletions may have events in common. In batches,
    # because one statement may take postgresql.ANSWER_TIMEOUT at most.
    batch = select(_columns.id).where(_columns.id.in_(ids)).order_by(*order)
    locked = batch.limit(ANONYMIZED_AT_ONCE).with_for_update()
    while database.write(update(events_table).where(_columns.id.in_(locked)).values(values)):
        pass
