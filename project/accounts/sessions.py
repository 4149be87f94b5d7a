"""Sessions: start one, identify the user of a token, refresh, list, end.

A live session is a row. Every token names its session, so deleting the row invalidates the tokens
on every server, from the next request on.
Functions here write and may flush. The caller commits; a refusal commits its own event.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from flask import current_app
from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    and_,
    bindparam,
    case,
    delete,
    insert,
    literal,
    or_,
    select,
    update,
)

from project import clock, errors, ids
from project.accounts import (
    audit,
    directory,
    ended_sessions,
    mails,
    rate_limits,
    second_factor,
)
from project.accounts.second_factor import Method
from project.extensions import db
from project.lib import database
from project.models import sessions_table, users_table
from project.tokens import auth_tokens, codec, keys

MAX_LISTED = 1_000

_users = users_table.c
_sessions = sessions_table.c
_NOW = bindparam("now", type_=_sessions.expires_at.type)
_IS_LIVE = _sessions.expires_at > _NOW
# Of a user with a second factor; servers of a version that knows none start others.
_HAS_GIVEN_CODE = or_(~_users.mfa_enabled, _sessions.amr != [Method.PASSWORD])
# For a query about users: whether `delete_expired` would find sessions of theirs at `now`.
HAS_EXPIRED = (
    select(_sessions.id)
    .where(_sessions.user_id == _users.id, _sessions.expires_at <= _NOW)
    .exists()
)


def _with_user(*columns: Any) -> Select[Any]:
    """Return a query for a user and a session: one row, or none when there is no such user.

    Its `session_id` is NULL unless the session is live and belongs to the user. That is no
    condition of the join, for which PostgreSQL might read all sessions of the user.
    """
    is_theirs = and_(_sessions.user_id == _users.id, _IS_LIVE, _HAS_GIVEN_CODE)
    return (
        select(*columns, case((is_theirs, _sessions.id)).label("session_id"))
        .select_from(users_table.outerjoin(sessions_table, _sessions.id == bindparam("session_id")))
        .where(_users.id == bindparam("user_id"))
    )


_CALLER = _with_user(
    _users.id,
    _users.username,
    _users.email,
    _users.active,
    _users.admin,
    _users.roles,
    _users.email_verified,
    _users.mfa_enabled,
    _users.created_at,
)
_SESSION = _with_user(
    _users.active,
    _users.email,
    _users.username,
    _users.admin,
    _users.roles,
    _users.mfa_enabled,
    *_sessions,
)
_OWNER = select(_users.admin, _users.roles, _users.mfa_enabled).where(
    _users.id == bindparam("user_id")
)
_TOKEN_END = bindparam("token_end", type_=_sessions.token_expires_at.type)
_NEW_SESSION = {
    _sessions.id: bindparam("id", type_=_sessions.id.type),
    _sessions.user_id: _users.id,
    _sessions.generation: literal(0),
    _sessions.created_at: _NOW,
    _sessions.last_used_at: _NOW,
    _sessions.ip: bindparam("ip", type_=_sessions.ip.type),
    _sessions.user_agent: bindparam("user_agent", type_=_sessions.user_agent.type),
    _sessions.expires_at: bindparam("expires_at", type_=_sessions.expires_at.type),
    _sessions.token_expires_at: _TOKEN_END,
    _sessions.amr: bindparam("amr", type_=_sessions.amr.type),
    _sessions.code_given_at: bindparam("code_given_at", type_=_sessions.code_given_at.type),
}
# FOR SHARE: no other transaction deactivates the user, changes the password or turns a second
# factor on before the commit.
_START = (
    insert(sessions_table)
    .from_select(
        list(_NEW_SESSION),
        select(*_NEW_SESSION.values())
        .where(
            _users.id == bindparam("user_id"),
            _users.email == bindparam("email"),
            _users.active,
            _users.password == bindparam("password_hash"),
            _users.mfa_enabled == bindparam("mfa_enabled"),
        )
        .with_for_update(read=True),
    )
    .returning(*_sessions)
    .execution_options(prepare=True)
)
_ROTATE = (
    update(sessions_table)
    # An earlier auth token expires last if TOKEN_EXPIRATION_SECONDS was lowered in the meantime.
    .values(
        token_expires_at=case(
            (_sessions.token_expires_at > _TOKEN_END, _sessions.token_expires_at), else_=_TOKEN_END
        )
    )
    .where(
        _sessions.id == bindparam("session_id"),
        _sessions.user_id == bindparam("owner_id"),
        _sessions.generation == bindparam("presented"),
        _IS_LIVE,
        select(_users.id)
        .where(_users.id == _sessions.user_id, _users.active, _HAS_GIVEN_CODE)
        .exists(),
    )
    .returning(*_sessions)
)
_NOT_LISTED = {"user_id", "generation", "token_expires_at", "code_given_at"}
_LISTED = (
    select(*(column for column in _sessions if column.name not in _NOT_LISTED))
    .where(_sessions.user_id == bindparam("user_id"), _IS_LIVE)
    .order_by(_sessions.created_at.desc(), _sessions.id.desc())
    .limit(MAX_LISTED)
)


class TokenPair(NamedTuple):
    """The tokens of a session, as a login or a refresh returns them."""

    auth_token: str
    refresh_token: str
    expires_in: int  # seconds until `auth_token` expires
    refresh_expires_in: int  # seconds until `refresh_token` expires


class AccountChanged(Exception):
    """The account is not what it was when its password was verified."""


def start(
    user_id: int,
    email: str,
    password_hash: str,
    origin: audit.Origin,
    kind: audit.Kind,
    method: Method | None = None,
) -> TokenPair:
    """Return the tokens of a new session of a user whose password has been verified.

    `kind` is the event to record, and `method` the kind of the code, if the user has sent one.
    Raise AccountChanged when the user has been deleted or deactivated in the meantime, or has
    another email or hash, or has turned a second factor on, or off after they sent a code.
    """
    now = clock.utcnow()
    amr = [Method.PASSWORD, method] if method else [Method.PASSWORD]
    started = db.session.execute(
        _START,
        {
            "id": ids.new_session(),
            "user_id": user_id,
            "email": email,
            "password_hash": password_hash,
            "now": now,
            "ip": origin.ip,
            "user_agent": origin.user_agent,
            "amr": amr,
            "mfa_enabled": method is not None,
            "code_given_at": now if method else None,
            **_expiries(now, now),
        },
    ).one_or_none()
    if started is None:
        raise AccountChanged
    details = {"amr": " ".join(amr)} if method else {}
    audit.record(kind, origin, user_id=user_id, session_id=started.id, **details)
    return _token_pair(started, now)


def _expiries(now: datetime, logged_in_at: datetime) -> dict[str, datetime]:
    """Return when a session that is used `now` expires, and when its auth token expires."""
    config = current_app.config
    lifetime = keys.auth_token_lifetime()
    end = logged_in_at + timedelta(seconds=config["SESSION_EXPIRATION_SECONDS"])
    idle = max(lifetime, config["REFRESH_EXPIRATION_SECONDS"])
    return {
        "expires_at": min(now + timedelta(seconds=idle), end),
        "token_end": min(now + timedelta(seconds=lifetime), end),
    }


def _token_pair(session: Row[Any], now: datetime) -> TokenPair:
    """Return the current tokens of `session`.

    Every call for the same row returns tokens with the same claims, unless the roles have changed,
    or the session has given a code.
    """
    issued_at, end = int(session.last_used_at.timestamp()), int(session.expires_at.timestamp())
    logged_in_at = int(session.created_at.timestamp())
    access = codec.AccessClaims(
        session.user_id, session.id, issued_at, min(issued_at + keys.auth_token_lifetime(), end)
    )
    refresh = codec.RefreshClaims(
        session.user_id,
        session.id,
        session.generation,
        logged_in_at,
        issued_at,
        min(issued_at + current_app.config["REFRESH_EXPIRATION_SECONDS"], end),
    )
    roles = _roles(session.user_id) if keys.issuer() else None
    return TokenPair(
        auth_tokens.encode(access, session.generation, logged_in_at, session.amr, roles),
        codec.encode_refresh(refresh, key=keys.signing_key()),
        max(0, access.expires_at - int(now.timestamp())),
        max(0, refresh.expires_at - int(now.timestamp())),
    )


def _roles(user_id: int) -> list[str] | None:
    """Return the roles of a user, for a token; None if other services may not accept one.

    Raise TokenOfInactive if the user was deleted.
    """
    user = db.session.execute(_OWNER, {"user_id": user_id}).one_or_none()
    if user is None:
        raise errors.TokenOfInactive
    return None if second_factor.must_enrol(user) else directory.roles_of(user)


def identify(auth_token: str) -> Row[Any]:
    """Return the active user to whose live session the token belongs, in one query.

    The row has the columns of a user except for the password, and `session_id`. Raise
    TokenInvalid or TokenExpired for the token; TokenOfInactive when the user is deactivated or
    deleted; SessionEnded.
    """
    claims = auth_tokens.decode(auth_token)
    if claims.session_id is None:
        raise errors.TokenInvalid
    user = database.fetch_one(
        _CALLER, user_id=claims.user_id, session_id=claims.session_id, now=clock.utcnow()
    )
    return _checked(user)


def find_live(user_id: int, session_id: str) -> Row[Any]:
    """Return a live session with name and roles of its active user, in one query.

    Raise TokenOfInactive or SessionEnded.
    """
    about = {"user_id": user_id, "session_id": session_id, "now": clock.utcnow()}
    return _checked(database.fetch_one(_SESSION, **about))


def _checked(row: Row[Any] | None) -> Row[Any]:
    """Return a row of `_with_user` if its user is active and its session is live."""
    if row is None or not row.active:
        raise errors.TokenOfInactive
    if row.session_id is None:
        raise errors.SessionEnded
    return row


def refresh(refresh_token: str, origin: audit.Origin) -> TokenPair:
    """Return the next token pair of a session; each refresh token is used once.

    There are three outcomes for a valid token of a live session:

    - rotated: the token is the current one. The session's generation is raised, once for any
      number of concurrent requests with this token.
    - repeated: the token is the one before, which was used in the last REFRESH_REUSE_SECONDS:
      a response was lost, or two tabs refreshed. The request gets the same pair as the one that
      rotated the session.
    - reused: any other token. The session is ended and RefreshReused is raised, because an
      attacker may have the token (RFC 9700, 4.14.2).

    Raise TokenInvalid or TokenExpired for the token (`codec.decode_refresh` decides), and
    TokenOfInactive, SessionEnded and TooManyAttempts. Forged tokens count as failures of the
    address, and so do those whose session is not live. A token of a live session never does, so it
    is not refused because of other clients at the address.
    """
    now = clock.utcnow()
    try:
        claims = codec.decode_refresh(refresh_token, keys=keys.verification_keys(), now=now)
    except errors.TokenInvalid:
        rate_limits.limits().refresh(origin.ip)
        raise
    rotated = _rotate(claims, now, origin)
    session = rotated or _repeated_or_refuse(claims, now, origin)
    # A client that repeats its refresh from the same address does not fill the audit log.
    if rotated or origin.ip != session.ip:
        audit.record(
            audit.Kind.REFRESHED,
            origin,
            user_id=session.user_id,
            session_id=session.id,
            repeated=not rotated,
        )
    return _token_pair(session, now)


def _rotate(claims: codec.RefreshClaims, now: datetime, origin: audit.Origin) -> Row[Any] | None:
    """Raise the generation of a session; return the session, or None if the token is not current.

    One conditional UPDATE decides between concurrent requests.
    """
    logged_in_at = datetime.fromtimestamp(claims.logged_in_at, UTC)
    conditions = {
        "session_id": claims.session_id,
        "owner_id": claims.user_id,
        "presented": claims.generation,
        "now": now,
    }
    values = {
        "generation": claims.generation + 1,
        "last_used_at": now,
        "ip": origin.ip,
        "user_agent": origin.user_agent,
        **_expiries(now, logged_in_at),
    }
    return db.session.execute(_ROTATE, conditions | values).one_or_none()


def _repeated_or_refuse(
    claims: codec.RefreshClaims, now: datetime, origin: audit.Origin
) -> Row[Any]:
    """Return the session that this token rotated just now; otherwise refuse the token."""
    about: dict[str, Any] = {"user_id": claims.user_id, "session_id": claims.session_id}
    row = db.session.execute(_SESSION, about | {"now": now}).one_or_none()
    try:
        session = _checked(row)
    except errors.ServiceError as error:
        if row is None:
            about = {"user_id": None, "session_id": None}
        db.session.rollback()  # give the connection back: the count takes another one
        rate_limits.limits().refresh(origin.ip)
        audit.refuse(error, audit.Kind.REFRESH_REFUSED, origin, **about, why=error.code)
    if not is_repeated(session, claims.generation, now):
        ended = _end(claims.user_id, claims.session_id)
        audit.record(audit.Kind.REFRESH_REUSED, origin, **about)
        if ended:  # by this request and not by another one with the same token
            kind = mails.Kind.REFRESH_REUSED
            mails.notify(kind, session.email, origin, user_id=claims.user_id)
        db.session.commit()
        raise errors.RefreshReused
    return session


def is_repeated(session: Row[Any], generation: int, now: datetime) -> bool:
    """Return whether the refresh token of this generation was replaced just now."""
    interval = timedelta(seconds=current_app.config["REFRESH_REUSE_SECONDS"])
    return bool(session.generation == generation + 1 and now - session.last_used_at <= interval)


def lock_user(user_id: int) -> None:
    """Keep other transactions from changing a user and from starting or ending their sessions.

    A transaction locks the user, then locks or ends sessions, and updates the user at last. A
    refresh locks its session before it records an event for the user. The event does not wait for
    this lock, but for an UPDATE that follows a change of a name.
    """
    user = select(_users.id).where(_users.id == user_id)
    db.session.execute(user.with_for_update(key_share=True))


def lock(user_id: int, session_id: str) -> None:
    """Keep other transactions from ending a live session until this one is over.

    Raise SessionEnded if it has been ended. For acts that take long between the guard and the
    commit, and must not happen for a session that was ended meanwhile.
    """
    session = select(_sessions.id).where(_is_live(user_id, session_id))
    if db.session.execute(session.with_for_update(read=True)).one_or_none() is None:
        raise errors.SessionEnded


def _is_live(user_id: int, session_id: str) -> ColumnElement[bool]:
    """Return the condition for a session of this id that is live and belongs to this user."""
    return and_(
        _sessions.id == session_id,
        _sessions.user_id == user_id,
        _sessions.expires_at > clock.utcnow(),
    )


def step_up(caller: Row[Any], method: Method, origin: audit.Origin) -> None:
    """Store that a session has given a code of this kind; its tokens say so from a refresh on.

    `caller` is as `identify` returned them, and their session is locked.
    """
    this_one = _sessions.id == caller.session_id
    amr = db.session.scalars(select(_sessions.amr).where(this_one)).one()
    amr = amr if method in amr else [*amr, method]
    given = {"amr": amr, "code_given_at": clock.utcnow()}
    database.write(update(sessions_table).where(this_one).values(given))
    about = {"user_id": caller.id, "session_id": caller.session_id}
    audit.record(audit.Kind.CODE_GIVEN, origin, **about, method=method.value)


def live(user_id: int) -> Sequence[Row[Any]]:
    """Return the live sessions of a user, newest first, at most MAX_LISTED of them."""
    return database.fetch_all(_LISTED, user_id=user_id, now=clock.utcnow())


def end(user_id: int, session_id: str, origin: audit.Origin) -> None:
    """End a live session of this user; raise SessionNotFound if there is none with this id."""
    if not _end(user_id, session_id):
        raise errors.SessionNotFound
    audit.record(audit.Kind.SESSION_ENDED, origin, user_id=user_id, session_id=session_id)


def revoke(user_id: int, session_id: str, client: str, origin: audit.Origin) -> None:
    """End a session, if it is live, for another service."""
    if _end(user_id, session_id):
        kind = audit.Kind.SESSION_REVOKED
        audit.record(kind, origin, user_id=user_id, session_id=session_id, client=client)


def _end(user_id: int, session_id: str) -> int:
    return _delete(_is_live(user_id, session_id))


def _delete(condition: ColumnElement[bool]) -> int:
    """End the sessions that match, and return how many; other services read of them in the feed."""
    statement = delete(sessions_table).where(condition)
    if not keys.issuer():
        return database.write(statement)
    columns = _sessions.id, _sessions.token_expires_at, _sessions.expires_at
    ended = db.session.execute(statement.returning(*columns)).all()
    ended_sessions.add(ended)
    return len(ended)


def end_all(user_id: int, *, but: str | None = None) -> int:
    """End the sessions of a user, all or all but one, and return how many."""
    # A concurrent login waits for this lock (`_START`), and so it starts its session afterwards.
    lock_user(user_id)
    theirs = _sessions.user_id == user_id
    return _delete(theirs if but is None else and_(theirs, _sessions.id != but))


def log_out(
    user_id: int, session_id: str, scope: Literal["others", "all"] | None, origin: audit.Origin
) -> None:
    """End this session of the user, or all other sessions, or all sessions."""
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
    """Delete a batch of expired sessions, of one user or of all; return how many, 0 at the end."""
    expired = _sessions.expires_at <= clock.utcnow()
    if user_id is not None:
        expired = and_(expired, _sessions.user_id == user_id)
    return database.delete_batch(sessions_table, expired, _sessions.expires_at)
