"""HTTPS enforcement, if FORCE_HTTPS is set."""

import flask
from flask import Flask, request

from project.api.requests import PROBES
from project.errors import HttpsRequired

_STRICT_TRANSPORT_SECURITY = "max-age=63072000; includeSubDomains"  # two years


def init_app(app: Flask) -> None:
    """Refuse plain HTTP before any guard runs, and send HSTS, if FORCE_HTTPS is set."""
    if app.config["FORCE_HTTPS"]:
        app.before_request(refuse_plain_http)
        app.after_request(add_hsts)


def refuse_plain_http() -> None:
    """Raise HttpsRequired for a request over plain HTTP.

    A redirect would hide a client that sends its token or password in plain text with every
    request; an error gets the client fixed. Probes carry no secrets, and load balancers and
    orchestrators send them without TLS.
    """
    if not request.is_secure and request.path not in PROBES:
        raise HttpsRequired


def add_hsts(response: flask.Response) -> flask.Response:
    """Tell browsers to use HTTPS from now on (RFC 6797).

    Browsers ignore the header in a response over plain HTTP (8.1).
    """
    response.headers["Strict-Transport-Security"] = _STRICT_TRANSPORT_SECURITY
    return response
