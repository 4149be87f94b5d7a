"""Cross-origin resource sharing (CORS) for the origins in CORS_ORIGINS."""

import flask
from flask import Flask, current_app, request

from project.api.responses import Response

_EXPOSED_HEADERS = (
    "WWW-Authenticate, Retry-After, Link, X-Request-ID, Location, ETag, RateLimit, RateLimit-Policy"
)
_PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": (
        "Authorization, Content-Type, If-Match, traceparent, X-Request-ID, X-Requested-With"
    ),
    "Access-Control-Max-Age": "600",  # seconds that a browser may cache the preflight
}


def init_app(app: Flask) -> None:
    """Answer preflight requests before any guard runs, and add headers, if CORS_ORIGINS is set."""
    if app.config["CORS_ORIGINS"]:
        app.before_request(answer_preflight)
        app.after_request(add_cors_headers)


def answer_preflight() -> flask.Response | None:
    """Answer a CORS preflight request (Fetch, 3.3.2) for any path.

    A preflight carries no token, so guards would refuse it. Unknown paths are included because a
    page must be able to read their 404.
    """
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return Response(status=204, headers=_PREFLIGHT_HEADERS)
    return None


def add_cors_headers(response: flask.Response) -> flask.Response:
    """Allow pages of the configured origins to read the response, errors included.

    Credentials in the sense of Fetch (cookies) are never allowed; pages send a token explicitly.
    """
    origins: frozenset[str] = current_app.config["CORS_ORIGINS"]
    origin = request.headers.get("Origin")
    if "*" in origins:
        origin = "*"
    else:
        response.vary.add("Origin")
    if origin in origins:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED_HEADERS
    return response
