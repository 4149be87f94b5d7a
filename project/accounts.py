"""Accounts: register, add, log in, change the password, deactivate, find, list.

Functions here write and may flush; the caller commits, but for what goes with a refusal.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import Row, bindparam, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from project import audit, clock, database, passwords, ratelimit, sessions
from project.api.models import User
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
_PUBLIC = select(User.id, User.username, User.email, User.created_at)
_BY_EMAIL = select(User.id).where(User.email == bindparam("email"))
_BY_ID = _PUBLIC.where(User.id == bindparam("user_id"))
_NEWEST = _PUBLIC.order_by(User.created_at.desc(), User.id.desc()).limit(bindparam("limit"))
_NEWEST_AFTER = _NEWEST.where(
    tuple_(User.created_at, User.id)
    < tuple_(bindparam("created_at", type_=User.created_at.type), bindparam("user_id"))
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
    return sessions.start(user.id, user.password, origin, audit.Kind.REGISTERED)


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
        violated = _violated_constraint(error)
        if "username_key" in violated:
            raise username_taken from None
        if "email" in violated:
            raise email_taken from None
        raise
    return user


def _violated_constraint(error: IntegrityError) -> str:
    """Return a text that names the constraint on PostgreSQL, the column on SQLite, and no value."""
    diagnostics = getattr(error.orig, "diag", None)
    return str(diagnostics.constraint_name if diagnostics else error.orig)


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
            pair = sessions.start(user.id, hashed, origin, audit.Kind.LOGGED_IN)
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
    hashed = None
    for _ in range(_ATTEMPTS):
        stored = database.fetch_one(_PASSWORD, user_id=user.id)
        if stored is None:
            raise TokenOfInactive
        if not passwords.verify(stored.password, current):
            audit.refuse(
                WrongPassword(),
                audit.Kind.PASSWORD_CHANGE_REFUSED,
                origin,
                user_id=user.id,
                session_id=user.session_id,
                why="wrong_password",
                pause=attempt.pause,
            )
        hashed = hashed or passwords.hash(new)
        if _replace_password(user.id, stored.password, hashed):
            sessions.hold(user.id, user.session_id)
            ended = 0 if keep_sessions else sessions.end_all(user.id, but=user.session_id)
            attempt.succeed()
            audit.record(
                audit.Kind.PASSWORD_CHANGED,
                origin,
                user_id=user.id,
                session_id=user.session_id,
                sessions=ended,
            )
            return
        db.session.rollback()  # somebody changed it while it was checked
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


def find(user_id: int) -> Row[Any]:
    """Return id, username, email and created_at of a user; raises UserNotFound."""
    user = database.fetch_one(_BY_ID, user_id=user_id)
    if user is None:
        raise UserNotFound
    return user


def newest(limit: int, after: tuple[datetime, int] | None = None) -> Sequence[Row[Any]]:
    """Return at most `limit` users as `find` does, the newest first.

    `after` is the created_at and id of a user: the list goes on behind that one. The cost is
    that of `limit` rows of an index, however many users there are.
    """
    if after is None:
        return database.fetch_all(_NEWEST, limit=limit)
    created_at, user_id = after
    return database.fetch_all(_NEWEST_AFTER, limit=limit, created_at=created_at, user_id=user_id)
