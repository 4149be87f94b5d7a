"""Who is calling. A guard verifies and raises; it answers nothing.

A view names its guards with `@required(...)`; `speak_first` calls them before the body is read.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from flask import current_app, g, request

from project import sessions
from project.api import answers
from project.errors import (
    LogoutTokenMissing,
    PermissionDenied,
    SessionEnded,
    TokenExpired,
    TokenInvalid,
    TokenMissing,
    TokenOfInactive,
)

View = TypeVar("View", bound=Callable[..., Any])

# RFC 6750, 2.1: one scheme, in any case, one space, one token.
_BEARER = re.compile(r"bearer ([A-Za-z0-9._~+/-]+=*)", re.ASCII | re.IGNORECASE)


_REFUSED = (TokenInvalid, TokenExpired, TokenOfInactive, SessionEnded)


def required(*guards: Callable[[], None]) -> Callable[[View], View]:
    """Return a decorator that names the guards of a view, in the order in which they speak."""

    def name(view: View) -> View:
        view.guards = guards  # type: ignore[attr-defined]  # a function takes any attribute
        return view

    return name


def speak_first() -> None:
    """Call the guards of the view that this request is for.

    OPTIONS asks which methods there are, which is no secret, and carries no token.
    """
    if request.method != "OPTIONS":
        view = current_app.view_functions.get(request.endpoint or "")
        for guard in getattr(view, "guards", ()):
            guard()


@answers.raises(TokenMissing, *_REFUSED)
def authenticate() -> None:
    """Put the user who is calling on `g.user`, with the `session_id` they call in, in one query.

    Raises TokenMissing with no Authorization header, TokenInvalid for one that is no Bearer
    token, and what `sessions.identify` raises.
    """
    header = request.headers.get("Authorization")
    if header is None:
        raise TokenMissing
    bearer = _BEARER.fullmatch(header)
    if bearer is None:
        raise TokenInvalid
    g.user = sessions.identify(bearer[1])


@answers.raises(LogoutTokenMissing, *_REFUSED)
def authenticate_to_log_out() -> None:
    """As `authenticate`, with the 403 that logout has for a missing header."""
    if "Authorization" not in request.headers:
        raise LogoutTokenMissing
    authenticate()


@answers.raises(PermissionDenied, TokenMissing, *_REFUSED)
def admin() -> None:
    """Let only active admins in."""
    authenticate()
    if not g.user.admin:
        raise PermissionDenied


@answers.raises(PermissionDenied, TokenMissing, *_REFUSED)
def admin_unless_open() -> None:
    """Let anybody in while the users API is open, and as `admin` when it is not."""
    if not current_app.config["USERS_API_OPEN"]:
        admin()


@answers.raises(PermissionDenied, TokenMissing, *_REFUSED)
def admin_or_self() -> None:
    """Let active admins in, and the user whose id is in the path."""
    authenticate()
    if not g.user.admin and (request.view_args or {})["user_id"] != str(g.user.id):
        raise PermissionDenied


@answers.raises(PermissionDenied, TokenMissing, *_REFUSED)
def admin_or_self_unless_open() -> None:
    """Let anybody in while the users API is open, and as `admin_or_self` when it is not."""
    if not current_app.config["USERS_API_OPEN"]:
        admin_or_self()


def is_admin() -> bool:
    """Tell whether a guard before this has seen that the caller is an admin."""
    return "user" in g and bool(g.user.admin)
