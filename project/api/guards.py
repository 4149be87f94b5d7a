"""Guards: functions that authenticate and authorize a request, or raise an error.

A view names its guards with `@required(...)`; `run_guards` calls them before the body is read.
"""

import re
from collections.abc import Callable

from flask import current_app, g, request

from project import errors
from project.accounts import clients, second_factor, sessions
from project.api import requests, responses
from project.api.responses import Function

TOKEN_ERRORS = (
    errors.TokenInvalid,
    errors.TokenExpired,
    errors.TokenOfInactive,
    errors.SessionEnded,
)
_CALLER_ERRORS = (errors.TokenMissing, *TOKEN_ERRORS, errors.MfaEnrolmentRequired)
_ACCESS_ERRORS = (errors.PermissionDenied, *_CALLER_ERRORS)

# RFC 6750, 2.1: the scheme in any case, one space, one token.
_BEARER = re.compile(r"bearer ([A-Za-z0-9._~+/-]+=*)", re.ASCII | re.IGNORECASE)


def required(*guards: Callable[[], None]) -> Callable[[Function], Function]:
    """Return a decorator that sets the guards of a view, in the order in which they run."""

    def decorate(view: Function) -> Function:
        view.guards = guards  # type: ignore[attr-defined]  # a function takes any attribute
        return view

    return decorate


def run_guards() -> None:
    """Run the guards of the requested view.

    OPTIONS requests carry no token and only return the methods of a path, so no guard runs.
    """
    if request.method != "OPTIONS":
        view = current_app.view_functions.get(request.endpoint or "")
        for guard in getattr(view, "guards", ()):
            guard()


@responses.raises(*_CALLER_ERRORS)
def authenticate() -> None:
    """Do what `authenticate_to_enrol` does, and raise MfaEnrolmentRequired (REQUIRE_MFA)."""
    authenticate_to_enrol()
    if second_factor.must_enrol(g.user):
        raise errors.MfaEnrolmentRequired


@responses.raises(errors.TokenMissing, *TOKEN_ERRORS)
def authenticate_to_enrol() -> None:
    """Set `g.user` to the user of the access token, including its `session_id`, with one query.

    This is for a user who may still have to set up a second factor. Raises TokenMissing without an
    Authorization header, TokenInvalid if the header is no Bearer token, and the errors of
    `sessions.identify`.
    """
    header = request.headers.get("Authorization")
    if header is None:
        raise errors.TokenMissing
    bearer = _BEARER.fullmatch(header)
    if bearer is None:
        raise errors.TokenInvalid
    g.user = sessions.identify(bearer[1])


@responses.raises(errors.LogoutTokenMissing, *TOKEN_ERRORS)
def authenticate_to_log_out() -> None:
    """Authenticate, but raise LogoutTokenMissing (403) without an Authorization header."""
    if "Authorization" not in request.headers:
        raise errors.LogoutTokenMissing
    authenticate_to_enrol()


@responses.raises(*_ACCESS_ERRORS)
def admin() -> None:
    """Require an active admin."""
    authenticate()
    if not g.user.admin:
        raise errors.PermissionDenied


@responses.raises(*_ACCESS_ERRORS)
def admin_unless_open() -> None:
    """Require an active admin, unless the users API is open."""
    if not current_app.config["USERS_API_OPEN"]:
        admin()


@responses.raises(*_ACCESS_ERRORS)
def admin_or_self() -> None:
    """Require an active admin, or the user whose ID is in the path."""
    authenticate()
    if not g.user.admin and (request.view_args or {})["user_id"] != str(g.user.id):
        raise errors.PermissionDenied


@responses.raises(*_ACCESS_ERRORS)
def admin_or_self_unless_open() -> None:
    """Require an active admin or the user in the path, unless the users API is open."""
    if not current_app.config["USERS_API_OPEN"]:
        admin_or_self()


@responses.raises(errors.InvalidClient, errors.TooManyAttempts)
def client() -> None:
    """Set `g.client` to the OAuth client whose name and secret the request has (Basic, RFC 7617).

    Raises InvalidClient without them, and the errors of `clients.authenticate`.
    """
    given = request.authorization
    if given is None or given.type != "basic":
        raise errors.InvalidClient
    g.client = clients.authenticate(given.username or "", given.password or "", requests.origin())


def is_admin() -> bool:
    """Tell whether a guard authenticated the caller, and the caller is an admin."""
    return "user" in g and bool(g.user.admin)
