"""The emails of accounts: add one to the outbox, and write one when it is sent.

An email that a client requests for an address is added without looking the address up. When it is
sent, `compose` finds out whether there is such an account. The response to the client therefore
cannot depend on that, nor can the time it takes.
No email contains a text that a client sent, except the address: an attacker could otherwise use
usernames to send advertisements.
"""

from enum import StrEnum, auto
from typing import Any

from flask import current_app
from sqlalchemy import Row

from project.accounts import audit, links, rate_limits
from project.accounts.links import Link
from project.errors import OPERATOR_RETRY_AFTER, MailNotConfigured
from project.mail import outbox, rendering
from project.mail.sender import Outgoing
from project.tokens.links import Purpose


class Kind(StrEnum):
    """The kinds of emails; each names its templates."""

    RESET = auto()
    VERIFY = auto()
    EMAIL = auto()  # to the new email of a user
    INVITATION = auto()
    ALREADY_REGISTERED = auto()
    # Security notices
    PASSWORD_CHANGED = auto()
    EMAIL_CHANGED = auto()  # to the old email
    NEW_LOGIN = auto()
    REFRESH_REUSED = auto()
    ACCOUNT_DEACTIVATED = auto()
    ACCOUNT_DELETED = auto()
    TOTP_ENABLED = auto()
    TOTP_DISABLED = auto()
    RECOVERY_CODES_REPLACED = auto()
    RECOVERY_CODE_USED = auto()
    WRONG_CODES = auto()  # with the right password, or in a session


WITH_LINK = {Kind.RESET, Kind.ALREADY_REGISTERED, Kind.VERIFY, Kind.EMAIL, Kind.INVITATION}


def check_configured() -> None:
    """Raise MailNotConfigured if the service cannot send email."""
    if not outbox.is_configured():
        raise MailNotConfigured(retry_after=OPERATOR_RETRY_AFTER)


def count_request(kind: Kind, address: str, origin: audit.Origin) -> None:
    """Count an email that a client requests for an address, which need not have an account.

    Raise MailNotConfigured; TooManyAttempts.
    """
    check_configured()
    rate_limits.limits().mail(kind, address, origin.ip)


def add(
    kind: Kind,
    address: str,
    origin: audit.Origin,
    *,
    user_id: int | None = None,
    **parameters: str | None,
) -> None:
    """Add an email to the transaction of `db.session`, in the language of `origin`."""
    outbox.add(kind, address, origin.language, user_id=user_id, **parameters)


def notify(kind: Kind, address: str, origin: audit.Origin, *, user_id: int) -> None:
    """Add a security notice to a user, if the service sends them.

    `address` is the email that the user has at the time of the event, so that an attacker who
    changes it afterwards does not get the notice. The IP address is named unless it is that of
    another user, such as an admin. An address gets a few notices of a kind in an hour and no more:
    an attacker may have registered the address of another person, and cause them.
    """
    if not (current_app.config["SECURITY_NOTICES"] and outbox.is_configured()):
        return
    if rate_limits.limits().notice(kind, address):
        by_user = origin.actor_id in {None, user_id}
        add(kind, address, origin, ip=origin.ip if by_user else None)


def compose(mail: Row[Any]) -> Outgoing | None:
    """Return the message of a row of the outbox, or None if there is no reason for it any more."""
    if mail.kind not in WITH_LINK:
        return Outgoing(rendering.render(mail), None)
    link = _link(mail)
    if link is None:
        return None
    return Outgoing(rendering.render(mail, link=link.url, minutes=link.minutes), link.url)


def _link(mail: Row[Any]) -> Link | None:
    """Return the link of an email, or None if the account is not in the state for it."""
    config = current_app.config
    match mail.kind:
        # A reset also confirms the email. The owner of an address with which an attacker has
        # registered can so take the account over.
        case Kind.RESET | Kind.ALREADY_REGISTERED:
            user = links.user_by_email(mail.address)
            if user:
                return links.for_user(Purpose.RESET, user, config["RESET_LINK_SECONDS"])
        case Kind.VERIFY:
            user = links.user_by_email(mail.address)
            if user and not user.email_verified:
                return links.for_user(Purpose.VERIFY, user, config["VERIFICATION_LINK_SECONDS"])
        case Kind.EMAIL:
            user = links.user_by_id(mail.user_id)
            # An attacker's request from before a reset must not get a link that is valid after it.
            state = mail.parameters["state"]
            if user and links.is_state_of_change(state, user, mail.address):
                seconds = config["EMAIL_LINK_SECONDS"]
                return links.for_user(Purpose.EMAIL, user, seconds, mail.address)
        case Kind.INVITATION:
            invitation = links.invitation(int(mail.parameters["invitation"]))
            if invitation:
                return links.for_invitation(invitation)
    return None
