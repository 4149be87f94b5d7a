"""Verification: a user confirms that an email address is theirs, with a link from an email.

Functions here write and may flush. The caller commits.
"""

from typing import Any

from flask import current_app
from sqlalchemy import Row, update
from sqlalchemy.exc import IntegrityError

from project import errors
from project.accounts import audit, links, mails, rate_limits, second_factor
from project.extensions import db
from project.lib import database
from project.models import users_table
from project.tokens.links import Purpose


def is_on() -> bool:
    """Return whether new users are asked to confirm their email."""
    return bool(current_app.config["EMAIL_VERIFICATION"] != "off")


def is_required() -> bool:
    """Return whether new users have to confirm their email before they can log in."""
    return bool(current_app.config["EMAIL_VERIFICATION"] == "required")


def changes_are_confirmed() -> bool:
    """Return whether users have to confirm a new email before it replaces the old one."""
    return is_on() or bool(current_app.config["SMTP_URL"])


def request(email: str, origin: audit.Origin) -> None:
    """Send a link to confirm an email, if there is a user who has not confirmed it.

    Raise MailNotConfigured; TooManyAttempts.
    """
    mails.count_request(mails.Kind.VERIFY, email, origin)
    mails.add(mails.Kind.VERIFY, email, origin)


def verify(token: str, origin: audit.Origin) -> None:
    """Mark the email of the user of a link as verified; raise LinkInvalid.

    Without a second factor, the user is known at this address from now on, as after a login.
    """
    user, _ = links.user_of(Purpose.VERIFY, token)
    verified = update(users_table).where(*links.unchanged(user)).values(email_verified=True)
    if not database.write(verified):
        raise errors.LinkInvalid
    if not second_factor.is_enabled(user.id):  # as in `recovery.reset_password`
        rate_limits.limits().remember(user.email, origin.ip)
    audit.record(audit.Kind.EMAIL_VERIFIED, origin, user_id=user.id)


def request_change(user: Row[Any], email: str, origin: audit.Origin) -> None:
    """Send a link to the new email of a user, who has confirmed the act with their password.

    No link is sent if the account changes before the email is sent.
    """
    state = links.state_of_change(user, email)
    mails.add(mails.Kind.EMAIL, email, origin, user_id=user.id, state=state)
    audit.record(audit.Kind.EMAIL_CHANGE_REQUESTED, origin, user_id=user.id)


def confirm_change(token: str, origin: audit.Origin) -> None:
    """Give the user of a link the new email, which is verified thereby; tell the old one.

    Raise LinkInvalid; EmailExists when another user has the email by now.
    """
    user, email = links.user_of(Purpose.EMAIL, token)
    values = {"email": email, "email_verified": True}
    # The link is bound to it, too.
    unchanged = *links.unchanged(user), users_table.c.mfa_enabled == user.mfa_enabled
    try:
        with db.session.begin_nested():
            changed = database.write(update(users_table).where(*unchanged).values(values))
    except IntegrityError:
        raise errors.EmailExists(errors={"email": "is taken"}) from None
    if not changed:
        raise errors.LinkInvalid
    rate_limits.rename(user.email, str(email))
    audit.record(audit.Kind.USER_CHANGED, origin, user_id=user.id, fields="email")
    mails.notify(mails.Kind.EMAIL_CHANGED, user.email, origin, user_id=user.id)
