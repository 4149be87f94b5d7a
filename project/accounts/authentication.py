"""Authentication: log in, verify the current password, change it.

Functions here write and may flush. The caller commits; a refusal commits its own event.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Row, bindparam, select, update

from project import clock, errors
from project.accounts import (
    audit,
    mails,
    password_policy,
    rate_limits,
    sessions,
    verification,
)
from project.accounts.sessions import AccountChanged
from project.extensions import db
from project.lib import database, hashing
from project.models import users_table

T = TypeVar("T")

MAX_TRIES = 3  # of an act that verifies a password, while the account changes meanwhile

_users = users_table.c
_CREDENTIALS = select(
    _users.id,
    _users.password,
    _users.active,
    _users.email_verified,
    sessions.HAS_EXPIRED.label("has_expired_sessions"),
).where(_users.email == bindparam("email"))
_PASSWORD = select(_users.password).where(_users.id == bindparam("user_id"), _users.active)


def retry_if_changed(act: Callable[[], T]) -> T:
    """Return what `act` returns; roll back and call it again when it raises AccountChanged.

    An act verifies a password, which takes long, in no transaction. Then it begins one, in which
    it raises AccountChanged when the stored hash is another by now. Raise Busy after MAX_TRIES.
    """
    for _ in range(MAX_TRIES):
        try:
            return act()
        except AccountChanged:
            db.session.rollback()
    raise errors.Busy(retry_after=1)


def log_in(email: str, password: str, origin: audit.Origin) -> sessions.TokenPair:
    """Return the tokens of a new session of the active user with these credentials.

    Raise InvalidCredentials for an unknown email and for a wrong password, after the same work;
    AccountInactive when both are right and the user is deactivated, EmailUnverified when they have
    to confirm their email first; TooManyAttempts. When the stored hash has a lower cost than the
    configured one, it is replaced. Expired sessions of the user are deleted. The user is told of a
    login at an address where they are not known.
    """
    attempt = rate_limits.limits().login(email, origin.ip)
    user_id, pair = retry_if_changed(lambda: _start_session(email, password, origin, attempt))
    attempt.succeed()
    if attempt.at_unknown_address:
        mails.notify(mails.Kind.NEW_LOGIN, email, origin, user_id=user_id)
    return pair


def _start_session(
    email: str, password: str, origin: audit.Origin, attempt: rate_limits.Attempt
) -> tuple[int, sessions.TokenPair]:
    """Verify the credentials once, and start a session; return the user id and the tokens.

    Every refusal counts as a failed attempt, also that of a deactivated user with the right
    password. Refuse before anything is written: a refusal commits the transaction.
    """
    refuse = partial(
        audit.refuse, kind=audit.Kind.LOGIN_REFUSED, origin=origin, pause=attempt.pause
    )
    user = database.fetch_one(_CREDENTIALS, email=email, now=clock.utcnow())
    matches = hashing.verify(user.password if user else None, password)
    if user is None:
        refuse(errors.InvalidCredentials(), user_id=None, why="unknown_email")
    if not matches:
        refuse(errors.InvalidCredentials(), user_id=user.id, why="wrong_password")
    if not user.active:
        refuse(errors.AccountInactive(), user_id=user.id, why="account_inactive")
    if verification.is_required() and not user.email_verified:
        refuse(errors.EmailUnverified(), user_id=user.id, why="email_unverified")
    hashed = user.password
    if hashing.needs_rehash(hashed):
        hashed = hashing.hash(password)
        _replace_password(user.id, user.password, hashed)
    pair = sessions.start(user.id, email, hashed, origin, audit.Kind.LOGGED_IN)
    if user.has_expired_sessions:
        sessions.delete_expired(user_id=user.id)
    return user.id, pair


def verify_password(
    user_id: int, password: str, attempt: rate_limits.Attempt, refuse: Callable[..., NoReturn]
) -> str:
    """Return the stored hash of an active user, against which `password` has been verified.

    No transaction is open meanwhile: the caller checks in one that the hash is still stored
    (`retry_if_changed`). Raise TokenOfInactive when the user is deleted or deactivated; `refuse`
    with WrongPassword.
    """
    stored = database.fetch_one(_PASSWORD, user_id=user_id)
    if stored is None:
        raise errors.TokenOfInactive
    if not hashing.verify(stored.password, password):
        refuse(errors.WrongPassword(), why="wrong_password", pause=attempt.pause)
    return str(stored.password)


def change_password(
    user: Row[Any], origin: audit.Origin, *, current: str, new: str, keep_sessions: bool
) -> None:
    """Give a user, as `sessions.identify` returned them, a new password.

    All other sessions of the user are ended unless `keep_sessions`. Raise InvalidPayload when
    `new` is weak; WrongPassword when `current` is wrong, which counts as a failed login;
    TooManyAttempts; TokenOfInactive or SessionEnded when the user was deactivated or this session
    was ended while the passwords were hashed.
    """
    password_policy.check_new(new, user.username, user.email, field="new_password")
    attempt = rate_limits.limits().login(user.email, origin.ip, own=True)
    about = {"origin": origin, "user_id": user.id, "session_id": user.session_id}
    refuse = partial(audit.refuse, kind=audit.Kind.PASSWORD_CHANGE_REFUSED, **about)
    new_hash = cache(lambda: hashing.hash(new))

    def replace() -> int:
        stored, hashed = verify_password(user.id, current, attempt, refuse), new_hash()
        sessions.lock_user(user.id)
        sessions.lock(user.id, user.session_id)
        ended = 0 if keep_sessions else sessions.end_all(user.id, but=user.session_id)
        if not _replace_password(user.id, stored, hashed):
            raise AccountChanged
        return ended

    ended = retry_if_changed(replace)
    attempt.succeed()
    audit.record(audit.Kind.PASSWORD_CHANGED, **about, sessions=ended)
    mails.notify(mails.Kind.PASSWORD_CHANGED, user.email, origin, user_id=user.id)


def _replace_password(user_id: int, old: str, new: str) -> bool:
    """Store another hash for an active user; return whether the stored one was still `old`."""
    unchanged = _users.id == user_id, _users.password == old, _users.active
    return bool(database.write(update(users_table).where(*unchanged).values(password=new)))
