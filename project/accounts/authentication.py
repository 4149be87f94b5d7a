"""Authentication: log in, in one step or in two, and change the password.

Functions here write and may flush. The caller commits; a refusal commits its own event.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from sqlalchemy import Row, bindparam, select, update

from project import clock, errors
from project.accounts import (
    audit,
    confirmation,
    links,
    mails,
    password_policy,
    rate_limits,
    second_factor,
    sessions,
    verification,
)
from project.accounts.confirmation import Confirmation
from project.lib import database, hashing
from project.models import users_table

_users = users_table.c
_CREDENTIALS = select(
    _users.id,
    _users.password,
    _users.active,
    _users.email_verified,
    _users.mfa_enabled,
    sessions.HAS_EXPIRED.label("has_expired_sessions"),
).where(_users.email == bindparam("email"))


def log_in(email: str, password: str, code: str | None, origin: audit.Origin) -> sessions.TokenPair:
    """Return the tokens of a new session of the active user with these credentials.

    Raise InvalidCredentials for an unknown email and for a wrong password, after the same work;
    AccountInactive when both are right and the user is deactivated, EmailUnverified when they have
    to confirm their email first; MfaRequired when they have a second factor and `code` is None, and
    WrongCode; TooManyAttempts. When the stored hash has a lower cost than the configured one, it is
    replaced. Expired sessions of the user are deleted. The user is told of a login at an address
    where they are not known.
    """
    login = rate_limits.limits().login(email, origin.ip)
    count_code = cache(lambda: rate_limits.limits().code(email, origin.ip, login))
    user_id, pair, attempt = confirmation.retry_if_changed(
        lambda: _start_session(email, password, code, origin, login, count_code)
    )
    _succeed(user_id, email, attempt, origin)
    return pair


def _start_session(
    email: str,
    password: str,
    code: str | None,
    origin: audit.Origin,
    login: rate_limits.Attempt,
    count_code: Callable[[], rate_limits.Attempt],
) -> tuple[int, sessions.TokenPair, rate_limits.Attempt]:
    """Verify the credentials once, and start a session.

    Return the user id, the tokens, and the attempt that has succeeded. Every refusal counts as a
    failed attempt, also that of a deactivated user with the right password. Refuse before anything
    but a hash is written: a refusal commits the transaction.
    """
    refuse = partial(audit.refuse, kind=audit.Kind.LOGIN_REFUSED, origin=origin, pause=login.pause)
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
    attempt = login
    if user.mfa_enabled and code is not None:
        # Not earlier: a client that does not know the password must not use up the attempts.
        attempt = count_code()
    hashed = user.password
    if hashing.needs_rehash(hashed):
        hashed = hashing.hash(password)
        _replace_password(user.id, user.password, hashed)
    method = None
    if user.mfa_enabled:
        if code is None:
            token = links.mfa_token(user.id, email, hashed, user.email_verified)
            refuse(errors.MfaRequired(mfa_token=token), user_id=user.id, why="mfa_required")
        method = _use_code(user.id, email, code, attempt, origin)
    pair = sessions.start(user.id, email, hashed, origin, audit.Kind.LOGGED_IN, method)
    if user.has_expired_sessions:
        sessions.delete_expired(user_id=user.id)
    return user.id, pair, attempt


def log_in_with_code(mfa_token: str, code: str, origin: audit.Origin) -> sessions.TokenPair:
    """Return the tokens of a new session, in the second step of a login.

    Raise TokenExpired or TokenInvalid for the token of the first step, also when the account has
    changed since; WrongCode; TooManyAttempts. The rest is as in `log_in`.
    """
    user = links.user_of_mfa_token(mfa_token)
    limits = rate_limits.limits()
    attempt = limits.code(user.email, origin.ip, limits.counted_login(user.email, origin.ip))
    method = _use_code(user.id, user.email, code, attempt, origin)
    kind = audit.Kind.LOGGED_IN
    try:
        pair = sessions.start(user.id, user.email, user.password, origin, kind, method)
    except sessions.AccountChanged:
        raise errors.TokenInvalid from None
    sessions.delete_expired(user_id=user.id)
    _succeed(user.id, user.email, attempt, origin)
    return pair


def _use_code(
    user_id: int, email: str, code: str, attempt: rate_limits.Attempt, origin: audit.Origin
) -> second_factor.Method:
    """Lock a user whose password was right, use up their code, and return what kind it is."""
    sessions.lock_user(user_id)
    refuse = partial(audit.refuse, kind=audit.Kind.LOGIN_REFUSED, origin=origin, user_id=user_id)
    return confirmation.use_code(user_id, email, code, attempt, origin, refuse)


def _succeed(user_id: int, email: str, attempt: rate_limits.Attempt, origin: audit.Origin) -> None:
    attempt.succeed()
    if attempt.at_unknown_address:
        mails.notify(mails.Kind.NEW_LOGIN, email, origin, user_id=user_id)


def change_password(
    user: Row[Any],
    origin: audit.Origin,
    *,
    current: str,
    new: str,
    code: str | None,
    keep_sessions: bool,
) -> None:
    """Give a user, as `sessions.identify` returned them, a new password.

    All other sessions of the user are ended unless `keep_sessions`. Raise InvalidPayload when
    `new` is weak; and as `Confirmation`, also when the user was deactivated or this session was
    ended while the passwords were hashed.
    """
    password_policy.check_new(new, user.username, user.email, field="new_password")
    refused = audit.Kind.PASSWORD_CHANGE_REFUSED
    confirmed = Confirmation(user, origin, refused, password=current, code=code)
    new_hash = cache(lambda: hashing.hash(new))

    def replace() -> int:
        stored, hashed = confirmed.verify(), new_hash()
        confirmed.lock(stored)
        ended = 0 if keep_sessions else sessions.end_all(user.id, but=user.session_id)
        _replace_password(user.id, stored, hashed)
        second_factor.forget_pending(user.id)
        return ended

    ended = confirmation.retry_if_changed(replace)
    confirmed.succeed()
    audit.record(audit.Kind.PASSWORD_CHANGED, **confirmed.about, sessions=ended)
    mails.notify(mails.Kind.PASSWORD_CHANGED, user.email, origin, user_id=user.id)


def _replace_password(user_id: int, old: str | None, new: str) -> None:
    """Store another hash for an active user; raise AccountChanged if it is no longer `old`."""
    unchanged = _users.id == user_id, _users.password == old, _users.active
    if not database.write(update(users_table).where(*unchanged).values(password=new)):
        raise sessions.AccountChanged
