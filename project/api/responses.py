"""The response class, the JSON envelope, and the decorators that declare responses."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import flask
import orjson
from flask.json.provider import JSONProvider
from pydantic import BaseModel

from project.accounts import directory, verification
from project.errors import MfaRequired, ServiceError

# frame-ancestors makes X-Frame-Options redundant. Cross-Origin-Resource-Policy blocks no-cors
# requests only (images, scripts; Fetch, 3.7), so it does not affect pages that CORS allows.
_DEFAULT_HEADERS = [
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
]
CONFIRM_CHANGE = "Please confirm the change with the link we sent to the new address."
# Times are RFC 3339 in UTC, in whole seconds: 2026-11-22T09:00:00Z.
_JSON_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_OMIT_MICROSECONDS

Function = TypeVar("Function", bound=Callable[..., Any])


class Responses(NamedTuple):
    """The declared responses of a view: the schemas of its successes by status, and its errors."""

    models: dict[int, type[BaseModel]]
    errors: tuple[type[ServiceError], ...]


def returns(
    status: int,
    model: type[BaseModel],
    *errors: type[ServiceError],
    accepted: type[BaseModel] | None = None,
) -> Callable[[Function], Function]:
    """Return a decorator that declares the responses of a view, for the API document.

    A view that can also answer 202 declares the schema of that answer as `accepted`. `errors` are
    those of the view itself. Those of its guards, of invalid requests and of every route are added
    in `openapi`.
    """

    def decorate(view: Function) -> Function:
        models = {status: model} | ({202: accepted} if accepted else {})
        view.responses = Responses(models, errors)  # type: ignore[attr-defined]  # a function takes any attribute
        return view

    return decorate


def raises(*errors: type[ServiceError]) -> Callable[[Function], Function]:
    """Return a decorator that declares the errors of a guard, for the API document."""

    def decorate(guard: Function) -> Function:
        guard.raises = errors  # type: ignore[attr-defined]  # a function takes any attribute
        return guard

    return decorate


class Response(flask.Response):
    """A JSON response with headers against caching, content sniffing and embedding."""

    default_mimetype = "application/json"

    def __init__(
        self,
        response: Any = None,
        status: Any = None,
        headers: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Create a response like Flask's, with default headers where `headers` has no others."""
        super().__init__(response, status, headers or _DEFAULT_HEADERS, *args, **kwargs)
        if headers:
            for name, value in _DEFAULT_HEADERS:
                self.headers.setdefault(name, value)


class OrjsonProvider(JSONProvider):
    """Use orjson for Flask's JSON functions: strict UTF-8, no NaN, limited depth."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        """Return `obj` as JSON text."""
        return orjson.dumps(obj, option=_JSON_OPTIONS).decode()

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        """Return the value of the JSON text `s`; raises ValueError if it is invalid."""
        return orjson.loads(s)


def success(status: int = 200, **members: Any) -> flask.Response:
    """Return a success response with these members."""
    return _envelope({"status": "success", **members}, status)


def document(members: dict[str, Any]) -> flask.Response:
    """Return a success response whose form a standard prescribes, without the envelope."""
    return _envelope(members, 200)


def full_user(user: Any) -> dict[str, Any]:
    """Return the members of a user, of whom `user` has the columns as attributes."""
    names = ["id", "username", "email", "active", "admin", "created_at"]
    if verification.is_on():
        names.append("email_verified")
    return {name: getattr(user, name) for name in names} | directory.shown_roles(user)


def failure(
    error: ServiceError, status: str, request_id: str, oauth_error: str | None = None
) -> flask.Response:
    """Return an error response; `status` is the member of that name, "error" or "fail".

    A 5xx includes the request ID, to find the error in the log. `oauth_error` is the member
    `error` (RFC 6749, 5.2), if the response has one.
    """
    members: dict[str, Any] = {"status": status, "message": error.message, "code": error.code}
    if oauth_error is not None:
        members["error"] = oauth_error
    if isinstance(error, MfaRequired) and error.mfa_token:
        members["mfa_token"] = error.mfa_token
    if error.status >= 500:
        members["request_id"] = request_id
    if error.errors is not None:
        members["errors"] = error.errors
    response = _envelope(members, error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _envelope(members: dict[str, Any], status: int) -> flask.Response:
    return Response(orjson.dumps(members, option=_JSON_OPTIONS), status)
