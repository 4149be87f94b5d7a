"""Enrolment: users set up an authenticator, replace their recovery codes, or turn it off.

Functions here write and may flush. The caller commits; a refusal commits its own event. `user` is
the caller, as `sessions.identify` returned them.
"""

from typing import Any, NamedTuple

from sqlalchemy import Row

from project import errors
from project.accounts import audit, mails, rate_limits, second_factor, sessions
from project.accounts.confirmation import Confirmation, retry_if_changed
from project.accounts.second_factor import Method
from project.lib import codes
from project.mail import rendering

_REFUSED = audit.Kind.TOTP_REFUSED


class Secret(NamedTuple):
    """A secret for an authenticator."""

    secret: str  # in base32
    uri: str  # for a QR code


def begin(user: Row[Any], origin: audit.Origin, *, password: str) -> Secret:
    """Return a secret for an authenticator, which a code of it turns on (`confirm`).

    Raise TotpExists; MfaNotConfigured; and as `Confirmation`.
    """
    if user.mfa_enabled:
        raise errors.TotpExists
    second_factor.encryption_keys()
    confirmation = Confirmation(user, origin, _REFUSED, password=password, code=None)

    def store() -> str:
        confirmation.lock(confirmation.verify())
        return second_factor.begin(user.id)

    secret = retry_if_changed(store)
    audit.record(audit.Kind.TOTP_STARTED, **confirmation.about)
    confirmation.succeed()
    return Secret(secret, codes.uri(secret, user.email, rendering.service_name()))


def confirm(user: Row[Any], origin: audit.Origin, *, code: str) -> list[str]:
    """Turn the new authenticator on, if this is its code, and return the recovery codes.

    The other sessions of the user are ended. Raise TotpExists; TotpNotFound before `begin`;
    WrongCode, which counts like one of a login; TooManyAttempts.
    """
    if user.mfa_enabled:
        raise errors.TotpExists
    factor = second_factor.pending(user.id)
    attempt = rate_limits.limits().code(user.email, origin.ip, rate_limits.Attempt())
    about: dict[str, Any] = {
        "origin": origin,
        "user_id": user.id,
        "session_id": user.session_id,
    }
    sessions.lock_user(user.id)
    sessions.lock(user.id, user.session_id)
    if not second_factor.confirm(factor, code):
        pause = attempt.pause
        audit.refuse(errors.WrongCode(), _REFUSED, **about, why="wrong_code", pause=pause)
    recovery_codes = second_factor.new_recovery_codes(user.id)
    sessions.step_up(user, Method.TOTP, origin)
    ended = sessions.end_all(user.id, but=user.session_id)
    second_factor.set_enabled(user.id, True)
    audit.record(audit.Kind.TOTP_ENABLED, **about, sessions=ended)
    attempt.succeed()
    # An attacker who has logged in with the password alone must not be known anywhere.
    rate_limits.forget(user.email)
    rate_limits.limits().remember(user.email, origin.ip)
    mails.notify(mails.Kind.TOTP_ENABLED, user.email, origin, user_id=user.id)
    return recovery_codes


def replace_recovery_codes(
    user: Row[Any], origin: audit.Origin, *, password: str, code: str | None
) -> list[str]:
    """Return new recovery codes, which replace all earlier ones.

    Raise TotpNotFound, and as `Confirmation`.
    """
    confirmation = _confirmation(user, origin, password, code)

    def replace() -> list[str]:
        confirmation.lock(confirmation.verify())
        return second_factor.new_recovery_codes(user.id)

    recovery_codes = retry_if_changed(replace)
    audit.record(audit.Kind.RECOVERY_CODES_REPLACED, **confirmation.about)
    confirmation.succeed()
    kind = mails.Kind.RECOVERY_CODES_REPLACED
    mails.notify(kind, user.email, origin, user_id=user.id)
    return recovery_codes


def turn_off(user: Row[Any], origin: audit.Origin, *, password: str, code: str | None) -> None:
    """Remove the authenticator and the recovery codes.

    Raise TotpNotFound, and as `Confirmation`.
    """
    confirmation = _confirmation(user, origin, password, code)

    def remove() -> None:
        confirmation.lock(confirmation.verify())
        second_factor.remove(user.id)

    retry_if_changed(remove)
    audit.record(audit.Kind.TOTP_DISABLED, **confirmation.about)
    confirmation.succeed()
    mails.notify(mails.Kind.TOTP_DISABLED, user.email, origin, user_id=user.id)


def _confirmation(
    user: Row[Any], origin: audit.Origin, password: str, code: str | None
) -> Confirmation:
    if not user.mfa_enabled:
        raise errors.TotpNotFound
    return Confirmation(user, origin, _REFUSED, password=password, code=code)
