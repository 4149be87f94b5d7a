"""Shared by the tests of request bodies and of responses."""

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pyotp
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from project import clock, errors
from project.lib import hashing
from project.lib.bulkhead import Bulkhead
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_user, start_session, stored_sessions, stored_users

SECRET = "correct-horse-battery"
USER = {"username": "justatest", "email": "test@test.com", "password": SECRET}
LOGIN = {"email": "test@test.com", "password": SECRET}
PASSWORD = {"current_password": SECRET}
CODE = {"code": "123456"}
# The routes that require a body, and a valid one for each, with what it has to have. A route is a
# path for a POST, or has its method in front.
BODIES: dict[str, dict[str, str]] = {
    "/auth/register": USER,
    "/users": USER,
    "/auth/login": LOGIN,
    "/auth/refresh": {"refresh_token": SECRET},
    "/auth/password": PASSWORD | {"new_password": SECRET},
    "/auth/login/mfa": {"mfa_token": SECRET} | CODE,
    "/auth/totp": PASSWORD,
    "/auth/totp/confirm": CODE,
    "/auth/recovery_codes": PASSWORD,
    "DELETE /auth/totp": PASSWORD,
    "DELETE /auth/account": PASSWORD,
}
ROUTES = list(BODIES)
JSON = "application/json"
NEW_USER_ROUTES = ["/auth/register", "/users"]


class InputTestCase(BaseTestCase):
    """A test that sends request bodies as a logged-in user."""

    def setUp(self) -> None:
        """Log a user in, and stop the clock so that no token expires."""
        super().setUp()
        self.move_clock(0)
        caller = add_user("caller", "caller@test.com", "caller's password")
        self.caller = bearer(start_session(caller).auth_token)

    def send(self, route: str, **request: Any) -> TestResponse:
        """Return the response to a request of the user to a route, as BODIES names it."""
        method, _, path = route.rpartition(" ")
        return self.client.open(path, method=method or "POST", headers=self.caller, **request)

    def assert_refused(self, route: str, fields: set[str], **body: Any) -> None:
        """Check that exactly these fields are named, no secret is echoed and nothing changes."""
        before = stored_users(), stored_sessions()

        response = self.send(route, **body)

        data = self.assert_error(response, errors.InvalidPayload)
        self.assertEqual(fields, set(data["errors"]))
        for reason in data["errors"].values():
            self.assertIsInstance(reason, str)
            self.assertTrue(reason)
        self.assertNotIn(SECRET, response.get_data(as_text=True))
        self.assertEqual(before, (stored_users(), stored_sessions()))

    def send_raw(self, route: str, body: bytes, content_type: str | None = JSON) -> TestResponse:
        """Return the response to a body given as bytes."""
        return self.send(route, data=body, content_type=content_type)

    def assert_registered(self, **changes: object) -> dict[str, Any]:
        """Register USER with these changes, and return the stored row."""
        response = self.client.post("/auth/register", json=USER | changes)

        self.assertEqual(201, response.status_code, response.get_data(as_text=True))
        return stored_users()[-1]


SESSION = f"/auth/sessions/{'x' * 22}"
AUTH = [
    *("register", "login", "refresh", "logout", "status", "password", "account", "sessions"),
    *("login/mfa", "totp", "totp/confirm", "recovery_codes", "no"),
]
HEALTH = ["/health/live", "/health/ready"]
USERS = ["/users", "/users/1", "/users/1/totp"]
PATHS = ["/ping", *HEALTH, *USERS, *(f"/auth/{word}" for word in AUTH), SESSION]
ELSEWHERE = ["/", "/auth", "/nothing", "/users/", "/auth/sessions/"]
METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"]


class ResponsesTestCase(BaseTestCase):
    """A test that looks at responses of every kind."""

    def setUp(self) -> None:
        """Stop the clock, so that no token expires."""
        super().setUp()
        self.move_clock(0)

    def every_response(self) -> list[tuple[str, TestResponse]]:
        """Return a named response of every kind: each route, method, refusal and server error."""
        return list(self._every_response())

    def _every_response(self) -> Iterator[tuple[str, TestResponse]]:
        user = add_user("other", "other@test.com", SECRET)
        for path in [*PATHS, *ELSEWHERE, f"/users/{user.id}"]:
            for method in METHODS:
                yield f"{method} {path}", self.client.open(path, method=method)
        registered = self.client.post("/auth/register", json=USER)
        yield "registered", registered
        token = registered.get_json()["auth_token"]
        users = ["/users?limit=1", "/users?limit=0", "/users/blah", "/users/%ff", "/users/1/2"]
        own = ["//status", "/status", "/sessions", "/logout?scope=x", "/logout"]
        for path in [*users, *(f"/auth{path}" for path in own)]:
            yield f"as a user: {path}", self.get(path, token)
        yield "bad token", self.get("/auth/status", "invalid")
        login = self.login(password=SECRET)
        yield "login", login
        yield "wrong login", self.login()
        yield from self._session_responses(login.get_json())
        yield from self._code_responses()
        yield "taken", self.client.post("/auth/register", json=USER)
        yield "email taken", self.client.post("/users", json=USER | {"username": "another"})
        yield "added", self.client.post("/users", json=USER | {"username": "a", "email": "a@b.c"})
        yield "broken", self.client.post("/auth/login", data=b"{", content_type="application/json")
        yield "large", self.client.post("/auth/login", data=b"x" * 70_000)
        with mock.patch("project.accounts.directory.find", side_effect=ValueError("secret-text")):
            yield "fault", self.get("/users/1")
        with mock.patch("project.accounts.directory.find", side_effect=RecursionError):
            yield "fault of another kind", self.get("/users/1")
        with mock.patch(
            "project.lib.database.fetch_all", side_effect=OperationalError("", {}, OSError())
        ):
            yield "no database", self.get("/users")
        with self.app.app_context():
            pool: hashing.HashingPool = self.app.extensions["hashing_pool"]
            for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"]):
                pool.enter()
            yield "busy", self.login()
        with self.app.app_context(), mock.patch("project.api.requests.BODY_SLOT_TIMEOUT", 0.0):
            slots: Bulkhead = self.app.extensions["body_bulkhead"]
            for _ in range(2 * self.app.config["GRANIAN_BLOCKING_THREADS"]):
                slots.enter()
            yield "no body slot", self.client.post("/auth/refresh", json={})

    def _session_responses(self, pair: dict[str, Any]) -> Iterator[tuple[str, TestResponse]]:
        post = partial(self.client.post, headers=bearer(pair["auth_token"]))
        change = {"current_password": SECRET, "new_password": SECRET}
        yield "changed", post("/auth/password", json=change)
        yield "no change", post("/auth/password", json=change | {"current_password": "wrong"})
        first = {"refresh_token": pair["refresh_token"]}
        refreshed = post("/auth/refresh", json=first)
        second = {"refresh_token": refreshed.get_json()["refresh_token"]}
        yield "refreshed", refreshed
        for name, body in {"again": second, "reused": first, "over": second}.items():
            yield name, post("/auth/refresh", json=body)
        headers = bearer(self.login(password=SECRET).get_json()["auth_token"])
        own = self.client.get("/auth/sessions", headers=headers).get_json()["data"]["sessions"][0]
        for path in (SESSION, f"/auth/sessions/{own['id']}"):
            yield path, self.client.delete(path, headers=headers)

    def _code_responses(self) -> Iterator[tuple[str, TestResponse]]:
        """Yield the responses to a user who sets an authenticator up and turns it off."""
        token = self.login(password=SECRET).get_json()["auth_token"]
        post, delete = (
            partial(self.client.open, method=method, headers=bearer(token))
            for method in ("POST", "DELETE")
        )
        begun = post("/auth/totp", json=PASSWORD)
        yield "begun", begun
        code = {"code": pyotp.TOTP(begun.get_json()["data"]["secret"]).at(clock.utcnow())}
        yield "wrong first code", post("/auth/totp/confirm", json={"code": "0" * 24})
        confirmed = post("/auth/totp/confirm", json=code)
        yield "confirmed", confirmed
        recovery_codes = confirmed.get_json()["data"]["recovery_codes"]
        yield "exists", post("/auth/totp", json=PASSWORD)
        yield "state", self.get("/auth/totp", token)
        refused = self.login(password=SECRET)
        yield "code needed", refused
        mfa_token = {"mfa_token": refused.get_json()["mfa_token"]}
        yield "used code", post("/auth/login/mfa", json=mfa_token | code)
        yield "second step", post("/auth/login/mfa", json=mfa_token | {"code": recovery_codes[0]})
        yield "no mfa_token", post("/auth/login/mfa", json={"mfa_token": token} | code)
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=()):
            yield "no keys", post("/auth/login", json=LOGIN | code)
        with mock.patch.dict(self.app.config, STEP_UP_SECONDS=0):
            yield "step-up", delete("/auth/totp", json=PASSWORD)
        yield "new recovery codes", post("/auth/recovery_codes", json=PASSWORD)
        yield "off", delete("/auth/totp", json=PASSWORD)
        yield "not on", delete("/auth/totp", json=PASSWORD)
        with mock.patch.dict(self.app.config, REQUIRE_MFA="all"):
            yield "has to enrol", self.get("/auth/status", token)
