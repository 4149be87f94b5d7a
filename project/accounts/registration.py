"""Registration: a user registers, or an admin or the operator adds a user.

Functions here write and may flush. The caller commits; a refusal commits its own event.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from sqlalchemy import insert, or_, select
from sqlalchemy.exc import IntegrityError

from project import errors
from project.accounts import (
    audit,
    mails,
    password_policy,
    rate_limits,
    sessions,
    verification,
)
from project.extensions import db
from project.lib import database
from project.mail import outbox
from project.models import User, username_key, users_table

_INSERT = insert(users_table).returning(*users_table.c).execution_options(prepare=True)


def register(
    username: str, email: str, password: str, origin: audit.Origin
) -> tuple[User, sessions.TokenPair] | None:
    """Add the user who registers; return the user and the tokens of their first session.

    Return None if the email has to be confirmed first; so also if another user has it, whom an
    email tells then. Raise InvalidPayload for a weak password; TooManyAttempts; UserExists when
    another user has the username or, unless it has to be confirmed, the email; MailNotConfigured.
    """
    if verification.is_required():
        mails.check_configured()
    password_policy.check_new(password, username, email)
    rate_limits.limits().registration(origin.ip)
    if verification.is_on() and outbox.is_configured():
        # Not together with the links that users request again.
        mails.count_request(mails.Kind.ALREADY_REGISTERED, email, origin)
    user = User(username, email, password)
    if verification.is_required():
        _register_unconfirmed(user, origin)
        return None
    try:
        return user, start(user, origin)
    except IntegrityError as error:
        db.session.rollback()
        _refuse(taken_names(error, username, email), origin)


def _register_unconfirmed(user: User, origin: audit.Origin) -> None:
    """Add a user who has to confirm the email, or tell the user who has the email already.

    Raise UserExists when another user has the username, and nothing about the email then.
    """
    try:
        _insert(user)
    except IntegrityError as error:
        db.session.rollback()
        taken = taken_names(error, user.username, user.email)
        if "username" in taken:
            _refuse({"username": taken["username"]}, origin)
        mails.add(mails.Kind.ALREADY_REGISTERED, user.email, origin)
        kind = audit.Kind.REGISTRATION_REFUSED
        audit.record(kind, origin, user_id=None, why="email_taken")
    else:
        mails.add(mails.Kind.VERIFY, user.email, origin)
        audit.record(audit.Kind.REGISTERED, origin, user_id=user.id)


def _refuse(taken: dict[str, str], origin: audit.Origin) -> NoReturn:
    why = f"{next(iter(taken))}_taken"
    refusal = errors.UserExists(errors=taken)
    audit.refuse(refusal, audit.Kind.REGISTRATION_REFUSED, origin, user_id=None, why=why)


def start(user: User, origin: audit.Origin) -> sessions.TokenPair:
    """Add a user who registers, and return the tokens of their first session.

    If the user is asked to confirm the email, an email is sent. Raise IntegrityError if the
    username or the email is taken.
    """
    _insert(user)
    pair = sessions.start(user.id, user.email, user.password, origin, audit.Kind.REGISTERED)
    rate_limits.limits().remember(user.email, origin.ip)
    if verification.is_on() and not user.email_verified and outbox.is_configured():
        mails.add(mails.Kind.VERIFY, user.email, origin)
    return pair


def add(
    username: str,
    email: str,
    password: str,
    origin: audit.Origin,
    *,
    admin: bool = False,
    roles: Sequence[str] = (),
    email_verified: bool = False,
) -> User:
    """Add a user for an admin or the operator, and return the user.

    `email_verified` says whether the email counts as confirmed. Raise EmailExists or
    UsernameExists, each with everything that is taken; InvalidPayload when the password is weak.
    """
    password_policy.check_new(password, username, email)
    user = User(
        username, email, password, admin=admin, roles=list(roles), email_verified=email_verified
    )
    audit.lock_actor(origin)
    try:
        _insert(user)
    except IntegrityError as error:
        db.session.rollback()
        raise conflict(taken_names(error, username, email), errors.UsernameExists) from None
    audit.record(audit.Kind.USER_ADDED, origin, user_id=user.id, admin=admin)
    if roles:
        audit.record(audit.Kind.ROLES_CHANGED, origin, user_id=user.id, roles=" ".join(roles))
    return user


def _insert(user: User) -> None:
    """Add a user's row, and give the user the values of its columns.

    The user does not join `db.session`, which stores no later change of an attribute.
    """
    given = {name: value for name, value in vars(user).items() if name in users_table.c}
    for name, value in db.session.execute(_INSERT, given).one()._mapping.items():
        setattr(user, name, value)


def taken_names(
    error: IntegrityError, username: str | None, email: str | None, *, but: int | None = None
) -> dict[str, str]:
    """Return for the username, the email or both that another user has them.

    `error` is that of the INSERT or UPDATE, whose transaction has been rolled back. The database
    names one constraint; a query finds out about the other name. `but` is the id of the user who
    changes their names. Raise `error` when it is about any other constraint.
    """
    diagnostics = getattr(error.orig, "diag", None)
    # The name of the constraint on PostgreSQL, of the column on SQLite; neither has a value in it.
    violated = str(diagnostics.constraint_name if diagnostics else error.orig)
    wanted = {"username": username, "email": email}
    names = {field for field, name in wanted.items() if name is not None and field in violated}
    if not names:
        raise error
    names |= names_in_use(username, email, but=but).keys()
    return {field: "is taken" for field in wanted if field in names}


def names_in_use(
    username: str | None, email: str | None, *, but: int | None = None
) -> dict[str, str]:
    """Return for the username, the email or both that a user, other than `but`, has them now."""
    columns = users_table.c
    same: dict[str, Any] = {}
    if username is not None:
        same["username"] = columns.username_key == username_key(username)
    if email is not None:
        same["email"] = columns.email == email
    others = select(*(is_same.label(field) for field, is_same in same.items())).where(
        or_(*same.values()), columns.id != (but or 0)
    )
    rows = database.fetch_all(others)
    return {field: "is taken" for field in same if any(getattr(row, field) for row in rows)}


def conflict(taken: dict[str, str], username: type[errors.ServiceError]) -> errors.ServiceError:
    """Return EmailExists if the email is taken, and an error of the class `username` otherwise."""
    return (errors.EmailExists if "email" in taken else username)(errors=taken)
