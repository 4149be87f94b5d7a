"""Browsers: whose pages may read the answers (CORS), and that nobody speaks in the clear.

Each is hooked in by its setting, and costs a request nothing without it.
"""

import flask
from flask import Flask, current_app, request

from project.api.responses import Response
from project.errors import HttpsRequired

_IN_THE_CLEAR = {"/ping", "/health/live", "/health/ready"}
_STRICT_TRANSPORT_SECURITY = "max-age=63072000; includeSubDomains"  # two years
_EXPOSED = "WWW-Authenticate, Retry-After, Link, X-Request-ID"
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Max-Age": "600",  # seconds that a browser need not ask again
}


def init_app(app: Flask) -> None:
    """Do what FORCE_HTTPS and CORS_ORIGINS ask for; before any guard speaks."""
    if app.config["FORCE_HTTPS"]:
        app.before_request(refuse_plain_http)
        app.after_request(demand_https)
    if app.config["CORS_ORIGINS"]:
        app.before_request(answer_preflight)
        app.after_request(let_pages_read)


def refuse_plain_http() -> None:
    """Let in what came by https, and questions about health; raises HttpsRequired.

    To redirect would make a client that leaks its token or password with every request work, and
    nobody would notice; refused, it is repaired the day it is written. _IN_THE_CLEAR have nothing
    to leak, and are asked by a balancer or container next door, without TLS.
    """
    if not request.is_secure and request.path not in _IN_THE_CLEAR:
        raise HttpsRequired


def demand_https(response: flask.Response) -> flask.Response:
    """Have a browser come by https from now on (RFC 6797).

    What is answered in the clear says so too; there a browser takes no notice (8.1).
    """
    response.headers["Strict-Transport-Security"] = _STRICT_TRANSPORT_SECURITY
    return response


def answer_preflight() -> flask.Response | None:
    """Answer the question that comes before a page's request (Fetch, 3.3.2), whatever the path.

    It carries no token, so no guard is asked; and a page has to be able to read a 404 too.
    """
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return Response(status=204, headers=_PREFLIGHT)
    return None


def let_pages_read(response: flask.Response) -> flask.Response:
    """Let the pages of the origins that are named read the answer, an error included.

    Never with credentials in the sense of Fetch (cookies): a token is sent on purpose, by the page.
    """
    origins: frozenset[str] = current_app.config["CORS_ORIGINS"]
    origin = request.headers.get("Origin")
    if "*" in origins:
        origin = "*"
    else:
        response.vary.add("Origin")
    if origin in origins:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
    return response
