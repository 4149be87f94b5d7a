"""Recovery: a user who does not know their password sets a new one with a link from an email.

Functions here write and may flush. The caller commits.
"""

from sqlalchemy import update

from project import errors
from project.accounts import (
    audit,
    links,
    mails,
    password_policy,
    rate_limits,
    second_factor,
    sessions,
)
from project.lib import database, hashing
from project.models import users_table
from project.tokens.links import Purpose


def request_reset(email: str, origin: audit.Origin) -> None:
    """Send a link to set a new password, if there is an active user with this email.

    Raise MailNotConfigured; TooManyAttempts.
    """
    mails.count_request(mails.Kind.RESET, email, origin)
    mails.add(mails.Kind.RESET, email, origin)


def reset_password(token: str, new_password: str, origin: audit.Origin) -> None:
    """Give the user of a link a new password; their email counts as verified from now on.

    All sessions of the user are ended, and a pause of the account is lifted. A second factor stays,
    unless it was set while the email was not verified. Without one, the user is known at this
    address from now on, as after a login. Raise LinkInvalid; InvalidPayload for a weak password,
    after which the link still works.
    """
    user, _ = links.user_of(Purpose.RESET, token)
    password_policy.check_new(new_password, user.username, user.email, field="new_password")
    values = {"password": hashing.hash(new_password), "email_verified": True}
    # Before the UPDATE: see `sessions.lock_user`.
    ended = sessions.end_all(user.id)
    if not database.write(update(users_table).where(*links.unchanged(user)).values(values)):
        raise errors.LinkInvalid
    second_factor.forget_pending(user.id)
    removed = second_factor.remove_unverified(user)
    audit.record(audit.Kind.PASSWORD_RESET, origin, user_id=user.id, sessions=ended)
    if removed:
        kind = audit.Kind.TOTP_RESET
        audit.record(kind, origin, user_id=user.id, why="password_reset", sessions=0)
    rate_limits.lift_pause(user.email)
    # An attacker who can read the mailbox must not get a count of codes of their own.
    if not second_factor.is_enabled(user.id):
        rate_limits.limits().remember(user.email, origin.ip)
    mails.notify(mails.Kind.PASSWORD_CHANGED, user.email, origin, user_id=user.id)
    if removed:
        mails.notify(mails.Kind.TOTP_DISABLED, user.email, origin, user_id=user.id)
