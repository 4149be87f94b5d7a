"""Accounts: register, add, log in, change the password, deactivate, find, list, search.

Functions here write and may flush; the caller commits, but for what goes with a refusal.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal, NoReturn

from sqlalchemy import (
    Row,
    Select,
    SQLColumnExpression,
    bindparam,
    false,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError

from project import audit, clock, database, passwords, ratelimit, sessions
from project.api.models import User, username_key
from project.errors import (
    AccountInactive,
    Busy,
    EmailExists,
    InvalidCredentials,
    InvalidPayload,
    ServiceError,
    TokenOfInactive,
    UserExists,
    UserNotFound,
    WrongPassword,
)
from project.extensions import db

_TAKEN = "is taken"
# How often a password is checked against an account that changes under the check.
_ATTEMPTS = 3
_CREDENTIALS = select(
    User.id, User.password, User.active, sessions.HAS_EXPIRED.label("has_expired_sessions")
).where(User.email == bindparam("email"))
_PASSWORD = select(User.password).where(User.id == bindparam("user_id"), User.active)
_BY_EMAIL = select(User.id).where(User.email == bindparam("email"))
# By whether `active` and `admin` are shown too.
_PUBLIC: list[Any] = [User.id, User.username, User.email, User.created_at]
_FULL = [*_PUBLIC, User.active, User.admin]
_SHOWN: dict[bool, Select[Any]] = {False: select(*_PUBLIC), True: select(*_FULL)}
_BY_ID = {full: shown.where(User.id == bindparam("user_id")) for full, shown in _SHOWN.items()}
_NEWEST = {
    full: shown.order_by(User.created_at.desc(), User.id.desc()).limit(bindparam("limit"))
    for full, shown in _SHOWN.items()
}
_AFTER = tuple_(User.created_at, User.id) < tuple_(
    bindparam("created_at", type_=User.created_at.type), bindparam("user_id")
)
_NEWEST_AFTER = {full: newest.where(_AFTER) for full, newest in _NEWEST.items()}

# A place in the order of all names, those of users and their emails: the name, and whether it is
# an email. They are ordered by code points, in both databases as in Python.
Place = tuple[str, bool]


def _names(name: SQLColumnExpression[str], is_email: SQLColumnExpression[bool]) -> Select[Any]:
    entries = _SHOWN[True].add_columns(
        User.username_key, name.label("name"), is_email.label("is_email")
    )
    start = name >= bindparam("start")
    return select(entries.where(start).order_by(name).limit(bindparam("limit")).subquery())


_NAMES = (
    union_all(_names(User.username_key, false()), _names(User.email, true()))
    .order_by("name", "is_email")
    .limit(bindparam("limit"))
)


def register(username: str, email: str, password: str, origin: audit.Origin) -> sessions.Pair:
    """Add the user who registers, and return the tokens of their first session.

    Raises InvalidPayload for a weak password, TooManyAttempts, UserExists when somebody has the
    name or the email.
    """
    passwords.check_new(password, username, email)
    ratelimit.limits().registration(origin.ip)
    try:
        user = _insert(
            username,
            email,
            password,
            username_taken=UserExists(errors={"username": _TAKEN}),
            email_taken=UserExists(errors={"email": _TAKEN}),
        )
    except UserExists as error:
        db.session.rollback()
        why = f"{next(iter(error.errors or {}))}_taken"
        audit.refuse(error, audit.Kind.REGISTRATION_REFUSED, origin, user_id=None, why=why)
    pair = sessions.start(user.id, user.email, user.password, origin, audit.Kind.REGISTERED)
    ratelimit.limits().remember(user.email, origin.ip)
    return pair


def add(
    username: str, email: str, password: str, origin: audit.Origin, *, admin: bool = False
) -> User:
    """Return the new user whom somebody else added.

    Raises EmailExists, or InvalidPayload when the username is taken or the password is weak.
    """
    passwords.check_new(password, username, email)
    user = _insert(
        username,
        email,
        password,
        admin=admin,
        username_taken=InvalidPayload(errors={"username": _TAKEN}),
        email_taken=EmailExists(errors={"email": _TAKEN}),
    )
    audit.record(audit.Kind.USER_ADDED, origin, user_id=user.id, admin=admin)
    return user


def _insert(
    username: str,
    email: str,
    password: str,
    *,
    admin: bool = False,
    username_taken: ServiceError,
    email_taken: ServiceError,
) -> User:
    user = User(username=username, email=email, password=password, admin=admin)
    db.session.add(user)
    try:
        db.session.flush()
    except IntegrityError as error:
        raise {"username": username_taken, "email": email_taken}[taken(error)] from None
    return user


def taken(error: IntegrityError) -> Literal["username", "email"]:
    """Return what somebody else has already; raises `error` when it is about anything else."""
    diagnostics = getattr(error.orig, "diag", None)
    # A text that names the constraint on PostgreSQL, the column on SQLite, and no value.
    violated = str(diagnostics.constraint_name if diagnostics else error.orig)
    if "username_key" in violated:
        return "username"
    if "email" in violated:
        return "email"
    raise error


def log_in(email: str, password: str, origin: audit.Origin) -> sessions.Pair:
    """Return the tokens of a new session of the active user with these credentials.

    Raises InvalidCredentials for an unknown email and for a wrong password, after the same work;
    AccountInactive when both are right and the user is deactivated; TooManyAttempts. The hash is
    renewed when the configured cost has risen since it was made; the user's expired sessions are
    deleted.
    """
    attempt = ratelimit.limits().login(email, origin.ip)
    refuse = partial(
        audit.refuse, kind=audit.Kind.LOGIN_REFUSED, origin=origin, pause=attempt.pause
    )
    for _ in range(_ATTEMPTS):
        user = database.fetch_one(_CREDENTIALS, email=email, now=clock.utcnow())
        genuine = passwords.verify(user.password if user else None, password)
        if user is None:
            refuse(InvalidCredentials(), user_id=None, why="unknown_email")
        if not genuine:
            refuse(InvalidCredentials(), user_id=user.id, why="wrong_password")
        if not user.active:
            refuse(AccountInactive(), user_id=user.id, why="account_inactive")
        hashed = user.password
        if passwords.needs_rehash(hashed):
            hashed = passwords.hash(password)
            _replace_password(user.id, user.password, hashed)
        try:
            pair = sessions.start(user.id, email, hashed, origin, audit.Kind.LOGGED_IN)
        except sessions.UserChanged:
            db.session.rollback()
            continue
        if user.has_expired_sessions:
            sessions.delete_expired(user_id=user.id)
        attempt.succeed()
        return pair
    raise Busy(retry_after=1)


def _replace_password(user_id: int, old: str, new: str) -> bool:
    """Store another hash for an active user, and tell whether theirs was still the old one."""
    statement = (
        update(User)
        .where(User.id == user_id, User.password == old, User.active)
        .values(password=new)
    )
    return bool(database.write(statement))


def change_password(
    user: Row[Any], origin: audit.Origin, *, current: str, new: str, keep_sessions: bool
) -> None:
    """Give a user (as `sessions.identify` returned them) a new password.

    Ends all their sessions but this one unless they are to be kept. Raises InvalidPayload when
    `new` is weak; WrongPassword when `current` is not the password they have, which counts as a
    failed login; TooManyAttempts; TokenOfInactive or SessionEnded when they were deactivated or
    this session was ended while the passwords were hashed.
    """
    passwords.check_new(new, user.username, user.email, field="new_password")
    attempt = ratelimit.limits().login(user.email, origin.ip)
    about = {"origin": origin, "user_id": user.id, "session_id": user.session_id}
    refuse = partial(audit.refuse, kind=audit.Kind.PASSWORD_CHANGE_REFUSED, **about)
    hashed = None
    for stored in confirm(user.id, current, attempt, refuse):
        hashed = hashed or passwords.hash(new)
        if _replace_password(user.id, stored, hashed):
            break
    sessions.hold(user.id, user.session_id)
    ended = 0 if keep_sessions else sessions.end_all(user.id, but=user.session_id)
    attempt.succeed()
    audit.record(audit.Kind.PASSWORD_CHANGED, **about, sessions=ended)


def confirm(
    user_id: int, password: str, attempt: ratelimit.Attempt, refuse: Callable[..., NoReturn]
) -> Iterator[str]:
    """Yield the hash against which a user's password was just verified, in no transaction.

    The caller then sees in a transaction whether it is still theirs, and asks for the next one
    when somebody has changed it under the check. Raises TokenOfInactive when the user is gone or
    deactivated, Busy when this has no end; refuses with WrongPassword.
    """
    for _ in range(_ATTEMPTS):
        stored = database.fetch_one(_PASSWORD, user_id=user_id)
        if stored is None:
            raise TokenOfInactive
        if not passwords.verify(stored.password, password):
            refuse(WrongPassword(), why="wrong_password", pause=attempt.pause)
        yield stored.password
        db.session.rollback()
    raise Busy(retry_after=1)


def set_active(email: str, active: bool, origin: audit.Origin) -> None:
    """Deactivate a user, or activate them again; raises UserNotFound.

    Either way their sessions are ended: nothing from before comes back to life.
    """
    statement = update(User).where(User.email == email).values(active=active).returning(User.id)
    user_id = db.session.execute(statement).scalar_one_or_none()
    if user_id is None:
        raise UserNotFound
    kind = audit.Kind.USER_ACTIVATED if active else audit.Kind.USER_DEACTIVATED
    audit.record(kind, origin, user_id=user_id, sessions=sessions.end_all(user_id))


def end_sessions(email: str, origin: audit.Origin) -> int:
    """End all sessions of a user, and return how many; raises UserNotFound."""
    user_id = find_by_email(email)
    ended = sessions.end_all(user_id)
    audit.record(audit.Kind.SESSIONS_ENDED, origin, user_id=user_id, sessions=ended)
    return ended


def find_by_email(email: str) -> int:
    """Return the id of the user with this email; raises UserNotFound."""
    user = database.fetch_one(_BY_EMAIL, email=email)
    if user is None:
        raise UserNotFound
    return int(user.id)


def find(user_id: int, *, full: bool = False) -> Row[Any]:
    """Return id, username, email and created_at of a user; raises UserNotFound.

    And `active` and `admin`, if it is to be `full`.
    """
    user = database.fetch_one(_BY_ID[full], user_id=user_id)
    if user is None:
        raise UserNotFound
    return user


def newest(
    limit: int, after: tuple[datetime, int] | None = None, *, full: bool = False
) -> Sequence[Row[Any]]:
    """Return at most `limit` users as `find` does, the newest first.

    `after` is the created_at and id of a user: the list goes on behind that one. The cost is
    that of `limit` rows of an index, however many users there are.
    """
    if after is None:
        return database.fetch_all(_NEWEST[full], limit=limit)
    created_at, user_id = after
    return database.fetch_all(
        _NEWEST_AFTER[full], limit=limit, created_at=created_at, user_id=user_id
    )


def search(
    query: str, limit: int, after: Place | None, origin: audit.Origin, *, full: bool = False
) -> tuple[Sequence[dict[str, Any]], Place | None]:
    """Return the users whose username or email begins with `query`, and where the list goes on.

    At most `limit`, with what `find` returns of them, in the order of the names that match, without
    regard to case. Whoever matches by both names is listed once, at the first; so there may be
    fewer than `limit` although the list goes on. The cost is that of some 2 * `limit` rows of each
    of two indexes, however many match. If the caller is known it is recorded that they searched.
    """
    prefix = username_key(query)
    start = after or ("", False)
    # Everybody may come twice, and there are at most two entries to leave out: those at `start`.
    size = 2 * limit + 3
    rows = database.fetch_all(_NAMES, start=max(start[0], prefix), limit=size)
    found = [row for row in rows if _place(row) == _first(row, prefix) and _place(row) > start]
    page, more = found[:limit], found[limit:]
    following = None
    if more:
        following = _place(page[-1])
    elif len(rows) == size and rows[-1].name.startswith(prefix):
        following = _place(rows[-1])
    if origin.actor_id is not None:
        audit.record(audit.Kind.USERS_SEARCHED, origin, user_id=None, users=len(page))
    columns = _SHOWN[full].selected_columns.keys()
    return [{name: getattr(row, name) for name in columns} for row in page], following


def _place(row: Row[Any]) -> Place:
    return row.name, row.is_email


def _first(row: Row[Any], prefix: str) -> Place | None:
    """Return the first place of a user among the names with this prefix, if they have one."""
    places = (row.username_key, False), (row.email, True)
    return min((place for place in places if place[0].startswith(prefix)), default=None)
