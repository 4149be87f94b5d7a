"""/ping, and /users: list, search, add, look up, change, delete, and what happened to them."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from flask import Response, g, request
from flask_openapi3 import APIBlueprint
from sqlalchemy import Row

from project import accounts, audit, care
from project.api import answers, guards, requests
from project.api.responses import success
from project.api.schemas import (
    Cursor,
    EventsPage,
    NameCursor,
    NewUser,
    Page,
    UserChange,
    UserPath,
    UsersPage,
)
from project.errors import (
    EmailExists,
    InvalidPayload,
    LastAdmin,
    TooManyAttempts,
    UserNotFound,
    WrongPassword,
)
from project.extensions import db

users_blueprint = APIBlueprint("users", __name__)


@users_blueprint.get("/ping")
@answers.has(200, answers.Probe)
def ping_pong() -> Response:
    """Say that the process answers; nothing else is asked."""
    return success(message="pong!")


@users_blueprint.get("/users")
@guards.required(guards.admin_unless_open)
@answers.has(200, answers.Users)
def list_users(query: UsersPage) -> Response:
    """List the users, or those that a search finds, a page at a time.

    All of them come newest first. With `query`, those whose username or email begins with it,
    without regard to case, come in the order of that name; such a page may have fewer users than
    `limit` and still a `next`. An admin is shown `active` and `admin` too, unless the users API is
    open, and their searches are in the audit trail.
    """
    full = guards.is_admin()
    if query.query is None:
        return _newest("users", accounts.newest(query.limit + 1, query.after, full=full), query)
    users, place = accounts.search(
        query.query, query.limit, query.after, requests.origin(), full=full
    )
    db.session.commit()
    following = str(NameCursor(*place)) if place else None
    return _page("users", users, following, query=query.query, limit=query.limit)


@users_blueprint.post("/users")
@guards.required(requests.take_turn, guards.admin_unless_open)
@answers.has(201, answers.Done, EmailExists)
def add_user(body: NewUser) -> Response:
    """Add a user, who can log in from then on."""
    user = accounts.add(body.username, body.email, body.password, requests.origin())
    db.session.commit()
    return success(201, message=f"{user.email} was added!")


@users_blueprint.get("/users/<user_id>")
@guards.required(guards.admin_or_self_unless_open)
@answers.has(200, answers.OneUser, UserNotFound)
def get_single_user(path: UserPath) -> Response:
    """Look up a user by id; an admin is shown `active` and `admin` too, as in the list."""
    return success(data=accounts.find(path.user_id, full=guards.is_admin())._asdict())


@users_blueprint.patch("/users/<user_id>")
@guards.required(requests.take_turn, guards.admin_or_self)
@answers.has(
    200, answers.ChangedUser, UserNotFound, EmailExists, WrongPassword, LastAdmin, TooManyAttempts
)
def change_user(path: UserPath, body: UserChange) -> Response:
    """Change a user's username, email, or what only an admin may change: `active` and `admin`.

    What is not sent stays as it is. Everybody gives `current_password` to change their own
    account; an admin who changes another needs none. Deactivating a user ends their sessions, and
    so does activating them again. The last active admin can be neither deactivated nor demoted.
    """
    password = body.current_password or None
    user = care.change(path.user_id, body.changes, g.user, requests.origin(), password=password)
    db.session.commit()
    return success(message="User changed.", data=user._asdict())


@users_blueprint.delete("/users/<user_id>")
@guards.required(guards.admin)
@answers.has(200, answers.Done, UserNotFound, InvalidPayload)
def delete_user(path: UserPath) -> Response:
    """Delete a user, their sessions, and everything that names them.

    What is in the audit trail stays there, without the person. For their own account an admin
    takes `DELETE /auth/account`, with the password.
    """
    care.delete(path.user_id, g.user, requests.origin(), password=None)
    db.session.commit()
    return success(message="User deleted.")


@users_blueprint.get("/users/<user_id>/events")
@guards.required(guards.admin_or_self)
@answers.has(200, answers.Events, UserNotFound)
def list_events(path: UserPath, query: EventsPage) -> Response:
    """List what happened to a user's account, newest first, a page at a time."""
    accounts.find(path.user_id)
    return _newest("events", audit.of_user(path.user_id, query.limit + 1, query.after), query)


def _newest(name: str, rows: Sequence[Row[Any]], query: Page | UsersPage) -> Response:
    """Answer with at most as many rows as are asked for, of a list that begins with the newest."""
    page, more = rows[: query.limit], rows[query.limit :]
    following = str(Cursor(page[-1].created_at, page[-1].id)) if more else None
    return _page(name, [row._asdict() for row in page], following, limit=query.limit)


def _page(
    name: str, page: Sequence[dict[str, Any]], following: str | None, **query: str | int
) -> Response:
    """Answer with a page, and where the next one begins if there is one."""
    response = success(data={name: page, "next": following})
    if following:
        target = f"{request.path}?{urlencode(query | {'after': following})}"
        response.headers["Link"] = f'<{target}>; rel="next"'
    return response
