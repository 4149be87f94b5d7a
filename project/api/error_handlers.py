"""Error handlers: the only place that turns an exception into a response."""

import traceback
from typing import cast

import flask
import structlog
from flask import Flask, request
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException

from project import errors
from project.accounts import fields
from project.api.requests import Request
from project.api.responses import failure
from project.lib import database

log = structlog.get_logger()

DATABASE_RETRY_AFTER = 5  # seconds

# The only errors with the status "fail", and only in the users blueprint; all others are "error".
_VIEW_FAILURES = (
    errors.InvalidPayload,
    errors.EmailExists,
    errors.UserNotFound,
    errors.WrongPassword,
    errors.WrongCode,
    errors.TotpNotFound,
    errors.LastAdmin,
    errors.OwnAccount,
    errors.PreconditionFailed,
    errors.UsernameExists,
)
_REFUSED_TOKENS = (errors.TokenInvalid, errors.TokenExpired, errors.TokenOfInactive)
_OAUTH_ERRORS = {
    errors.InvalidClient,
    errors.InvalidScope,
    errors.UnsupportedGrantType,
    errors.UnsupportedTokenType,
}
_OAUTH_ERRORS_BY_STATUS = {
    429: "temporarily_unavailable",
    500: "server_error",
    503: "temporarily_unavailable",
}
_BY_STATUS: dict[int | None, type[errors.ServiceError]] = {
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    413: errors.PayloadTooLarge,
    500: errors.InternalError,
}


def init_app(app: Flask) -> None:
    """Answer every exception with JSON."""
    app.register_error_handler(errors.ServiceError, answer)
    app.register_error_handler(HTTPException, answer_http)
    app.register_error_handler(SQLAlchemyError, answer_database)
    app.register_error_handler(Exception, answer_unhandled)


def raise_invalid_payload(error: ValidationError) -> flask.Response:
    """Raise InvalidPayload for a body or query that does not match its schema."""
    raise fields.invalid_payload(error)


def answer(error: errors.ServiceError) -> flask.Response:
    """Return the response to an error of the service."""
    flask.g.refusal = error.code
    status = envelope_status(type(error), request.blueprint)
    oauth = oauth_error(type(error), request.blueprint)
    response = failure(error, status, cast(Request, request).id, oauth)
    if isinstance(error, errors.InvalidClient):
        response.headers["WWW-Authenticate"] = 'Basic realm="users"'
    elif error.status == 401:
        # RFC 6750, 3.1: no error code if the request has no credentials.
        code = ', error="invalid_token"' if isinstance(error, _REFUSED_TOKENS) else ""
        response.headers["WWW-Authenticate"] = f'Bearer realm="users"{code}'
    return response


def envelope_status(error: type[errors.ServiceError], blueprint: str | None) -> str:
    """Return the `status` member of the response to an error, "fail" or "error"."""
    in_view = blueprint == "users" and issubclass(error, _VIEW_FAILURES)
    return "fail" if in_view else "error"


def oauth_error(error: type[errors.ServiceError], blueprint: str | None) -> str | None:
    """Return the `error` of RFC 6749 in the response of a route for OAuth clients, or None."""
    if blueprint != "oauth":
        return None
    if error in _OAUTH_ERRORS:
        return error.code
    return _OAUTH_ERRORS_BY_STATUS.get(error.status, "invalid_request")


def answer_http(error: HTTPException) -> flask.Response:
    """Return the response to an error of Flask or Werkzeug, with its headers (such as Allow)."""
    response = answer(_BY_STATUS.get(error.code, errors.BadRequest)())
    for name, value in error.get_headers():
        if name != "Content-Type":
            response.headers[name] = value
    return response


def answer_database(error: SQLAlchemyError) -> flask.Response:
    """Return a 503 if the database is unavailable, and a 500 for any other database error."""
    if not database.is_unavailable(error):
        return answer_unhandled(error)
    sqlstate = database.sqlstate(error)
    log.error("database_unavailable", error=type(error).__name__, sqlstate=sqlstate)
    return answer(errors.DatabaseUnavailable(retry_after=DATABASE_RETRY_AFTER))


def answer_unhandled(error: Exception) -> flask.Response:
    """Log an unexpected exception and return a 500."""
    log_unhandled(error)
    return answer(errors.InternalError())


def log_unhandled(error: BaseException) -> None:
    """Log the type and stack of an exception, never its text, which may quote a row or a secret."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    path = cast(Request, request).redacted_path
    log.error("unhandled_exception", error=type(error).__name__, path=path, stack=stack)
