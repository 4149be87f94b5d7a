"""The only place that builds the JSON envelope."""

from typing import Any

import flask
import orjson
from flask.json.provider import JSONProvider

from project.errors import ServiceError

# X-Frame-Options says nothing that frame-ancestors does not. A page that CORS lets in asks in a
# mode that Cross-Origin-Resource-Policy has no say in (Fetch, 3.7): it stops images and scripts.
_HEADERS = [
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
]
# Moments are RFC 3339 in UTC, to the second: 2026-11-22T09:00:00Z.
_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_OMIT_MICROSECONDS


class Response(flask.Response):
    """JSON, unless told, that nobody stores and no browser takes for something else."""

    default_mimetype = "application/json"

    def __init__(
        self,
        response: Any = None,
        status: Any = None,
        headers: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make an answer as Flask does, with the headers that every answer has unless told."""
        super().__init__(response, status, headers or _HEADERS, *args, **kwargs)
        if headers:
            for name, value in _HEADERS:
                self.headers.setdefault(name, value)


class OrjsonProvider(JSONProvider):
    """orjson behind Flask's own JSON functions: strict UTF-8, no NaN, bounded depth."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        """Return `obj` as JSON text."""
        return orjson.dumps(obj, option=_OPTIONS).decode()

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        """Return what the JSON text says; raises ValueError when it is none."""
        return orjson.loads(s)


def success(status: int = 200, **members: Any) -> flask.Response:
    """Return the answer to a request that did what it asked for."""
    return _answer({"status": "success", **members}, status)


def failure(error: ServiceError, word: str, request_id: str) -> flask.Response:
    """Return the answer to a refused request; `word` is "error", or "fail" in a /users view.

    Where the service failed it says under which id the log has that.
    """
    envelope: dict[str, Any] = {"status": word, "message": error.message, "code": error.code}
    if error.status >= 500:
        envelope["request_id"] = request_id
    if error.errors is not None:
        envelope["errors"] = error.errors
    response = _answer(envelope, error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _answer(envelope: dict[str, Any], status: int) -> flask.Response:
    return Response(orjson.dumps(envelope, option=_OPTIONS), status)
