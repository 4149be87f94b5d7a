"""The access log: one line for each request, with its request ID, and its metrics."""

import time

import flask
from flask import Flask, g

from project.api.requests import PROBES, Request
from project.lib import logs, metrics

# Other methods, which a client may make up, are logged and counted as "other".
_METHODS = {"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"}


def record(app: Flask, request: Request, response: flask.Response) -> None:
    """Set X-Request-ID on `response`, count it and log it; the last step of each request.

    A probe that succeeds leaves no line without LOG_PROBES. The line contains the path, never the
    query or a header. `ms` is the time since the request reached the application, including the
    time to read its body.
    """
    seconds = time.perf_counter() - request.began_at
    method = request.method if request.method in _METHODS else "other"
    route = request.url_rule.rule if request.url_rule else None
    context = vars(g._get_current_object())
    refusal, user = context.get("refusal"), context.get("user")
    status, request_id = response.status_code, request.id
    response.headers["X-Request-ID"] = request_id
    counters = metrics.of(app)
    counters.answer(method, route, status, seconds)
    if route in PROBES and status < 300 and not app.config["LOG_PROBES"]:
        return
    line: dict[str, object] = {
        "method": method,
        "path": request.redacted_path,
        "status": status,
        "ms": round(seconds * 1000, 1),
        "ip": request.remote_addr,
        "request_id": request_id,
    }
    if trace_id := request.trace_id:
        line["trace_id"] = trace_id
    if route:
        line["route"] = route
    if refusal:
        counters.refusal(route, refusal)
        line["code"] = refusal
    if user:
        line["user_id"] = user.id
    logs.info("request", line)
