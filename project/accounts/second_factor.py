"""The second factor of a user: an authenticator, and recovery codes for when it is lost.

The secret of the authenticator is encrypted under ENCRYPTION_KEYS, bound to the user. Of recovery
codes only the hashes are stored. A code works once: a conditional UPDATE or DELETE decides between
any number of requests with the same code.

Functions here write and may flush. The caller commits, and has locked the user before a function
that writes.
"""

from collections.abc import Iterator
from datetime import timedelta
from enum import StrEnum
from typing import Any

import structlog
from flask import current_app
from sqlalchemy import Row, bindparam, delete, func, insert, select, update

from project import clock, errors
from project.extensions import db
from project.lib import codes, database, encryption
from project.models import (
    recovery_codes_table,
    sessions_table,
    totp_factors_table,
    users_table,
)

log = structlog.get_logger()

RECOVERY_CODES = 10
REENCRYPTED_AT_ONCE = 1_000  # rows

_users = users_table.c
_factors = totp_factors_table.c
_codes = recovery_codes_table.c
_IS_CONFIRMED = _factors.last_step.is_not(None)
_FACTOR = select(*_factors).where(_factors.user_id == bindparam("user_id"))
_CODES_LEFT = select(func.count()).where(_codes.user_id == bindparam("user_id"))
_STEPPED_UP = select(sessions_table.c.id).where(
    sessions_table.c.id == bindparam("session_id"),
    sessions_table.c.code_given_at
    > bindparam("earliest", type_=sessions_table.c.code_given_at.type),
)
_ADMINS_WITHOUT = select(func.count()).where(_users.active, _users.admin, ~_users.mfa_enabled)
_NEXT = (
    select(*_factors)
    .where(_factors.user_id > bindparam("after"))
    .order_by(_factors.user_id)
    .limit(REENCRYPTED_AT_ONCE)
)


class Method(StrEnum):
    """How a user has proved who they are: the values of `amr` (RFC 8176, 2)."""

    PASSWORD = "pwd"  # noqa: S105  # nosec B105  # no password
    TOTP = "otp"
    RECOVERY_CODE = "rc"  # RFC 8176 has no value for it


def must_enrol(user: Any) -> bool:
    """Return whether REQUIRE_MFA requires a second factor of a user who has none."""
    required = current_app.config["REQUIRE_MFA"]
    return not user.mfa_enabled and (required == "all" or (required == "admins" and user.admin))


def check_step_up(caller: Row[Any], code: str | None) -> None:
    """Raise StepUpRequired unless the caller sends a code or need not send one.

    They need none without a second factor, and for STEP_UP_SECONDS after the last code of their
    session. `caller` is as `sessions.identify` returns them.
    """
    if not caller.mfa_enabled or code is not None:
        return
    interval = timedelta(seconds=current_app.config["STEP_UP_SECONDS"])
    earliest = clock.utcnow() - interval
    if database.fetch_one(_STEPPED_UP, session_id=caller.session_id, earliest=earliest) is None:
        raise errors.StepUpRequired


def begin(user_id: int) -> str:
    """Store a new secret that the user has to confirm, and return it in base32.

    It replaces one that was not confirmed. Raise TotpExists if one was; MfaNotConfigured.
    """
    secret = codes.new_secret()
    values = {"user_id": user_id, "secret": encrypt(secret, user_id)}
    new = database.insert(totp_factors_table).values(values)
    replacing = new.on_conflict_do_update(
        index_elements=[_factors.user_id], set_=values, where=~_IS_CONFIRMED
    )
    if not database.write(replacing):
        raise errors.TotpExists
    return secret


def pending(user_id: int) -> Row[Any]:
    """Return the authenticator that a user is setting up; raise TotpNotFound."""
    factor = database.fetch_one(_FACTOR, user_id=user_id)
    if factor is None or factor.last_step is not None:
        raise errors.TotpNotFound
    return factor


def confirm(factor: Row[Any], code: str) -> bool:
    """Confirm the authenticator that `pending` returned, and use the code up.

    Return whether it did: not if the code is wrong, or another request was first. The caller turns
    the second factor on with `set_enabled`, after it has ended sessions (`sessions.lock_user`).
    """
    user_id = factor.user_id
    step = _step_of(code, factor)
    if step is None:
        return False
    verified = select(_users.email_verified).where(_users.id == user_id).scalar_subquery()
    unchanged = _factors.user_id == user_id, _factors.secret == factor.secret, ~_IS_CONFIRMED
    values = {"last_step": step, "email_verified": verified}
    return bool(database.write(update(totp_factors_table).where(*unchanged).values(values)))


def use(user_id: int, code: str) -> Method | None:
    """Use a code up; return what kind it is, or None if it is wrong or was used before.

    Raise MfaNotConfigured if the secret of the authenticator cannot be decrypted.
    """
    if not codes.is_totp(code):
        this_one = _codes.user_id == user_id, _codes.code_hash == codes.hash_of(code)
        deleted = delete(recovery_codes_table).where(*this_one).returning(_codes.user_id)
        return Method.RECOVERY_CODE if db.session.execute(deleted).first() else None
    factor = db.session.execute(_FACTOR, {"user_id": user_id}).one_or_none()
    step = _step_of(code, factor) if factor else None
    if step is None:
        return None
    # Without effect before the authenticator is confirmed: NULL is not less than any step.
    unused = _factors.user_id == user_id, _factors.last_step < step
    used = database.write(update(totp_factors_table).where(*unused).values(last_step=step))
    return Method.TOTP if used else None


def _step_of(code: str, factor: Row[Any]) -> int | None:
    return codes.step_of(code, decrypt(factor.secret, factor.user_id), clock.utcnow())


def new_recovery_codes(user_id: int) -> list[str]:
    """Return RECOVERY_CODES new codes as people read them, which replace all earlier ones."""
    new = [codes.new_recovery_code() for _ in range(RECOVERY_CODES)]
    database.write(delete(recovery_codes_table).where(_codes.user_id == user_id))
    rows = [{"user_id": user_id, "code_hash": codes.hash_of(code)} for code in new]
    db.session.execute(insert(recovery_codes_table), rows)
    return [codes.grouped(code) for code in new]


def recovery_codes_left(user_id: int) -> int:
    """Return how many recovery codes a user has not used."""
    return database.count(_CODES_LEFT, user_id=user_id)


def admins_without() -> int:
    """Return how many active admins have no second factor."""
    return database.count(_ADMINS_WITHOUT)


def forget_pending(user_id: int) -> None:
    """Remove an authenticator that was not confirmed, because the password has changed since."""
    pending = _factors.user_id == user_id, ~_IS_CONFIRMED
    database.write(delete(totp_factors_table).where(*pending))


def remove(user_id: int) -> None:
    """Remove the second factor of a user, or the one that they are setting up."""
    database.write(delete(recovery_codes_table).where(_codes.user_id == user_id))
    database.write(delete(totp_factors_table).where(_factors.user_id == user_id))
    set_enabled(user_id, False)


def remove_unverified(user: Row[Any]) -> bool:
    """Remove a second factor that was set while the email was not verified; return whether it was.

    For the owner of the email, who resets the password: a client may have registered with the
    email of another person. `user` is as they were before the reset.
    """
    confirmed = _FACTOR.where(_IS_CONFIRMED)
    factor = db.session.execute(confirmed, {"user_id": user.id}).one_or_none()
    if factor is None or (factor.email_verified and user.email_verified):
        return False
    remove(user.id)
    return True


def is_enabled(user_id: int) -> bool:
    """Return whether a user has a second factor, as the transaction of `db.session` sees it."""
    enabled = select(_users.mfa_enabled).where(_users.id == user_id)
    return bool(db.session.scalars(enabled).one_or_none())


def set_enabled(user_id: int, enabled: bool) -> None:
    """Store whether a login of a user needs a code too."""
    database.write(update(users_table).where(_users.id == user_id).values(mfa_enabled=enabled))


def encrypt(secret: str, user_id: int) -> bytes:
    """Return the secret of a user's authenticator as it is stored; raise MfaNotConfigured."""
    return encryption.encrypt(secret.encode(), _context(user_id), encryption_keys())


def decrypt(stored: bytes, user_id: int) -> str:
    """Return a secret that `encrypt` has encrypted; raise MfaNotConfigured if no key fits."""
    try:
        return encryption.decrypt(stored, _context(user_id), encryption_keys()).decode()
    except encryption.DecryptionFailed:
        log.error("totp_secret_unreadable", user_id=user_id)
        raise errors.MfaNotConfigured(retry_after=errors.OPERATOR_RETRY_AFTER) from None


def encryption_keys() -> tuple[str, ...]:
    """Return the keys that encrypt secrets; raise MfaNotConfigured if there are none."""
    keys: tuple[str, ...] = current_app.config["ENCRYPTION_KEYS"]
    if not keys:
        raise errors.MfaNotConfigured(retry_after=errors.OPERATOR_RETRY_AFTER)
    return keys


def _context(user_id: int) -> str:
    return f"totp {user_id}"


def reencrypt() -> Iterator[tuple[int, int]]:
    """Encrypt all secrets with the first of ENCRYPTION_KEYS.

    Yield after each batch, for the caller to commit, how many were encrypted with another key, and
    how many no key decrypts, which stay as they are.
    """
    after = 0
    while rows := database.fetch_all(_NEXT, after=after):
        after = rows[-1].user_id
        outdated = [factor for factor in rows if not is_readable(factor, encryption_keys()[:1])]
        readable = [factor for factor in outdated if is_readable(factor, encryption_keys())]
        yield sum(map(_reencrypt, readable)), len(outdated) - len(readable)


def _reencrypt(factor: Row[Any]) -> int:
    """Encrypt a secret again; return 1, or 0 if the user has replaced it in the meantime."""
    secret = encrypt(decrypt(factor.secret, factor.user_id), factor.user_id)
    unchanged = _factors.user_id == factor.user_id, _factors.secret == factor.secret
    return database.write(update(totp_factors_table).where(*unchanged).values(secret=secret))


def is_readable(factor: Row[Any], encryption_keys: tuple[str, ...]) -> bool:
    """Return whether one of `encryption_keys` decrypts the secret of an authenticator."""
    return encryption.can_decrypt(factor.secret, _context(factor.user_id), encryption_keys)


def all_factors() -> Iterator[Row[Any]]:
    """Yield every authenticator, also those that are being set up."""
    yield from database.stream(select(*_factors))
