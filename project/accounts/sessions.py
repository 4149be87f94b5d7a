"""Sessions: start one, say whose a token is, refresh, list, end.

A session is a row while it lives. A token names its session, so whatever deletes the row ends the
token, everywhere and at the next request.
Functions here write and may flush; the caller commits, but for what goes with a refusal.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, cast

from flask import current_app
from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Table,
    and_,
    bindparam,
    case,
    delete,
    insert,
    literal,
    select,
    update,
)

from project import audit, clock, database, identifiers, ratelimit, tokens
from project.api.models import Session, User, token_keys, token_lifetime
from project.errors import (
    RefreshReused,
    ServiceError,
    SessionEnded,
    SessionNotFound,
    TokenInvalid,
    TokenOfInactive,
)
from project.extensions import db

# A refresh token that comes a second time so soon is a lost answer or another tab, not a theft.
REUSE_INTERVAL = timedelta(seconds=10)
MAX_LISTED = 1_000
DELETED_AT_ONCE = 1_000

_users = cast(Table, User.__table__)
_sessions = cast(Table, Session.__table__)

_NOW = bindparam("now", type_=_sessions.c.expires_at.type)
_LIVES = _sessions.c.expires_at > _NOW
# For a query about users: whether `delete_expired` would find something of theirs at `now`.
HAS_EXPIRED = (
    select(_sessions.c.id)
    .where(_sessions.c.user_id == _users.c.id, _sessions.c.expires_at <= _NOW)
    .exists()
)


def _with_user(*columns: Any) -> Select[Any]:
    """Return a query for a user and a session: one row, or none when there is no such user.

    `session_id` in it is NULL unless the session lives and is theirs. That is no condition of the
    join: PostgreSQL might look through all sessions of the user for it instead of finding the one.
    """
    is_theirs = and_(_sessions.c.user_id == _users.c.id, _LIVES)
    return (
        select(*columns, case((is_theirs, _sessions.c.id)).label("session_id"))
        .select_from(_users.outerjoin(_sessions, _sessions.c.id == bindparam("session_id")))
        .where(_users.c.id == bindparam("user_id"))
    )


_CALLER = _with_user(
    _users.c.id,
    _users.c.username,
    _users.c.email,
    _users.c.active,
    _users.c.admin,
    _users.c.created_at,
)
_REFRESHED = _with_user(_users.c.active, *_sessions.c)
_STARTED = {
    _sessions.c.id: bindparam("id", type_=_sessions.c.id.type),
    _sessions.c.user_id: _users.c.id,
    _sessions.c.generation: literal(0),
    _sessions.c.created_at: _NOW,
    _sessions.c.last_used_at: _NOW,
    _sessions.c.ip: bindparam("ip", type_=_sessions.c.ip.type),
    _sessions.c.user_agent: bindparam("user_agent", type_=_sessions.c.user_agent.type),
    _sessions.c.expires_at: bindparam("expires_at", type_=_sessions.c.expires_at.type),
}
# Nobody can be deactivated, or have another password, while this runs: the row is locked.
_START = (
    insert(_sessions)
    .from_select(
        list(_STARTED),
        select(*_STARTED.values())
        .where(
            _users.c.id == bindparam("user_id"),
            _users.c.email == bindparam("email"),
            _users.c.active,
            _users.c.password == bindparam("password_hash"),
        )
        .with_for_update(read=True),
    )
    .returning(*_sessions.c)
)
_ROTATE = (
    update(_sessions)
    .where(
        _sessions.c.id == bindparam("session_id"),
        _sessions.c.user_id == bindparam("owner_id"),
        _sessions.c.generation == bindparam("presented"),
        _LIVES,
        select(_users.c.id).where(_users.c.id == _sessions.c.user_id, _users.c.active).exists(),
    )
    .returning(*_sessions.c)
)
_LISTED = (
    select(*(column for column in _sessions.c if column.name not in {"user_id", "generation"}))
    .where(_sessions.c.user_id == bindparam("user_id"), _LIVES)
    .order_by(_sessions.c.created_at.desc(), _sessions.c.id.desc())
    .limit(MAX_LISTED)
)


class Pair(NamedTuple):
    """What a client gets: the token for every request, and the one for the next pair."""

    auth_token: str
    refresh_token: str
    expires_in: int  # seconds of life that `auth_token` has left


class UserChanged(Exception):
    """The user is not what they were when their password was verified."""


def start(
    user_id: int, email: str, password_hash: str, origin: audit.Origin, kind: audit.Kind
) -> Pair:
    """Return the tokens of a new session of a user whose password has just been verified.

    `kind` is what the audit trail calls it. Raises UserChanged when they are gone or deactivated
    meanwhile, or have another email or hash.
    """
    now = clock.utcnow()
    started = db.session.execute(
        _START,
        {
            "id": identifiers.new_session(),
            "user_id": user_id,
            "email": email,
            "password_hash": password_hash,
            "now": now,
            "expires_at": _expiry(now, now),
            "ip": origin.ip,
            "user_agent": origin.user_agent,
        },
    ).one_or_none()
    if started is None:
        raise UserChanged
    audit.record(kind, origin, user_id=user_id, session_id=started.id)
    return _pair(started, now)


def _expiry(now: datetime, logged_in_at: datetime) -> datetime:
    """Return until when a session that is used `now` lives."""
    config = current_app.config
    idle = max(token_lifetime(), config["REFRESH_EXPIRATION_SECONDS"])
    return min(
        now + timedelta(seconds=idle),
        logged_in_at + timedelta(seconds=config["SESSION_EXPIRATION_SECONDS"]),
    )


def _pair(session: Row[Any], now: datetime) -> Pair:
    """Return the present tokens of `session`: the same ones as often as they are asked for."""
    config = current_app.config
    issued_at, end = int(session.last_used_at.timestamp()), int(session.expires_at.timestamp())
    access = tokens.Access(
        session.user_id, session.id, issued_at, min(issued_at + token_lifetime(), end)
    )
    refresh = tokens.Refresh(
        session.user_id,
        session.id,
        session.generation,
        int(session.created_at.timestamp()),
        issued_at,
        min(issued_at + config["REFRESH_EXPIRATION_SECONDS"], end),
    )
    return Pair(
        tokens.encode_access(access, key=config["SECRET_KEY"]),
        tokens.encode_refresh(refresh, key=config["SECRET_KEY"]),
        max(0, access.expires_at - int(now.timestamp())),
    )


def identify(auth_token: str) -> Row[Any]:
    """Return the active user whose live session the token belongs to, in one query.

    With `session_id` beside what the table of users has, but for the password. Raises
    TokenInvalid or TokenExpired for the token itself, TokenOfInactive for its user, SessionEnded.
    """
    now = clock.utcnow()
    claims = tokens.decode_access(auth_token, keys=token_keys(), now=now)
    if claims.session_id is None:
        raise TokenInvalid
    user = database.fetch_one(
        _CALLER, user_id=claims.user_id, session_id=claims.session_id, now=now
    )
    return _checked(user)


def _checked(row: Row[Any] | None) -> Row[Any]:
    """Return a row of `_with_user` if there is an active user, and a session in it."""
    if row is None or not row.active:
        raise TokenOfInactive
    if row.session_id is None:
        raise SessionEnded
    return row


def refresh(refresh_token: str, origin: audit.Origin) -> Pair:
    """Return the next pair of tokens of a session; the refresh token that came is used up.

    Of any number that come at once with the same token one rotates the session, and all get the
    same pair; so does whoever comes again within REUSE_INTERVAL. After that it is a theft: the
    session is ended and RefreshReused raised (RFC 9700, 4.14.2). Otherwise raises as `identify`.
    """
    attempt = ratelimit.limits().refresh(origin.ip)
    now = clock.utcnow()
    claims = tokens.decode_refresh(refresh_token, keys=token_keys(), now=now)
    logged_in_at = datetime.fromtimestamp(claims.logged_in_at, UTC)
    session = db.session.execute(
        _ROTATE,
        {
            "session_id": claims.session_id,
            "owner_id": claims.user_id,
            "presented": claims.generation,
            "now": now,
            # The columns that change:
            "generation": claims.generation + 1,
            "last_used_at": now,
            "expires_at": _expiry(now, logged_in_at),
            "ip": origin.ip,
            "user_agent": origin.user_agent,
        },
    ).one_or_none()
    repeated = session is None
    session = session or _rotated_already(claims, now, origin)
    attempt.succeed()
    # Whoever repeats theirs from where they are could otherwise fill the audit trail.
    if not repeated or origin.ip != session.ip:
        audit.record(
            audit.Kind.REFRESHED,
            origin,
            user_id=session.user_id,
            session_id=session.id,
            repeated=repeated,
        )
    return _pair(session, now)


def _rotated_already(claims: tokens.Refresh, now: datetime, origin: audit.Origin) -> Row[Any]:
    """Return the session that this very token has rotated a moment ago."""
    about: dict[str, Any] = {"user_id": claims.user_id, "session_id": claims.session_id}
    row = db.session.execute(_REFRESHED, about | {"now": now}).one_or_none()
    try:
        session = _checked(row)
    except ServiceError as error:
        if row is None:
            about = {"user_id": None, "session_id": None}
        audit.refuse(error, audit.Kind.REFRESH_REFUSED, origin, **about, why=error.code)
    used_just_now = now - session.last_used_at <= REUSE_INTERVAL
    if session.generation != claims.generation + 1 or not used_just_now:
        _end(claims.user_id, claims.session_id)
        audit.refuse(RefreshReused(), audit.Kind.REFRESH_REUSED, origin, **about)
    return session


def hold(user_id: int, session_id: str) -> None:
    """Let nobody end a live session before this transaction is over; raises SessionEnded.

    For what takes long in the name of a session, and must not happen once somebody has ended it.
    """
    session = select(_sessions.c.id).where(_is_live(user_id, session_id))
    if db.session.execute(session.with_for_update(read=True)).one_or_none() is None:
        raise SessionEnded


def _is_live(user_id: int, session_id: str) -> ColumnElement[bool]:
    """Return the condition for the session of this id that lives and is this user's."""
    return and_(
        _sessions.c.id == session_id,
        _sessions.c.user_id == user_id,
        _sessions.c.expires_at > clock.utcnow(),
    )


def live(user_id: int) -> Sequence[Row[Any]]:
    """Return the live sessions of a user, the newest first, at most MAX_LISTED of them."""
    return database.fetch_all(_LISTED, user_id=user_id, now=clock.utcnow())


def end(user_id: int, session_id: str, origin: audit.Origin) -> None:
    """End a live session of this user; raises SessionNotFound when there is none of that id."""
    if not _end(user_id, session_id):
        raise SessionNotFound
    audit.record(audit.Kind.SESSION_ENDED, origin, user_id=user_id, session_id=session_id)


def _end(user_id: int, session_id: str) -> int:
    return database.write(delete(_sessions).where(_is_live(user_id, session_id)))


def end_all(user_id: int, *, but: str | None = None) -> int:
    """End the sessions of a user, all or all but one, and return how many."""
    # Logins wait for this lock (`_START`): what has not begun when they are ended begins later.
    db.session.execute(
        select(_users.c.id).where(_users.c.id == user_id).with_for_update(key_share=True)
    )
    statement = delete(_sessions).where(_sessions.c.user_id == user_id)
    if but is not None:
        statement = statement.where(_sessions.c.id != but)
    return database.write(statement)


def log_out(
    user_id: int, session_id: str, scope: Literal["others", "all"] | None, origin: audit.Origin
) -> None:
    """End this session of the user, or all others, or all."""
    if scope is None:
        ended = _end(user_id, session_id)
    else:
        ended = end_all(user_id, but=session_id if scope == "others" else None)
    audit.record(
        audit.Kind.LOGGED_OUT,
        origin,
        user_id=user_id,
        session_id=session_id,
        scope=scope or "this",
        sessions=ended,
    )


def delete_expired(user_id: int | None = None) -> int:
    """Delete sessions whose time is over, of one user or of all; return how many, 0 at the end.

    At most DELETED_AT_ONCE, so that nobody holds many rows for long. Rows that somebody else is
    deleting are left to them: nobody waits, so nobody deadlocks.
    """
    expired = select(_sessions.c.id).where(_sessions.c.expires_at <= clock.utcnow())
    if user_id is not None:
        expired = expired.where(_sessions.c.user_id == user_id)
    # In the order of an index, or PostgreSQL might read the whole table for the last of them.
    expired = (
        expired.order_by(_sessions.c.expires_at)
        .limit(DELETED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    return database.write(delete(_sessions).where(_sessions.c.id.in_(expired)))
