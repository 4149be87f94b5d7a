"""Errors that the document declares on every route occur on every route."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from project import db
from project.accounts import clients
from project.api import openapi
from project.models import User
from project.tests.api.oauth_case import ISSUER, basic
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import ORIGIN, add_user, start_session

TOKENS = ("token_", "session_ended", "account_inactive")


class TestEveryRoute(BaseTestCase):
    """An admin, or another service, requests every route and receives every documented error."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}
    settings: ClassVar[dict[str, Any]] = {"USERS_API_OPEN": False}

    def setUp(self) -> None:
        """Log in an admin, and add a client; stop the clock, so that no token expires."""
        super().setUp()
        self.move_clock(0)
        self.admin = add_user("root", "root@test.com", "test", admin=True)
        self.token = start_session(self.admin).auth_token
        self.service = basic("orders", clients.create("orders", ISSUER, [], ORIGIN))
        db.session.commit()
        self.provoked = 0

    def routes(self, code: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
        """Yield method, path, endpoint and operation of every route that declares this code."""
        endpoints = {
            (method, rule.rule.replace("<", "{").replace(">", "}")): rule.endpoint
            for rule in self.app.url_map.iter_rules()
            for method in rule.methods or ()
        }
        for path, operations in openapi.describe(self.app)["paths"].items():
            for method, operation in operations.items():
                codes = {
                    example["value"]["code"]
                    for answer in operation["responses"].values()
                    for content in answer.get("content", {}).values()
                    for example in content.get("examples", {}).values()
                }
                if code in codes:
                    real = path.format(user_id=self.admin.id, session_id="x" * 22)
                    yield method.upper(), real, endpoints[method.upper(), path], operation

    def provoke(self, code: str, token: str | None = None, **request: Any) -> None:
        """Request every route that declares this code, and check that it is the answer."""
        for method, path, _, operation in self.routes(code):
            # Without security, the token is in the body: see test_refresh.
            if operation["security"] or not code.startswith(TOKENS):
                with self.subTest(code, method=method, path=path):
                    self.check(code, self.ask(method, path, operation, token, **request))

    def ask(
        self, method: str, path: str, operation: dict[str, Any], token: str | None, **request: Any
    ) -> TestResponse:
        """Return the response to a request, with an empty object or form if it has a body.

        With a token it is authenticated: on a route for other services, by the client.
        """
        if "requestBody" in operation:
            (kind,) = operation["requestBody"]["content"]
            request = {"data": b"{}" if "json" in kind else b"", "content_type": kind} | request
        headers = bearer(token) if token else {}
        if token and {"client": []} in operation["security"]:
            headers = self.service
        return self.client.open(path, method=method, headers=headers, **request)

    def check(self, code: str, response: TestResponse) -> None:
        """Check that a response has this code, and count it."""
        self.assertEqual(code, response.get_json()["code"])
        self.provoked += 1

    def test_tokens(self) -> None:
        """Every token error occurs on every route that declares it."""
        self.provoke("token_missing")
        self.provoke("token_invalid", "x")
        ended = start_session(self.admin).auth_token
        self.client.post("/auth/logout", headers=bearer(ended))
        self.provoke("session_ended", ended)
        db.session.execute(update(User).values(active=False))
        db.session.commit()
        self.provoke("account_inactive", self.token)
        self.move_clock(4)
        self.provoke("token_expired", self.token)

        self.assertGreater(self.provoked, 50)

    def test_clients(self) -> None:
        """Every route that requires a client refuses a request without its secret."""
        self.provoke("invalid_client")

        self.assertEqual(4, self.provoked)

    def test_https(self) -> None:
        """Plain HTTP is refused on every route that declares it."""
        with mock.patch.dict(os.environ, {"FORCE_HTTPS": "1"}):
            super().setUp()
        self.provoke("https_required", self.token)

        self.assertGreater(self.provoked, 10)

    def test_size(self) -> None:
        """A body over the limit is refused on every route that declares it."""
        self.provoke("payload_too_large", self.token, data=b" " * 70_000)

        self.assertGreater(self.provoked, 5)

    def test_places(self) -> None:
        """Routes that reserve a slot answer 503 when all slots are taken."""
        places = self.app.config["GRANIAN_BLOCKING_THREADS"]
        with self.app.app_context():
            for _ in range(places // 2):
                self.app.extensions["hashing_pool"].enter()
            for _ in range(places // 4):
                self.app.extensions["body_bulkhead"].enter()
            self.provoke("busy", self.token)

        self.assertGreater(self.provoked, 5)

    def test_faults(self) -> None:
        """An exception in a view is a 500, and an unavailable database a 503."""
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        away = OperationalError("SELECT secret", {}, OSError())
        for code, fault in (("internal_error", RuntimeError()), ("database_unavailable", away)):
            for method, path, endpoint, operation in self.routes(code):
                fail = failing(self.app.view_functions[endpoint], fault)
                with (
                    self.subTest(code, method=method, path=path),
                    mock.patch.dict(self.app.view_functions, {endpoint: fail}),
                ):
                    self.check(code, self.ask(method, path, operation, self.token))

        self.assertGreater(self.provoked, 30)


def failing(view: Callable[..., Any], fault: Exception) -> Callable[..., Any]:
    """Return a view that raises `fault`, with the same guards and responses."""

    @functools.wraps(view)
    def fail(**_: object) -> None:
        raise fault

    return fail
