"""The headers RateLimit and RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers-10).

A login and a refresh have none. What is left of the limit of an address would tell whether an
account is known there: a failed login for such an account does not count against the address.
"""

import math

import flask
from flask import Flask

from project import clock
from project.accounts import rate_limits


def init_app(app: Flask) -> None:
    """Add the headers to responses if RATE_LIMITS is on."""
    if app.config["RATE_LIMITS"]:
        app.after_request(add_rate_limit_headers)


def add_rate_limit_headers(response: flask.Response) -> flask.Response:
    """Add to a response what is left of the limits that the request counted against."""
    now = clock.utcnow()
    policies, states = [], []
    for quota in rate_limits.quotas().values():
        name, limit, window = quota.policy.name, quota.policy.limit, quota.policy.window
        seconds = math.ceil(max(0.0, (quota.resets_at - now).total_seconds()))
        policies.append(f'"{name}";q={limit};w={window}')
        states.append(f'"{name}";r={max(0, limit - quota.attempts)};t={seconds}')
    if policies:
        response.headers["RateLimit-Policy"] = ", ".join(policies)
        response.headers["RateLimit"] = ", ".join(states)
    return response
