"""Accounts: register, add, authenticate, find, list.

Functions here add to the session and may flush; the caller commits.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, bindparam, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from project import database, passwords
from project.api.models import User
from project.errors import (
    AccountInactive,
    EmailExists,
    InvalidCredentials,
    InvalidPayload,
    ServiceError,
    UserExists,
    UserNotFound,
)
from project.extensions import db

_TAKEN = "is taken"
_CREDENTIALS = select(User.id, User.password, User.active).where(User.email == bindparam("email"))
_PUBLIC = select(User.id, User.username, User.email, User.created_at)
_BY_ID = _PUBLIC.where(User.id == bindparam("user_id"))
_NEWEST = _PUBLIC.order_by(User.created_at.desc(), User.id.desc()).limit(bindparam("limit"))
_NEWEST_AFTER = _NEWEST.where(
    tuple_(User.created_at, User.id)
    < tuple_(bindparam("created_at", type_=User.created_at.type), bindparam("user_id"))
)


def register(username: str, email: str, password: str) -> User:
    """Return the new user who registered; raises UserExists when somebody has the name or email."""
    return _insert(
        username,
        email,
        password,
        username_taken=UserExists(errors={"username": _TAKEN}),
        email_taken=UserExists(errors={"email": _TAKEN}),
    )


def add(username: str, email: str, password: str, *, admin: bool = False) -> User:
    """Return the new user whom somebody else added.

    Raises EmailExists, or InvalidPayload when the username is taken.
    """
    return _insert(
        username,
        email,
        password,
        admin=admin,
        username_taken=InvalidPayload(errors={"username": _TAKEN}),
        email_taken=EmailExists(errors={"email": _TAKEN}),
    )


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


def authenticate(email: str, password: str) -> int:
    """Return the id of the active user with these credentials.

    Raises InvalidCredentials for an unknown email and for a wrong password, after the same work;
    AccountInactive when both are right and the user is deactivated. The hash is renewed when the
    configured cost has risen since it was made.
    """
    user = database.fetch_one(_CREDENTIALS, email=email)
    genuine = passwords.verify(user.password if user else None, password)
    if user is None or not genuine:
        raise InvalidCredentials
    if not user.active:
        raise AccountInactive
    if passwords.needs_rehash(user.password):
        renewed = passwords.hash(password)
        db.session.execute(
            update(User)
            .where(User.id == user.id, User.password == user.password)
            .values(password=renewed)
        )
    user_id: int = user.id
    return user_id


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
