"""/users: list, search, add, retrieve, change and delete users; and /ping."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlencode

from flask import Response, g, request, url_for
from sqlalchemy import Row

from project import errors
from project.accounts import (
    administration,
    audit,
    directory,
    invitations,
    registration,
    verification,
)
from project.accounts.fields import NewUser
from project.api import guards, requests, responses, schemas
from project.api.openapi import Blueprint
from project.api.paging import Cursor, EventsPage, NameCursor, Page, UsersPage
from project.api.responses import full_user, success
from project.extensions import db

_STEP_UP_ERRORS = (
    errors.StepUpRequired,
    errors.WrongCode,
    errors.TooManyAttempts,
    errors.MfaNotConfigured,
)

users_blueprint = Blueprint("users", "Users, and the audit log of their accounts.")


@users_blueprint.get("/ping")
@responses.returns(200, schemas.Probe)
def ping_pong() -> Response:
    """Check that the process responds; no other component is checked.

    It requires no token, and no HTTPS.
    """
    return success(message="pong!")


@users_blueprint.get("/users")
@guards.required(guards.admin_unless_open)
@responses.returns(200, schemas.Users)
def list_users(query: UsersPage) -> Response:
    """List users or search for users, one page at a time.

    Without `query`, users are listed newest first. With `query`, the users whose username or email
    begins with it, in any case, are listed in the order of that name; a page may then have fewer
    than `limit` users and still have a `next`. With `ids`, the users with these IDs are listed in
    this order, in one page; unknown IDs are left out. Admins also see `active`, `admin` and
    `roles`, and their searches are recorded in the audit log, unless the users API is open.
    """
    full = guards.is_admin()
    show = partial(directory.members, full=full)
    if query.ids is not None:
        named = directory.find_all(query.ids, full=full)
        return _page("users", [show(user) for user in named], None)
    if query.query is None:
        newest = directory.newest(query.limit + 1, query.after, full=full)
        return _newest_page("users", newest, query, show)
    users, place = directory.search(
        query.query, query.limit, query.after, requests.origin(), full=full
    )
    db.session.commit()
    following = str(NameCursor(*place)) if place else None
    return _page("users", users, following, query=query.query, limit=query.limit)


@users_blueprint.post("/users")
@guards.required(requests.reserve_hash_slot, guards.admin_unless_open)
@responses.returns(201, schemas.AddedUser, errors.EmailExists, errors.UsernameExists)
def add_user(body: NewUser) -> Response:
    """Add a user, who can then log in.

    The user is active, and no admin. Unlike a registration, this starts no session.
    """
    user = registration.add(
        body.username,
        body.email,
        body.password,
        requests.origin(),
        email_verified=guards.is_admin(),
    )
    db.session.commit()
    response = success(201, message=f"{user.email} was added!", data=full_user(user))
    response.headers["Location"] = url_for("users.get_single_user", user_id=user.id)
    return response


@users_blueprint.post("/users/invitations")
@guards.required(requests.reserve_body_slot, guards.admin)
@responses.returns(
    202, schemas.Done, errors.EmailExists, errors.UsernameExists, errors.MailNotConfigured
)
def invite_user(body: schemas.Invitation) -> Response:
    """Send a link to an email address with which its owner registers.

    The link is valid for INVITATION_LINK_SECONDS, and until the email is invited again.
    """
    invitations.invite(body.email, body.username or None, requests.origin())
    db.session.commit()
    return success(202, message="An invitation is on its way.")


@users_blueprint.get("/users/<user_id>")
@guards.required(guards.admin_or_self_unless_open)
@responses.returns(200, schemas.OneUser, errors.UserNotFound)
def get_single_user(path: schemas.UserPath) -> Response:
    """Retrieve a user; admins also see what they see in the list.

    If the users API is closed, users who are not admins can retrieve only themselves.
    `ETag` is the version of the user, for `If-Match` of a change.
    """
    full = guards.is_admin()
    user = directory.find(path.user_id, full=full)
    response = success(data=directory.members(user, full=full))
    response.set_etag(directory.version(user, full=full))
    return response


@users_blueprint.patch("/users/<user_id>")
@guards.required(requests.reserve_hash_slot, guards.admin_or_self)
@responses.returns(
    200,
    schemas.ChangedUser,
    errors.UserNotFound,
    errors.EmailExists,
    errors.WrongPassword,
    errors.LastAdmin,
    errors.PreconditionFailed,
    *_STEP_UP_ERRORS,
    errors.MailNotConfigured,
    accepted=schemas.ChangedUser,
)
def change_user(
    path: schemas.UserPath, header: schemas.UserVersion, body: schemas.UserChange
) -> Response:
    """Change a user's username or email, or, as an admin, `active`, `admin` and `roles`.

    Members that are not sent stay unchanged. Callers who change their own account send
    `current_password`; admins who change another account do not need it. Callers with a second
    factor send `code` too, unless their session has given one in the last minutes. Deactivating or
    reactivating a user ends their sessions. The last active admin can be neither deactivated nor
    demoted. With `If-Match`, the change is made only if no other request has changed the user.

    If SMTP_URL is set or EMAIL_VERIFICATION is not `off`, callers have to confirm a new email of
    their own: the answer is 202, the other changes are made, and the new email gets a link.
    """
    own = path.user_id == g.user.id
    user, email_unconfirmed = administration.change(
        path.user_id,
        body.changes,
        g.user,
        requests.origin(),
        password=body.current_password or None,
        code=body.code or None,
        versions=header.versions,
        confirm_email=own and verification.changes_are_confirmed(),
    )
    db.session.commit()
    if email_unconfirmed:
        response = success(202, message=responses.CONFIRM_CHANGE, data=full_user(user))
    else:
        response = success(message="User changed.", data=full_user(user))
    response.set_etag(directory.version(user, full=True))
    return response


@users_blueprint.delete("/users/<user_id>")
@guards.required(requests.reserve_optional_body_slot, guards.admin)
@responses.returns(200, schemas.Done, errors.UserNotFound, errors.OwnAccount, *_STEP_UP_ERRORS)
def delete_user(path: schemas.UserPath, body: schemas.OptionalCode) -> Response:
    """Delete a user, their sessions, and all data that identifies them.

    The events of the account stay in the audit log, without the user. Admins delete their own
    account with `DELETE /auth/account`, which requires the password.
    """
    administration.delete(
        path.user_id, g.user, requests.origin(), password=None, code=body.code or None
    )
    db.session.commit()
    return success(message="User deleted.")


@users_blueprint.delete("/users/<user_id>/totp")
@guards.required(requests.reserve_optional_body_slot, guards.admin)
@responses.returns(
    200,
    schemas.Done,
    errors.UserNotFound,
    errors.TotpNotFound,
    errors.OwnTotp,
    *_STEP_UP_ERRORS,
)
def reset_totp(path: schemas.UserPath, body: schemas.OptionalCode) -> Response:
    """Turn off the authenticator of a user who has lost it, and end their sessions.

    Make sure that it is this user who asks for it. Admins turn their own authenticator off with
    `DELETE /auth/totp`, which requires the password.
    """
    administration.reset_totp(path.user_id, g.user, requests.origin(), code=body.code or None)
    db.session.commit()
    return success(message="Authenticator turned off.")


@users_blueprint.get("/users/<user_id>/events")
@guards.required(guards.admin_or_self)
@responses.returns(200, schemas.Events, errors.UserNotFound)
def list_events(path: schemas.UserPath, query: EventsPage) -> Response:
    """List the audit log of a user's account, newest first, one page at a time.

    Users can list their own, and admins that of every user. The address, user agent and request ID
    of an event are null or empty if another user caused it.
    """
    directory.find(path.user_id)
    newest = audit.of_user(path.user_id, query.limit + 1, query.after)
    return _newest_page("events", newest, query, Row._asdict)


def _newest_page(
    name: str,
    rows: Sequence[Row[Any]],
    query: Page | UsersPage,
    show: Callable[[Row[Any]], dict[str, Any]],
) -> Response:
    """Return a page of rows sorted newest first, as `show` returns each for clients.

    `rows` has one row more than `query.limit` if there is a next page.
    """
    page, more = rows[: query.limit], rows[query.limit :]
    following = str(Cursor(page[-1].created_at, page[-1].id)) if more else None
    return _page(name, [show(row) for row in page], following, limit=query.limit)


def _page(
    name: str, page: Sequence[dict[str, Any]], following: str | None, **query: str | int
) -> Response:
    """Return a page, with the cursor and the link of the next page if there is one."""
    response = success(data={name: page, "next": following})
    if following:
        target = f"{request.path}?{urlencode(query | {'after': following})}"
        response.headers["Link"] = f'<{target}>; rel="next"'
    return response
