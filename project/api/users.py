"""/ping, and /users: list, add, look up, and what happened to them."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from flask import Response, request
from flask_openapi3 import APIBlueprint
from sqlalchemy import Row

from project import accounts, audit
from project.api import answers, guards, requests
from project.api.responses import success
from project.api.schemas import Cursor, EventsPage, NewUser, Page, UserPath
from project.errors import EmailExists, UserNotFound
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
def list_users(query: Page) -> Response:
    """List the users, newest first, a page at a time."""
    return _page("users", accounts.newest(query.limit + 1, query.after), query.limit)


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
    """Look up a user by id."""
    return success(data=accounts.find(path.user_id)._asdict())


@users_blueprint.get("/users/<user_id>/events")
@guards.required(guards.admin_or_self)
@answers.has(200, answers.Events, UserNotFound)
def list_events(path: UserPath, query: EventsPage) -> Response:
    """List what happened to a user's account, newest first, a page at a time."""
    accounts.find(path.user_id)
    return _page("events", audit.of_user(path.user_id, query.limit + 1, query.after), query.limit)


def _page(name: str, rows: Sequence[Row[Any]], limit: int) -> Response:
    """Answer with at most `limit` rows, and where the next page begins if there are more."""
    page, more = rows[:limit], rows[limit:]
    following = str(Cursor(page[-1].created_at, page[-1].id)) if more else None
    response = success(data={name: [row._asdict() for row in page], "next": following})
    if following:
        target = f"{request.path}?{urlencode({'limit': limit, 'after': following})}"
        response.headers["Link"] = f'<{target}>; rel="next"'
    return response
