"""Links in emails: make one for the present state of an account, and find the account of one.

A link is made when its email is sent, and is stored nowhere. `tokens/links.py` says how a link is
bound to the state of the account; the token for the second step of a login is, too.
"""

import hmac
from typing import Any, NamedTuple

from flask import current_app
from sqlalchemy import ColumnElement, Row, bindparam, select

from project import clock, errors
from project.lib import database
from project.models import invitations_table, users_table
from project.tokens import keys, links
from project.tokens.links import LinkClaims, Purpose

_users = users_table.c
MFA_SECONDS = 300  # for the second step of a login

_USER = select(
    _users.id,
    _users.username,
    _users.email,
    _users.password,
    _users.email_verified,
    _users.mfa_enabled,
).where(_users.active)
_USER_BY_ID = _USER.where(_users.id == bindparam("user_id"))
_USER_BY_EMAIL = _USER.where(_users.email == bindparam("email"))
_invitations = invitations_table.c
_INVITATION = select(*_invitations).where(
    _invitations.id == bindparam("invitation_id"), _invitations.expires_at > bindparam("now")
)


class Link(NamedTuple):
    """A link, and how long it is valid."""

    url: str
    minutes: int


def user_by_id(user_id: int) -> Row[Any] | None:
    """Return the active user whom a link is about, or None."""
    return database.fetch_one(_USER_BY_ID, user_id=user_id)


def user_by_email(email: str) -> Row[Any] | None:
    """Return the active user whom a link is about, or None."""
    return database.fetch_one(_USER_BY_EMAIL, email=email)


def invitation(invitation_id: int) -> Row[Any] | None:
    """Return an invitation that has not expired, or None."""
    return database.fetch_one(_INVITATION, invitation_id=invitation_id, now=clock.utcnow())


def for_user(purpose: Purpose, user: Row[Any], seconds: int, new_email: str | None = None) -> Link:
    """Return a link that is valid for `seconds`, and until the account changes."""
    return _link(purpose, user.id, _state_of(user, new_email), seconds, new_email)


def for_invitation(invitation: Row[Any]) -> Link:
    """Return the link of an invitation, valid until the invitation is used or expires."""
    seconds = int((invitation.expires_at - clock.utcnow()).total_seconds())
    return _link(Purpose.INVITATION, invitation.id, _invitation_state(invitation), seconds)


def _link(
    purpose: Purpose, subject: int, state: tuple[str, ...], seconds: int, email: str | None = None
) -> Link:
    """Return the link to the page of the client, which sends the token back with a POST.

    The token is in the fragment: browsers send no fragment to a server, nor in a Referer.
    """
    token = _token(purpose, subject, state, seconds, email)
    base = current_app.config["LINK_BASE_URL"]
    return Link(f"{base}/#/{purpose}?token={token}", round(seconds / 60))


def _token(
    purpose: Purpose, subject: int, state: tuple[str, ...], seconds: int, email: str | None = None
) -> str:
    now = int(clock.utcnow().timestamp())
    key = keys.signing_key()
    claims = LinkClaims(
        subject, links.seal(purpose, state, key=key), email, now, now + max(seconds, 0)
    )
    return links.encode(purpose, claims, key=key)


def mfa_token(user_id: int, email: str, password_hash: str, email_verified: bool) -> str:
    """Return the token for the second step of a login, after the password was right.

    It is valid for MFA_SECONDS, and until the account changes.
    """
    state = _state(user_id, email, password_hash, email_verified)
    return _token(Purpose.MFA, user_id, state, MFA_SECONDS)


def user_of_mfa_token(token: str) -> Row[Any]:
    """Return the active user of a token of `mfa_token`; raise TokenExpired or TokenInvalid."""
    claims = _decode(Purpose.MFA, token)
    user = user_by_id(claims.subject)
    if user is None or not _is_sealed(Purpose.MFA, claims.state, _state_of(user)):
        raise errors.TokenInvalid
    return user


def user_of(purpose: Purpose, token: str) -> tuple[Row[Any], str | None]:
    """Return the active user of a link, and the new email in it; raise LinkInvalid."""
    claims = _claims(purpose, token)
    user = user_by_id(claims.subject)
    if user is None:
        raise errors.LinkInvalid
    _check_state(purpose, claims, _state_of(user, claims.email))
    return user, claims.email


def state_of_change(user: Row[Any], new_email: str) -> str:
    """Return what a link to change the email of `user` is bound to, to compare it later."""
    return links.seal(Purpose.EMAIL, _state_of(user, new_email), key=keys.signing_key())


def is_state_of_change(state: str, user: Row[Any], new_email: str) -> bool:
    """Return whether `state` is that of `user` now."""
    return _is_sealed(Purpose.EMAIL, state, _state_of(user, new_email))


def invitation_of(token: str) -> Row[Any]:
    """Return the invitation of a link; raise LinkInvalid."""
    claims = _claims(Purpose.INVITATION, token)
    found = invitation(claims.subject)
    if found is None:
        raise errors.LinkInvalid
    _check_state(Purpose.INVITATION, claims, _invitation_state(found))
    return found


def unchanged(user: Row[Any]) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for `user` being as they were read.

    An UPDATE with them decides between any number of requests with the same link.
    """
    bound = _users.id, _users.email, _users.password, _users.email_verified
    return _users.active, *(column == getattr(user, column.name) for column in bound)


def _claims(purpose: Purpose, token: str) -> LinkClaims:
    try:
        return _decode(purpose, token)
    except (errors.TokenExpired, errors.TokenInvalid):
        raise errors.LinkInvalid from None


def _decode(purpose: Purpose, token: str) -> LinkClaims:
    return links.decode(purpose, token, keys=keys.verification_keys(), now=clock.utcnow())


def _check_state(purpose: Purpose, claims: LinkClaims, state: tuple[str, ...]) -> None:
    """Raise LinkInvalid if what the link is bound to has changed since it was made."""
    if not _is_sealed(purpose, claims.state, state):
        raise errors.LinkInvalid


def _is_sealed(purpose: Purpose, given: str, state: tuple[str, ...]) -> bool:
    seals = (links.seal(purpose, state, key=key) for key in keys.verification_keys())
    return any(hmac.compare_digest(seal, given) for seal in seals)


def _state_of(user: Row[Any], new_email: str | None = None) -> tuple[str, ...]:
    state = _state(user.id, user.email, user.password, user.email_verified, new_email)
    # A change that was requested before the second factor was on has been confirmed by no code.
    return (*state, "mfa") if new_email and user.mfa_enabled else state


def _state(
    user_id: int, email: str, password_hash: str, email_verified: bool, new_email: str | None = None
) -> tuple[str, ...]:
    return str(user_id), email, password_hash, str(email_verified), new_email or ""


def _invitation_state(invitation: Row[Any]) -> tuple[str, ...]:
    return str(invitation.id), invitation.email, invitation.created_at.isoformat()
