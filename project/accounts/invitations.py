"""Invitations: an admin invites the owner of an email address to register.

Functions here write and may flush. The caller commits.
"""

from datetime import timedelta

from flask import current_app
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError

from project import clock, errors
from project.accounts import audit, links, mails, password_policy, registration, sessions
from project.extensions import db
from project.lib import database
from project.models import User, invitations_table

_invitations = invitations_table.c


def invite(email: str, username: str | None, origin: audit.Origin) -> None:
    """Send a link to register with this email; an earlier invitation of it is replaced.

    `username` is what the user is called unless they choose another one. Raise EmailExists or
    UsernameExists if it is taken now; whether it still is free is decided when the user registers.
    Raise MailNotConfigured.
    """
    mails.check_configured()
    if taken := registration.names_in_use(username, email):
        raise registration.conflict(taken, errors.UsernameExists)
    audit.lock_actor(origin)
    now = clock.utcnow()
    values = {
        "email": email,
        "username": username,
        "created_at": now,
        "expires_at": now + timedelta(seconds=current_app.config["INVITATION_LINK_SECONDS"]),
    }
    new = database.insert(invitations_table).values(values)
    replacing = new.on_conflict_do_update(index_elements=[_invitations.email], set_=values)
    invitation_id = db.session.scalars(replacing.returning(_invitations.id)).one()
    mails.add(mails.Kind.INVITATION, email, origin, invitation=str(invitation_id))
    audit.record(audit.Kind.USER_INVITED, origin, user_id=None)


def accept(
    token: str, username: str | None, password: str, origin: audit.Origin
) -> tuple[User, sessions.TokenPair]:
    """Add the invited user; return the user and the tokens of their first session.

    Raise LinkInvalid; InvalidPayload for a weak password, or if neither the user nor the
    invitation has a username; UserExists. After the last two the link still works.
    """
    invitation = links.invitation_of(token)
    name = username or invitation.username
    if name is None:
        raise errors.InvalidPayload(errors={"username": "is required"})
    password_policy.check_new(password, name, invitation.email)
    user = User(name, invitation.email, password, email_verified=True)
    # Of concurrent requests with the same link, one deletes the row, and the others wait for it.
    this_one = _invitations.id == invitation.id, _invitations.created_at == invitation.created_at
    if not database.write(delete(invitations_table).where(*this_one)):
        raise errors.LinkInvalid
    try:
        return user, registration.start(user, origin)
    except IntegrityError as error:
        db.session.rollback()
        raise errors.UserExists(
            errors=registration.taken_names(error, name, invitation.email)
        ) from None


def forget(email: str) -> None:
    """Delete the invitation of an email, if there is one."""
    database.write(delete(invitations_table).where(_invitations.email == email))


def delete_expired() -> int:
    """Delete a batch of expired invitations; return how many, 0 at the end."""
    expired = _invitations.expires_at <= clock.utcnow()
    return database.delete_batch(invitations_table, expired, _invitations.expires_at)
