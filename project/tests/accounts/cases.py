"""Shared by the tests of accounts: users with sessions, administration, concurrent requests."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import jwt
from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import administration
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import (
    ORIGIN,
    add_user,
    start_session,
    stored_events,
    stored_sessions,
    stored_users,
)
from project.tests.tokens.claims import session_of

CREDENTIALS = {"email": "test@test.com", "password": "test"}
DAY = 86_400  # seconds
BARRIER_TIMEOUT = 10  # seconds


class SessionsTestCase(BaseTestCase):
    """A test with two users who can log in, while the clock stands still."""

    settings = {"TOKEN_EXPIRATION_SECONDS": 3_600}  # noqa: RUF012  # never changed

    def setUp(self) -> None:
        """Add the users, and stop the clock."""
        super().setUp()
        self.user = add_user("test", "test@test.com", "test")
        self.other = add_user("other", "other@test.com", "test")
        self.move_clock(0)

    def start(self, email: str = "test@test.com") -> str:
        """Log in, and return the auth token of the new session."""
        return str(self.login(email).get_json()["auth_token"])

    def start_from(self, **environ: object) -> dict[str, Any]:
        """Log in from this WSGI environment, and return the row of the new session."""
        response = self.client.post("/auth/login", json=CREDENTIALS, environ_overrides=environ)
        self.assertEqual(200, response.status_code)
        return self.row(response.get_json()["auth_token"])

    def row(self, token: str) -> dict[str, Any]:
        """Return the row of the session that a token names."""
        return next(row for row in stored_sessions() if row["id"] == session_of(token))

    def forge(self, claims: Mapping[str, object], type_: str = "JWT") -> str:
        """Return a token with these claims, signed with the service's own key."""
        key = self.app.config["SECRET_KEY"]
        return jwt.encode(dict(claims), key, algorithm="HS256", headers={"typ": type_})

    def end(self, session_id: str, token: str) -> TestResponse:
        """Return the response to a caller who ends one session."""
        return self.client.delete(f"/auth/sessions/{session_id}", headers=bearer(token))

    def set_active(self, active: bool) -> None:
        """Activate or deactivate the user."""
        administration.set_active("test@test.com", active, ORIGIN)
        db.session.commit()

    def listed(self, token: str) -> list[dict[str, Any]]:
        """Return the sessions in the caller's list."""
        response = self.get("/auth/sessions", token)
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        shown: list[dict[str, Any]] = response.get_json()["data"]["sessions"]
        return shown

    def ids(self, token: str) -> set[str]:
        """Return the IDs of the sessions in the caller's list."""
        return {session["id"] for session in self.listed(token)}

    def assert_live(self, *tokens: str) -> None:
        """Check that each auth token is accepted."""
        for token in tokens:
            self.assertEqual(200, self.get("/auth/status", token).status_code)

    def assert_refused(self, token: str, refusal: type[errors.ServiceError]) -> None:
        """Check that every route that requires a token refuses this one and changes nothing."""
        before = stored_sessions()
        for method, path in (
            ("GET", "/auth/status"),
            ("GET", "/auth/logout"),
            ("POST", "/auth/logout?scope=all"),
            ("GET", "/auth/sessions"),
            ("DELETE", f"/auth/sessions/{'x' * 22}"),
            ("POST", "/auth/password"),
            ("GET", "/auth/totp"),
            ("POST", "/auth/totp"),
            ("POST", "/auth/totp/confirm"),
            ("DELETE", "/auth/totp"),
            ("POST", "/auth/recovery_codes"),
        ):
            with self.subTest(path, method=method):
                response = self.client.open(path, method=method, headers=bearer(token))
                self.assert_error(response, refusal)
        self.assertEqual(before, stored_sessions())


class AdministrationTestCase(BaseTestCase):
    """A test with two users and an admin, all of them logged in."""

    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": 3_600}

    def setUp(self) -> None:
        """Add the users and the admin, and log them in."""
        super().setUp()
        self.ids: dict[str, int] = {}
        self.tokens: dict[str, str] = {}
        for name in ("ada", "bob", "admin"):
            self.add(name, admin=name == "admin")

    def add(self, name: str, **columns: Any) -> None:
        """Add a user with a session."""
        user = add_user(name, f"{name}@test.com", "test", **columns)
        self.ids[name], self.tokens[name] = user.id, start_session(user).auth_token

    def patch(self, name: str, caller: str = "admin", /, **body: Any) -> TestResponse:
        """Return the response to a caller who changes a user."""
        path, headers = f"/users/{self.ids[name]}", bearer(self.tokens[caller])
        return self.app.test_client().patch(path, json=body, headers=headers)

    def change_self(self, name: str = "ada", /, **body: Any) -> TestResponse:
        """Return the response to a user who changes their own account with the right password."""
        return self.patch(name, name, **{"current_password": "test"} | body)

    def delete(self, name: str, caller: str = "admin") -> TestResponse:
        """Return the response to a caller who deletes a user by id."""
        path, headers = f"/users/{self.ids[name]}", bearer(self.tokens[caller])
        return self.app.test_client().delete(path, headers=headers)

    def delete_self(self, name: str = "ada", **body: object) -> TestResponse:
        """Return the response to a user who deletes their own account."""
        body = {"current_password": "test"} | body
        headers = bearer(self.tokens[name])
        return self.app.test_client().delete("/auth/account", json=body, headers=headers)

    def assert_changed(self, response: TestResponse, **expected: object) -> None:
        """Check that a change succeeded, in the response and in the database."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        answer = response.get_json()
        self.assertEqual("User changed.", answer["message"])
        shown = {"id", "username", "email", "active", "admin", "created_at"}
        self.assertEqual(shown, set(answer["data"]))
        self.assertEqual(expected, {name: answer["data"][name] for name in expected})
        stored = self.stored(answer["data"]["id"])
        self.assertEqual(expected, {name: stored[name] for name in expected})

    def stored(self, user_id: int) -> dict[str, Any]:
        """Return a user's row."""
        return next(user for user in stored_users() if user["id"] == user_id)

    def events(self, number: int = 1) -> list[tuple[str, dict[str, Any]]]:
        """Return the kind and the details of the newest events."""
        return [(event["kind"], event["details"]) for event in stored_events()[-number:]]


def at_once(*actions: Callable[[], Any]) -> list[Any]:
    """Run each action in a thread, all starting together, and return their results in order."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], Any]) -> Any:
        barrier.wait(BARRIER_TIMEOUT)
        return action()

    with ThreadPoolExecutor(len(actions)) as threads:
        return list(threads.map(run, actions))
