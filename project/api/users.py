"""/ping, and /users: list, add, look up."""

from urllib.parse import urlencode

from flask import Response, request
from flask_openapi3 import APIBlueprint

from project import accounts
from project.api import guards, requests
from project.api.responses import success
from project.api.schemas import Cursor, NewUser, Page, UserPath
from project.extensions import db

users_blueprint = APIBlueprint("users", __name__)


@users_blueprint.get("/ping")
def ping_pong() -> Response:
    """Say that the process answers; nothing else is asked."""
    return success(message="pong!")


@users_blueprint.get("/users")
@guards.required(guards.admin_unless_open)
def list_users(query: Page) -> Response:
    """List the users, newest first, a page at a time."""
    users = accounts.newest(query.limit + 1, query.after)
    page, more = users[: query.limit], users[query.limit :]
    following = str(Cursor(page[-1].created_at, page[-1].id)) if more else None
    response = success(data={"users": [user._asdict() for user in page], "next": following})
    if following:
        target = f"{request.path}?{urlencode({'limit': query.limit, 'after': following})}"
        response.headers["Link"] = f'<{target}>; rel="next"'
    return response


@users_blueprint.post("/users")
@guards.required(requests.take_turn, guards.admin_unless_open)
def add_user(body: NewUser) -> Response:
    """Add a user, who can log in from then on."""
    user = accounts.add(body.username, body.email, body.password)
    db.session.commit()
    return success(201, message=f"{user.email} was added!")


@users_blueprint.get("/users/<user_id>")
@guards.required(guards.admin_or_self_unless_open)
def get_single_user(path: UserPath) -> Response:
    """Look up a user by id."""
    return success(data=accounts.find(path.user_id)._asdict())
