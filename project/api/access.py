"""Every answer, once: it carries the id of its request, is counted, and is a line of the log."""

import time
from typing import cast

import flask
import structlog
from flask import g

from project import metrics
from project.api.requests import Request

log = structlog.get_logger()


def record(response: flask.Response) -> None:
    """Give `response` the id of its request, count it, and log it, as the last thing it meets.

    The line has the path, never the query or a header. `ms` is the time since the request was
    handed to the application, the reading of its body included.
    """
    request = cast(Request, flask.request)
    seconds = time.perf_counter() - request.began_at
    route = request.url_rule.rule if request.url_rule else None
    refusal = g.get("refusal")
    user = g.get("user")
    response.headers["X-Request-ID"] = request.id
    measured = metrics.present()
    measured.answer(request.method, route, response.status_code, seconds)
    if refusal:
        measured.refusal(route, refusal)
    line = {
        "method": request.method,
        "path": request.shown_path,
        "route": route,
        "status": response.status_code,
        "code": refusal,
        "ms": round(seconds * 1000, 1),
        "ip": request.remote_addr,
        "user_id": user.id if user else None,
    }
    log.info("request", **{name: value for name, value in line.items() if value is not None})
