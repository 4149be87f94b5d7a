"""The only place that turns an exception into an answer."""

import traceback
from typing import cast

import flask
import structlog
from flask import Flask, request
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException

from project import database, errors
from project.api import schemas
from project.api.requests import Request
from project.api.responses import failure

log = structlog.get_logger()

DATABASE_RETRY_AFTER = 5  # seconds

# What a view of /users itself refuses is a "fail"; what was refused before it, and everything
# elsewhere, is an "error".
_VIEW_FAILURES = (
    errors.InvalidPayload,
    errors.EmailExists,
    errors.UserNotFound,
    errors.WrongPassword,
    errors.LastAdmin,
)
_REFUSED_TOKENS = (errors.TokenInvalid, errors.TokenExpired, errors.TokenOfInactive)
_BY_STATUS: dict[int | None, type[errors.ServiceError]] = {
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    413: errors.PayloadTooLarge,
    500: errors.InternalError,
}


def init_app(app: Flask) -> None:
    """Make every exception a JSON answer."""
    app.register_error_handler(errors.ServiceError, answer)
    app.register_error_handler(HTTPException, answer_http)
    app.register_error_handler(SQLAlchemyError, answer_database)
    app.register_error_handler(Exception, answer_unforeseen)


def refuse_invalid(error: ValidationError) -> flask.Response:
    """Answer a body or query that does not fit its schema."""
    raise schemas.refuse(error)


def answer(error: errors.ServiceError) -> flask.Response:
    """Answer a refusal of the service's own."""
    flask.g.refusal = error.code
    name = cast(Request, request).id
    response = failure(error, word(type(error), request.blueprint), name)
    if error.status == 401:
        # RFC 6750, 3.1: a request without credentials is told no error code.
        response.headers["WWW-Authenticate"] = (
            'Bearer error="invalid_token"' if isinstance(error, _REFUSED_TOKENS) else "Bearer"
        )
    return response


def word(refusal: type[errors.ServiceError], blueprint: str | None) -> str:
    """Return what `status` says in the answer to a refusal."""
    in_view = blueprint == "users" and issubclass(refusal, _VIEW_FAILURES)
    return "fail" if in_view else "error"


def answer_http(error: HTTPException) -> flask.Response:
    """Answer a refusal of the framework's, with the headers it carries (Allow, for one)."""
    response = answer(_BY_STATUS.get(error.code, errors.BadRequest)())
    for name, value in error.get_headers():
        if name != "Content-Type":
            response.headers[name] = value
    return response


def answer_database(error: SQLAlchemyError) -> flask.Response:
    """Answer a fault of the database, or of our statements."""
    if not database.is_unavailable(error):
        return answer_unforeseen(error)
    state = getattr(getattr(error, "orig", None), "pgcode", None)
    log.error("database_unavailable", error=type(error).__name__, sqlstate=state)
    return answer(errors.DatabaseUnavailable(retry_after=DATABASE_RETRY_AFTER))


def answer_unforeseen(error: Exception) -> flask.Response:
    """Answer an exception that nobody foresaw, and log it."""
    log_unforeseen(error)
    return answer(errors.InternalError())


def log_unforeseen(error: BaseException) -> None:
    """Log where an exception came from, never its text: that may quote a row or a password."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    path = cast(Request, request).shown_path
    log.error("unhandled_exception", error=type(error).__name__, path=path, stack=stack)
