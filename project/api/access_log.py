"""Every answer, once: it carries the id of its request, is counted, and is a line of the log."""

import time

import flask
import structlog
from flask import Flask, g

from project import metrics
from project.api.requests import Request

# Any other is what somebody made up: it is not logged, and counted as one.
_METHODS = {"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"}

log = structlog.get_logger()


def record(app: Flask, request: Request, response: flask.Response) -> None:
    """Give `response` the id of its request, count it, and log it, as the last thing it meets.

    The line has the path, never the query or a header. `ms` is the time since the request was
    handed to the application, the reading of its body included.
    """
    seconds = time.perf_counter() - request.began_at
    method = request.method if request.method in _METHODS else "other"
    route = request.url_rule.rule if request.url_rule else None
    here = vars(g._get_current_object())
    refusal, user = here.get("refusal"), here.get("user")
    response.headers["X-Request-ID"] = request.id
    measured = metrics.of(app)
    measured.answer(method, route, response.status_code, seconds)
    line: dict[str, object] = {
        "method": method,
        "path": request.shown_path,
        "status": response.status_code,
        "ms": round(seconds * 1000, 1),
        "ip": request.remote_addr,
        "request_id": request.id,
    }
    if route:
        line["route"] = route
    if refusal:
        measured.refusal(route, refusal)
        line["code"] = refusal
    if user:
        line["user_id"] = user.id
    log.info("request", **line)
